"""What distinguishes the kernel's state from the desired one, in sentences."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from meshcni.rules import iptables, nft
from meshcni.rules.iptables_observed import own_entries
from meshcni.rules.model import BUILT_IN_CHAINS, Family, Purpose, Ruleset
from meshcni.rules.remember import remembered


class DriftKind(Enum):
    """What is not as desired."""

    MISSING_CHAIN = "missing_chain"
    UNEXPECTED_CHAIN = "unexpected_chain"
    WRONG_HOOK = "wrong_hook"
    MISSING_RULE = "missing_rule"
    UNEXPECTED_RULE = "unexpected_rule"
    WRONG_ORDER = "wrong_order"
    NOT_FIRST = "not_first"
    UNEXPECTED_TABLE = "unexpected_table"
    UNEXPECTED_OBJECT = "unexpected_object"


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference: what kind, where (`nat ISTIO_OUTPUT (IPv4)`), and the rule or chain in question."""

    kind: DriftKind
    place: str
    subject: str

    def __str__(self) -> str:
        return _SENTENCES[self.kind].format(place=self.place, subject=self.subject)


_SENTENCES = {
    DriftKind.MISSING_CHAIN: "chain {place} is missing",
    DriftKind.UNEXPECTED_CHAIN: "chain {place} should not be there",
    DriftKind.WRONG_HOOK: "chain {place} hangs on the wrong hook: {subject}",
    DriftKind.MISSING_RULE: "chain {place} lacks the rule: {subject}",
    DriftKind.UNEXPECTED_RULE: "chain {place} holds a rule that should not be there: {subject}",
    DriftKind.WRONG_ORDER: "the rules of chain {place} are in the wrong order, first at: {subject}",
    DriftKind.NOT_FIRST: "chain {place} does not begin with the rule: {subject}",
    DriftKind.UNEXPECTED_TABLE: "table {place} should not be there",
    DriftKind.UNEXPECTED_OBJECT: "table {place} holds something that is not ours: {subject}",
}


Observation = Mapping[Family, iptables.ObservedTables] | nft.ObservedTables


def drift(desired: Ruleset, observed: Observation) -> tuple[Drift, ...]:
    """Return what distinguishes `observed` from `desired`; empty when all is as it should be.

    `observed` is what nft lists, or what iptables-save lists per family; a family that is not in the mapping counts as
    empty. Our chains have to be the same in content and order. In chains that are not ours only our rules count, and
    their order among themselves; other tools' rules and tables are ignored. On the host, where many tools insert rules,
    ours have to be the first as well.
    """
    if isinstance(observed, nft.ObservedTables):
        return tuple(_nft_drift(desired, observed))
    nothing = iptables.ObservedTables()
    return tuple(
        found for family in Family for found in _iptables_drift(desired, family, observed.get(family, nothing))
    )


def _iptables_drift(desired: Ruleset, family: Family, observed: iptables.ObservedTables) -> Iterator[Drift]:
    wanted = iptables.expected(desired, family)
    for name in iptables.TABLE_ORDER:
        table = name.value
        chains = dict.fromkeys([*wanted.tables.get(table, {}), *observed.tables.get(table, {})])
        own = set(observed.own_chains(table, desired.purpose))
        for chain in chains:
            place = f"{table} {chain} (IPv{family.value})"
            is_wanted = chain in wanted.tables.get(table, {})
            rules = wanted.chain(table, chain).rules
            if chain in BUILT_IN_CHAINS or (not is_wanted and chain not in own):
                yield from _rule_drift(place, rules, own_entries(observed, table, chain, wanted, desired.purpose))
            elif not is_wanted:
                yield Drift(DriftKind.UNEXPECTED_CHAIN, place, chain)
            elif chain not in own:
                yield Drift(DriftKind.MISSING_CHAIN, place, chain)
            else:
                yield from _rule_drift(place, rules, observed.chain(table, chain).rules)

    if desired.purpose is Purpose.AMBIENT_HOST:
        yield from _position_drift(desired, family, observed)


def _position_drift(desired: Ruleset, family: Family, observed: iptables.ObservedTables) -> Iterator[Drift]:
    for table in desired.for_family(family):
        for chain in table.chains:
            there = observed.chain(table.name.value, chain.name).rules
            wanted = iptables.expected(desired, family).chain(table.name.value, chain.name).rules[: chain.inserted]
            if set(wanted) <= set(there) and there[: len(wanted)] != wanted:
                place = f"{table.name.value} {chain.name} (IPv{family.value})"
                yield Drift(DriftKind.NOT_FIRST, place, wanted[0])


def _nft_drift(desired: Ruleset, observed: nft.ObservedTables) -> Iterator[Drift]:
    wanted = nft.expected(desired)
    for table in dict.fromkeys([*wanted.tables, *observed.tables]):
        there, should = observed.tables.get(table, {}), wanted.tables.get(table, {})
        if not there and not should:
            yield Drift(DriftKind.UNEXPECTED_TABLE, table, table)
        for chain in dict.fromkeys([*should, *there]):
            place = f"{table} {chain}"
            if chain not in there:
                yield Drift(DriftKind.MISSING_CHAIN, place, chain)
            elif chain not in should:
                yield Drift(DriftKind.UNEXPECTED_CHAIN, place, chain)
            else:
                if there[chain].header != should[chain].header:
                    yield Drift(DriftKind.WRONG_HOOK, place, there[chain].header or "none")
                yield from _rule_drift(place, should[chain].rules, there[chain].rules)
    for statement in observed.foreign:
        table, _, subject = statement.partition(": ")
        yield Drift(DriftKind.UNEXPECTED_OBJECT, table, subject)


def _rule_drift(place: str, wanted: tuple[str, ...], there: tuple[str, ...]) -> Iterator[Drift]:
    if wanted == there:
        return
    missing, unexpected = Counter(wanted) - Counter(there), Counter(there) - Counter(wanted)
    for rule in missing.elements():
        yield Drift(DriftKind.MISSING_RULE, place, rule)
    for rule in unexpected.elements():
        yield Drift(DriftKind.UNEXPECTED_RULE, place, rule)
    if not missing and not unexpected:
        first = next(rule for rule, other in zip(there, wanted, strict=True) if rule != other)
        yield Drift(DriftKind.WRONG_ORDER, place, first)


@remembered
def digest(ruleset: Ruleset) -> str:
    """Return 16 hexadecimal digits that are the same for rule sets that make the same kernel state."""
    lines = [" ".join(sorted(f"IPv{family.value}" for family in ruleset.families))]
    if ruleset.purpose is not Purpose.SIDECAR:
        lines.append(ruleset.purpose.value)
    for table in ruleset.tables:
        for chain in table.chains:
            lines.append(f"{table.name.value} {chain.name} {chain.inserted}")
            lines += [f"{rule.family} {rule.matches!r} {rule.action!r}" for rule in chain.rules]
            lines += [f"uncounted {number}" for number, rule in enumerate(chain.rules) if not rule.is_counted]
    lines += map(repr, (*ruleset.policy_rules, *ruleset.routes, *ruleset.addresses))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
