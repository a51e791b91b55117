# ruff: noqa: D100
# Stands in for collections.abc, as far as the modules go that the plugin shares with the agent: of what JSON makes,
# only a dict is a Mapping.
Mapping = dict
