"""meshcni: an Istio-compatible CNI node agent."""

__version__ = "0.1.0"
