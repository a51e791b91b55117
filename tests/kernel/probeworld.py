"""A node with address sets: the sets of one variant in a namespace of the test's own, and names for what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from tests.kernel.world import Netns

from meshcni.host.probeset import FakeProbeSet, IpsetProbeSet, NftProbeSet, ProbeSet
from meshcni.rules.model import Family

V4, BOTH = frozenset({Family.V4}), frozenset(Family)
UID = "6b3f7c1e-5d0a-4c55-9f4e-2f1f6a7b8c9d"
OTHER_UID = "0c2d9a10-1111-4222-8333-944445555666"
STATIC_UID = "d41d8cd98f00b204e9800998ecf8427e"
ONE, TWO = ip_address("10.77.0.2"), ip_address("10.77.0.3")
SIX = ip_address("fd00:77::2")
MAPPED = IPv6Address("::ffff:10.77.0.2")


@dataclass
class Host:
    """A node's network namespace and the sets of one variant in it."""

    netns: Netns
    variant: str

    def sets(self, families: frozenset[Family] = BOTH) -> ProbeSet:
        """A fresh object, as a new agent has it; the fake's world is the object itself."""
        made: ProbeSet = {"ipset": IpsetProbeSet, "nft": NftProbeSet, "fake": FakeProbeSet}[self.variant](families)
        return Inside(self.netns, made)

    def ipset(self, *arguments: str) -> str:
        return self.netns.shell("ipset", *arguments)

    def nft(self, command: str) -> str:
        return self.netns.shell("nft", "-f", "-", text=command + "\n")


class Inside:
    """Calls the methods of a ProbeSet in a namespace."""

    def __init__(self, netns: Netns, inner: ProbeSet) -> None:
        self._netns = netns
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *arguments: self._netns.call(lambda: value(*arguments))
