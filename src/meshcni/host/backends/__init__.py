"""Who programs packet rules: native nftables, iptables in its nft and its legacy variant, and a fake for tests.

A backend acts on the network namespace of the thread that calls it, and on what is ours there for one purpose.
"""

from __future__ import annotations

from typing import Protocol

from meshcni.rules.model import Family, Ruleset
from meshcni.rules.plan import Drift, Observation


class PacketBackend(Protocol):
    """One way of programming packet rules; one object serves one operation in one network namespace."""

    @property
    def variant(self) -> str:
        """Its name in logs, metrics and `Applied`: `nftables`, `nft`, `legacy` or `fake`."""

    @property
    def processes(self) -> int:
        """How many processes it has started so far."""

    def holds_ours(self) -> bool:
        """Tell whether rules of ours are in the kernel; starts no process and changes nothing."""

    def own_names(self) -> tuple[str, ...]:
        """Name the chains (of nft the tables) of ours that are in the kernel; starts no process and changes nothing."""

    def apply(self, ruleset: Ruleset, *, keep_on_failure: bool = False) -> bool:
        """Make the kernel hold `ruleset` and nothing else of ours; tell whether anything had to be done.

        Raises ApplyError. Then nothing of ours stays in this backend, or with `keep_on_failure` everything does that
        was not replaced.
        """

    def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
        """Name the chains of `ruleset` that the kernel does not have; starts no process (the check after an apply)."""

    def drift(self, ruleset: Ruleset) -> tuple[Drift, ...]:
        """Compare what the kernel holds, rule by rule and in order, with `ruleset`."""

    def observed(self, ruleset: Ruleset) -> Observation:
        """Return what the kernel holds where `ruleset` has something to say, for comparisons of any kind."""

    def listing(self) -> str:
        """Return the kernel's rules, ours and others', as text without counters: for people."""

    def release(self) -> None:
        """Empty our chains of table nat, so that no new connection is translated. Raises ApplyError."""

    def remove(self, known: Ruleset | None = None) -> None:
        """Take everything of ours out; nothing there is fine. Raises ApplyError.

        `known` is what was applied; with iptables it recognises entries that do not look like ours (an interface's).
        """


def families_of(ruleset: Ruleset) -> tuple[Family, ...]:
    """Return the families of `ruleset` in the order in which they are programmed."""
    return tuple(family for family in Family if family in ruleset.families)
