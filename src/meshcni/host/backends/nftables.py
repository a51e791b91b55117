"""Native nftables: our own tables, replaced whole in one transaction, without starting a process."""

from __future__ import annotations

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host.backends import libnftables
from meshcni.rules import nft, plan
from meshcni.rules.model import Backend, Ruleset

VARIANT = "nftables"


class NftablesBackend:
    """Programs `inet istio-proxy-*` tables through libnftables; see PacketBackend."""

    variant = VARIANT
    kind = Backend.NFTABLES
    processes = 0

    def holds_ours(self) -> bool:
        """Tell whether a table of ours exists."""
        return bool(_our_tables())

    def apply(self, ruleset: Ruleset) -> bool:
        """Replace our tables by `ruleset`, unless they already are what it asks for."""
        if self.holds_ours() and not self.drift(ruleset):
            return False
        try:
            libnftables.run(nft.render(ruleset))
        except ApplyError:
            self.remove()
            raise
        return True

    def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
        """Name the chains of `ruleset` that do not exist."""
        present = _our_tables()
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
        return libnftables.run("list ruleset")

    def remove(self) -> None:
        """Delete our tables, if there are any."""
        if self.holds_ours():
            libnftables.run(nft.render_removal())

    def _own_listing(self) -> str:
        commands = "".join(f"list table inet {table}\n" for table in _our_tables())
        return libnftables.run(commands) if commands else ""


def _our_tables() -> dict[str, tuple[str, ...]]:
    """Return our tables and their chains; none when the kernel has no nftables at all."""
    try:
        found = libnftables.chains()
    except libnftables.NftUnavailableError:
        return {}
    return {
        table: chains
        for (family, table), chains in found.items()
        if family == "inet" and table.startswith(istio.NFT_TABLE_PREFIX)
    }
