"""A rule set as iptables-restore input, and iptables-save output read back.

The input is for `--noflush`: each table is one transaction, in which `:CHAIN - [0:0]` creates a chain or empties it, so
there is no moment without rules. What earlier runs left in other people's chains is deleted in the same transaction.
Upstream: tools/istio-iptables/pkg/builder/iptables_builder_impl.go.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from meshcni.rules.iptables_observed import (
    ObservedChain,
    ObservedTables,
    is_own_chain,
    own_entries,
    parse,
    target,
)
from meshcni.rules.iptables_rule import saved, written
from meshcni.rules.model import BUILT_IN_CHAINS, Chain, Family, Purpose, Ruleset, TableName
from meshcni.rules.remember import remembered

__all__ = ["ObservedChain", "ObservedTables", "canonical", "expected", "listing", "parse", "render", "render_removal"]

# The order of upstream's restore input.
TABLE_ORDER = (TableName.FILTER, TableName.MANGLE, TableName.NAT, TableName.RAW)


def render(ruleset: Ruleset, family: Family, observed: ObservedTables | None = None, *, with_whys: bool = False) -> str:
    """Return the `iptables-restore --noflush` input that leads from `observed` to `ruleset` for one family.

    `observed` None says that nothing of ours is there. `with_whys` puts the reason of each rule as a comment before it.
    Empty when there is nothing to do.
    """
    if observed is None and not with_whys:
        return _fresh(ruleset, family)
    tables = {table.name: table.chains for table in ruleset.for_family(family)}
    known = expected(ruleset, family)
    return _script(tables, observed or ObservedTables(), known, ruleset.purpose, with_whys=with_whys)


@remembered
def _fresh(ruleset: Ruleset, family: Family) -> str:
    tables = {table.name: table.chains for table in ruleset.for_family(family)}
    return _script(tables, ObservedTables(), ObservedTables(), ruleset.purpose)


def render_removal(
    observed: ObservedTables, known: ObservedTables | None = None, purpose: Purpose = Purpose.SIDECAR
) -> str:
    """Return the `iptables-restore --noflush` input that takes everything of ours away; empty when there is nothing.

    `known` is what we had applied (see `expected`), for those entries in other people's chains that nobody recognises
    as ours by looking at them: the exclusion of an interface.
    """
    return _script({}, observed, known or ObservedTables(), purpose)


def _script(
    tables: Mapping[TableName, tuple[Chain, ...]],
    observed: ObservedTables,
    ours: ObservedTables,
    purpose: Purpose,
    *,
    with_whys: bool = False,
) -> str:
    """Return the input that takes away what is ours in `observed` and puts `tables` in its place."""
    sections = []
    for name in TABLE_ORDER:
        chains = tables.get(name, ())
        lines = _preparation(name.value, chains, observed, ours, purpose)
        lines += [line for chain in chains for line in _additions(chain, with_whys)]
        if lines:
            sections.append("\n".join([f"*{name.value}", *lines, "COMMIT", ""]))
    return "".join(sections)


def _preparation(
    table: str, chains: tuple[Chain, ...], observed: ObservedTables, ours: ObservedTables, purpose: Purpose
) -> list[str]:
    """Return what comes before the rules of a table: deletions and declarations."""
    own = [chain.name for chain in chains if chain.name not in BUILT_IN_CHAINS]
    stale = [chain for chain in observed.own_chains(table, purpose) if chain not in own]
    return [
        *_deletions(table, observed, ours, stale, purpose),
        # All are emptied before the first is deleted, because they jump to each other.
        *(f":{chain} - [0:0]" for chain in (*own, *stale)),
        *(f"-X {chain}" for chain in stale),
    ]


def _deletions(
    table: str, observed: ObservedTables, ours: ObservedTables, stale: Collection[str], purpose: Purpose
) -> Iterator[str]:
    for chain, content in observed.tables.get(table, {}).items():
        if chain in BUILT_IN_CHAINS:
            entries = own_entries(observed, table, chain, ours, purpose)
            yield from (f"-D {chain} {rule}" for rule in entries)
        elif not is_own_chain(chain, purpose):
            # Another tool's chain that leads to a chain of ours: only a jump to what goes away has to go.
            yield from (f"-D {chain} {rule}" for rule in content.rules if target(rule) in stale)


def _additions(chain: Chain, with_whys: bool) -> Iterator[str]:
    said = ""
    for position, rule in enumerate(chain.rules, start=1):
        if with_whys and rule.why != said:
            said = rule.why
            yield f"# {said}"
        place = f"-I {chain.name} {position}" if position <= chain.inserted else f"-A {chain.name}"
        yield f"{place} {written(rule)}"


# --- the listing ------------------------------------------------------------------------------------------------------


@remembered
def expected(ruleset: Ruleset, family: Family) -> ObservedTables:
    """Return our chains and our entries in built-in chains as `parse` will find them in a netns nobody else uses."""
    return ObservedTables(
        {
            table.name.value: {
                chain.name: ObservedChain("ACCEPT" if chain.name in BUILT_IN_CHAINS else "-", _saved(chain, family))
                for chain in table.chains
            }
            for table in ruleset.for_family(family)
        }
    )


def _saved(chain: Chain, family: Family) -> tuple[str, ...]:
    return tuple(saved(rule, family) for rule in chain.rules)


@remembered
def listing(ruleset: Ruleset, family: Family) -> str:
    """Return what iptables-save prints of our rules, without comments, counters and the built-in chains' declarations.

    Both variants sort their tables differently; here they are in TABLE_ORDER. Chains that are not built in are sorted
    by name, whatever the order in which they were made.
    """
    lines = []
    tables = expected(ruleset, family).tables
    for table in TABLE_ORDER:
        chains = sorted(tables.get(table.value, {}).items(), key=lambda item: _save_position(item[0]))
        if not chains:
            continue
        lines.append(f"*{table.value}")
        lines += [f":{name} -" for name, _ in chains if name not in BUILT_IN_CHAINS]
        lines += [f"-A {name} {rule}" for name, chain in chains for rule in chain.rules]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


_BUILT_IN_LINE = re.compile(r":[A-Z]+ [A-Z]+ \[\d+:\d+\]")


def canonical(save_text: str) -> str:
    """Return what an iptables-save command printed in the form of `listing`.

    Comparing the two texts is all the verification that a namespace without other people's rules needs.
    """
    tables: dict[str, list[str]] = {}
    for line in save_text.splitlines():
        if line.startswith("*"):
            lines = tables.setdefault(line[1:], [])
        elif line.startswith("-A ") or (line.startswith(":") and not _BUILT_IN_LINE.fullmatch(line)):
            lines.append(line.partition(" [")[0] if line[0] == ":" else line)
    return "".join(
        "\n".join([f"*{table.value}", *tables[table.value], "COMMIT", ""])
        for table in TABLE_ORDER
        if tables.get(table.value)
    )


def _save_position(chain: str) -> tuple[int, str]:
    return (BUILT_IN_CHAINS.index(chain) if chain in BUILT_IN_CHAINS else len(BUILT_IN_CHAINS), chain)
