"""Whether what a pod's netns holds captures the pod's connections, whoever programmed it and with which parameters.

A pod that runs may have been programmed by an earlier version, by the original, by the other backend, or before
somebody edited its annotations: that is no fault, and nobody may touch it. So what counts is not whether the rules are
the ones we would make now, but whether each direction that should be captured still leads to the proxy: the jump of the
kernel's own chain, the chains behind it, the redirect at their end, the exemption of the proxy itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from meshcni.rules import iptables, nft
from meshcni.rules.iptables_observed import is_own_chain, target
from meshcni.rules.model import BUILT_IN_CHAINS, Family, Purpose, Ruleset
from meshcni.rules.nft_layout import LAYOUTS
from meshcni.rules.plan import Observation


class Direction(Enum):
    """What a sidecar's redirection can capture."""

    INBOUND = "inbound connections"
    OUTBOUND = "outbound connections"
    DNS = "DNS questions"


@dataclass(frozen=True, slots=True)
class Step:
    """One rule: where it leads, whether it takes every packet, whether it looks at a socket's owner."""

    target: str
    is_certain: bool
    by_owner: bool


Chains = Mapping[tuple[str, str], tuple[Step, ...]]  # by table and chain, both in iptables' words
Link = tuple[str, str, str]  # table, chain, and the target that a rule of it must have

_NAT_OUTPUT: tuple[Link, ...] = (("nat", "OUTPUT", "ISTIO_OUTPUT"),)
# Either way of a direction does.
_WAYS: Mapping[Direction, tuple[tuple[Link, ...], ...]] = {
    Direction.INBOUND: (
        (
            ("nat", "PREROUTING", "ISTIO_INBOUND"),
            ("nat", "ISTIO_INBOUND", "ISTIO_IN_REDIRECT"),
            ("nat", "ISTIO_IN_REDIRECT", "REDIRECT"),
        ),
        (
            ("mangle", "PREROUTING", "ISTIO_INBOUND"),
            ("mangle", "ISTIO_INBOUND", "ISTIO_TPROXY"),
            ("mangle", "ISTIO_TPROXY", "TPROXY"),
        ),
    ),
    Direction.OUTBOUND: (
        (*_NAT_OUTPUT, ("nat", "ISTIO_OUTPUT", "ISTIO_REDIRECT"), ("nat", "ISTIO_REDIRECT", "REDIRECT")),
    ),
    Direction.DNS: (
        (*_NAT_OUTPUT, ("nat", "ISTIO_OUTPUT", "ISTIO_OUTPUT_DNS"), ("nat", "ISTIO_OUTPUT_DNS", "REDIRECT")),
    ),
}
# The targets that rules of our chains have, beside RETURN and jumps to each other; no other one is of the mesh.
_VERDICTS: Mapping[tuple[str, str], frozenset[str]] = {
    ("nat", "ISTIO_REDIRECT"): frozenset({"REDIRECT"}),
    ("nat", "ISTIO_IN_REDIRECT"): frozenset({"REDIRECT"}),
    ("nat", "ISTIO_OUTPUT_DNS"): frozenset({"REDIRECT"}),
    ("mangle", "ISTIO_DIVERT"): frozenset({"MARK", "ACCEPT"}),
    ("mangle", "ISTIO_TPROXY"): frozenset({"TPROXY"}),
    ("mangle", "ISTIO_DROP"): frozenset({"DROP"}),
    ("raw", "ISTIO_OUTPUT_DNS"): frozenset({"CT"}),
    ("raw", "ISTIO_INBOUND"): frozenset({"CT"}),
}
_ENDS = frozenset({"RETURN", "ACCEPT", "DROP"})  # of a chain, when they take every packet


def gaps(desired: Ruleset, observed: Observation) -> tuple[str, ...]:
    """Return what keeps `observed` from capturing what `desired` captures, in sentences; empty when nothing does.

    `observed` is what one backend holds, `desired` a rule set for that backend.
    """
    if isinstance(observed, nft.ObservedTables):
        return tuple(_gaps(_nft_chains(nft.expected(desired)), _nft_chains(observed), ""))
    nothing = iptables.ObservedTables()
    return tuple(
        gap
        for family in Family
        if family in desired.families
        for gap in _gaps(
            _iptables_chains(iptables.expected(desired, family)),
            _iptables_chains(observed.get(family, nothing)),
            f" (IPv{family.value})",
        )
    )


def holds_own_chains(observed: Observation, family: Family) -> bool:
    """Tell whether anything of ours is there that acts on `family`."""
    if isinstance(observed, nft.ObservedTables):
        return bool(observed.tables)
    tables = observed.get(family, iptables.ObservedTables())
    return any(tables.own_chains(table) for table in tables.tables)


def is_transparent(observed: Observation) -> bool:
    """Tell whether inbound connections go to a transparent proxy, which takes policy rules and routes as well."""
    views = [observed] if isinstance(observed, nft.ObservedTables) else list(observed.values())
    chains = [_nft_chains(one) if isinstance(one, nft.ObservedTables) else _iptables_chains(one) for one in views]
    return any(step.target == "TPROXY" for view in chains for step in view.get(("mangle", "ISTIO_TPROXY"), ()))


def _gaps(desired: Chains, observed: Chains, where: str) -> Iterator[str]:
    for direction, ways in _WAYS.items():
        if not any(_breaks(desired, way) == "" for way in ways):
            continue
        breaks = [_breaks(observed, way) for way in ways]
        if all(breaks):
            yield f"{direction.value} are not captured{where}: {breaks[0]}"
        elif direction is Direction.OUTBOUND and not _exempts_proxy(observed):
            yield f"the proxy's own connections would come back to it{where}: chain nat ISTIO_OUTPUT exempts no owner"
    for place, steps in observed.items():
        foreign = sorted({step.target for step in steps if not _is_of_mesh(place, step)})
        if foreign:
            yield f"chain {' '.join(place)}{where} holds what no mesh puts there: {', '.join(foreign)}"


def _breaks(chains: Chains, way: tuple[Link, ...]) -> str:
    """Return where the way breaks off, empty when it leads to its end."""
    for table, chain, wanted in way:
        if (table, chain) not in chains:
            return f"chain {table} {chain} is missing"
        for step in chains[table, chain]:
            if step.target == wanted:
                break
            if step.is_certain and step.target in _ENDS and chain not in BUILT_IN_CHAINS:
                return f"chain {table} {chain} ends before it leads to {wanted}"
        else:
            return f"chain {table} {chain} does not lead to {wanted}"
    return ""


def _exempts_proxy(chains: Chains) -> bool:
    steps = chains.get(("nat", "ISTIO_OUTPUT"), ())
    return any(step.by_owner and step.target == "RETURN" for step in steps)


def _is_of_mesh(place: tuple[str, str], step: Step) -> bool:
    """Whether a rule may stand there; what stands in the kernel's own chains is everybody's business."""
    if place[1] in BUILT_IN_CHAINS or step.target == "RETURN" or is_own_chain(step.target, Purpose.SIDECAR):
        return True
    return step.target in _VERDICTS.get(place, ())


# --- iptables ---------------------------------------------------------------------------------------------------------


def _iptables_chains(observed: iptables.ObservedTables) -> Chains:
    return {
        (table, name): tuple(map(_iptables_step, chain.rules))
        for table, chains in observed.tables.items()
        for name, chain in chains.items()
        if name in BUILT_IN_CHAINS or is_own_chain(name, Purpose.SIDECAR)
    }


def _iptables_step(rule: str) -> Step:
    found = target(rule)
    return Step(found, rule.startswith(("-j ", "-g ")), "--uid-owner " in rule or "--gid-owner " in rule)


# --- nftables ---------------------------------------------------------------------------------------------------------

_JUMP = re.compile(r"\b(?:jump|goto) (?P<chain>\S+)$")
_CERTAIN = re.compile(r"(?:counter )?(?:(?:jump|goto) \S+|return|accept|drop)")
_TABLES = {f"{LAYOUTS[Purpose.SIDECAR].table_name(name)}": name.value for name in LAYOUTS[Purpose.SIDECAR].tables}


def _nft_chains(observed: nft.ObservedTables) -> Chains:
    """In iptables' words; a chain that should hang on a hook and does not is none."""
    found: dict[tuple[str, str], tuple[Step, ...]] = {}
    for table, chains in observed.tables.items():
        for name, chain in chains.items():
            word = _iptables_word(name)
            if word not in BUILT_IN_CHAINS or f" hook {name} " in chain.header:
                found[_TABLES[table], word] = tuple(map(_nft_step, chain.rules))
    return found


def _nft_step(rule: str) -> Step:
    return Step(_nft_target(rule), _CERTAIN.fullmatch(rule) is not None, "skuid" in rule or "skgid" in rule)


def _nft_target(rule: str) -> str:
    if jump := _JUMP.search(rule):
        return _iptables_word(jump["chain"])
    for words, name in (("redirect to ", "REDIRECT"), ("tproxy ", "TPROXY"), ("mark set ", "MARK"), ("ct zone", "CT")):
        if words in rule:
            return name
    return rule.rpartition(" ")[2].upper()


def _iptables_word(name: str) -> str:
    return name.upper().replace("-", "_")
