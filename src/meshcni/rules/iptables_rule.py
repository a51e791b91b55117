"""One rule in iptables' words, in two spellings: as people write it and as iptables-save prints it.

iptables-save (1.8.9, legacy and nft alike) prints addresses first, then interfaces, protocol and extensions in the
order in which they were typed; it adds defaults (`-m tcp`, masks) and turns marks into hexadecimal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from meshcni.pods.interception import NumberRange
from meshcni.rules.model import (
    Accept,
    Action,
    ConnectionMark,
    ConnectionState,
    ConntrackZone,
    Destination,
    DestinationPort,
    Drop,
    Family,
    InInterface,
    Jump,
    Match,
    OtherSocketGroup,
    OutInterface,
    PacketMark,
    Protocol,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetMark,
    SocketGroup,
    SocketUser,
    Source,
    SourcePort,
    TransparentProxy,
)

ALL_BITS = 0xFFFFFFFF

# Where a match stands in the text.
_WRITTEN_ORDER: tuple[type[Any], ...] = (InInterface, OutInterface, Source, Destination, Protocol)
_SAVED_ORDER: tuple[type[Any], ...] = (Source, Destination, InInterface, OutInterface, Protocol)
_EXTENSION_ORDER: tuple[type[Any], ...] = (
    SourcePort,
    DestinationPort,
    ConnectionState,
    PacketMark,
    ConnectionMark,
    SocketUser,
    SocketGroup,
    OtherSocketGroup,
)


def written(rule: Rule) -> str:
    """Return the rule as people write it: `-p tcp --dport 15008 -j RETURN`."""
    matches = _in_order(rule, _WRITTEN_ORDER)
    return " ".join([*map(_written_match, matches), _written_action(rule.action)])


def saved(rule: Rule, family: Family) -> str:
    """Return the rule as iptables-save prints it for `family`: `-p tcp -m tcp --dport 15008 -j RETURN`."""
    matches = _in_order(rule, _SAVED_ORDER)
    return " ".join([*filter(None, map(_saved_match, matches)), _saved_action(rule.action, family)])


def _in_order(rule: Rule, basics: tuple[type[Any], ...]) -> list[Match]:
    order = (*basics, *_EXTENSION_ORDER)
    # A port names its protocol; iptables wants it said once, before.
    protocols = [Protocol(match.protocol) for match in rule.matches if isinstance(match, SourcePort | DestinationPort)]
    matches = list(dict.fromkeys([*protocols, *rule.matches]))
    return sorted(matches, key=lambda match: order.index(type(match)))


# --- matches ----------------------------------------------------------------------------------------------------------


def _written_match(match: Match) -> str:
    return _MATCH_TEXT[type(match)](match)


def _saved_match(match: Match) -> str:
    match match:
        case Source(network) | Destination(network) if network.prefixlen == 0:
            return ""
        case SourcePort(protocol, ports):
            return f"-m {protocol} {_written_match(match)}" if not _is_any_port(ports) else f"-m {protocol}"
        case DestinationPort(protocol, ports, negated) if len(ports) == 1:
            if _is_any_port(ports) and not negated:
                return f"-m {protocol}"
            return f"-m {protocol} {_written_match(match)}"
        case PacketMark(mark, mask, negated):
            return f"-m mark {_not(negated)}--mark {_hexadecimal(mark, mask)}"
        case ConnectionMark(mark, mask, negated):
            return f"-m connmark {_not(negated)}--mark {_hexadecimal(mark, mask)}"
    return _written_match(match)


def _is_any_port(ports: tuple[NumberRange, ...]) -> bool:
    return ports == (NumberRange(0, 0xFFFF),)


def _destination_port(match: DestinationPort) -> str:
    ports = ",".join(_colon(port) for port in match.ports)
    if len(match.ports) == 1:
        return f"{_not(match.negated)}--dport {ports}"
    return f"-m multiport {_not(match.negated)}--dports {ports}"


_MATCH_TEXT: dict[type[Any], Callable[[Any], str]] = {
    InInterface: lambda match: f"-i {match.name}",
    OutInterface: lambda match: f"-o {match.name}",
    Source: lambda match: f"{_not(match.negated)}-s {match.network}",
    Destination: lambda match: f"{_not(match.negated)}-d {match.network}",
    Protocol: lambda match: f"-p {match.name}",
    SourcePort: lambda match: f"--sport {','.join(map(_colon, match.ports))}",
    DestinationPort: _destination_port,
    ConnectionState: lambda match: f"-m conntrack --ctstate {','.join(_upper(match.states))}",
    PacketMark: lambda match: f"-m mark {_not(match.negated)}--mark {_decimal(match.mark, match.mask)}",
    ConnectionMark: lambda match: f"-m connmark {_not(match.negated)}--mark {_decimal(match.mark, match.mask)}",
    SocketUser: lambda match: f"-m owner {_not(match.negated)}--uid-owner {match.uid}",
    SocketGroup: lambda match: f"-m owner {_not(match.negated)}--gid-owner {match.gid}",
    OtherSocketGroup: lambda match: " ".join(f"-m owner ! --gid-owner {gid}" for gid in match.gids),
}


def _not(negated: bool) -> str:
    return "! " if negated else ""


def _colon(numbers: NumberRange) -> str:
    return str(numbers).replace("-", ":")


def _upper(states: Iterable[str]) -> Iterable[str]:
    return (state.upper() for state in states)


def _decimal(mark: int, mask: int) -> str:
    return str(mark) if mask == ALL_BITS else f"{mark}/{mask}"


def _hexadecimal(mark: int, mask: int) -> str:
    return f"{mark:#x}" if mask == ALL_BITS else f"{mark:#x}/{mask:#x}"


# --- actions ----------------------------------------------------------------------------------------------------------


def _written_action(action: Action) -> str:
    return "-j " + _ACTION_TEXT[type(action)](action)


def _saved_action(action: Action, family: Family) -> str:
    match action:
        case SetMark(mark):
            return f"-j MARK --set-xmark {mark:#x}/0xffffffff"
        case SaveMark():
            return "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff"
        case RestoreMark():
            return "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
        case TransparentProxy(port, mark):
            any_address = "0.0.0.0" if family is Family.V4 else "::"
            return f"-j TPROXY --on-port {port} --on-ip {any_address} --tproxy-mark {mark:#x}/0xffffffff"
    return _written_action(action)


_ACTION_TEXT: dict[type[Any], Callable[[Any], str]] = {
    Accept: lambda _: "ACCEPT",
    Drop: lambda _: "DROP",
    Return: lambda _: "RETURN",
    Jump: lambda action: action.chain,
    Redirect: lambda action: f"REDIRECT --to-ports {action.port}",
    TransparentProxy: lambda action: f"TPROXY --tproxy-mark {action.mark}/0xffffffff --on-port {action.port}",
    SetMark: lambda action: f"MARK --set-mark {action.mark}",
    SaveMark: lambda _: "CONNMARK --save-mark",
    RestoreMark: lambda _: "CONNMARK --restore-mark",
    ConntrackZone: lambda action: f"CT --zone {action.zone}",
}
