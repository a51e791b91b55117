"""Random interception parameters within what the annotations and flags admit."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from hypothesis import strategies as st

from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, NumberRange
from meshcni.rules.model import Family


def number_ranges(highest: int) -> st.SearchStrategy[NumberRange]:
    numbers = st.integers(0, highest)
    return st.one_of(
        numbers.map(NumberRange.single),
        st.tuples(numbers, numbers).map(lambda pair: NumberRange(min(pair), max(pair))),
    )


PORTS = st.integers(0, 65535)
PORT_LISTS = st.lists(number_ranges(65535), max_size=4, unique=True).map(tuple)
IDS = number_ranges(2**32 - 2)
ID_LISTS = st.lists(IDS, max_size=3, unique=True).map(tuple)
NETWORKS = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda pair: IPv4Network(pair, strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(lambda pair: IPv6Network(pair, strict=False)),
    st.sampled_from(
        [IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"), IPv4Network("0.0.0.0/0"), IPv6Network("::/0")]
    ),
)
NETWORK_LISTS = st.lists(NETWORKS, max_size=4, unique=True).map(tuple)
INTERFACES = st.sampled_from(["eth1", "net1", "eth0.100", "k6t-eth0", "ip", "counter", "a_b", "fifteen-letters"])
INTERFACE_LISTS = st.lists(INTERFACES, max_size=3, unique=True).map(tuple)
MARKS = st.integers(1, 2**32 - 1)
SERVERS = st.one_of(
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.integers(0, 2**128 - 1).map(IPv6Address),
)

INTERCEPTIONS: st.SearchStrategy[Interception] = st.builds(
    Interception,
    mode=st.sampled_from(InterceptionMode),
    proxy_port=st.integers(1, 65535),
    inbound_capture_port=st.integers(1, 65535),
    inbound_tunnel_port=PORTS,
    proxy_uids=ID_LISTS,
    proxy_gids=ID_LISTS,
    inbound_ports=st.one_of(st.just(EVERYTHING), PORT_LISTS),
    inbound_exclude_ports=PORT_LISTS,
    outbound_ports=st.one_of(st.just(EVERYTHING), PORT_LISTS),
    outbound_exclude_ports=PORT_LISTS,
    outbound_cidrs=st.one_of(st.just(EVERYTHING), NETWORK_LISTS),
    outbound_exclude_cidrs=NETWORK_LISTS,
    exclude_interfaces=INTERFACE_LISTS,
    virtual_interfaces=INTERFACE_LISTS,
    redirect_dns=st.booleans(),
    capture_all_dns=st.booleans(),
    dns_servers=st.lists(SERVERS, max_size=3, unique=True).map(tuple),
    drop_invalid=st.booleans(),
    owner_groups=st.one_of(st.just(EVERYTHING), ID_LISTS),
    owner_groups_exclude=ID_LISTS,
    tproxy_mark=MARKS,
    tproxy_table=st.integers(1, 2**32 - 1),
    loopback_cidr=st.integers(8, 32).map(lambda length: IPv4Network((0x7F000001, length), strict=False)),
)

FAMILIES = st.sampled_from([frozenset({Family.V4}), frozenset({Family.V6}), frozenset(Family)])
