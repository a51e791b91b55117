"""Ambient rules leave the kernel as the original's node agent does, in pods and on the host.

Two fresh namespaces: the oracle's texts are loaded by hand into one, ours are applied in the other, then everything
that the kernel's own tools list is compared, order included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import product

import pytest
from tests.kernel import ambient_oracle
from tests.kernel.ambient_oracle import Texts
from tests.kernel.listings import Listing, listing, new_netns, settled
from tests.kernel.world import COMMAND, KIND, Netns, node_choice

from meshcni.host.ambient import apply_pod, prepare_routes, remove_pod, verify_pod
from meshcni.host.hostrules import apply_host, remove_host, verify_host
from meshcni.host.redirection import Applied
from meshcni.pods.ambient import AmbientParameters
from meshcni.rules.model import Family

V4, DUAL = frozenset({Family.V4}), frozenset(Family)
FAMILIES = {"v4": V4, "dual": DUAL}
INTERFACES: Mapping[str, tuple[str, ...]] = {
    "no interface": (),
    "one interface": ("fake1s0f0",),
    "two interfaces": ("fake1s0f0", "fake1s0f1"),
    "a family of interfaces": ("k6t+", "ip"),
}
UID = 1000
Probes = tuple[str, str]
PROBES: Probes = (ambient_oracle.P4, ambient_oracle.P6)
OTHER_PROBES: Probes = ("192.0.2.77", "e9ac:1e77:90ca:399f:4d6d:ece2:2f9b:3164")


@dataclass(frozen=True)
class Case:
    """A pod's overrides."""

    dns: bool = False
    ingress: bool = False
    interfaces: tuple[str, ...] = ()
    probes: Probes = PROBES

    @property
    def parameters(self) -> AmbientParameters:
        probe_v4, probe_v6 = IPv4Address(self.probes[0]), IPv6Address(self.probes[1])
        return AmbientParameters(self.dns, self.ingress, self.interfaces, probe_v4, probe_v6)

    def texts(self, families: frozenset[Family]) -> Texts:
        return ambient_oracle.pod(
            ipv6=Family.V6 in families,
            dns=self.dns,
            ingress=self.ingress,
            interfaces=self.interfaces,
            p4=self.probes[0],
            p6=self.probes[1],
        )


CASES = {
    ", ".join(("DNS" if dns else "no DNS", "ingress" if ingress else "both ways", interfaces)): Case(
        dns, ingress, names
    )
    for dns, ingress, (interfaces, names) in product((False, True), (False, True), INTERFACES.items())
} | {"other probes": Case(dns=True, probes=OTHER_PROBES)}


@pytest.fixture
def theirs() -> Iterator[Netns]:
    with closing(new_netns("dual")) as netns:
        yield netns


@pytest.fixture
def ours() -> Iterator[Netns]:
    with closing(new_netns("dual")) as netns:
        yield netns


def everything(netns: Netns, variant: str) -> Listing:
    """Return all that can be seen of rules, routes, addresses and address sets, and what nft rules are in the kernel.

    Two rules that are listed alike may consist of different expressions. Left out are the random numbers of ipsets.
    """
    sets = "" if variant == "nftables" else re.sub(r" initval \S+", "", netns.shell("ipset", "save"))
    expressions = netns.shell("nft", "--debug=netlink", "list", "ruleset") if variant == "nftables" else ""
    rules = re.findall(r"^(inet \S+ \S+|  \[ .*)", re.sub(r"pkts \d+ bytes \d+", "", expressions), re.MULTILINE)
    return [*listing(netns, variant), *sets.splitlines(), *rules]


def load(netns: Netns, texts: Texts, variant: str) -> None:
    """Do by hand what the original does with its texts."""
    if variant == "nftables":
        netns.shell("nft", "-f", "-", text=texts.nft)
    else:
        for command, text in (("iptables", texts.iptables), ("ip6tables", texts.ip6tables)):
            if text:
                netns.shell(f"{command}-{variant}-restore", "--noflush", "-v", text=text)
    if texts.ip:
        netns.shell("sh", "-e", text=texts.ip)


def apply(netns: Netns, case: Case, families: frozenset[Family], variant: str) -> Applied:
    return netns.call(lambda: apply_pod(case.parameters, families, KIND[variant], choice=node_choice(variant)))


def verify(netns: Netns, case: Case, families: frozenset[Family], variant: str) -> tuple[str, ...]:
    return netns.call(lambda: verify_pod(case.parameters, families, KIND[variant], choice=node_choice(variant)))


# --- a pod ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_pod(name: str, kind: str, variant: str, theirs: Netns, ours: Netns) -> None:
    case, families = CASES[name], FAMILIES[kind]
    load(theirs, case.texts(families), variant)

    applied = apply(ours, case, families, variant)

    expected = everything(theirs, variant)
    assert everything(ours, variant) == expected
    assert (applied.changed, applied.variant, applied.families) == (True, variant, families)
    assert applied.processes == (0 if variant == "nftables" else len(families))

    assert verify(theirs, case, families, variant) == ()
    for netns in (ours, theirs):  # what either has made needs nothing
        assert not apply(netns, case, families, variant).changed
        assert everything(netns, variant) == expected


@pytest.mark.parametrize("has_routes", [False, True], ids=["rules first", "routes first"])
def test_routes_may_be_there_before(has_routes: bool, variant: str, theirs: Netns, ours: Netns) -> None:
    case = CASES["DNS, both ways, no interface"]
    load(theirs, case.texts(DUAL), variant)
    if has_routes:
        before = everything(ours, variant)
        assert ours.call(lambda: prepare_routes(DUAL))
        assert not ours.call(lambda: prepare_routes(DUAL))
        added = [line for line in everything(ours, variant) if line not in before]
        assert added == [line for line in everything(theirs, variant) if "table 100" in line or "lookup 100" in line]

    assert apply(ours, case, DUAL, variant).changed

    assert everything(ours, variant) == everything(theirs, variant)


@pytest.mark.parametrize("kind", FAMILIES)
def test_pod_without_ipv6_on_lo(kind: str, variant: str, theirs: Netns, ours: Netns) -> None:
    """The policy rule for IPv6 is made all the same, the route is not."""
    case, families = CASES["no DNS, both ways, no interface"], FAMILIES[kind]
    for netns in (theirs, ours):
        netns.shell("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6")
    load(theirs, case.texts(families), variant)

    assert apply(ours, case, families, variant).changed

    assert everything(ours, variant) == everything(theirs, variant)
    assert verify(ours, case, families, variant) == ()
    assert not apply(ours, case, families, variant).changed


# Each is applied over what the original left of the one before. Neighbours differ in as much as possible.
SUCCESSION = [
    ("DNS, both ways, two interfaces", "dual"),
    ("no DNS, ingress, no interface", "v4"),
    ("DNS, ingress, a family of interfaces", "dual"),
    ("no DNS, both ways, no interface", "dual"),
    ("other probes", "v4"),
    ("no DNS, both ways, one interface", "dual"),
    ("no DNS, ingress, two interfaces", "dual"),
]


@pytest.mark.parametrize("position", range(len(SUCCESSION)))
def test_over_the_original(position: int, variant: str, theirs: Netns, ours: Netns) -> None:
    (former, former_kind), (latter, latter_kind) = SUCCESSION[position - 1], SUCCESSION[position]
    load(ours, CASES[former].texts(FAMILIES[former_kind]), variant)
    load(theirs, CASES[latter].texts(FAMILIES[latter_kind]), variant)
    assert verify(ours, CASES[latter], FAMILIES[latter_kind], variant) != ()

    assert apply(ours, CASES[latter], FAMILIES[latter_kind], variant).changed

    assert settled(everything(ours, variant)) == settled(everything(theirs, variant))


@pytest.mark.parametrize("name", ["DNS, both ways, two interfaces", "no DNS, ingress, no interface"])
def test_removal_of_what_either_made(name: str, variant: str, theirs: Netns, ours: Netns) -> None:
    empty = settled(everything(ours, variant))
    load(theirs, CASES[name].texts(DUAL), variant)
    apply(ours, CASES[name], DUAL, variant)

    for netns in (theirs, ours):
        netns.call(remove_pod)
        assert settled(everything(netns, variant)) == empty
        netns.call(remove_pod)
        assert settled(everything(netns, variant)) == empty


# --- the original's own checks of what we made ------------------------------------------------------------------------


@pytest.mark.parametrize("iptables_variant", ["nft", "legacy"])
@pytest.mark.parametrize("name", ["DNS, both ways, two interfaces", "no DNS, ingress, no interface"])
def test_the_original_finds_nothing_to_do(name: str, iptables_variant: str, ours: Netns) -> None:
    """It counts the rules of each of its chains, and asks for every rule with `-C`."""
    texts = CASES[name].texts(DUAL)
    apply(ours, CASES[name], DUAL, iptables_variant)
    for family, text in ((Family.V4, texts.iptables), (Family.V6, texts.ip6tables)):
        command = f"{COMMAND[family]}-{iptables_variant}"
        saved = ours.shell(f"{command}-save")
        assert chain_sizes(saved) == chain_sizes(text)
        for table, rule in table_rules(text):
            ours.shell(command, "-t", table, "-C", *rule.split()[1:])


@pytest.mark.parametrize("iptables_variant", ["nft", "legacy"])
def test_the_original_removes_what_we_made(iptables_variant: str, ours: Netns) -> None:
    empty = settled(everything(ours, iptables_variant))
    apply(ours, CASES["DNS, both ways, two interfaces"], DUAL, iptables_variant)
    for family in Family:
        for line in ambient_oracle.removal_commands():
            ours.shell(f"{COMMAND[family]}-{iptables_variant}", "-t", *line.split())
    ours.shell("sh", "-e", text="for f in -4 -6; do ip $f rule del pref 32764; ip $f route flush table 100; done")
    assert settled(everything(ours, iptables_variant)) == empty


def table_rules(text: str) -> list[tuple[str, str]]:
    """Return the rules of a restore text or a listing with their tables."""
    found, table = [], ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith("-A"):
            found.append((table, line))
    return found


def chain_sizes(text: str) -> dict[tuple[str, str], int]:
    """Return the number of rules of each chain of the original's."""
    sizes: dict[tuple[str, str], int] = {}
    for table, rule in table_rules(text):
        if (chain := rule.split()[1]).startswith("ISTIO"):
            sizes[table, chain] = sizes.get((table, chain), 0) + 1
    return sizes


# --- the host ---------------------------------------------------------------------------------------------------------

ELEMENTS = {"istio-inpod-probes-v4": ("inet", "10.0.0.1"), "istio-inpod-probes-v6": ("inet6", "fd00::1")}
FOREIGN = """\
*filter
:ISTIO_POSTRT - [0:0]
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
COMMIT
*nat
:ISTIO_OTHER - [0:0]
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -j MASQUERADE
-A ISTIO_OTHER -j RETURN
COMMIT
"""


def make_sets(netns: Netns, variant: str, names: Sequence[str] = tuple(ELEMENTS)) -> None:
    """Make the address sets as the original does, with an element each."""
    for name in names:
        family, element = ELEMENTS[name]
        if variant == "nftables":
            kind = "ipv4_addr" if family == "inet" else "ipv6_addr"
            text = "add table inet istio-ambient-nat\n"
            text += f'add set inet istio-ambient-nat {name} {{ type {kind} ; comment "probes" ; }}\n'
            text += f'add element inet istio-ambient-nat {name} {{ {element} comment "a-uid" }}\n'
            netns.shell("nft", "-f", "-", text=text)
        else:
            netns.shell("ipset", "create", name, "hash:ip", "family", family, "comment")
            netns.shell("ipset", "add", name, element, "comment", "a-uid")


def make_foreign(netns: Netns, variant: str) -> None:
    for command in ("iptables", "ip6tables") if variant != "nftables" else ():
        netns.shell(f"{command}-{variant}-restore", "--noflush", text=FOREIGN)
    netns.shell("nft", "-f", "-", text="table inet filter {\n chain input { type filter hook input priority 0; }\n}\n")


def apply_to_host(netns: Netns, families: frozenset[Family], variant: str, probes: Probes = PROBES) -> Applied:
    addresses = IPv4Address(probes[0]), IPv6Address(probes[1])
    return netns.call(
        lambda: apply_host(*addresses, families, KIND[variant], kubelet_uid=UID, choice=node_choice(variant))
    )


def verify_on_host(netns: Netns, families: frozenset[Family], variant: str, probes: Probes = PROBES) -> tuple[str, ...]:
    addresses = IPv4Address(probes[0]), IPv6Address(probes[1])
    return netns.call(
        lambda: verify_host(*addresses, families, KIND[variant], kubelet_uid=UID, choice=node_choice(variant))
    )


@pytest.mark.parametrize("is_busy", [False, True], ids=["alone", "with others"])
@pytest.mark.parametrize("probes", [PROBES, OTHER_PROBES], ids=["default probes", "other probes"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_host(kind: str, probes: Probes, is_busy: bool, variant: str, theirs: Netns, ours: Netns) -> None:
    families = FAMILIES[kind]
    names = list(ELEMENTS) if kind == "dual" else list(ELEMENTS)[:1]
    for netns in (theirs, ours):
        if is_busy:
            make_foreign(netns, variant)
        make_sets(netns, variant, names)
    before = everything(ours, variant)
    texts = ambient_oracle.host(ipv6=Family.V6 in families, uid=UID, p4=probes[0], p6=probes[1])
    load(theirs, texts, variant)

    applied = apply_to_host(ours, families, variant, probes)

    expected = everything(theirs, variant)
    assert everything(ours, variant) == expected
    assert applied.changed
    assert applied.processes == (0 if variant == "nftables" else len(families))
    for netns in (ours, theirs):
        assert verify_on_host(netns, families, variant, probes) == ()
        assert not apply_to_host(netns, families, variant, probes).changed
        assert everything(netns, variant) == expected

    for netns in (ours, theirs):
        netns.call(remove_host)
        assert settled(everything(netns, variant)) == settled(before)


def test_other_probes_on_the_host_take_the_place_of_the_first(variant: str, theirs: Netns, ours: Netns) -> None:
    for netns in (theirs, ours):
        make_foreign(netns, variant)
        make_sets(netns, variant)
        load(netns, ambient_oracle.host(ipv6=netns is ours, uid=UID), variant)

    assert apply_to_host(ours, V4, variant).changed

    assert settled(everything(ours, variant)) == settled(everything(theirs, variant))
