"""What a look into a running sidecar pod finds, in real namespaces, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network, ip_address

import pytest
from tests.kernel.contract_oracle import contract
from tests.kernel.world import IPV4, IPV6, KIND, VARIANTS, Netns, apply, make_pod

from meshcni.host.mending import Mending, WrongAddressError
from meshcni.host.netns import call_in_new_netns
from meshcni.host.rulesmark import take_mark
from meshcni.host.sidecarlook import Found, Look, look_at_capture
from meshcni.pods.interception import Interception, InterceptionMode, NumberRange
from meshcni.rules.model import Backend

BOTH = (ip_address(IPV4), ip_address(IPV6))
TPROXY = Interception(mode=InterceptionMode.TPROXY)
ORIGINAL = "-p 15001 -u 1337 -g 1337 -m REDIRECT -i * -b * -d 15020,15021,15090 -o 15020"


@pytest.fixture
def pod() -> Iterator[Netns]:
    made = make_pod()
    yield made
    made.close()


def wanted(parameters: Interception = Interception(), backend: Backend = Backend.NFTABLES) -> Mending:  # noqa: B008
    return Mending(parameters, BOTH, backend)


def look(pod: Netns, mending: Mending, known: Look | None = None) -> Look:
    """Look, and check that looking has changed nothing."""
    before = pod.call(take_mark)
    found = pod.call(lambda: look_at_capture(mending, known))
    assert pod.call(take_mark) == before
    return found


def test_an_empty_pod_has_nothing(pod: Netns) -> None:
    found = look(pod, wanted())
    assert (found.found, found.is_captured, found.variant) == (Found.NOTHING, False, "")


@pytest.mark.parametrize("agents", [Backend.NFTABLES, Backend.IPTABLES])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parameters", [Interception(), TPROXY, Interception(redirect_dns=True, capture_all_dns=True)])
def test_what_an_add_leaves_is_as_wanted_in_any_backend(
    pod: Netns, variant: str, agents: Backend, parameters: Interception
) -> None:
    apply(pod, parameters, variant)
    found = look(pod, wanted(parameters, agents))
    assert (found.found, found.words, found.variant) == (Found.AS_WANTED, (), variant)
    assert look(pod, wanted(parameters, agents), found) is found


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_parameters_capture_too(pod: Netns, variant: str) -> None:
    older = Interception(
        outbound_exclude_cidrs=(IPv4Network("10.0.0.0/8"),), inbound_exclude_ports=(NumberRange.single(8080),)
    )
    apply(pod, older, variant)
    found = look(pod, wanted(backend=KIND[variant]))
    assert found.found is Found.OTHERWISE
    assert any("10.0.0.0/8" in words for words in found.words)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dual_stack", [True, False])
def test_what_the_original_leaves_captures(pod: Netns, variant: str, dual_stack: bool) -> None:
    """Also where it has left IPv6 out, which it does unless told of the second family."""
    words = [*ORIGINAL.split(), *(["--dual-stack"] if dual_stack else [])]
    load(pod, words, variant)
    found = look(pod, wanted(backend=KIND[variant]))
    assert found.found is (Found.AS_WANTED if dual_stack else Found.OTHERWISE), found


def load(pod: Netns, words: list[str], variant: str) -> None:
    """Program what the original does for a command line."""
    theirs = contract(words, {}, [IPV4, IPV6])
    if variant == "nftables":
        pod.shell("nft", "-f", "-", text=theirs.nft)
    else:
        for command, text in (("iptables", theirs.iptables), ("ip6tables", theirs.ip6tables)):
            if text:
                pod.shell(f"{command}-{variant}-restore", "--noflush", text=text)
    pod.shell("sh", "-c", f"{theirs.ip}true")  # an address that is there already is no error of the original either


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(
    "damage",
    [
        "iptables-{0} -t nat -F",
        "iptables-{0} -t nat -D PREROUTING -p tcp -j ISTIO_INBOUND",
        "iptables-{0} -t nat -F ISTIO_REDIRECT",
        "iptables-{0} -t nat -I ISTIO_OUTPUT -p tcp --dport 443 -j ACCEPT",
        "ip6tables-{0} -t nat -F; ip6tables-{0} -t nat -X",
        "ip -6 addr del ::6/128 dev lo",
    ],
)
def test_damage_to_iptables_rules_is_found(pod: Netns, variant: str, damage: str) -> None:
    apply(pod, Interception(), variant)
    known = look(pod, wanted(backend=Backend.IPTABLES))
    pod.shell("sh", "-ec", damage.format(variant))
    found = look(pod, wanted(backend=Backend.IPTABLES), known)
    assert found.found is Found.PARTLY, found
    assert found.words


@pytest.mark.parametrize(
    "damage",
    [
        "nft delete table inet istio-proxy-nat",
        "nft flush chain inet istio-proxy-nat istio-output",
        "nft flush chain inet istio-proxy-nat prerouting",
        "nft insert rule inet istio-proxy-nat istio-inbound accept",
    ],
)
def test_damage_to_nft_rules_is_found(pod: Netns, damage: str) -> None:
    apply(pod, Interception(), "nftables")
    known = look(pod, wanted())
    pod.shell("sh", "-ec", damage)
    found = look(pod, wanted(), known)
    assert found.found in (Found.PARTLY, Found.NOTHING), found
    assert found.words


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("damage", ["ip rule del fwmark 1337", "ip -6 route flush table 133"])
def test_routes_of_a_transparent_proxy_belong_to_it(pod: Netns, variant: str, damage: str) -> None:
    """They have no mark, so they are looked at every time."""
    apply(pod, TPROXY, variant)
    known = look(pod, wanted(TPROXY, KIND[variant]))
    assert known.found is Found.AS_WANTED
    pod.shell("sh", "-ec", damage)
    assert look(pod, wanted(TPROXY, KIND[variant]), known).found is Found.PARTLY


def test_rules_in_two_backends_capture_and_are_told(pod: Netns) -> None:
    apply(pod, Interception(), "nftables")
    load(pod, [*ORIGINAL.split(), "--dual-stack"], "legacy")
    found = look(pod, wanted())
    assert found.found is Found.OTHERWISE
    assert "legacy too" in found.words[-1]


@pytest.mark.parametrize(
    "addresses", [(ip_address("10.77.0.3"),), (*BOTH, ip_address("10.77.0.3"))], ids=["another", "one more"]
)
def test_a_netns_without_every_address_is_not_looked_at(pod: Netns, addresses: tuple[object, ...]) -> None:
    with pytest.raises(WrongAddressError):
        look(pod, replace(wanted(), addresses=addresses))  # type: ignore[arg-type]


# --- the mark ---------------------------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[Netns], object]] = {
    "nft": lambda pod: pod.shell("nft", "add rule inet istio-proxy-nat istio-output accept"),
    "nft, a table of others": lambda pod: pod.shell("nft", "add table inet others"),
    "iptables-nft": lambda pod: pod.shell("iptables-nft", "-t", "filter", "-A", "INPUT", "-j", "ACCEPT"),
    "legacy": lambda pod: pod.shell("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT"),
    "legacy, IPv6": lambda pod: pod.shell("ip6tables-legacy", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_mark_changes_with_the_rules(pod: Netns, change: str) -> None:
    apply(pod, Interception(), "nftables")
    before = pod.call(take_mark)
    assert before is not None
    CHANGES[change](pod)
    assert pod.call(take_mark) != before


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mark_stays_while_packets_are_counted(pod: Netns, variant: str) -> None:
    apply(pod, Interception(), variant)
    before = pod.call(take_mark)
    counted = pod.shell("sh", "-c", "nft list ruleset; iptables-legacy-save -c")
    program = "import socket; s = socket.socket(); s.settimeout(1); s.connect_ex(('127.0.0.1', 9))"
    pod.shell("python3", "-c", program)
    assert pod.shell("sh", "-c", "nft list ruleset; iptables-legacy-save -c") != counted
    if variant == "legacy":
        assert pod.call(take_mark) == before
    else:
        assert before is not None


def test_no_two_namespaces_have_the_same_mark() -> None:
    marks = {call_in_new_netns(take_mark) for _ in range(5)}
    assert len(marks) == 5
