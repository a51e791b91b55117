"""What a pod's annotations make of the node's ambient parameters."""

from __future__ import annotations

import re
import string
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import PodSpecError
from meshcni.pods.ambient import MAX_INTERFACES, AmbientParameters, derive_ambient, read_interfaces

DNS = "ambient.istio.io/dns-capture"
BYPASS = "ambient.istio.io/bypass-inbound-capture"
INTERFACES = "istio.io/reroute-virtual-interfaces"

TRUE = ("1", "t", "T", "true", "TRUE", "True")
FALSE = ("0", "f", "F", "false", "FALSE", "False")
NEITHER = ("", " ", "yes", "no", "on", "off", "tRUE", "true ", " true", "2", "-1", "01", "enabled", "\u0661", "trüe")

SAFE = set(string.ascii_letters + string.digits + "_.:@-+")
# What would mean something to iptables-restore, to nft or to a shell.
UNSAFE = set(" \t\r\n\v\f\0\"'`\\{}[]();#$&|<>!*?~^%=/,\u2028\u00a0é") | {chr(number) for number in range(32)}


def test_defaults_of_the_node_without_annotations() -> None:
    node = AmbientParameters(dns_capture=True, virtual_interfaces=("net1",), probe_v4=IPv4Address("192.0.2.1"))
    derived = derive_ambient({}, node)
    assert derived.parameters == node
    assert (dict(derived.origins), derived.warnings) == ({}, ())


def test_all_together() -> None:
    derived = derive_ambient({DNS: "true", BYPASS: "1", INTERFACES: "net1, net2"}, AmbientParameters())
    assert derived.parameters == AmbientParameters(dns_capture=True, ingress=True, virtual_interfaces=("net1", "net2"))
    assert derived.origins == {
        "dns_capture": f"annotation {DNS}",
        "ingress": f"annotation {BYPASS}",
        "virtual_interfaces": f"annotation {INTERFACES}",
    }
    assert derived.warnings == ()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(("texts", "value"), [(TRUE, True), (FALSE, False)])
def test_booleans_as_go_reads_them(texts: tuple[str, ...], value: bool, default: bool) -> None:
    """A pod's word counts against the node's, in both directions."""
    node = AmbientParameters(dns_capture=default, ingress=default)
    for text in texts:
        derived = derive_ambient({DNS: text, BYPASS: text}, node)
        assert (derived.parameters.dns_capture, derived.parameters.ingress) == (value, value), text
        assert derived.warnings == ()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("text", NEITHER)
def test_what_is_no_boolean_is_passed_over(text: str, default: bool) -> None:
    node = AmbientParameters(dns_capture=default, ingress=default)
    derived = derive_ambient({DNS: text, BYPASS: text}, node)
    assert derived.parameters == node
    assert derived.origins == {}
    assert [DNS in warning or BYPASS in warning for warning in derived.warnings] == [True, True]


def test_a_warning_is_short() -> None:
    """An annotation may be 256 KiB long."""
    (warning,) = derive_ambient({DNS: "x" * 200_000}).warnings
    assert len(warning) < 200


@given(st.text(), st.text())
def test_any_switch(dns: str, bypass: str) -> None:
    derived = derive_ambient({DNS: dns, BYPASS: bypass})
    assert derived.parameters.dns_capture is (dns in TRUE)
    assert derived.parameters.ingress is (bypass in TRUE)
    assert len(derived.warnings) == sum(text not in TRUE + FALSE for text in (dns, bypass))


ACCEPTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "one": ("net1", ("net1",)),
    "several": ("net1,net2,eth0.100", ("net1", "net2", "eth0.100")),
    "blanks around": (" net1 ,\tnet2\n", ("net1", "net2")),
    "empty parts": (",net1,, ,", ("net1",)),
    "nothing": ("", ()),
    "only commas": (" , ,", ()),
    "wildcard": ("veth+", ("veth+",)),
    "as long as can be": ("a" * 15, ("a" * 15,)),
    "what the kernel takes": ("br-0a1b_2.3@x:1", ("br-0a1b_2.3@x:1",)),
    "twice": ("net1,net1", ("net1", "net1")),
}


@pytest.mark.parametrize(("text", "names"), ACCEPTED.values(), ids=ACCEPTED)
def test_interfaces(text: str, names: tuple[str, ...]) -> None:
    assert read_interfaces(text, "annotation x") == names
    assert derive_ambient({INTERFACES: text}).parameters.virtual_interfaces == names


REFUSED = {
    "too long": "a" * 16,
    "too long with the wildcard": "a" * 15 + "+",
    "blank inside": "net 1",
    "newline inside": "net\n1",
    "plus inside": "ne+t",
    "two pluses": "net++",
    "only a plus": "+",
    "slash": "a/b",
    "quote": 'net"',
    "brace": "net}",
    "semicolon": "net;",
    "comment": "#net",
    "set": "@{net}",
    "include": 'net" include "/etc/passwd',
    "commit": "net\nCOMMIT",
    "jump": "net1 -j ACCEPT",
    "negated": "!net1",
    "not ASCII": "nét",
    "wide digit": "net\uff11",
    "bytes, not characters": "é" * 8,
    "control": "net\x01",
    "null": "net\0",
    "bad among good": "net1,net 2,net3",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_no_interfaces(text: str) -> None:
    with pytest.raises(PodSpecError, match=re.escape(f"annotation {INTERFACES}")) as caught:
        derive_ambient({INTERFACES: text})
    assert "letters, digits" in caught.value.hint


def test_how_many() -> None:
    names = [f"net{number}" for number in range(MAX_INTERFACES)]
    assert read_interfaces(",".join(names), "x") == tuple(names)
    with pytest.raises(PodSpecError, match=f"{MAX_INTERFACES + 1} interfaces"):
        read_interfaces(",".join([*names, "more"]), "x")


def test_a_refusal_is_short() -> None:
    with pytest.raises(PodSpecError) as caught:
        read_interfaces("x" * 200_000, "annotation x")
    assert len(str(caught.value)) < 300


pieces = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.sampled_from(sorted(SAFE | UNSAFE)), max_size=20),
    st.text(alphabet=st.sampled_from(sorted(SAFE)), min_size=1, max_size=16),
)


@given(st.lists(pieces, max_size=5).map(",".join))
def test_no_accepted_name_can_be_more_than_a_name(text: str) -> None:
    """Upstream writes them unchecked into a script that runs as root."""
    try:
        names = read_interfaces(text, "x")
    except PodSpecError:
        return
    for name in names:
        assert set(name) <= SAFE
        assert not set(name) & UNSAFE
        assert 1 <= len(name.encode()) <= 15
        assert "+" not in name[:-1]
        assert re.search(r"\w", name) or set(name) <= set(".:@-+")
    assert names == tuple(part.strip() for part in text.split(",") if part.strip())


@given(pieces)
def test_nothing_but_commas_and_blanks_around_is_taken_away(text: str) -> None:
    """What is accepted is what the annotation says, so that nobody is surprised by another interface's name."""
    try:
        names = read_interfaces(text, "x")
    except PodSpecError:
        return
    assert "".join(names) == "".join(text.replace(",", " ").split())
