"""The hardened image: what is in it, as data, and the builder that makes it from packages of a lock."""
