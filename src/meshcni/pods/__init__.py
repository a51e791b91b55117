"""Decisions about pods, as pure functions: who is in the mesh, and with which parameters."""
