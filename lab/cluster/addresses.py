"""Who has which address: every cluster uses the same ones, because no two clusters share a network."""

from __future__ import annotations

from dataclasses import dataclass

API_SERVER = "172.30.0.10"
API_SERVER_V6 = "fd00:30::10"
API_PORT = 6443
LAN_V4, LAN_V6 = "172.30.0.0/24", "fd00:30::/64"
SERVICES_V4, SERVICES_V6 = "10.96.0.0/16", "fd00:96::/112"
FIRST_SERVICE = "10.96.0.1"  # the API server's own, `kubernetes` in namespace default
CLUSTER_DNS = "10.96.0.10"  # nobody answers there
PODS = "10.244.0.0/16,fd00:244::/32"
NOWHERE_V4, NOWHERE_V6 = "192.0.2.1", "2001:db8::1"  # for documentation (RFC 5737, RFC 3849): no node has a route


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """The addresses of node number 1, 2, …; the link's address stays over reboots, as that of a network card does."""

    number: int

    @property
    def v4(self) -> str:
        """Its IPv4 address in the cluster's LAN."""
        return f"172.30.0.{10 + self.number}"

    @property
    def v6(self) -> str:
        """Its IPv6 address in the cluster's LAN."""
        return f"fd00:30::{10 + self.number}"

    @property
    def link(self) -> str:
        """Its link's address."""
        return f"02:00:00:00:30:{10 + self.number:02x}"

    @property
    def pods_v4(self) -> str:
        """The subnet of its pods."""
        return f"10.244.{self.number}.0/24"

    @property
    def pods_v6(self) -> str:
        """The IPv6 subnet of its pods."""
        return f"fd00:244:{self.number}::/64"
