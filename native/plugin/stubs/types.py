# ruff: noqa: D100
# Stands in for types, as far as the modules go that the plugin shares with the agent.
MappingProxyType = type(type.__dict__)
