"""Native nftables: our own tables, replaced whole in one transaction, without starting a process."""

from __future__ import annotations

from meshcni.errors import ApplyError
from meshcni.host.backends.libnftables import Nft
from meshcni.rules import nft, plan
from meshcni.rules.model import BUILT_IN_CHAINS, Backend, Purpose, Ruleset, TableName
from meshcni.rules.nft_layout import LAYOUTS, own_tables
from meshcni.rules.nft_rule import chain_name

VARIANT = "nftables"


class NftablesBackend:
    """Programs our tables of family inet through libnftables; see PacketBackend.

    On the host our table is shared with the address sets: there only chains come and go.
    """

    variant = VARIANT
    kind = Backend.NFTABLES
    processes = 0

    def __init__(self, nft_here: Nft | None = None, purpose: Purpose = Purpose.SIDECAR) -> None:
        self._nft = nft_here or Nft()
        self._purpose = purpose
        self._is_shared = LAYOUTS[purpose].is_shared

    def holds_ours(self) -> bool:
        """Tell whether a table of ours exists."""
        return bool(self._tables())

    def own_names(self) -> tuple[str, ...]:
        """Name our tables."""
        return tuple(self._tables())

    def apply(self, ruleset: Ruleset, *, keep_on_failure: bool = False) -> bool:
        """Replace our tables by `ruleset`, unless they already are what it asks for."""
        transaction = nft.render(ruleset)
        present = self._tables()
        if not present:
            # A deletion makes the kernel wait for all processors (10 ms), so none where there is nothing to delete.
            transaction = transaction.removeprefix(nft.render_removal(self._purpose))
        elif not self.drift(ruleset):
            return False
        try:
            self._nft.change(transaction + nft.render_leftovers(ruleset, present))
        except ApplyError:
            if not keep_on_failure:
                self.remove()
            raise
        return True

    def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
        """Name the chains of `ruleset` that do not exist."""
        present = self._tables()
        return tuple(
            f"{table} {chain}"
            for table, chains in nft.expected(ruleset).tables.items()
            for chain in chains
            if chain not in present.get(table, ())
        )

    def drift(self, ruleset: Ruleset) -> tuple[plan.Drift, ...]:
        """Compare our tables with `ruleset`."""
        listed = nft.canonical(self._own_listing())
        if listed == nft.listing(ruleset):
            return ()
        return plan.drift(ruleset, nft.parse(listed, self._purpose))

    def observed(self, ruleset: Ruleset) -> plan.Observation:
        """Return our tables."""
        return nft.parse(self._own_listing(), self._purpose)

    def listing(self) -> str:
        """Return the whole ruleset of the namespace."""
        return self._nft.show("list ruleset")

    def release(self) -> None:
        """Empty our nat chains that hang on no hook."""
        table = LAYOUTS[self._purpose].table_name(TableName.NAT)
        bases = {chain_name(name) for name in BUILT_IN_CHAINS}
        chains = [chain for chain in self._tables().get(table, ()) if chain not in bases]
        if chains:
            self._nft.change("".join(f"flush chain inet {table} {chain}\n" for chain in chains))

    def remove(self, known: Ruleset | None = None) -> None:
        """Delete our tables, or our chains in a shared one, if there are any."""
        if present := self._tables():
            self._nft.change(nft.render_removal(self._purpose, present))

    def _own_listing(self) -> str:
        # One call for each: nft 1.0.6 finds only the last one of several tables to list. Of a shared table only the
        # chains, because the sets in it can have an element for each pod of the node.
        if self._is_shared:
            names = [f"chain inet {table} {chain}" for table, chains in self._tables().items() for chain in chains]
        else:
            names = [f"table inet {table}" for table in self._tables()]
        return "".join(self._nft.show(f"list {name}") for name in names)

    def _tables(self) -> dict[str, tuple[str, ...]]:
        """Return our tables and their chains; a shared table without chains holds nothing of ours."""
        listed = self._nft.chains()
        present = {table: listed["inet", table] for table in own_tables(self._purpose) if ("inet", table) in listed}
        return {table: chains for table, chains in present.items() if chains or not self._is_shared}
