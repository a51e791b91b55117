"""Whatever stands in a namespace before, an apply leads to what it would lead to in a fresh one, and harms nobody."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.kernel.conftest import PodMaker
from tests.kernel.world import (
    COMMAND,
    KIND,
    VARIANTS,
    Netns,
    apply,
    apply_rules,
    nft_list,
    node_choice,
    policy,
    remove,
    save,
    state,
)
from tests.pure.rules.cases import CASES

from meshcni.errors import ApplyError, NetnsError
from meshcni.host.backends.fake import FakeBackend
from meshcni.host.backends.iptables import IptablesBackend, Tools, find_tools
from meshcni.host.redirection import apply_sidecar, observe_sidecar, program, verify_sidecar
from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules.model import Backend, Chain, Family, Jump, Rule, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

DEFAULT = Interception()
TPROXY = replace(DEFAULT, mode=InterceptionMode.TPROXY)
BUSY = replace(TPROXY, redirect_dns=True, capture_all_dns=True, drop_invalid=True)
IPTABLES_VARIANTS = ("nft", "legacy")

# What nobody can tell from other tools' work afterwards: RETURNs of excluded interfaces, a mark of one's own choice.
UNRECOGNISABLE = {name for name, case in CASES.items() if case.parameters.exclude_interfaces} | {
    "tproxy-mark-and-table"
}
_NAMES = list(CASES)
_STRIDE = 11  # no divisor of the number of cases, so that every case has every other one before it some day
PAIRS = [
    (before, after)
    for index, after in enumerate(_NAMES)
    if (before := _NAMES[(index * 3 + _STRIDE) % len(_NAMES)]) not in UNRECOGNISABLE and before != after
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_one_case_over_another(before: str, after: str, variant: str, new_pod: PodMaker) -> None:
    fresh, used = new_pod(), new_pod()
    rules = {
        name: sidecar_ruleset(CASES[name].parameters, CASES[name].families, KIND[variant]) for name in (before, after)
    }
    apply_rules(fresh, rules[after], variant)

    apply_rules(used, rules[before], variant)
    apply_rules(used, rules[after], variant)

    assert ours(used, variant) == ours(fresh, variant)


def ours(pod: Netns, variant: str) -> str:
    """Return the state of one backend; a table that became empty does not count."""
    packet_rules = nft_list(pod) if variant == "nftables" else "".join(save(pod, variant, family) for family in Family)
    return packet_rules + policy(pod)


def test_unrecognisable_entries_go_when_the_parameters_are_given(variant: str, pod: Netns) -> None:
    odd = replace(TPROXY, exclude_interfaces=("net1",), tproxy_mark=99, tproxy_table=177)
    empty = policy(pod)
    apply(pod, odd, variant)

    remove(pod, odd)

    assert ours(pod, variant) == empty


# --- other people's rules --------------------------------------------------------------------------------------------

FOREIGN = """\
*filter
:MINE - [0:0]
-A INPUT -p tcp -m tcp --dport 9999 -j DROP
-A INPUT -j MINE
-A MINE -s 192.0.2.0/24 -j RETURN
COMMIT
*mangle
-A OUTPUT -p udp -j MARK --set-xmark 0x7/0xffffffff
COMMIT
*nat
:ISTIOLIKE - [0:0]
-A PREROUTING -p tcp -m tcp --dport 7777 -j REDIRECT --to-ports 7778
-A PREROUTING -i net9 -j RETURN
-A OUTPUT -p tcp -m comment --comment "to ISTIO_OUTPUT" -m tcp --dport 8888 -j ISTIOLIKE
-A ISTIOLIKE -j RETURN
COMMIT
"""
FOREIGN_LATER = """\
*nat
-A PREROUTING -p tcp -m tcp --dport 6666 -j ACCEPT
-I OUTPUT -d 203.0.113.9/32 -j RETURN
COMMIT
"""
FOREIGN_NFT = """\
table inet mine {
	set blocked { type ipv4_addr; elements = { 192.0.2.1 } }
	chain output { type filter hook output priority -100; ip daddr @blocked drop; }
}
table ip istio-proxy-nat {
	chain other { }
}
"""
FOREIGN_POLICY = ("rule add fwmark 0x539/0xfff lookup 133 priority 900", "rule add fwmark 1337 lookup 44 priority 901")


OURS = re.compile(r":ISTIO_|-A ISTIO_| -j ISTIO_|--zone [12]$|mark 0x53[9a](/0xffffffff)?\b(?!/)")


def foreign(pod: Netns, variant: str) -> list[str]:
    """Return what is not ours in the tables of an iptables variant, and the policy rules that are not ours."""
    lines = [line for family in Family for line in save(pod, variant, family).splitlines()]
    rules = [rule for rule in pod.shell("ip", "rule").splitlines() if rule.startswith(("900:", "901:"))]
    return [line for line in lines if not OURS.search(line) and line[0] not in "*C"] + rules


@pytest.mark.parametrize("foreign_variant", IPTABLES_VARIANTS)
def test_other_tools_rules_stay_in_order(foreign_variant: str, variant: str, pod: Netns) -> None:
    for family, text in ((Family.V4, FOREIGN), (Family.V6, FOREIGN.replace("192.0.2.0/24", "2001:db8::/32"))):
        pod.shell(f"{COMMAND[family]}-{foreign_variant}-restore", "--noflush", text=text)
    pod.shell("nft", "-f", "-", text=FOREIGN_NFT)
    pod.ip(*FOREIGN_POLICY)
    before, before_nft = foreign(pod, foreign_variant), nft_list(pod)
    assert len(before) == 2 * 10 + 2

    apply(pod, BUSY, variant)
    apply(pod, BUSY, variant)
    assert foreign(pod, foreign_variant) == before
    assert before_nft in nft_list(pod)

    pod.shell(f"iptables-{foreign_variant}-restore", "--noflush", text=FOREIGN_LATER)
    with_later = foreign(pod, foreign_variant)
    assert len(with_later) == len(before) + 2
    apply(pod, DEFAULT, variant)
    assert foreign(pod, foreign_variant) == with_later
    assert pod.call(lambda: verify_sidecar(DEFAULT, KIND[variant], choice=node_choice(variant))) == ()

    remove(pod)
    assert foreign(pod, foreign_variant) == with_later
    assert "ISTIO_" not in save(pod, foreign_variant, Family.V4).replace("to ISTIO_OUTPUT", "")
    assert nft_list(pod) == before_nft
    assert "table ip istio-proxy-nat" in pod.shell("nft", "list", "tables")


# --- what the original left ------------------------------------------------------------------------------------------

# Its default rules with a tunnel port and exclusions that ours do not have, in its spelling, with chains in its order.
ORIGINAL = """\
* nat
-N ISTIO_INBOUND
-N ISTIO_REDIRECT
-N ISTIO_IN_REDIRECT
-N ISTIO_OUTPUT
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp --dport 22 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -o lo -s {self} -j RETURN
-A ISTIO_OUTPUT -o lo ! -d {loopback} -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d {loopback} -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
COMMIT
"""
ORIGINAL_TPROXY = """\
* mangle
-N ISTIO_DIVERT
-N ISTIO_TPROXY
-N ISTIO_INBOUND
-A ISTIO_DIVERT -j MARK --set-mark 1337
-A ISTIO_DIVERT -j ACCEPT
-A ISTIO_TPROXY ! -d {loopback} -p tcp -j TPROXY --tproxy-mark 1337/0xffffffff --on-port 15006
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY
-A PREROUTING -p tcp -m mark --mark 1337 -j CONNMARK --save-mark
-A OUTPUT -p tcp -o lo -m mark --mark 1337 -j RETURN
-A OUTPUT ! -d {loopback} -p tcp -o lo -m owner --uid-owner 1337 -j MARK --set-mark 1338
-A OUTPUT -p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark
-I ISTIO_INBOUND 1 -p tcp -m mark --mark 1337 -j RETURN
COMMIT
"""
GUARDS = (
    "*filter\n"
    + "".join(
        f"-I {chain} 1 -p {protocol} -j DROP\n"
        for chain in ("INPUT", "FORWARD", "OUTPUT")
        for protocol in ("tcp", "udp")
    )
    + "COMMIT\n"
)
ADDRESSES = {
    Family.V4: {"self": "127.0.0.6/32", "loopback": "127.0.0.1/32"},
    Family.V6: {"self": "::6/128", "loopback": "::1/128"},
}


def run_original(pod: Netns, variant: str, *, text: str = ORIGINAL + ORIGINAL_TPROXY) -> None:
    for family, addresses in ADDRESSES.items():
        pod.shell(f"{COMMAND[family]}-{variant}-restore", "--noflush", text=text.format(**addresses))
    pod.ip("addr add ::6/128 dev lo", "route add local ::/0 dev lo table 133", family=Family.V6)
    pod.ip("route add local 0.0.0.0/0 dev lo table 133")
    for family in Family:
        pod.ip(*["rule add fwmark 1337 lookup 133"] * 3, family=family)


@pytest.mark.parametrize("original_variant", IPTABLES_VARIANTS)
@pytest.mark.parametrize("parameters", [DEFAULT, TPROXY], ids=["redirect", "tproxy"])
def test_over_what_the_original_left(
    parameters: Interception, original_variant: str, variant: str, new_pod: PodMaker
) -> None:
    fresh, used = new_pod(), new_pod()
    apply(fresh, parameters, variant)
    run_original(used, original_variant)

    # The pod's own state decides between iptables variants, so the answer is given for nftables only.
    expected_variant = original_variant if variant != "nftables" else variant
    if expected_variant != variant:
        fresh = new_pod()
        apply(fresh, parameters, expected_variant)
    assert apply(used, parameters, variant).variant == expected_variant

    assert ours(used, expected_variant) == ours(fresh, expected_variant)
    assert pod_variants(used) == (expected_variant,)


@pytest.mark.parametrize("iptables_variant", IPTABLES_VARIANTS)
def test_guards_of_a_killed_original_go(iptables_variant: str, new_pod: PodMaker) -> None:
    fresh, used = new_pod(), new_pod()
    apply(fresh, DEFAULT, iptables_variant)
    for family in Family:
        used.shell(f"{COMMAND[family]}-{iptables_variant}-restore", "--noflush", text=GUARDS)
    run_original(used, iptables_variant, text=ORIGINAL)

    apply(used, DEFAULT, iptables_variant)

    assert ours(used, iptables_variant) == ours(fresh, iptables_variant)


# --- several backends ------------------------------------------------------------------------------------------------


def pod_variants(pod: Netns) -> tuple[str, ...]:
    return pod.call(observe_sidecar).variants


def test_of_rules_in_every_backend_one_remains(variant: str, new_pod: PodMaker) -> None:
    fresh, used = new_pod(), new_pod()
    apply(fresh, TPROXY, variant)
    run_original(used, "nft")
    with_another_port = ORIGINAL.replace("15008", "16008")
    for family, addresses in ADDRESSES.items():
        used.shell(f"{COMMAND[family]}-legacy-restore", "--noflush", text=with_another_port.format(**addresses))
    used.shell("nft", "-f", "-", text="table inet istio-proxy-nat {\n chain istio-output { counter return; }\n}\n")
    assert pod_variants(used) == VARIANTS

    applied = apply(used, TPROXY, variant)

    assert applied.changed
    assert pod_variants(used) == (variant,)
    assert ours(used, variant) == ours(fresh, variant)
    for other in set(IPTABLES_VARIANTS) - {variant}:
        for family in Family:
            assert save(used, other, family) == ""
    assert not apply(used, TPROXY, variant).changed


@pytest.mark.parametrize("first", VARIANTS)
def test_a_change_of_mind_leaves_one_set(first: str, variant: str, new_pod: PodMaker) -> None:
    fresh, used = new_pod(), new_pod()
    kept = first if KIND[first] == KIND[variant] else variant  # the pod's own state decides between iptables variants
    apply(fresh, DEFAULT, kept)

    apply(used, TPROXY, first)
    applied = apply(used, DEFAULT, variant)

    assert applied.variant == kept
    assert ours(used, kept) == ours(fresh, kept)
    assert pod_variants(used) == (kept,)


# --- drift -----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "a rule gone": ("-D ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN", "flush chain inet istio-proxy-nat istio-output"),
    "a rule more": ("-A ISTIO_INBOUND -j RETURN", "add rule inet istio-proxy-nat istio-inbound counter return"),
    "the jump gone": ("-D OUTPUT -j ISTIO_OUTPUT", "flush chain inet istio-proxy-nat output"),
    "a chain more": ("-N ISTIO_OLD", "add chain inet istio-proxy-nat istio-old"),
    "another order": (
        "-I ISTIO_OUTPUT 1 -d 127.0.0.1/32 -j RETURN",
        "insert rule inet istio-proxy-nat istio-output counter jump istio-redirect",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_repaired(damage: str, variant: str, pod: Netns) -> None:
    def verify() -> tuple[str, ...]:
        return pod.call(lambda: verify_sidecar(DEFAULT, KIND[variant], choice=node_choice(variant)))

    apply(pod, DEFAULT, variant)
    good = state(pod)
    assert verify() == ()
    if variant == "nftables":
        pod.shell("nft", DAMAGE[damage][1])
    else:
        pod.shell(f"iptables-{variant}", "-t", "nat", *DAMAGE[damage][0].split())
    assert len(verify()) >= 1

    assert apply(pod, DEFAULT, variant).changed

    assert verify() == ()
    assert state(pod) == good


def test_a_lost_address_and_policy_rule_are_seen_and_repaired(variant: str, pod: Netns) -> None:
    apply(pod, TPROXY, variant)
    good = state(pod)
    pod.ip("addr del ::6/128 dev lo", "rule del fwmark 1337 lookup 133")

    words = pod.call(lambda: verify_sidecar(TPROXY, KIND[variant], choice=node_choice(variant)))
    assert words == ("::6", "IPv4 rule fwmark 1337 lookup 133")
    assert apply(pod, TPROXY, variant).changed

    assert state(pod) == good


# --- failures --------------------------------------------------------------------------------------------------------


def tools_that_refuse_ipv6_rules(variant: str, folder: Path) -> Tools:
    """Return commands of which ip6tables-restore takes deletions only."""
    tools = find_tools(variant)
    assert tools is not None
    script = folder / "ip6tables-restore"
    script.write_text(
        f"""#!/bin/sh
text=$(cat)
case "$text" in *"-A ISTIO_"*) echo "no IPv6 today" >&2; exit 1;; esac
echo "$text" | exec {tools.restore[Family.V6]} "$@"
"""
    )
    script.chmod(0o755)
    return replace(tools, restore={**tools.restore, Family.V6: str(script)})


@pytest.mark.parametrize("was_there", [False, True], ids=["fresh", "over an earlier state"])
@pytest.mark.parametrize("iptables_variant", IPTABLES_VARIANTS)
def test_nothing_stays_when_ipv6_fails(was_there: bool, iptables_variant: str, pod: Netns, tmp_path: Path) -> None:
    tools = tools_that_refuse_ipv6_rules(iptables_variant, tmp_path)
    ruleset = sidecar_ruleset(BUSY, frozenset(Family), Backend.IPTABLES)
    empty = policy(pod)
    if was_there:
        apply(pod, TPROXY, iptables_variant)

    with pytest.raises(ApplyError, match="no IPv6 today"):
        pod.call(lambda: program(ruleset, Backend.IPTABLES, IptablesBackend(tools)))

    assert ours(pod, iptables_variant) == empty
    assert pod_variants(pod) == ()


def test_nothing_stays_when_routing_fails(variant: str, pod: Netns) -> None:
    pod.ip("link set lo down")  # the kernel refuses local routes over an interface that is down
    empty = policy(pod)

    with pytest.raises(ApplyError, match="interface lo of the pod is down"):
        apply(pod, TPROXY, variant)

    assert ours(pod, variant) == empty
    assert pod_variants(pod) == ()


def test_nothing_stays_after_a_fault_of_ours(pod: Netns) -> None:
    class Faulty(FakeBackend):
        def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
            raise ValueError("cannot read what the kernel says")

    class FaultyToo(FakeBackend):
        def remove(self, known: Ruleset | None = None) -> None:
            raise OSError("no descriptor left")

    ruleset = sidecar_ruleset(TPROXY, frozenset(Family), Backend.NFTABLES)
    empty, chosen, broken = policy(pod), Faulty(), FaultyToo()

    def fail() -> None:
        with pytest.raises(ValueError, match="cannot read") as caught:
            program(ruleset, Backend.NFTABLES, chosen)
        assert not hasattr(caught.value, "__notes__")
        broken.held = ruleset
        with pytest.raises(OSError, match="no descriptor") as left:
            program(ruleset, Backend.NFTABLES, chosen, (broken,))
        assert left.value.__notes__ == ["rules of ours may stay in fake: no descriptor left"]

    pod.call(fail)
    assert chosen.held is None
    assert policy(pod) == empty


def test_nothing_stays_when_nft_refuses(pod: Netns) -> None:
    good = sidecar_ruleset(DEFAULT, frozenset(Family), Backend.NFTABLES)
    rule = Rule((), Jump("ISTIO_NOWHERE"), "A jump into a chain that does not exist.")
    table = replace(good.tables[0], chains=(*good.tables[0].chains, Chain("ISTIO_OUTPUT_DNS", (rule,))))
    apply(pod, DEFAULT, "nftables")

    with pytest.raises(ApplyError, match="nft refused the rules"):
        apply_rules(pod, replace(good, tables=(table,)), "nftables")

    assert nft_list(pod) == ""


def test_a_pod_without_address_is_refused(variant: str, new_pod: PodMaker) -> None:
    pod = new_pod(frozenset())
    before = state(pod)

    with pytest.raises(NetnsError, match="no valid local IP address found"):
        apply(pod, DEFAULT, variant)

    assert state(pod) == before


def test_a_pod_with_other_addresses_than_its_own_is_refused(variant: str, pod: Netns) -> None:
    before = state(pod)

    def add() -> None:
        apply_sidecar(DEFAULT, KIND[variant], choice=node_choice(variant), expected_addresses=[ip_address("10.9.9.9")])

    with pytest.raises(NetnsError, match=r"none of the pod's addresses 10\.9\.9\.9, but 10\.77\.0\.2"):
        pod.call(add)

    assert state(pod) == before
