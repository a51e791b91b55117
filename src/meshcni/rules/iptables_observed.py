"""iptables-save output as values, and what of it is ours.

A freshly started agent has no memory of what it, an earlier version, or the original put into a netns, so what is ours
is recognised by what stands in the kernel:

- chains named `ISTIO_...`, and jumps to them;
- in mangle, the rules of TPROXY mode: they have a fixed form and carry a mark that our chains carry too;
- in nat PREROUTING, a RETURN for an interface that a redirect of ours names as well;
- the six DROP rules that the original puts in front of table filter while it works, left there when it was killed;
- what the rule set to be applied would add anyway.

A RETURN for an interface that an earlier run excluded cannot be told from another tool's rule, and stays.

In a pod that holds for a sidecar's and for ambient rules alike. On the host, only chain ISTIO_POSTRT and jumps to it
are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshcni import istio
from meshcni.errors import RulesError
from meshcni.rules.model import Purpose

OWN_PREFIX = istio.IPTABLES_CHAIN_PREFIX + "_"


@dataclass(frozen=True, slots=True)
class ObservedChain:
    """A chain as iptables-save lists it: `policy` is `-` for chains that are not built in, rules without `-A CHAIN`."""

    policy: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ObservedTables:
    """The tables of one family: table name, then chain name in listing order, then the chain."""

    tables: Mapping[str, Mapping[str, ObservedChain]] = field(default_factory=dict)

    def chain(self, table: str, chain: str) -> ObservedChain:
        """Return a chain, an empty one when there is none."""
        return self.tables.get(table, {}).get(chain, ObservedChain("-"))

    def own_chains(self, table: str, purpose: Purpose = Purpose.SIDECAR) -> tuple[str, ...]:
        """Return the names of the chains that are ours, in listing order."""
        return tuple(name for name in self.tables.get(table, {}) if is_own_chain(name, purpose))


def is_own_chain(name: str, purpose: Purpose) -> bool:
    """Tell whether a chain is ours in a namespace of `purpose`."""
    if purpose is Purpose.AMBIENT_HOST:
        return name == istio.AMBIENT_HOST_CHAIN
    return name.startswith(OWN_PREFIX)


# --- reading ----------------------------------------------------------------------------------------------------------

_CHAIN_LINE = re.compile(r":(?P<chain>\S+) (?P<policy>\S+)(?: \[\d+:\d+\])?")
_RULE_LINE = re.compile(r"(?:\[\d+:\d+\] )?-A (?P<chain>\S+)(?: (?P<rule>.*))?")


def parse(save_text: str) -> ObservedTables:
    """Read what `iptables-save` or `ip6tables-save` printed, with or without counters, legacy or nft.

    Raises RulesError for text that is no such listing.
    """
    tables: dict[str, dict[str, tuple[str, list[str]]]] = {}
    chains: dict[str, tuple[str, list[str]]] | None = None
    for number, line in enumerate(map(str.strip, save_text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("*"):
            chains = tables.setdefault(line[1:].strip(), {})
        elif line == "COMMIT":
            chains = None
        elif chains is None:
            raise RulesError(f"line {number} of the iptables-save listing belongs to no table: {line}")
        elif match := _CHAIN_LINE.fullmatch(line):
            chains[match["chain"]] = (match["policy"], [])
        elif (match := _RULE_LINE.fullmatch(line)) and match["chain"] in chains:
            chains[match["chain"]][1].append(match["rule"] or "")
        else:
            raise RulesError(f"line {number} of the iptables-save listing cannot be read: {line}")
    return ObservedTables(
        {
            table: {name: ObservedChain(policy, tuple(rules)) for name, (policy, rules) in chains.items()}
            for table, chains in tables.items()
        }
    )


# --- recognising ------------------------------------------------------------------------------------------------------

_ALL = "0xffffffff"
_MARK = r"--mark (?P<mark>0x[0-9a-f]+)"
_TPROXY_FORMS: dict[tuple[str, str], tuple[re.Pattern[str], ...]] = {
    ("mangle", "PREROUTING"): (
        re.compile(rf"-p tcp -m mark {_MARK} -j CONNMARK --save-mark --nfmask {_ALL} --ctmask {_ALL}"),
    ),
    ("mangle", "OUTPUT"): (
        re.compile(rf"-o lo -p tcp -m mark {_MARK} -j RETURN"),
        re.compile(rf"-p tcp -m connmark {_MARK} -j CONNMARK --restore-mark --nfmask {_ALL} --ctmask {_ALL}"),
    ),
}
_OUTBOUND_MARK_FORM = re.compile(
    rf"! -d \S+ -o lo -p tcp -m owner --[ug]id-owner \S+ -j MARK --set-xmark {istio.OUTBOUND_MARK:#x}/{_ALL}"
)
_OWN_MARK_FORMS = (
    re.compile(rf"-j MARK --set-xmark (?P<mark>0x[0-9a-f]+)/{_ALL}"),
    re.compile(rf"-p tcp -m mark {_MARK} -j RETURN"),
)
_INTERFACE_REDIRECT = re.compile(rf"(?:-d \S+ )?-i (?P<interface>\S+) -j {OWN_PREFIX}REDIRECT")
_INTERFACE_RETURN = re.compile(r"-i (?P<interface>\S+) -j RETURN")
_TARGET = re.compile(r"(?:^| )-[jg] (?P<target>\S+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_GUARDS = frozenset({"-p tcp -j DROP", "-p udp -j DROP"})
_GUARDED_CHAINS = ("INPUT", "FORWARD", "OUTPUT")


def own_entries(
    observed: ObservedTables, table: str, chain: str, known: ObservedTables, purpose: Purpose = Purpose.SIDECAR
) -> tuple[str, ...]:
    """Return our rules in a chain that is not ours, in listing order.

    `known` is what we are about to apply, or had applied. An interface that it excludes in nat is excluded in mangle as
    well when the mode is TPROXY, so one found there is from such a run.
    """
    if purpose is Purpose.AMBIENT_HOST:
        return tuple(rule for rule in observed.chain(table, chain).rules if is_own_chain(target(rule), purpose))
    desired = {*known.chain(table, chain).rules, *(known.chain("nat", chain).rules if table == "mangle" else ())}
    marks, interfaces = _own_marks(observed), _redirected_interfaces(observed)
    guards = _GUARDS if chain in _GUARDED_CHAINS and table == "filter" and _is_guarded(observed) else frozenset()

    def is_ours(rule: str) -> bool:
        if rule in desired or rule in guards or target(rule).startswith(OWN_PREFIX):
            return True
        if (table, chain) == ("nat", "PREROUTING") and (found := _INTERFACE_RETURN.fullmatch(rule)):
            return found["interface"] in interfaces
        if (table, chain) == ("mangle", "OUTPUT") and _OUTBOUND_MARK_FORM.fullmatch(rule):
            return True
        forms = _TPROXY_FORMS.get((table, chain), ())
        return any((found := form.fullmatch(rule)) and found["mark"] in marks for form in forms)

    return tuple(filter(is_ours, observed.chain(table, chain).rules))


def target(rule: str) -> str:
    """Return the chain or target a rule leads to; empty when it has none."""
    found = _TARGET.search(_QUOTED.sub('""', rule))
    return found["target"] if found else ""


def _own_marks(observed: ObservedTables) -> set[str]:
    """Return the marks, as iptables-save prints them, that an earlier TPROXY rule set works with."""
    rules = [rule for chain in observed.own_chains("mangle") for rule in observed.chain("mangle", chain).rules]
    found = (form.fullmatch(rule) for rule in rules for form in _OWN_MARK_FORMS)
    return {f"{istio.TPROXY_MARK:#x}", *(match["mark"] for match in found if match)}


def _redirected_interfaces(observed: ObservedTables) -> set[str]:
    found = map(_INTERFACE_REDIRECT.fullmatch, observed.chain("nat", "PREROUTING").rules)
    return {match["interface"] for match in found if match}


def _is_guarded(observed: ObservedTables) -> bool:
    return all(frozenset(observed.chain("filter", chain).rules[:2]) == _GUARDS for chain in _GUARDED_CHAINS)
