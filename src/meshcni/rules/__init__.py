"""Packet rules as values: built, rendered, parsed, compared and put into words, without touching a kernel."""
