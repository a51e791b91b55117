"""The host's address sets: which pod addresses are exempt when the kubelet probes them, each with its pod's UID.

Two ways to keep them, as the node's rules are iptables' or nft's. Every call looks at the network namespace of the
calling thread and remembers nothing of it, so one object serves any number of threads and survives whatever others do
to the sets between two calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from meshcni.errors import ApplyError
from meshcni.host.ipsetprobes import NO_COMMENTS, IpsetProbeSet
from meshcni.host.nftprobes import NFT_TABLE, NftProbeSet
from meshcni.host.probeentries import SET_NAMES, IpAddress, by_family, checked
from meshcni.rules.model import Family

__all__ = ["NFT_TABLE", "NO_COMMENTS", "SET_NAMES", "FakeProbeSet", "IpsetProbeSet", "NftProbeSet", "ProbeSet"]


class ProbeSet(Protocol):
    """The address sets of one node: an IPv4 one and, when IPv6 is among the families, an IPv6 one.

    An IPv4-mapped address is the IPv4 address in it. An address of a family that is off is skipped without a word, as
    there is no rule that would look for it. Failures are ApplyErrors.
    """

    variant: str

    @property
    def warning(self) -> str:
        """What is not as it should be but works, in words; empty when all is well. `ensure` finds it out."""

    def ensure(self) -> None:
        """Make the sets unless they are there; entries of an earlier agent, also of the original, stay."""

    def entries(self) -> dict[IpAddress, str]:
        """Return every address with its comment as it is: a pod's UID, or whatever somebody else wrote, or nothing."""

    def put(self, owners: Mapping[IpAddress, str], there: Mapping[IpAddress, str] | None = None) -> None:
        """Put addresses in, or give those that are there their new owner's UID; makes missing sets.

        `there` is what the caller believes to be in the sets, which saves looking; wrong beliefs cost time, except that
        an address believed to have the right owner is left alone. Raises RulesError for what is no UID.
        """

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """Take addresses out, whoever owns them; what is not there is fine."""

    def destroy(self) -> None:
        """Remove the sets of both families. One that a rule still looks into makes an ApplyError that says so."""


class FakeProbeSet:
    """Sets without a kernel, for tests of what is above; passes the contract test of the real ones.

    `held` is what is in them, `refuse` the message of the ApplyError that every change raises, `used_by` names what
    looks into the sets; empty for none.
    """

    variant = "fake"
    warning = ""

    def __init__(self, families: frozenset[Family], refuse: str = "", used_by: str = "") -> None:
        self.held: dict[IpAddress, str] = {}
        self.refuse = refuse
        self.used_by = used_by
        self._families = families

    def ensure(self) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()

    def entries(self) -> dict[IpAddress, str]:
        """See ProbeSet."""
        return {address: comment for address, comment in self.held.items() if Family(address.version) in self._families}

    def put(self, owners: Mapping[IpAddress, str], there: Mapping[IpAddress, str] | None = None) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()
        for own in by_family(checked(owners), self._families).values():
            self.held |= own

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()
        for own in by_family(dict.fromkeys(addresses, ""), self._families).values():
            for address in own:
                self.held.pop(address, None)

    def destroy(self) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()
        if self.used_by:
            raise ApplyError(f"the sets are in use by {self.used_by}")
        self.held = {}

    def _perhaps_refuse(self) -> None:
        if self.refuse:
            raise ApplyError(self.refuse)
