"""Native nftables: our own tables, replaced whole in one transaction, without starting a process."""

from __future__ import annotations

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host.backends.libnftables import Nft
from meshcni.rules import nft, plan
from meshcni.rules.model import Backend, Ruleset

VARIANT = "nftables"


class NftablesBackend:
    """Programs `inet istio-proxy-*` tables through libnftables; see PacketBackend."""

    variant = VARIANT
    kind = Backend.NFTABLES
    processes = 0

    def __init__(self, nft_here: Nft | None = None) -> None:
        self._nft = nft_here or Nft()

    def holds_ours(self) -> bool:
        """Tell whether a table of ours exists."""
        return bool(self._tables())

    def apply(self, ruleset: Ruleset) -> bool:
        """Replace our tables by `ruleset`, unless they already are what it asks for."""
        transaction = nft.render(ruleset)
        if not self.holds_ours():
            # A deletion makes the kernel wait for all processors (10 ms), so none where there is nothing to delete.
            transaction = transaction.removeprefix(nft.render_removal())
        elif not self.drift(ruleset):
            return False
        try:
            self._nft.change(transaction)
        except ApplyError:
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
        return plan.drift(ruleset, nft.parse(self._own_listing()))

    def listing(self) -> str:
        """Return the whole ruleset of the namespace."""
        return self._nft.show("list ruleset")

    def remove(self, known: Ruleset | None = None) -> None:
        """Delete our tables, if there are any."""
        if self.holds_ours():
            self._nft.change(nft.render_removal())

    def _own_listing(self) -> str:
        # One call for each: nft 1.0.6 finds only the last one of several tables to list.
        return "".join(self._nft.show(f"list table inet {table}") for table in self._tables())

    def _tables(self) -> dict[str, tuple[str, ...]]:
        """Return our tables and their chains."""
        return {
            table: chains
            for (family, table), chains in self._nft.chains().items()
            if family == "inet" and table.startswith(istio.NFT_TABLE_PREFIX)
        }
