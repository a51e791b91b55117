"""Texts of annotations and variables, read item by item."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.pods.interception import EVERYTHING, NumberRange
from meshcni.pods.values import (
    read_cidr_selection,
    read_group_selection,
    read_id_ranges,
    read_interfaces,
    read_loopback,
    read_port_selection,
    read_ports,
    read_prefix,
    read_prefixes,
)


def ranges(*numbers: int | tuple[int, int]) -> tuple[NumberRange, ...]:
    return tuple(NumberRange(*one) if isinstance(one, tuple) else NumberRange.single(one) for one in numbers)


Reader = Callable[[str], object]

READ: dict[str, tuple[Reader, str, object]] = {
    "no port": (read_ports, "", ()),
    "only blanks": (read_ports, "  ", ()),
    "one port": (read_ports, "80", ranges(80)),
    "lowest and highest port": (read_ports, "0,65535", ranges(0, 65535)),
    "trimmed": (read_ports, " 80 ,\t443 ", ranges(80, 443)),
    "numeric": (read_ports, "0080,00", ranges(80, 0)),
    "without repetitions, first one stays": (read_ports, "443,80,443,080", ranges(443, 80)),
    "one trailing comma": (read_ports, "80,443,", ranges(80, 443)),
    "one trailing comma and a blank": (read_ports, "80, ", ranges(80)),
    "all ports": (read_port_selection, "*", EVERYTHING),
    "all ports, blanks": (read_port_selection, " * ", EVERYTHING),
    "some ports": (read_port_selection, "80,81", ranges(80, 81)),
    "none of the ports": (read_port_selection, "", ()),
    "prefixes of both families": (
        read_prefixes,
        "10.0.0.0/8, fd00::/8",
        (ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
    ),
    "prefix with host bits": (read_prefixes, "10.1.2.3/8,10.9.9.9/8", (ip_network("10.0.0.0/8"),)),
    "prefix of everything": (read_prefixes, "0.0.0.0/0,::/0", (ip_network("0.0.0.0/0"), ip_network("::/0"))),
    "all destinations": (read_cidr_selection, "*", EVERYTHING),
    "no destination": (read_cidr_selection, "", ()),
    "mapped": (read_cidr_selection, "::ffff:10.0.0.0/104", (ip_network("::ffff:10.0.0.0/104"),)),
    "interfaces": (read_interfaces, "eth1, net-1.5_x,eth1,", ("eth1", "net-1.5_x")),
    "interface of 15 letters": (read_interfaces, "a23456789012345", ("a23456789012345",)),
    "all groups": (read_group_selection, "*", EVERYTHING),
    "no group": (read_group_selection, "", ()),
    "groups": (read_group_selection, "202, 1000-1999,202", ranges(202, (1000, 1999))),
    "64 groups": (read_group_selection, ",".join(map(str, range(64))), ranges(*range(64))),
    "highest id": (read_id_ranges, "4294967294", ranges(4294967294)),
    "loopback": (read_loopback, "127.0.0.1/32", ip_network("127.0.0.1/32")),
    "all of loopback": (read_loopback, " 127.1.2.3/8 ", ip_network("127.0.0.0/8")),
}


@pytest.mark.parametrize(("read", "text", "value"), READ.values(), ids=READ)
def test_read(read: Reader, text: str, value: object) -> None:
    assert read(text) == value


PORT, PREFIX, NAME = "no port: write a decimal number", "no prefix: write ADDRESS/LENGTH", "no interface name"
EMPTY_ITEM, STAR, ID = "an item between commas is empty", "'*' cannot be excluded", "no id: write a number"

REFUSED: dict[str, tuple[Reader, str, str]] = {
    "port too high": (read_ports, "65536", PORT),
    "port far too high": (read_ports, "9" * 5000, PORT),
    "port with a sign": (read_ports, "+80", PORT),
    "negative port": (read_ports, "-80", PORT),
    "hexadecimal port": (read_ports, "0x50", PORT),
    "service name": (read_ports, "http", PORT),
    "port range": (read_ports, "80-90", PORT),
    "port range with a colon": (read_ports, "80:90", PORT),
    "port with an inner blank": (read_ports, "8 0", PORT),
    "port with an underscore": (read_ports, "8_0", PORT),
    "digits of another script": (read_ports, "٨٠", PORT),
    "empty item": (read_ports, "80,,443", EMPTY_ITEM),
    "leading comma": (read_ports, ",80", EMPTY_ITEM),
    "only a comma": (read_ports, ",", EMPTY_ITEM),
    "two trailing commas": (read_ports, "80,,", EMPTY_ITEM),
    "star among excluded ports": (read_ports, "*", STAR),
    "star in a list of excluded ports": (read_ports, "80, *", STAR),
    "star in a list of included ports": (read_port_selection, "80,*", PORT),
    "star among excluded prefixes": (read_prefixes, "*", STAR),
    "star in a list of included prefixes": (read_cidr_selection, "*,10.0.0.0/8", PREFIX),
    "address without a length": (read_prefixes, "10.0.0.1", PREFIX),
    "empty length": (read_prefixes, "10.0.0.0/", PREFIX),
    "length with a leading zero": (read_prefixes, "10.0.0.0/08", PREFIX),
    "length with a sign": (read_prefixes, "10.0.0.0/+8", PREFIX),
    "length too long": (read_prefixes, "10.0.0.0/33", PREFIX),
    "IPv6 length too long": (read_prefixes, "fd00::/129", PREFIX),
    "netmask": (read_prefixes, "10.0.0.0/255.0.0.0", PREFIX),
    "leading zero in the address": (read_prefixes, "10.0.0.01/8", PREFIX),
    "three parts": (read_prefixes, "10.0.0/8", PREFIX),
    "number for an address": (read_prefixes, "167772160/8", PREFIX),
    "zone": (read_prefixes, "fe80::1%eth0/64", PREFIX),
    "blank within": (read_prefixes, "10.0.0.0 /8", PREFIX),
    "five digits": (read_prefixes, "fd000::/8", PREFIX),
    "name": (read_prefixes, "localhost/8", PREFIX),
    "interface that begins with a digit": (read_interfaces, "0eth", NAME),
    "interface of 16 letters": (read_interfaces, "a234567890123456", NAME),
    "interface with a blank": (read_interfaces, "eth 1", NAME),
    "interface with a slash": (read_interfaces, "eth/1", NAME),
    "interface with a wildcard": (read_interfaces, "eth+", NAME),
    "interface with a line end": (read_interfaces, "eth0\n-j ACCEPT", NAME),
    "empty interface": (read_interfaces, "eth0,,eth1", EMPTY_ITEM),
    "65 groups": (read_group_selection, ",".join(map(str, range(65))), "65 groups: at most 64"),
    "group name": (read_group_selection, "java", ID),
    "group too high": (read_id_ranges, "4294967295", ID),
    "half a range": (read_id_ranges, "5-", ID),
    "empty range": (read_id_ranges, "9-5", "empty range"),
    "loopback elsewhere": (read_loopback, "10.0.0.0/8", "no IPv4 loopback prefix"),
    "loopback too wide": (read_loopback, "127.0.0.0/7", "no IPv4 loopback prefix"),
    "IPv6 loopback": (read_loopback, "::1/128", "no IPv4 loopback prefix"),
    "empty loopback": (read_loopback, "", PREFIX),
}


@pytest.mark.parametrize(("read", "text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(read: Reader, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(text)
    assert message in str(caught.value)


PREFIXES = st.builds(
    lambda address, length: f"{address}/{length}", st.ip_addresses(v=4), st.integers(min_value=0, max_value=32)
)


@given(st.lists(st.integers(0, 65535).map(str) | st.integers(0, 99).map(lambda port: f" 0{port} "), max_size=9))
def test_reading_ports_is_idempotent(items: list[str]) -> None:
    once = read_ports(",".join(items))
    assert read_ports(",".join(map(str, once))) == once
    assert len(set(once)) == len(once)


@given(st.lists(PREFIXES, max_size=9))
def test_reading_prefixes_is_idempotent_and_masks(items: list[str]) -> None:
    once = read_prefixes(",".join(items))
    assert read_prefixes(",".join(map(str, once))) == once
    assert set(once) == {ip_network(item, strict=False) for item in items}


@given(st.from_regex(r"[0-9a-f:./%]{0,20}", fullmatch=True))
def test_whatever_is_taken_for_a_prefix_writes_address_and_length(text: str) -> None:
    try:
        network = read_prefix(text)
    except ValueError:
        return
    address, _, length = text.partition("/")
    assert (network.prefixlen, network) == (int(length), ip_network(f"{address}/{length}", strict=False))
