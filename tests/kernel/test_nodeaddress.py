"""The node's own address as the kernel would choose it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kernel.world import Netns

from meshcni.host.nodeaddress import node_address
from meshcni.rules.model import Family

ETH0 = ("link set lo up", "link add eth0 type veth peer name peer0", "link set eth0 up", "link set peer0 up")
DUMMY = ("link add ipvs0 type veth peer name ipvs1", "link set ipvs0 up", "addr add 10.96.0.10/32 dev ipvs0")


@pytest.fixture
def netns() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


def addresses(netns: Netns) -> tuple[str, str]:
    return tuple(str(netns.call(lambda family=family: node_address(family))) for family in Family)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), ("None", "None")),
        (("link set lo up",), ("None", "None")),
        (ETH0, ("None", "None")),  # link-local addresses only
        ((*ETH0, "addr add 10.0.0.5/24 dev eth0"), ("10.0.0.5", "None")),
        ((*ETH0, "addr add 10.0.0.5/24 dev eth0", "route add default via 10.0.0.1"), ("10.0.0.5", "None")),
        (
            (*ETH0, "addr add 10.0.0.5/24 dev eth0", "addr add 10.0.0.6/24 dev eth0", "route add default via 10.0.0.1"),
            ("10.0.0.5", "None"),
        ),
        (
            (
                *ETH0,
                "addr add 10.0.0.5/24 dev eth0",
                "addr add 10.0.0.6/24 dev eth0",
                "route add default via 10.0.0.1 src 10.0.0.6",
            ),
            ("10.0.0.6", "None"),
        ),
        (
            (*DUMMY, *ETH0, "addr add 10.0.0.5/24 dev eth0", "route add default via 10.0.0.1"),
            ("10.0.0.5", "None"),
        ),
        (
            (*ETH0, "addr add 169.254.20.10/32 dev eth0", "addr add 10.0.0.5/24 dev eth0 scope global"),
            ("10.0.0.5", "None"),
        ),
        ((*ETH0, "addr add 10.0.0.5/24 dev eth0 scope link"), ("None", "None")),
        ((*ETH0, "addr add 10.0.0.5/32 dev lo"), ("None", "None")),
        (  # an address that the routing protocol announces
            (
                *ETH0,
                "addr add 10.0.0.5/32 dev lo",
                "addr add 192.168.9.2/24 dev eth0",
                "route add default via 192.168.9.1 src 10.0.0.5",
            ),
            ("10.0.0.5", "None"),
        ),
        ((*ETH0, "addr add 10.0.0.5/24 dev eth0", "route add blackhole default"), ("10.0.0.5", "None")),
        ((*ETH0, "addr add 10.0.0.5/24 dev eth0", "route add unreachable 192.0.2.0/24"), ("10.0.0.5", "None")),
        ((*ETH0, "addr add fd00::5/64 dev eth0 nodad"), ("None", "fd00::5")),
        (
            (
                *ETH0,
                "addr add 10.0.0.5/24 dev eth0",
                "addr add fd00::5/64 dev eth0 nodad",
                "addr add 2001:db8:5::5/64 dev eth0 nodad",
                "route add default via 10.0.0.1",
                "route add default via 2001:db8:5::1",
            ),
            ("10.0.0.5", "2001:db8:5::5"),
        ),
        ((*ETH0, "addr add fd00::5/64 dev eth0 nodad", "route add unreachable 2001:db8::/32"), ("None", "fd00::5")),
    ],
)
def test_addresses(netns: Netns, lines: tuple[str, ...], expected: tuple[str, str]) -> None:
    if lines:
        netns.ip(*lines)
    assert addresses(netns) == expected


def test_without_ipv6(netns: Netns) -> None:
    netns.shell("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    netns.ip(*ETH0, "addr add 10.0.0.5/24 dev eth0", "route add default via 10.0.0.1")
    assert addresses(netns) == ("10.0.0.5", "None")
