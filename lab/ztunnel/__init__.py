"""A stand-in for ztunnel: speaks ZDS as the real one does, and as no real one should; `python -m lab.ztunnel --help`.

Nothing of the agent is in it but the generated messages of the protocol.
"""
