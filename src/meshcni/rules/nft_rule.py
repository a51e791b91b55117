"""One rule in nft's words, in two spellings: as people write it and as `nft list` prints it (1.0.6).

Interface names are quoted, because a name such as `ip` or `counter` is a keyword otherwise. Any rest of a name is `*`,
where iptables and our values have a final `+`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from meshcni.pods.interception import NumberRange
from meshcni.rules.model import (
    Accept,
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
    Protocol,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetConnectionMark,
    SetMark,
    SocketGroup,
    SocketUser,
    Source,
    SourcePort,
    SourceTranslation,
    TransparentProxy,
)

ALL_BITS = 0xFFFFFFFF
_OTHER_NAMES = {"ISTIO_PRERT": "istio-prerouting"}


def chain_name(name: str) -> str:
    """Return nft's name of a chain: `ISTIO_INBOUND` is `istio-inbound`."""
    return _OTHER_NAMES.get(name) or name.lower().replace("_", "-")


def written(rule: Rule) -> str:
    """Return the rule as people write it: `meta l4proto tcp tcp dport 15008 counter return`."""
    return " ".join([*map(_written_match, rule.matches), *_counter(rule), _written_action(rule)])


def listed(rule: Rule) -> str:
    """Return the rule as `nft list` prints it, with counters as in the input: `tcp dport 15008 counter return`."""
    # A port match says the protocol; the listing does not repeat it.
    ports = {match.protocol for match in rule.matches if isinstance(match, SourcePort | DestinationPort)}
    matches = [match for match in rule.matches if not (isinstance(match, Protocol) and match.name in ports)]
    return " ".join([*map(_listed_match, matches), *_counter(rule), _listed_action(rule)])


def _counter(rule: Rule) -> tuple[str, ...]:
    # The original counts what it hands to the proxy after the handing over.
    return ("counter",) if rule.is_counted and not isinstance(rule.action, TransparentProxy) else ()


def _written_action(rule: Rule) -> str:
    match rule.action:
        case TransparentProxy(port, mark):
            family = "ip" if rule.family is Family.V4 else "ip6"
            return f"tproxy {family} to :{port} meta mark set {mark} counter accept"
    return _ACTION_TEXT[type(rule.action)](rule.action)


_ACTION_TEXT: dict[type[Any], Callable[[Any], str]] = {
    Accept: lambda _: "accept",
    Drop: lambda _: "drop",
    Return: lambda _: "return",
    Jump: lambda action: f"jump {chain_name(action.chain)}",
    Redirect: lambda action: f"redirect to :{action.port}",
    SetMark: lambda action: f"meta mark set {action.mark}",
    SaveMark: lambda _: "ct mark set mark",
    RestoreMark: lambda _: "meta mark set ct mark",
    SetConnectionMark: lambda action: f"ct mark set ct mark & {_others(action.mask):#x} | {action.mark:#x}",
    SourceTranslation: lambda action: f"snat to {action.address}",
    ConntrackZone: lambda action: f"ct zone set {action.zone}",
}


def _others(mask: int) -> int:
    """Return the bits that are not in `mask`."""
    return ALL_BITS & ~mask


def _ports(match: DestinationPort | SourcePort) -> str:
    if len(match.ports) == 1:
        return str(match.ports[0])
    return _set(match.ports)


def _set(numbers: Iterable[NumberRange]) -> str:
    return "{ " + ", ".join(map(str, numbers)) + " }"


_FAMILY_NAMES = {Family.V4: "ip", Family.V6: "ip6"}


def _address(match: Source | Destination, side: str) -> str:
    family = _FAMILY_NAMES[Family(match.network.version)]
    return f"{family} {side} {_not(match.negated)}{match.network}"


def _interface(name: str) -> str:
    return f"{name[:-1]}*" if name.endswith("+") else name


def _not(negated: bool) -> str:
    return "!= " if negated else ""


def _other_groups(match: OtherSocketGroup, key: str) -> str:
    """Return one comparison per group, as the original does, or a set where that is more than the kernel takes."""
    if len(match.gids) <= _MAX_COMPARISONS:
        return " ".join(f"{key} != {gid}" for gid in match.gids)
    return f"{key} != {_set(merged(match.gids))}"


# A rule has at most 128 expressions (NFT_RULE_MAXEXPRS, net/netfilter/nf_tables_api.c), each comparison is two, counter
# and verdict are one each.
_MAX_COMPARISONS = 63


def merged(ranges: Iterable[NumberRange]) -> list[NumberRange]:
    """Return the same numbers in the fewest ranges, in ascending order, as the kernel lists a set."""
    result: list[NumberRange] = []
    for numbers in sorted(ranges):
        if result and numbers.first <= result[-1].last + 1:
            result[-1] = NumberRange(result[-1].first, max(result[-1].last, numbers.last))
        else:
            result.append(numbers)
    return result


def _masked(
    key: str, match: PacketMark | ConnectionMark, number: Callable[[int], str], bits: Callable[[int], str]
) -> str:
    if match.mask == ALL_BITS:
        return f"{key} {_not(match.negated)}{number(match.mark)}"
    return f"{key} & {bits(match.mask)} {'!=' if match.negated else '=='} {bits(match.mark)}"


def _written_match(match: Match) -> str:
    return _MATCH_TEXT[type(match)](match)


_MATCH_TEXT: dict[type[Any], Callable[[Any], str]] = {
    InInterface: lambda match: f'iifname "{_interface(match.name)}"',
    OutInterface: lambda match: f'oifname "{_interface(match.name)}"',
    OtherOutInterface: lambda match: f'oifname != "{_interface(match.name)}"',
    Protocol: lambda match: f"meta l4proto {match.name}",
    Source: lambda match: _address(match, "saddr"),
    Destination: lambda match: _address(match, "daddr"),
    DestinationInSet: lambda match: f"{_FAMILY_NAMES[match.family]} daddr @{match.name}",
    SourcePort: lambda match: f"{match.protocol} sport {_ports(match)}",
    DestinationPort: lambda match: f"{match.protocol} dport {_not(match.negated)}{_ports(match)}",
    SocketUser: lambda match: f"skuid {_not(match.negated)}{match.uid}",
    SocketGroup: lambda match: f"skgid {_not(match.negated)}{match.gid}",
    OtherSocketGroup: lambda match: _other_groups(match, "skgid"),
    ConnectionState: lambda match: f"ct state {','.join(match.states)}",
    PacketMark: lambda match: _masked("mark", match, str, hex),
    ConnectionMark: lambda match: _masked("ct mark", match, str, hex),
}


# --- as listed --------------------------------------------------------------------------------------------------------

# The kernel keeps states as bits; the listing names them from the lowest up.
_STATE_ORDER = ("invalid", "established", "related", "new", "untracked")


def _listed_match(match: Match) -> str:
    match match:
        case Source(network) | Destination(network) if network.prefixlen == network.max_prefixlen:
            return _written_match(match).removesuffix(f"/{network.prefixlen}")
        case ConnectionState(states):
            return "ct state " + ",".join(sorted(states, key=_STATE_ORDER.index))
        case PacketMark():
            return _masked("meta mark", match, _hexadecimal, _hexadecimal)
        case ConnectionMark():
            return _masked("ct mark", match, _hexadecimal, _hexadecimal)
        case SocketUser() | SocketGroup():
            return "meta " + _written_match(match)
        case OtherSocketGroup():
            return _other_groups(match, "meta skgid")
        case DestinationPort(protocol, ports, negated) if len(ports) > 1:
            return f"{protocol} dport {_not(negated)}{_set(sorted(set(ports)))}"
    return _written_match(match)


def _hexadecimal(mark: int) -> str:
    return f"{mark:#010x}"


def _listed_action(rule: Rule) -> str:
    match rule.action:
        case TransparentProxy(_, mark):
            return _written_action(rule).replace(f"mark set {mark}", f"mark set {_hexadecimal(mark)}")
        case SetMark(mark):
            return f"meta mark set {_hexadecimal(mark)}"
        case SaveMark():
            return "ct mark set meta mark"
        case SetConnectionMark(mark, mask):
            # The kernel computes `& mask ^ mark`; the listing tells `|` from it by the mark's bits in the mask.
            return f"ct mark set ct mark & {_hexadecimal(_others(mask) | mark)} | {_hexadecimal(mark)}"
        case SourceTranslation(address):
            return f"snat {_FAMILY_NAMES[Family(address.version)]} to {address}"
    return _written_action(rule)
