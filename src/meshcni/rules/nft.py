"""A rule set as one nft transaction, and the kernel's listing of our tables read back.

Three tables of family inet are ours alone. A transaction deletes and builds all three anew, so whatever stood in them
before, an earlier parameter's table included, is gone in the same instant (nft 1.0.6 has no `destroy`; `add` before
`delete` makes the deletion work on a clean kernel). Upstream: tools/istio-nftables/pkg.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from meshcni import istio
from meshcni.errors import RulesError
from meshcni.rules.model import BUILT_IN_CHAINS, Chain, Ruleset, Table, TableName
from meshcni.rules.nft_rule import chain_name, listed, written
from meshcni.rules.remember import remembered

TABLES = (TableName.NAT, TableName.MANGLE, TableName.RAW)

# Type, hook and priority of base chains. Priorities are numbers, because 1.0.6 refuses `dstnat` in an output chain.
BASE_CHAINS: dict[tuple[TableName, str], tuple[str, str, int]] = {
    (TableName.NAT, "PREROUTING"): ("nat", "prerouting", -100),
    (TableName.NAT, "OUTPUT"): ("nat", "output", -100),
    (TableName.MANGLE, "PREROUTING"): ("filter", "prerouting", -150),
    (TableName.MANGLE, "OUTPUT"): ("route", "output", -150),
    (TableName.RAW, "PREROUTING"): ("filter", "prerouting", -300),
    (TableName.RAW, "OUTPUT"): ("filter", "output", -300),
}

# Chains in the order in which the original declares them, which is the order of the kernel's listing.
DECLARATION_ORDER: dict[TableName, tuple[str, ...]] = {
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
}


def table_name(name: TableName) -> str:
    """Return our nft table that stands for an iptables table: `istio-proxy-nat`."""
    return istio.NFT_TABLE_PREFIX + name.value


@remembered
def render(ruleset: Ruleset, *, with_whys: bool = False) -> str:
    """Return the transaction that replaces whatever is in our tables by `ruleset`.

    `with_whys` puts the reason of each rule as a comment before it.
    """
    lines = [render_removal().rstrip("\n")]
    for table in _in_order(ruleset):
        name = table_name(table.name)
        lines.append(f"add table inet {name}")
        lines += [f"add chain inet {name} {chain_name(chain.name)}{_hook(table, chain)}" for chain in table.chains]
        for chain in table.chains:
            lines += _additions(name, chain, with_whys)
    return "\n".join(lines) + "\n"


def _additions(table: str, chain: Chain, with_whys: bool) -> Iterator[str]:
    said = ""
    for rule in chain.rules:
        if with_whys and rule.why != said:
            said = rule.why
            yield f"# {said}"
        yield f"add rule inet {table} {chain_name(chain.name)} {written(rule)}"


def render_removal() -> str:
    """Return the transaction that leaves nothing of ours."""
    return "".join(f"add table inet {table_name(t)}\ndelete table inet {table_name(t)}\n" for t in TABLES)


def _in_order(ruleset: Ruleset) -> list[Table]:
    """Return tables and chains in declaration order."""
    tables = {table.name: table for table in ruleset.tables}
    return [
        Table(name, tuple(sorted(tables[name].chains, key=lambda chain: DECLARATION_ORDER[name].index(chain.name))))
        for name in TABLES
        if name in tables
    ]


def _hook(table: Table, chain: Chain) -> str:
    if chain.name not in BUILT_IN_CHAINS:
        return ""
    kind, hook, priority = BASE_CHAINS[table.name, chain.name]
    return f" {{ type {kind} hook {hook} priority {priority} ; }}"


# --- the listing ------------------------------------------------------------------------------------------------------

# Priorities that the listing gives a name (`dstnat` in prerouting only: nft 1.0.6 has no name for -100 elsewhere).
_PRIORITY_NAMES = {("prerouting", -100): "dstnat", ("prerouting", -150): "mangle", ("output", -150): "mangle"} | {
    (hook, -300): "raw" for hook in ("prerouting", "output")
}


@dataclass(frozen=True, slots=True)
class ObservedChain:
    """A chain as listed: `header` is its `type ... policy ...;` line, empty for one that hangs on no hook."""

    header: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ObservedTables:
    """Our tables as listed, counters set back: table name, then chain name in listing order, then the chain.

    `foreign` are statements in our tables that belong to no chain (sets, maps, flags): never ours.
    """

    tables: Mapping[str, Mapping[str, ObservedChain]] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()


@remembered
def expected(ruleset: Ruleset) -> ObservedTables:
    """Return our tables as `parse` will find them."""
    return ObservedTables(
        {
            table_name(table.name): {
                chain_name(chain.name): ObservedChain(_listed_hook(table, chain), tuple(map(listed, chain.rules)))
                for chain in table.chains
            }
            for table in _in_order(ruleset)
        }
    )


def listing(ruleset: Ruleset) -> str:
    """Return what `nft list ruleset` prints of our tables, with counters without their numbers."""
    lines = []
    for table, chains in expected(ruleset).tables.items():
        blocks = []
        for name, chain in chains.items():
            content = [line for line in (chain.header, *chain.rules) if line]
            blocks.append("".join([f"\tchain {name} {{\n", *(f"\t\t{line}\n" for line in content), "\t}\n"]))
        lines.append(f"table inet {table} {{\n" + "\n".join(blocks) + "}\n")
    return "".join(lines)


def _listed_hook(table: Table, chain: Chain) -> str:
    if chain.name not in BUILT_IN_CHAINS:
        return ""
    kind, hook, priority = BASE_CHAINS[table.name, chain.name]
    return f"type {kind} hook {hook} priority {_PRIORITY_NAMES.get((hook, priority), priority)}; policy accept;"


_TABLE_LINE = re.compile(r"table (?P<table>\S+ \S+) \{(?: # handle \d+)?")
_CHAIN_LINE = re.compile(r"chain (?P<chain>\S+) \{(?: # handle \d+)?")
_NUMBERS = re.compile(r"(?<=\bcounter) packets \d+ bytes \d+| # handle \d+$")


def canonical(list_text: str) -> str:
    """Return a listing as nft 1.0.6 prints it: 1.1 has a name for the priority -100 of an output chain too."""
    return list_text.replace("hook output priority dstnat;", "hook output priority -100;")


def parse(list_text: str) -> ObservedTables:
    """Read what `nft list ruleset` or `nft list table` printed (`-a` or not); only our three tables are kept.

    Raises RulesError for text that is no such listing.
    """
    ours = {f"inet {table_name(table)}": table_name(table) for table in TABLES}
    tables: dict[str, dict[str, ObservedChain]] = {}
    foreign: list[str] = []
    for table, content in _table_blocks(canonical(list_text)):
        if table in ours:
            chains, others = _read_chains(content)
            tables[ours[table]] = chains
            foreign += (f"{ours[table]}: {line}" for line in others)
    return ObservedTables(tables, tuple(foreign))


def _table_blocks(list_text: str) -> list[tuple[str, list[str]]]:
    """Return each table's family and name with its lines; a table ends at the brace that is not indented."""
    blocks: list[tuple[str, list[str]]] = []
    is_open = False
    for number, line in enumerate(list_text.splitlines(), start=1):
        if is_open and line == "}":
            is_open = False
        elif is_open:
            blocks[-1][1].append(line.strip())
        elif match := _TABLE_LINE.fullmatch(line):
            blocks.append((match["table"], []))
            is_open = True
        elif line.strip() and not line.startswith("#"):
            raise RulesError(f"line {number} of the nft listing belongs to no table: {line}")
    if is_open:
        raise RulesError(f"the nft listing ends within table {blocks[-1][0]}")
    return blocks


def _read_chains(lines: list[str]) -> tuple[dict[str, ObservedChain], list[str]]:
    chains: dict[str, ObservedChain] = {}
    others: list[str] = []
    chain = ""
    for line in filter(None, lines):
        if match := _CHAIN_LINE.fullmatch(line):
            chain = match["chain"]
            chains[chain] = ObservedChain("")
        elif line == "}":
            chain = ""
        elif not chain:
            others.append(line)
        elif line.startswith("type ") and " hook " in line:
            chains[chain] = replace(chains[chain], header=line)
        else:
            chains[chain] = replace(chains[chain], rules=(*chains[chain].rules, _NUMBERS.sub("", line)))
    return chains, others
