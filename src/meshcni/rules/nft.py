"""A rule set as one nft transaction, and the kernel's listing of our tables read back.

A pod's tables of family inet are ours alone. A transaction deletes and builds all of them anew, so whatever stood in
them before, an earlier parameter's table included, is gone in the same instant (nft 1.0.6 has no `destroy`; `add`
before `delete` makes the deletion work on a clean kernel). On the host our table holds the address sets as well, so
there only chains are deleted and built anew. Upstream: tools/istio-nftables/pkg, cni/pkg/nftables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from meshcni.errors import RulesError
from meshcni.rules.model import BUILT_IN_CHAINS, Chain, Purpose, Ruleset, Table
from meshcni.rules.nft_layout import LAYOUTS, Layout, own_tables
from meshcni.rules.nft_rule import chain_name, listed, written
from meshcni.rules.remember import remembered

Present = Mapping[str, tuple[str, ...]]  # our tables in the kernel, with the names of their chains


@remembered
def render(ruleset: Ruleset, *, with_whys: bool = False) -> str:
    """Return the transaction that replaces whatever is in our tables by `ruleset`.

    `with_whys` puts the reason of each rule as a comment before it.
    """
    layout = LAYOUTS[ruleset.purpose]
    lines = [] if layout.is_shared else [render_removal(ruleset.purpose).rstrip("\n")]
    for table in _in_order(ruleset):
        name = layout.table_name(table.name)
        lines.append(f"add table inet {name}")
        for chain in table.chains:
            if layout.is_shared:
                lines += _chain_removal(name, chain_name(chain.name))
            lines.append(f"add chain inet {name} {chain_name(chain.name)}{_hook(layout, table, chain)}")
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


def render_removal(purpose: Purpose = Purpose.SIDECAR, present: Present | None = None) -> str:
    """Return the transaction that leaves nothing of ours, but for what others keep in a shared table.

    Without `present` it deletes the tables of `purpose`, whether they are there or not. With it, it deletes every
    table of ours in it, leftovers of another purpose included; of a shared table it deletes the chains.
    """
    layout = LAYOUTS[purpose]
    if layout.is_shared:
        tables = (present or {}).items()
        return _text(line for table, chains in tables for chain in chains for line in _chain_removal(table, chain))
    names = layout.table_names if present is None else tuple(present)
    return _text(line for table in names for line in _table_removal(table))


def render_leftovers(ruleset: Ruleset, present: Present) -> str:
    """Return what has to follow `render`, so that of `present` nothing stays that is ours and not of `ruleset`."""
    layout = LAYOUTS[ruleset.purpose]
    if not layout.is_shared:
        return _text(line for table in present if table not in layout.table_names for line in _table_removal(table))
    wanted = {layout.table_name(table.name): set(map(_nft_name, table.chains)) for table in ruleset.tables}
    return _text(
        line
        for table, chains in present.items()
        for chain in chains
        if chain not in wanted.get(table, ())
        for line in _chain_removal(table, chain)
    )


def _table_removal(table: str) -> tuple[str, ...]:
    return f"add table inet {table}", f"delete table inet {table}"


def _chain_removal(table: str, chain: str) -> tuple[str, ...]:
    # Only an empty chain can be deleted; adding it first makes the other two work where there is none.
    return tuple(f"{verb} chain inet {table} {chain}" for verb in ("add", "flush", "delete"))


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _nft_name(chain: Chain) -> str:
    return chain_name(chain.name)


def _in_order(ruleset: Ruleset) -> list[Table]:
    """Return tables and chains in declaration order."""
    layout = LAYOUTS[ruleset.purpose]
    tables = {table.name: table for table in ruleset.tables}
    return [
        Table(name, tuple(sorted(tables[name].chains, key=lambda chain: order.index(chain.name))))
        for name in layout.tables
        if name in tables and (order := layout.declaration_order[name])
    ]


def _hook(layout: Layout, table: Table, chain: Chain) -> str:
    if chain.name not in BUILT_IN_CHAINS:
        return ""
    kind, hook, priority = layout.base_chains[table.name, chain.name]
    return f" {{ type {kind} hook {hook} priority {priority} ; }}"


# --- the listing ------------------------------------------------------------------------------------------------------

# Priorities that the listing gives a name (`dstnat` in prerouting only: nft 1.0.6 has no name for -100 elsewhere).
_PRIORITY_NAMES = {
    ("prerouting", -100): "dstnat",
    ("prerouting", -150): "mangle",
    ("output", -150): "mangle",
    ("prerouting", -300): "raw",
    ("output", -300): "raw",
    ("postrouting", 100): "srcnat",
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
    layout = LAYOUTS[ruleset.purpose]
    return ObservedTables(
        {
            layout.table_name(table.name): {
                chain_name(chain.name): ObservedChain(
                    _listed_hook(layout, table, chain), tuple(map(listed, chain.rules))
                )
                for chain in table.chains
            }
            for table in _in_order(ruleset)
        }
    )


@remembered
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


def _listed_hook(layout: Layout, table: Table, chain: Chain) -> str:
    if chain.name not in BUILT_IN_CHAINS:
        return ""
    kind, hook, priority = layout.base_chains[table.name, chain.name]
    return f"type {kind} hook {hook} priority {_PRIORITY_NAMES.get((hook, priority), priority)}; policy accept;"


_TABLE_LINE = re.compile(r"table (?P<table>\S+ \S+) \{(?: # handle \d+)?")
_CHAIN_LINE = re.compile(r"chain (?P<chain>\S+) \{(?: # handle \d+)?")
_NUMBERS = re.compile(r"(?<=\bcounter) packets \d+ bytes \d+| # handle \d+$")


def canonical(list_text: str) -> str:
    """Return a listing as nft 1.0.6 prints it: 1.1 has a name for the priority -100 of an output chain too."""
    return list_text.replace("hook output priority dstnat;", "hook output priority -100;")


def parse(list_text: str, purpose: Purpose = Purpose.SIDECAR) -> ObservedTables:
    """Read what `nft list ruleset`, `list table` or `list chain` printed (`-a` or not); only our tables are kept.

    Raises RulesError for text that is no such listing.
    """
    ours = {f"inet {table}": table for table in own_tables(purpose)}
    tables: dict[str, dict[str, ObservedChain]] = {}
    foreign: list[str] = []
    for table, content in _table_blocks(canonical(list_text)):
        if table in ours:
            chains, others = _read_chains(content)
            tables.setdefault(ours[table], {}).update(chains)
            if not LAYOUTS[purpose].is_shared:
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
