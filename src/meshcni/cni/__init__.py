"""The CNI contract: what a runtime sends, what it expects back, and the conf files it reads."""
