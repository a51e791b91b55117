"""A rule set as frozen values: tables, chains, rules (matches, one action, a why), policy rules, routes, addresses.

Matches of a rule stand in the order in which nft evaluates and lists them. The iptables renderer puts interface,
addresses and protocol first, because iptables-save prints them in its own order whatever was typed; match extensions
stay in the order given. A chain's rules stand in the order in which the kernel will hold them: inserts are resolved by
the builder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from meshcni.pods.interception import NumberRange


class Family(Enum):
    """An address family; a rule without one is for both."""

    V4 = 4
    V6 = 6


class TableName(Enum):
    """The netfilter tables of the contract, in the order in which nft transactions declare them."""

    NAT = "nat"
    MANGLE = "mangle"
    RAW = "raw"
    FILTER = "filter"


class Backend(Enum):
    """Who programs the kernel."""

    IPTABLES = "iptables"
    NFTABLES = "nftables"


class Purpose(Enum):
    """What a rule set is for, which decides how nft tables are named and what in a namespace is ours.

    The value is the name of the command that shows such rules: `meshcni rules sidecar`.
    """

    SIDECAR = "sidecar"
    AMBIENT_POD = "ambient-pod"
    # The host's network namespace, where everything but the one chain of ours is other people's.
    AMBIENT_HOST = "ambient-host"


# --- matches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InInterface:
    """Arrived on interface `name` (at most 15 bytes); a final `+` stands for any rest, as in iptables."""

    name: str


@dataclass(frozen=True, slots=True)
class OutInterface:
    """Leaves by interface `name` (at most 15 bytes); a final `+` stands for any rest, as in iptables."""

    name: str


@dataclass(frozen=True, slots=True)
class OtherOutInterface:
    """Leaves by any interface but `name` (at most 15 bytes); a final `+` stands for any rest, as in iptables."""

    name: str


@dataclass(frozen=True, slots=True)
class Protocol:
    """Transport protocol, `tcp` or `udp`."""

    name: str


@dataclass(frozen=True, slots=True)
class ProtocolExtension:
    """iptables' match extension of transport protocol `name` without a condition: the kernel keeps the bare word.

    No nft rule has one.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """Source address in (or, negated, not in) a network."""

    network: IPv4Network | IPv6Network
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Destination:
    """Destination address in (or, negated, not in) a network."""

    network: IPv4Network | IPv6Network
    negated: bool = False


@dataclass(frozen=True, slots=True)
class DestinationInSet:
    """Destination address is in the address set `name` (an ipset, or a set of the rule's own nft table)."""

    name: str
    family: Family


@dataclass(frozen=True, slots=True)
class DestinationPort:
    """Destination port of `protocol` is one of `ports` (more than one: iptables' multiport, an anonymous nft set)."""

    protocol: str
    ports: tuple[NumberRange, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class SourcePort:
    """Source port of `protocol` is in `ports`."""

    protocol: str
    ports: tuple[NumberRange, ...]


@dataclass(frozen=True, slots=True)
class SocketUser:
    """The sending socket's user id."""

    uid: NumberRange
    negated: bool = False


@dataclass(frozen=True, slots=True)
class SocketGroup:
    """The sending socket's group id."""

    gid: NumberRange
    negated: bool = False


@dataclass(frozen=True, slots=True)
class OtherSocketGroup:
    """The sending socket's group id is none of `gids` (at least one)."""

    gids: tuple[NumberRange, ...]


@dataclass(frozen=True, slots=True)
class SocketExists:
    """Sent by a socket of this namespace, not forwarded. iptables only."""


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """Connection tracking state is one of `states` (`invalid`, `related`, `established`), in listing order."""

    states: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PacketMark:
    """The packet's mark under `mask`."""

    mark: int
    mask: int = 0xFFFFFFFF
    negated: bool = False


@dataclass(frozen=True, slots=True)
class ConnectionMark:
    """The connection's mark under `mask`."""

    mark: int
    mask: int = 0xFFFFFFFF
    negated: bool = False


Match = (
    InInterface
    | OutInterface
    | OtherOutInterface
    | Protocol
    | ProtocolExtension
    | Source
    | Destination
    | DestinationInSet
    | DestinationPort
    | SourcePort
    | SocketUser
    | SocketGroup
    | OtherSocketGroup
    | SocketExists
    | ConnectionState
    | PacketMark
    | ConnectionMark
)


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accept:
    """Let the packet pass this hook."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Discard the packet."""


@dataclass(frozen=True, slots=True)
class Return:
    """Go back to the calling chain."""


@dataclass(frozen=True, slots=True)
class Jump:
    """Continue in chain `chain` (the name as in the model: iptables spelling, see `Chain.name`)."""

    chain: str


@dataclass(frozen=True, slots=True)
class Redirect:
    """Change the destination to this host's `port`."""

    port: int


@dataclass(frozen=True, slots=True)
class TransparentProxy:
    """Deliver to the local socket on `port` with the destination kept, and mark the packet."""

    port: int
    mark: int


@dataclass(frozen=True, slots=True)
class SetMark:
    """Set the packet's mark."""

    mark: int


@dataclass(frozen=True, slots=True)
class SaveMark:
    """Copy the packet's mark to its connection."""


@dataclass(frozen=True, slots=True)
class RestoreMark:
    """Copy the connection's mark to the packet."""


@dataclass(frozen=True, slots=True)
class SetConnectionMark:
    """Set those bits of the connection's mark that are in `mask`."""

    mark: int
    mask: int


@dataclass(frozen=True, slots=True)
class SourceTranslation:
    """Change the source to `address`."""

    address: IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class ConntrackZone:
    """Track the packet in conntrack zone `zone`."""

    zone: int


Action = (
    Accept
    | Drop
    | Return
    | Jump
    | Redirect
    | TransparentProxy
    | SetMark
    | SaveMark
    | RestoreMark
    | SetConnectionMark
    | SourceTranslation
    | ConntrackZone
)


BUILT_IN_CHAINS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")


# --- rule sets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; `why` is a sentence a person understands, `family` is None for both families.

    `is_counted` tells whether an nft rule counts its packets; every iptables rule does.
    """

    matches: tuple[Match, ...]
    action: Action
    why: str
    family: Family | None = None
    is_counted: bool = True


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain with its rules in kernel order.

    `name` is the iptables spelling (`PREROUTING`, `ISTIO_INBOUND`); the nft renderer maps it (`prerouting`,
    `istio-inbound`). Built-in chains are other people's too: of them a rule set holds only our entries, the first
    `inserted` of which go before everybody else's, the others behind.
    """

    name: str
    rules: tuple[Rule, ...]
    inserted: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """A table and its chains in creation order."""

    name: TableName
    chains: tuple[Chain, ...]


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """`ip rule`: packets with `mark` are looked up in routing table `table`."""

    family: Family
    mark: int
    table: int
    mask: int = 0xFFFFFFFF
    priority: int | None = None  # None: the kernel chooses


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """`ip route add local DESTINATION dev lo table TABLE`."""

    destination: IPv4Network | IPv6Network
    table: int


@dataclass(frozen=True, slots=True)
class LoopbackAddress:
    """An address on `lo` that the rules rely on."""

    address: IPv4Address | IPv6Address
    prefix_length: int


@dataclass(frozen=True, slots=True)
class Ruleset:
    """All that one owner programs in one network namespace, for the families in `families`."""

    families: frozenset[Family]
    tables: tuple[Table, ...]
    policy_rules: tuple[PolicyRule, ...] = ()
    routes: tuple[LocalRoute, ...] = ()
    addresses: tuple[LoopbackAddress, ...] = ()
    purpose: Purpose = Purpose.SIDECAR
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash once: rule sets are keys of what is remembered (rules/remember.py), and have hundreds of parts."""
        parts = (self.families, self.tables, self.policy_rules, self.routes, self.addresses, self.purpose)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash

    @property
    def size(self) -> int:
        """How many packet rules it holds."""
        return sum(len(chain.rules) for table in self.tables for chain in table.chains)

    def for_family(self, family: Family) -> tuple[Table, ...]:
        """Return what of the tables concerns `family`: its rules, and the chains that hold some or are jumped to.

        The order is kept; tables without anything for the family are left out. A rule set that is not for `family`
        gives nothing.
        """
        if family not in self.families:
            return ()
        return tuple(view for table in self.tables if (view := _table_view(table, family)).chains)


def _table_view(table: Table, family: Family) -> Table:
    chains = tuple(_chain_view(chain, family) for chain in table.chains)
    targets = {rule.action.chain for chain in chains for rule in chain.rules if isinstance(rule.action, Jump)}
    return Table(table.name, tuple(chain for chain in chains if chain.rules or chain.name in targets))


def _chain_view(chain: Chain, family: Family) -> Chain:
    def concerned(rule: Rule) -> bool:
        return rule.family in (None, family)

    rules = tuple(filter(concerned, chain.rules))
    return Chain(chain.name, rules, inserted=sum(map(concerned, chain.rules[: chain.inserted])))
