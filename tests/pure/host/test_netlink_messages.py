"""What the kernel answers about sets, rules and routes: answers recorded on Linux 6.18, and any bytes at all."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.host.ipset import SetEntry, SetHeader, read_entries, read_header
from meshcni.host.netlink import attribute, attributes
from meshcni.host.rtnetlink import PlainRule, Route, read_device_routes, read_plain_rule

# create probes hash:ip comment; add probes 10.77.0.2 comment 6b3f-uid; add probes 10.77.0.3
PROBES = bytes.fromhex(
    "0200000005000100060000000b00020070726f62657300000c000300686173683a69700005000500020000000500040006000000440007"
    "8008001240000004000800134000010000050015000c00000008001140f100ca8e080019400000000108001a4000000171080018400000"
    "0002080008400000001034000880100007800c000180080001000a4d0003200007800c000180080001000a4d00020d001a00366233662d"
    "75696400000000"
)
# create six hash:ip family inet6 timeout 60; add six fd00::1
SIX = bytes.fromhex(
    "02000000050001000600000008000200736978000c000300686173683a697000050005000a000000050004000600000044000780080012"
    "40000004000800134000010000050015000c00000008001140e6698f3f080019400000000008001a400000013008001840000000010800"
    "06400000003c28000880240007801800018014000200fd000000000000000000000000000001080006400000003b"
)
# create l list:set; add l probes
HOLDER = bytes.fromhex(
    "020000000500010006000000060002006c0000000d0003006c6973743a7365740000000005000500000000000500040003000000240007"
    "800800174000000008080019400000000008001a4000000080080018400000000114000880100007800b00120070726f6265730000"
)
# create m hash:ip netmask 24
MASKED = bytes.fromhex(
    "020000000500010006000000060002006d0000000c000300686173683a6970000500050002000000050004000600000044000780080012"
    "400000040008001340000100000500140018000000050015000c00000008001140cc56fed9080019400000000008001a40000000d80800"
    "18400000000004000880"
)
# rule add iif vlanx lookup 101 priority 10
FROM_POD = bytes.fromhex(
    "02000000650000010000000008000f006500000008000e00ffffffff05001500000000000a000300766c616e78000000080006000a000000"
)
# rule add to 10.0.5.20 lookup 500 priority 512
TO_POD = bytes.fromhex(
    "02200000fc0000010000000008000f00f401000008000e00ffffffff05001500000000000800060000020000080001000a000514"
)
# rule add fwmark 1 to 10.0.5.20 lookup 101 priority 600
MARKED = bytes.fromhex(
    "02200000650000010000000008000f006500000008000e00ffffffff0500150000000000080006005802000008000a0001000000080010"
    "00ffffffff080001000a000514"
)
# what every namespace begins with
LOCAL = bytes.fromhex("02000000ff0000010000000008000f00ff00000008000e00ffffffff0500150002000000")
# -6 rule add iif vlanx lookup local priority 9
ANSWER = bytes.fromhex(
    "0a000000ff0000010000000008000f00ff00000008000e00ffffffff05001500000000000a000300766c616e780000000800060009000000"
)
# route add 10.0.5.20 dev vlanx table 101; route add default via 10.0.0.1 dev vlanx onlink table 500; two of lo
ROUTES = tuple(
    map(
        bytes.fromhex,
        (
            "022000006503fd011000000008000f0065000000080001000a0005140800040003000000",
            "02000000fc0300011400000008000f00f4010000080005000a0000010800040003000000",
            "02080000ff02fe020000000008000f00ff000000080001007f000000080007007f0000010800040001000000",
            "02200000ff02fe020000000008000f00ff000000080001007f000001080007007f0000010800040001000000",
            "02200000ff02fd030000000008000f00ff000000080001007fffffff080007007f0000010800040001000000",
        ),
    )
)


@pytest.mark.parametrize(
    ("answer", "header"),
    [
        (PROBES, SetHeader("probes", "hash:ip", socket.AF_INET, True, 1)),
        (SIX, SetHeader("six", "hash:ip", socket.AF_INET6, False, 0, "timeout 60")),
        (HOLDER, SetHeader("l", "list:set", 0, False, 0)),
        (MASKED, SetHeader("m", "hash:ip", socket.AF_INET, False, 0, "netmask 24")),
    ],
)
def test_headers(answer: bytes, header: SetHeader) -> None:
    assert read_header(answer) == header


@pytest.mark.parametrize(
    ("answer", "entries"),
    [
        (PROBES, [SetEntry(ip_address("10.77.0.3")), SetEntry(ip_address("10.77.0.2"), "6b3f-uid")]),
        (SIX, [SetEntry(ip_address("fd00::1"))]),
        (HOLDER, [SetEntry(None, member="probes")]),
        (MASKED, []),
    ],
)
def test_entries(answer: bytes, entries: list[SetEntry]) -> None:
    assert list(read_entries(answer)) == entries


def test_a_further_part_has_no_header() -> None:
    assert read_header(PROBES[:4] + attribute(2, b"probes\0")) is None


def test_a_comment_that_is_no_text() -> None:
    answer = PROBES.replace(b"6b3f-uid", b"\xff\x01\n\xd0\xba\0x")
    assert list(read_entries(answer))[1].comment == "\\xff\x01\nк"


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (FROM_POD, PlainRule(socket.AF_INET, 10, 101, interface="vlanx")),
        (TO_POD, PlainRule(socket.AF_INET, 512, 500, bytes((10, 0, 5, 20)), 32)),
        (LOCAL, PlainRule(socket.AF_INET, 0, 255)),
        (ANSWER, PlainRule(socket.AF_INET6, 9, 255, interface="vlanx")),
        (MARKED, None),
        (TO_POD[:7] + b"\x08" + TO_POD[8:], None),  # prohibit
        (TO_POD[:8] + b"\x02" + TO_POD[9:], None),  # not to
        (TO_POD[:3] + b"\x10" + TO_POD[4:], None),  # with a type of service
        (TO_POD[:2] + b"\x08" + TO_POD[3:], None),  # from a network
        (FROM_POD.replace(b"\xff" * 4, b"\0" * 4), None),  # suppress_prefixlength 0
        (FROM_POD + attribute(17, b"eth0\0"), None),  # oif
        (FROM_POD + attribute(250, b"\1"), None),  # something of a newer kernel
    ],
)
def test_rules(answer: bytes, rule: PlainRule | None) -> None:
    assert read_plain_rule(answer) == rule


def test_routes() -> None:
    pod, default = Route(bytes((10, 0, 5, 20)), 32, 3), Route(b"", 0, 3)
    assert read_device_routes(ROUTES, frozenset((101, 500))) == {101: [pod], 500: [default]}
    assert read_device_routes(ROUTES, frozenset((101,))) == {101: [pod]}
    assert read_device_routes(ROUTES, frozenset((254, 252))) == {}
    assert read_device_routes(ROUTES, frozenset((255,))) == {}  # none of them is a unicast route


ANSWERS = (PROBES, SIX, HOLDER, MASKED, FROM_POD, TO_POD, MARKED, LOCAL, ANSWER, *ROUTES)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An answer with some bytes exchanged, cut off, or doubled."""
    answer = bytearray(draw(st.sampled_from(ANSWERS)))
    for _ in range(draw(st.integers(0, 6))):
        answer[draw(st.integers(0, len(answer) - 1))] = draw(st.integers(0, 255))
    return bytes(answer[: draw(st.integers(12, len(answer)))]) + draw(st.sampled_from((b"", bytes(answer))))


@given(damaged() | st.binary(min_size=12, max_size=300))
def test_no_answer_is_a_traceback(answer: bytes) -> None:
    read_header(answer)
    list(read_entries(answer))
    read_plain_rule(answer)
    read_device_routes([answer], frozenset(range(0, 600, 7)))


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_come_back(pairs: list[tuple[int, bytes]]) -> None:
    assert list(attributes(b"".join(attribute(kind, value) for kind, value in pairs))) == pairs
