"""A packet backend without a kernel, for tests of what is above: it keeps the rule set it was given."""

from __future__ import annotations

from dataclasses import replace

from meshcni.errors import ApplyError
from meshcni.rules import nft, plan
from meshcni.rules.model import BUILT_IN_CHAINS, Backend, Jump, Ruleset, Table, TableName


class FakeBackend:
    """Holds one rule set, as one network namespace would; passes the contract test of the real backends.

    `refuse` is the message of the ApplyError that the next `apply` raises, empty for none.
    """

    variant = "fake"
    kind = Backend.NFTABLES
    processes = 0

    def __init__(self, refuse: str = "") -> None:
        self.held: Ruleset | None = None
        self.refuse = refuse

    def holds_ours(self) -> bool:
        """Tell whether a rule set is held."""
        return self.held is not None

    def own_names(self) -> tuple[str, ...]:
        """Name the tables that are held."""
        return tuple(table.name.value for table in (self.held.tables if self.held else ()))

    def apply(self, ruleset: Ruleset, *, keep_on_failure: bool = False) -> bool:
        """Hold `ruleset`, or refuse it and hold nothing, or with `keep_on_failure` what was held before."""
        refusal = self.refuse or _dangling_jump(ruleset)
        if refusal:
            self.held = self.held if keep_on_failure else None
            raise ApplyError(refusal)
        changed = self.held != ruleset
        self.held = ruleset
        return changed

    def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
        """Name the chains of `ruleset` that are not held."""
        held = {(table.name, chain.name) for table in (self.held.tables if self.held else ()) for chain in table.chains}
        wanted = [(table.name, chain.name) for table in ruleset.tables for chain in table.chains]
        return tuple(f"{table.value} {chain}" for table, chain in wanted if (table, chain) not in held)

    def drift(self, ruleset: Ruleset) -> tuple[plan.Drift, ...]:
        """Compare what is held with `ruleset`, by way of the listing that nft would print."""
        return plan.drift(ruleset, nft.parse(self.listing()))

    def observed(self, ruleset: Ruleset) -> plan.Observation:
        """Return what is held, by way of the listing that nft would print."""
        return nft.parse(self.listing())

    def listing(self) -> str:
        """Return what nft would list."""
        return nft.listing(self.held) if self.held else ""

    def release(self) -> None:
        """Hold the nat chains that hang on no hook without their rules."""
        if self.held is not None:
            self.held = replace(self.held, tables=tuple(map(_without_translation, self.held.tables)))

    def remove(self, known: Ruleset | None = None) -> None:
        """Hold nothing."""
        self.held = None


def _without_translation(table: Table) -> Table:
    if table.name is not TableName.NAT:
        return table
    chains = (chain if chain.name in BUILT_IN_CHAINS else replace(chain, rules=()) for chain in table.chains)
    return replace(table, chains=tuple(chains))


def _dangling_jump(ruleset: Ruleset) -> str:
    """Refuse what every kernel refuses: a jump into a chain that the table does not have."""
    for table in ruleset.tables:
        names = {chain.name for chain in table.chains}
        for chain in table.chains:
            for rule in chain.rules:
                if isinstance(rule.action, Jump) and rule.action.chain not in names:
                    return f"chain {rule.action.chain} of table {table.name.value} does not exist"
    return ""
