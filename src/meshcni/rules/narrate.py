"""A rule set in words for people, and as objects for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from meshcni.pods.interception import NumberRange
from meshcni.rules.iproute import mark_words
from meshcni.rules.iptables_rule import ALL_BITS
from meshcni.rules.model import (
    BUILT_IN_CHAINS,
    Accept,
    Action,
    Chain,
    ConnectionMark,
    ConnectionState,
    ConntrackZone,
    Destination,
    DestinationInSet,
    DestinationPort,
    Drop,
    Family,
    InInterface,
    Jump,
    Match,
    OtherOutInterface,
    OtherSocketGroup,
    OutInterface,
    PacketMark,
    PolicyRule,
    Protocol,
    ProtocolExtension,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    Ruleset,
    SaveMark,
    SetConnectionMark,
    SetMark,
    SocketExists,
    SocketGroup,
    SocketUser,
    Source,
    SourcePort,
    SourceTranslation,
    Table,
    TransparentProxy,
)

_HOOKS = {
    "PREROUTING": "packets that arrive",
    "OUTPUT": "packets that this pod sends",
    "POSTROUTING": "packets that leave the host or go to its pods",
}


def words(ruleset: Ruleset) -> list[str]:
    """Return a rule set as lines: per chain a heading, then its rules in the order in which a packet meets them.

    The chains at which packets come in stand first in each table.
    """
    lines = [f"For {_list_of(family_name(family) for family in Family if family in ruleset.families)}."]
    for table in ruleset.tables:
        for chain in sorted(table.chains, key=_is_ours):
            lines += ["", _heading(table, chain)]
            lines += [f"  {number}. {rule_words(rule)}" for number, rule in enumerate(chain.rules, start=1)]
    surroundings = [
        *(
            f"{family_name(rule.family)} packets with mark {mark_words(rule)} are routed by table {rule.table}."
            for rule in ruleset.policy_rules
        ),
        *(f"In routing table {route.table}, {route.destination} is delivered locally." for route in ruleset.routes),
        *(f"{item.address}/{item.prefix_length} is an address of lo." for item in ruleset.addresses),
    ]
    if surroundings:
        lines += ["", "Beside the packet rules", *(f"  {line}" for line in surroundings)]
    return lines


def rule_words(rule: Rule) -> str:
    """Return one rule as a line: what it matches, what it does, and why."""
    family = f"{family_name(rule.family)}: " if rule.family else ""
    matches = ", ".join(match_words(match) for match in _said_once(rule.matches)) or "everything"
    return f"{family}{matches} → {action_words(rule.action)}. {rule.why}"


def match_words(match: Match) -> str:
    """Return what a match looks for."""
    return _MATCH_WORDS[type(match)](match)


def action_words(action: Action) -> str:
    """Return what an action does."""
    return _ACTION_WORDS[type(action)](action)


def family_name(family: Family) -> str:
    """Return `IPv4` or `IPv6`."""
    return f"IPv{family.value}"


def _is_ours(chain: Chain) -> bool:
    return chain.name not in BUILT_IN_CHAINS


def _heading(table: Table, chain: Chain) -> str:
    hook = _HOOKS.get(chain.name)
    return f"{table.name.value} {chain.name}: {hook}" if hook else f"{table.name.value} {chain.name}"


def _said_once(matches: tuple[Match, ...]) -> list[Match]:
    ports = {match.protocol for match in matches if isinstance(match, SourcePort | DestinationPort)}
    unsaid = [match for match in matches if not isinstance(match, ProtocolExtension)]  # says nothing about packets
    return [match for match in unsaid if not (isinstance(match, Protocol) and match.name in ports)]


def _list_of(items: Iterable[object]) -> str:
    return " and ".join(map(str, items))


def _one_of(numbers: tuple[NumberRange, ...]) -> str:
    return " or ".join(map(str, numbers))


def _mark(mark: int, mask: int) -> str:
    return str(mark) if mask == ALL_BITS else f"{mark:#x} in the bits {mask:#x}"


def _not(negated: bool) -> str:
    return "not " if negated else ""


_MATCH_WORDS: dict[type[Any], Callable[[Any], str]] = {
    InInterface: lambda match: f"arriving on {match.name}",
    OutInterface: lambda match: f"leaving by {match.name}",
    OtherOutInterface: lambda match: f"not leaving by {match.name}",
    Protocol: lambda match: match.name.upper(),
    ProtocolExtension: lambda match: f"any {match.name.upper()}",
    Source: lambda match: f"{_not(match.negated)}from {match.network}",
    Destination: lambda match: f"{_not(match.negated)}to {match.network}",
    DestinationInSet: lambda match: f"to an address of set {match.name}",
    DestinationPort: lambda match: f"{match.protocol.upper()} {_not(match.negated)}to port {_one_of(match.ports)}",
    SourcePort: lambda match: f"{match.protocol.upper()} from port {_one_of(match.ports)}",
    SocketUser: lambda match: f"{_not(match.negated)}sent by user {match.uid}",
    SocketGroup: lambda match: f"{_not(match.negated)}sent by group {match.gid}",
    OtherSocketGroup: lambda match: f"not sent by group {_one_of(match.gids)}",
    SocketExists: lambda _: "sent by a process of this host",
    ConnectionState: lambda match: f"connection {' or '.join(match.states)}",
    PacketMark: lambda match: f"{_not(match.negated)}marked {_mark(match.mark, match.mask)}",
    ConnectionMark: lambda match: f"connection {_not(match.negated)}marked {_mark(match.mark, match.mask)}",
}

_ACTION_WORDS: dict[type[Any], Callable[[Any], str]] = {
    Accept: lambda _: "accept",
    Drop: lambda _: "drop",
    Return: lambda _: "leave alone",
    Jump: lambda action: f"continue in {action.chain}",
    Redirect: lambda action: f"redirect to port {action.port}",
    TransparentProxy: lambda action: f"deliver to port {action.port} with mark {action.mark}",
    SetMark: lambda action: f"mark {action.mark}",
    SaveMark: lambda _: "copy the mark to the connection",
    RestoreMark: lambda _: "copy the connection's mark to the packet",
    SetConnectionMark: lambda action: f"mark the connection {_mark(action.mark, action.mask)}",
    SourceTranslation: lambda action: f"send from {action.address}",
    ConntrackZone: lambda action: f"track in zone {action.zone}",
}


# --- objects ----------------------------------------------------------------------------------------------------------


def as_objects(ruleset: Ruleset) -> dict[str, Any]:
    """Return a rule set as what json.dumps takes; keys are camelCase, ports and ids `15008` or `80-90` as text."""
    return {
        "families": [family_name(family) for family in Family if family in ruleset.families],
        "tables": [
            {
                "name": table.name.value,
                "chains": [
                    {"name": chain.name, "rules": [_rule_object(rule) for rule in chain.rules]}
                    for chain in table.chains
                ],
            }
            for table in ruleset.tables
        ],
        "policyRules": [_policy_rule_object(rule) for rule in ruleset.policy_rules],
        "routes": [{"destination": str(route.destination), "table": route.table} for route in ruleset.routes],
        "addresses": [f"{item.address}/{item.prefix_length}" for item in ruleset.addresses],
    }


def _policy_rule_object(rule: PolicyRule) -> dict[str, Any]:
    """Return a policy rule; mask and priority are named only where they are not what `ip rule` assumes."""
    found: dict[str, Any] = {"family": family_name(rule.family), "mark": rule.mark, "table": rule.table}
    if rule.mask != ALL_BITS:
        found["mask"] = rule.mask
    if rule.priority is not None:
        found["priority"] = rule.priority
    return found


def _rule_object(rule: Rule) -> dict[str, Any]:
    return {
        "why": rule.why,
        "family": family_name(rule.family) if rule.family else None,
        "matches": [_value_object(match) for match in rule.matches],
        "action": _value_object(rule.action),
    }


def _value_object(value: Match | Action) -> dict[str, Any]:
    """Return a match or an action: its kind, its fields, and the words for it."""
    is_action = type(value) in _ACTION_WORDS
    text = _ACTION_WORDS[type(value)](value) if is_action else _MATCH_WORDS[type(value)](value)
    name = type(value).__name__
    return {
        "kind": name[0].lower() + name[1:],
        **{item.name: _plain(getattr(value, item.name)) for item in fields(value)},
        "words": text,
    }


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, NumberRange | IPv4Network | IPv6Network | IPv4Address | IPv6Address):
        return str(value)
    if isinstance(value, Family):
        return family_name(value)
    return value
