"""`install-cni`: the node agent, one asyncio process."""
