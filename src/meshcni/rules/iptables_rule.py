"""One rule in iptables' words, in two spellings: as people write it and as iptables-save prints it.

iptables-save (1.8.9, legacy and nft alike) prints addresses first, then interfaces, protocol and extensions in the
order in which they were typed, which the kernel keeps and `iptables -C` compares; it adds defaults (`-m tcp`, masks)
and turns marks into hexadecimal.
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
    ProtocolExtension,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetConnectionMark,
    SetMark,
    SocketExists,
    SocketGroup,
    SocketUser,
    Source,
    SourcePort,
    SourceTranslation,
    TransparentProxy,
)

ALL_BITS = 0xFFFFFFFF

# Where a match stands in the text: these first, then extensions as given.
_WRITTEN_ORDER: tuple[type[Any], ...] = (InInterface, OutInterface, OtherOutInterface, Source, Destination, Protocol)
_SAVED_ORDER: tuple[type[Any], ...] = (Source, Destination, InInterface, OutInterface, OtherOutInterface, Protocol)
# With nft the original looks at a connection's state before the port, with iptables after everything else.
_LAST: tuple[type[Any], ...] = (ConnectionState,)


def written(rule: Rule) -> str:
    """Return the rule as people write it: `-p tcp --dport 15008 -j RETURN`."""
    matches = _in_order(rule, _WRITTEN_ORDER)
    return " ".join([*map(_written_match, matches), _written_action(rule.action)])


def saved(rule: Rule, family: Family) -> str:
    """Return the rule as iptables-save prints it for `family`: `-p tcp -m tcp --dport 15008 -j RETURN`."""
    matches = _in_order(rule, _SAVED_ORDER)
    return " ".join([*filter(None, map(_saved_match, matches)), _saved_action(rule.action, family)])


def _in_order(rule: Rule, basics: tuple[type[Any], ...]) -> list[Match]:
    places = {kind: place for place, kind in enumerate(basics)} | dict.fromkeys(_LAST, len(basics) + 1)
    # A port names its protocol; iptables wants it said once, before.
    protocols = [Protocol(match.protocol) for match in rule.matches if isinstance(match, SourcePort | DestinationPort)]
    matches = list(dict.fromkeys([*protocols, *rule.matches]))
    return sorted(matches, key=lambda match: places.get(type(match), len(basics)))


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
    OtherOutInterface: lambda match: f"! -o {match.name}",
    Source: lambda match: f"{_not(match.negated)}-s {match.network}",
    Destination: lambda match: f"{_not(match.negated)}-d {match.network}",
    DestinationInSet: lambda match: f"-m set --match-set {match.name} dst",
    Protocol: lambda match: f"-p {match.name}",
    ProtocolExtension: lambda match: f"-m {match.name}",
    SourcePort: lambda match: f"--sport {','.join(map(_colon, match.ports))}",
    DestinationPort: _destination_port,
    ConnectionState: lambda match: f"-m conntrack --ctstate {','.join(_upper(match.states))}",
    PacketMark: lambda match: f"-m mark {_not(match.negated)}--mark {_plain(match.mark, match.mask)}",
    ConnectionMark: lambda match: f"-m connmark {_not(match.negated)}--mark {_plain(match.mark, match.mask)}",
    SocketExists: lambda _: "-m owner --socket-exists",
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


def _plain(mark: int, mask: int) -> str:
    """Return a whole mark as the decimal number that people set; with a mask the bits are what matters."""
    return str(mark) if mask == ALL_BITS else _hexadecimal(mark, mask)


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
    SetConnectionMark: lambda action: f"CONNMARK --set-xmark {action.mark:#x}/{action.mask:#x}",
    SourceTranslation: lambda action: f"SNAT --to-source {action.address}",
    ConntrackZone: lambda action: f"CT --zone {action.zone}",
}
