"""nft's listings of sets, and the commands that change them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.host import nftset
from meshcni.host.nftset import Block, blocks

LISTING = """\
table inet istio-ambient-nat {
	comment "table { set fake { } }"
	set istio-inpod-probes-v4 {
		type ipv4_addr
		comment "elements = { 1.2.3.4 }"
		elements = { 10.0.0.1 comment "one", 10.0.0.2,
				10.0.0.3 timeout 1h expires 59m58s comment "three, {3} = \\ ;
on two lines",
				10.0.0.4 counter packets 0 bytes 0 comment "" }
	}

	set istio-inpod-probes-v6 {
		type ipv6_addr
		elements = { fd00::1 comment "six",
				::ffff:10.0.0.1 }
	}

	set nets {
		type ipv4_addr
		flags interval
		elements = { 10.0.0.0/24, 10.1.0.1-10.1.0.5 comment "range", 10.2.0.1 }
	}

	map where {
		type ipv4_addr : verdict
		elements = { 10.0.0.1 : jump postrouting }
	}

	ct helper ftp {
		type "ftp" protocol tcp
		l3proto ip
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip daddr { 10.9.0.1, 10.9.0.2 } accept
		meta l4proto tcp ip daddr @istio-inpod-probes-v4 counter packets 0 bytes 0 snat to 169.254.7.127
	}
}
"""


def test_objects_of_a_table() -> None:
    assert [(block.kind, block.name) for block in blocks(LISTING)] == [
        ("set", "istio-inpod-probes-v4"),
        ("set", "istio-inpod-probes-v6"),
        ("set", "nets"),
        ("map", "where"),
        ("helper", "ftp"),
        ("chain", "postrouting"),
    ]


def test_elements() -> None:
    v4, v6, nets, *others = blocks(LISTING)
    assert v4.elements == {
        IPv4Address("10.0.0.1"): "one",
        IPv4Address("10.0.0.2"): "",
        IPv4Address("10.0.0.3"): "three, {3} = \\ ;\non two lines",
        IPv4Address("10.0.0.4"): "",
    }
    assert v6.elements == {IPv6Address("fd00::1"): "six", IPv6Address("::ffff:10.0.0.1"): ""}
    assert nets.elements == {IPv4Address("10.2.0.1"): ""}
    assert [block.elements for block in others[1:]] == [{}, {}]


def test_who_looks_into_a_set() -> None:
    users = [block.name for block in blocks(LISTING) if block.mentions("istio-inpod-probes-v4")]
    assert users == ["postrouting"]
    assert not any(block.mentions("istio-inpod-probes-v6") for block in blocks(LISTING))


@pytest.mark.parametrize(
    "listing",
    [
        "",
        "table inet t {\n}\n",
        "table inet t {\n\tset s {\n\t\ttype ipv4_addr\n\t}\n}\n",
        "table inet t { # handle 1\n}\n",
    ],
)
def test_listings_without_elements(listing: str) -> None:
    assert all(block.elements == {} for block in blocks(listing))


ADDRESSES = st.ip_addresses(v=4) | st.ip_addresses(v=6)
# Whatever nft can hold between its quotes.
COMMENTS = st.text(st.characters(blacklist_characters='"\0', blacklist_categories=["Cs"]), max_size=40)


def listing_of(name: str, elements: dict[IPv4Address | IPv6Address, str], per_line: int) -> str:
    """What nft prints: several elements to a line, those without a comment without the word."""
    texts = [f'{address} comment "{comment}"' if comment else str(address) for address, comment in elements.items()]
    lines = [", ".join(texts[start : start + per_line]) for start in range(0, len(texts), per_line)]
    listed = "\t\telements = { " + ",\n\t\t\t     ".join(lines) + " }\n" if texts else ""
    return f"table inet t {{\n\tset {name} {{\n\t\ttype ipv4_addr\n{listed}\t}}\n}}\n"


@given(st.dictionaries(ADDRESSES, COMMENTS, max_size=12), st.integers(1, 3))
def test_whatever_was_put_in_is_read(elements: dict[IPv4Address | IPv6Address, str], per_line: int) -> None:
    (block,) = blocks(listing_of("s", elements, per_line))
    assert (block.kind, block.name) == ("set", "s")
    assert block.elements == elements


@given(st.text(max_size=200) | st.lists(st.sampled_from(LISTING.split() + list('{},="\n')), max_size=60).map(" ".join))
def test_no_listing_is_a_traceback(listing: str) -> None:
    for block in blocks(listing):
        assert isinstance(block, Block)
        assert all(isinstance(comment, str) for comment in block.elements.values())
        block.mentions("s")


@given(st.integers(0, len(LISTING)), st.text(max_size=3))
def test_a_listing_with_something_put_in(at: int, text: str) -> None:
    for block in blocks(LISTING[:at] + text + LISTING[at:]):
        assert all(isinstance(comment, str) for comment in block.elements.values())


def test_commands() -> None:
    two = {ip_address("10.0.0.1"): "a", ip_address("10.0.0.2"): "b"}
    assert nftset.replace("t", "s", two).splitlines() == [
        'add element inet t s { 10.0.0.1 comment "a", 10.0.0.2 comment "b" }',
        "delete element inet t s { 10.0.0.1, 10.0.0.2 }",
        'add element inet t s { 10.0.0.1 comment "a", 10.0.0.2 comment "b" }',
    ]
    assert nftset.delete("t", "s", two).splitlines() == [
        "add element inet t s { 10.0.0.1, 10.0.0.2 }",
        "delete element inet t s { 10.0.0.1, 10.0.0.2 }",
    ]


def test_only_what_is_wrong_is_replaced() -> None:
    one, two, three = map(ip_address, ("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    wanted, there = {one: "a", two: "b", three: "c"}, {one: "a", two: "x", ip_address("10.0.0.4"): "d"}
    assert nftset.put("t", "s", wanted, there).splitlines() == [
        'create element inet t s { 10.0.0.3 comment "c" }',
        'add element inet t s { 10.0.0.2 comment "b" }',
        "delete element inet t s { 10.0.0.2 }",
        'add element inet t s { 10.0.0.2 comment "b" }',
    ]
    assert nftset.put("t", "s", wanted, wanted) == ""
