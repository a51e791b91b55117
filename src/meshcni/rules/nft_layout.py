"""How our nft tables are laid out for each purpose: their names, base chains, and the order of declarations.

Upstream: tools/istio-nftables/pkg/{constants,builder}, cni/pkg/nftables/nftables.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshcni import istio
from meshcni.rules.model import Purpose, TableName

TABLES = (TableName.NAT, TableName.MANGLE, TableName.RAW)

BaseChains = Mapping[tuple[TableName, str], tuple[str, str, int]]

# Type, hook and priority of base chains. Priorities are numbers, because 1.0.6 refuses `dstnat` in an output chain.
_POD_BASE_CHAINS: BaseChains = {
    (TableName.NAT, "PREROUTING"): ("nat", "prerouting", -100),
    (TableName.NAT, "OUTPUT"): ("nat", "output", -100),
    (TableName.MANGLE, "PREROUTING"): ("filter", "prerouting", -150),
    (TableName.MANGLE, "OUTPUT"): ("route", "output", -150),
    (TableName.RAW, "PREROUTING"): ("filter", "prerouting", -300),
    (TableName.RAW, "OUTPUT"): ("filter", "output", -300),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The tables of one purpose.

    `declaration_order` is the order in which the original declares chains, which is the order of the kernel's listing.
    `is_shared` says that a table holds what is not of the rules (address sets) and therefore is never deleted, and that
    whatever hangs on no chain in it is none of our business.
    """

    prefix: str
    tables: tuple[TableName, ...]
    base_chains: BaseChains
    declaration_order: Mapping[TableName, tuple[str, ...]]
    is_shared: bool = False

    def table_name(self, name: TableName) -> str:
        """Return our nft table that stands for an iptables table: `istio-proxy-nat`."""
        return self.prefix + name.value

    @property
    def table_names(self) -> tuple[str, ...]:
        """The names of all our tables, in the order of declaration."""
        return tuple(map(self.table_name, self.tables))


_AMBIENT_CHAINS = ("PREROUTING", "OUTPUT", "ISTIO_PRERT", "ISTIO_OUTPUT")

LAYOUTS: Mapping[Purpose, Layout] = {
    Purpose.SIDECAR: Layout(
        istio.NFT_TABLE_PREFIX,
        TABLES,
        _POD_BASE_CHAINS,
        {
            TableName.NAT: (
                "PREROUTING",
                "OUTPUT",
                "ISTIO_INBOUND",
                "ISTIO_REDIRECT",
                "ISTIO_IN_REDIRECT",
                "ISTIO_OUTPUT",
                "ISTIO_OUTPUT_DNS",
            ),
            TableName.MANGLE: ("PREROUTING", "OUTPUT", "ISTIO_DIVERT", "ISTIO_TPROXY", "ISTIO_INBOUND", "ISTIO_DROP"),
            TableName.RAW: ("PREROUTING", "OUTPUT", "ISTIO_INBOUND", "ISTIO_OUTPUT_DNS"),
        },
    ),
    Purpose.AMBIENT_POD: Layout(
        istio.AMBIENT_NFT_TABLE_PREFIX, TABLES, _POD_BASE_CHAINS, dict.fromkeys(TABLES, _AMBIENT_CHAINS)
    ),
    Purpose.AMBIENT_HOST: Layout(
        istio.AMBIENT_NFT_TABLE_PREFIX,
        (TableName.NAT,),
        {(TableName.NAT, "POSTROUTING"): ("nat", "postrouting", 100)},
        {TableName.NAT: ("POSTROUTING",)},
        is_shared=True,
    ),
}

# In a pod that is to be ambient, what an earlier sidecar left is ours too: it would go on capturing.
_LEFTOVERS: Mapping[Purpose, tuple[str, ...]] = {
    Purpose.SIDECAR: (),
    Purpose.AMBIENT_POD: LAYOUTS[Purpose.SIDECAR].table_names,
    Purpose.AMBIENT_HOST: (),
}


def own_tables(purpose: Purpose) -> tuple[str, ...]:
    """Return every table of family inet that is ours in a namespace of `purpose`, those to be deleted last."""
    return (*LAYOUTS[purpose].table_names, *_LEFTOVERS[purpose])
