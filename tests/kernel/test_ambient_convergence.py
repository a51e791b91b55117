"""Whatever happens to an ambient pod or to the host's rules is named and healed, and nobody else is harmed."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from ipaddress import ip_address
from itertools import permutations
from pathlib import Path

import pytest
from tests.kernel.conftest import PodMaker
from tests.kernel.listings import listing, new_netns, settled
from tests.kernel.test_ambient_packets import APP_PORT, HOST, POD, SERVER_PORT, Node, node_with
from tests.kernel.test_convergence import FOREIGN, FOREIGN_NFT, GUARDS, foreign, tools_that_refuse_ipv6_rules
from tests.kernel.world import COMMAND, KIND, VARIANTS, Netns, node_choice, state
from tests.kernel.world import apply as apply_sidecar
from tests.kernel.world import save as save_rules

from meshcni.errors import ApplyError, NetnsError
from meshcni.host.ambient import apply_pod, prepare_routes, remove_pod, verify_pod
from meshcni.host.backends import PacketBackend
from meshcni.host.backends.fake import FakeBackend
from meshcni.host.backends.iptables import IptablesBackend, find_tools
from meshcni.host.backends.nftables import NftablesBackend
from meshcni.host.redirection import Applied, observe_sidecar, program
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules.ambient import pod_ruleset
from meshcni.rules.model import Backend, Family, Jump, Purpose, Rule, Ruleset

BOTH = frozenset(Family)
V4 = frozenset({Family.V4})
FULL = AmbientParameters(dns_capture=True, virtual_interfaces=("k6t-eth0",))
PLAIN = AmbientParameters()
SIDECAR = Interception(mode=InterceptionMode.TPROXY, redirect_dns=True, capture_all_dns=True, drop_invalid=True)
IPTABLES_VARIANTS = ("nft", "legacy")
ROUTING = {
    "IPv4 rule": "ip -4 rule del pref 32764",
    "IPv6 rule": "ip -6 rule del pref 32764",
    "route 0.0.0.0/0": "ip -4 route flush table 100",
    "route ::/0": "ip -6 route flush table 100",
}


def _comparable() -> Iterator[Netns]:
    with closing(new_netns("dual")) as netns:
        yield netns


# Two namespaces that list alike: without interfaces of their own, whose addresses of the link differ.
fresh = pytest.fixture(_comparable, name="fresh")
used = pytest.fixture(_comparable, name="used")


def apply(
    pod: Netns,
    variant: str,
    parameters: AmbientParameters = FULL,
    families: frozenset[Family] = BOTH,
    *,
    force: str = "",
    keep: bool = False,
) -> Applied:
    choice = node_choice(variant)
    return pod.call(
        lambda: apply_pod(
            parameters, families, KIND[variant], choice=choice, force_iptables=force, keep_on_failure=keep
        )
    )


def verify(
    pod: Netns, variant: str, parameters: AmbientParameters = FULL, families: frozenset[Family] = BOTH
) -> tuple[str, ...]:
    return pod.call(lambda: verify_pod(parameters, families, KIND[variant], choice=node_choice(variant)))


# --- tampering --------------------------------------------------------------------------------------------------------


def saved(pod: Netns, variant: str, family: Family) -> Iterator[tuple[str, str, str]]:
    """Give table, chain and text of each rule."""
    table = ""
    for line in pod.shell(f"{COMMAND[family]}-{variant}-save").splitlines():
        table = line[1:] if line.startswith("*") else table
        if line.startswith("-A"):
            _verb, chain, rule = line.split(" ", 2)
            yield table, chain, rule


def listed(pod: Netns) -> Iterator[tuple[str, str, str, str]]:
    """Give table, chain, handle and text of each nft rule."""
    table = chain = ""
    for line in pod.shell("nft", "-a", "-s", "list", "ruleset").splitlines():
        if match := re.match(r"table inet (\S+) \{|\tchain (\S+) \{", line):
            table, chain = match[1] or table, match[2] or chain
        elif match := re.fullmatch(r"\t\t(?!type )(.*) # handle (\d+)", line):
            yield table, chain, match[2], match[1]


def test_each_rule_deleted_is_named_and_healed(variant: str, pod: Netns) -> None:
    apply(pod, variant)
    good = settled(listing(pod, variant))

    def heals(rule: str) -> None:
        (words,) = verify(pod, variant)
        assert "lacks the rule" in words
        assert rule in words
        assert apply(pod, variant, keep=True).changed
        assert verify(pod, variant) == ()

    if variant == "nftables":
        number = len(list(listed(pod)))
        assert number == 26
        for position in range(number):
            table, chain, handle, rule = list(listed(pod))[position]  # all have new handles each time
            pod.shell("nft", "delete", "rule", "inet", table, chain, "handle", handle)
            heals(rule)
    else:
        every = [(COMMAND[family], *found) for family in Family for found in saved(pod, variant, family)]
        assert len(every) == 2 * 20
        for command, table, chain, rule in every:
            pod.shell(f"{command}-{variant}", "-t", table, "-D", chain, *rule.split())
            heals(rule)
    assert settled(listing(pod, variant)) == good


def test_each_chain_deleted_is_named_and_healed(variant: str, pod: Netns) -> None:
    apply(pod, variant)
    good = settled(listing(pod, variant))
    for table in ("mangle", "nat", "raw"):
        for chain, entry in (("ISTIO_PRERT", "PREROUTING"), ("ISTIO_OUTPUT", "OUTPUT")):
            if variant == "nftables":
                name = f"inet istio-ambient-{table}"
                target = "istio-prerouting" if chain == "ISTIO_PRERT" else "istio-output"
                script = [f"flush chain {name} {entry.lower()}", f"flush chain {name} {target}"]
                pod.shell("nft", "-f", "-", text="\n".join([*script, f"delete chain {name} {target}\n"]))
                expected = {f"chain istio-ambient-{table} {target} is missing"}
            else:
                command = [f"iptables-{variant}", "-t", table]
                for words in (["-D", entry, "-j", chain], ["-F", chain], ["-X", chain]):
                    pod.shell(*command, *words)
                expected = {f"chain {table} {chain} (IPv4) is missing"}
            found = verify(pod, variant)
            assert expected < set(found)
            assert all("lacks the rule" in words for words in set(found) - expected)

            assert apply(pod, variant, keep=True).changed
            assert settled(listing(pod, variant)) == good


# What is done to nat of IPv4 or to our nft tables, and what verification says of it.
EXTRAS = {
    "a chain more": (
        "-N ISTIO_TEST",
        "add chain inet istio-ambient-nat istio-test",
        "should not be there",
    ),
    "a chain more, in use": (
        "-N ISTIO_TEST\n-A OUTPUT -p tcp -j ISTIO_TEST\n-A ISTIO_TEST -j ACCEPT",
        "add chain inet istio-ambient-nat istio-test\n"
        "add rule inet istio-ambient-nat istio-test accept\n"
        "add rule inet istio-ambient-nat output jump istio-test",
        "should not be there",
    ),
    "a jump twice": (
        "-A OUTPUT -j ISTIO_OUTPUT",
        "add rule inet istio-ambient-nat output jump istio-output",
        "should not be there",
    ),
    "a rule at the end": (
        "-A ISTIO_PRERT -j RETURN",
        "add rule inet istio-ambient-nat istio-prerouting counter return",
        "should not be there",
    ),
    "a way past everything": (
        "-I ISTIO_OUTPUT 1 -j ACCEPT",
        "insert rule inet istio-ambient-nat istio-output accept",
        "should not be there",
    ),
    "another order": (
        "-D ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT\n"
        "-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT",
        "",
        "wrong order",
    ),
    "another table": (
        "",
        "add table inet istio-proxy-raw",
        "table istio-proxy-raw should not be there",
    ),
    "a set in our table": (
        "",
        "add set inet istio-ambient-raw mine { type ipv4_addr ; }",
        "something that is not ours",
    ),
    "another hook": (
        "",
        "delete table inet istio-ambient-raw\nadd table inet istio-ambient-raw\n"
        "add chain inet istio-ambient-raw output { type filter hook output priority 0 ; }",
        "hangs on the wrong hook",
    ),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_more_is_named_and_healed(extra: str, variant: str, pod: Netns) -> None:
    for_iptables, for_nft, words = EXTRAS[extra]
    apply(pod, variant)
    good = settled(listing(pod, variant))
    if variant == "nftables" and for_nft:
        pod.shell("nft", "-f", "-", text=f"{for_nft}\n")
    elif variant != "nftables" and for_iptables:
        pod.shell(f"iptables-{variant}-restore", "--noflush", text=f"*nat\n{for_iptables}\nCOMMIT\n")
    else:
        return  # there is no such thing with this backend

    assert any(words in found for found in verify(pod, variant))
    assert apply(pod, variant, keep=True).changed

    assert verify(pod, variant) == ()
    assert settled(listing(pod, variant)) == good


@pytest.mark.parametrize("table", ["filter", "mangle", "nat", "raw"])
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("iptables_variant", IPTABLES_VARIANTS)
def test_a_test_chain_anywhere_is_named_and_healed(
    table: str, family: Family, iptables_variant: str, pod: Netns
) -> None:
    apply(pod, iptables_variant, PLAIN)
    good = save_rules(pod, iptables_variant, family)
    pod.shell(f"{COMMAND[family]}-{iptables_variant}", "-t", table, "-N", "ISTIO_TEST")

    expected = f"chain {table} ISTIO_TEST (IPv{family.value}) should not be there"
    assert verify(pod, iptables_variant, PLAIN) == (expected,)
    assert apply(pod, iptables_variant, PLAIN, keep=True).changed

    assert verify(pod, iptables_variant, PLAIN) == ()
    assert save_rules(pod, iptables_variant, family) == good


@pytest.mark.parametrize("lost", ROUTING)
def test_lost_routing_is_named_and_healed(lost: str, variant: str, pod: Netns) -> None:
    apply(pod, variant)
    good = state(pod)
    pod.shell("sh", "-c", ROUTING[lost])

    (words,) = verify(pod, variant)
    assert lost in words
    assert apply(pod, variant, keep=True).changed

    assert verify(pod, variant) == ()
    assert state(pod) == good


def test_all_routing_lost_is_made_again_before_the_rules_need_it(pod: Netns) -> None:
    apply(pod, "nftables")
    good = state(pod)
    for command in ROUTING.values():
        pod.shell("sh", "-c", command)
    assert len(verify(pod, "nftables")) == 4
    assert pod.call(lambda: prepare_routes(BOTH))
    assert state(pod) == good


def test_routing_that_is_not_ours_stays(variant: str, pod: Netns) -> None:
    theirs = ("rule add fwmark 0x111/0xfff lookup 100 pref 900", "rule add fwmark 0x111 lookup 100 pref 901")
    pod.ip(*theirs, "rule add from 10.9.0.0/16 lookup 100 pref 902", "route add 10.9.9.0/24 dev eth0 table 100")
    before = state(pod)
    apply(pod, variant)
    assert verify(pod, variant) == ()
    assert {line for line in before.splitlines() if line} <= set(state(pod).splitlines())
    pod.call(remove_pod)
    assert pod.shell("ip", "rule").count("lookup 100") == 3
    assert pod.shell("ip", "route", "show", "table", "100") == "10.9.9.0/24 dev eth0 scope link \n"


def test_another_default_route_in_our_table_gives_way(variant: str, pod: Netns) -> None:
    """As with the original, which replaces it."""
    pod.ip("route add default via 10.77.0.1 dev eth0 table 100")
    apply(pod, variant)
    assert pod.shell("ip", "route", "show", "table", "100") == "local default dev lo scope host \n"
    assert verify(pod, variant) == ()


def test_a_family_given_up_goes(variant: str, fresh: Netns, used: Netns) -> None:
    apply(fresh, variant, FULL, V4)
    apply(used, variant, FULL, BOTH)
    assert verify(used, variant, FULL, V4) != () or variant != "nftables"
    apply(used, variant, FULL, V4)
    assert settled(listing(used, variant)) == settled(listing(fresh, variant))


# --- other people -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign_variant", IPTABLES_VARIANTS)
def test_other_tools_rules_and_sets_stay(foreign_variant: str, variant: str, pod: Netns) -> None:
    for family, text in ((Family.V4, FOREIGN), (Family.V6, FOREIGN.replace("192.0.2.0/24", "2001:db8::/32"))):
        pod.shell(f"{COMMAND[family]}-{foreign_variant}-restore", "--noflush", text=text)
    pod.shell("nft", "-f", "-", text=FOREIGN_NFT + "table inet istio-ambient-other {\n chain output { }\n}\n")
    pod.shell("ipset", "create", "theirs", "hash:ip")
    pod.shell("ipset", "add", "theirs", "192.0.2.7")

    def others() -> list[str]:
        nft = pod.shell("nft", "-s", "list", "table", "inet", "mine")
        nft += pod.shell("nft", "-s", "list", "table", "inet", "istio-ambient-other")
        return [*foreign(pod, foreign_variant), *nft.splitlines(), *pod.shell("ipset", "list").splitlines()]

    before = others()
    for parameters in (FULL, FULL, PLAIN, FULL):
        apply(pod, variant, parameters)
        assert others() == before
        assert verify(pod, variant, parameters) == ()
    jumps = [
        line for line in save_rules(pod, foreign_variant, Family.V4).splitlines() if line.endswith("-j ISTIO_OUTPUT")
    ]
    assert len(jumps) == (3 if foreign_variant == variant else 0)
    pod.call(remove_pod)
    assert others() == before


def test_a_rule_before_ours_is_other_peoples(variant: str, pod: Netns) -> None:
    apply(pod, variant)
    if variant == "nftables":
        chain = "{ type nat hook output priority -101; tcp dport 7 accept; }"
        pod.shell("nft", "-f", "-", text=f"table inet mine {{\n chain output {chain}\n}}\n")
    else:
        pod.shell(f"iptables-{variant}", "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-j", "RETURN")
    before = state(pod)
    assert verify(pod, variant) == ()
    assert not apply(pod, variant).changed
    assert state(pod) == before


# --- what others of ours left -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sidecar_variant", VARIANTS)
def test_of_a_sidecars_rules_nothing_stays(sidecar_variant: str, variant: str, fresh: Netns, used: Netns) -> None:
    apply_sidecar(used, SIDECAR, sidecar_variant)
    kept = variant if KIND[variant] != KIND[sidecar_variant] else sidecar_variant  # the pod's own state decides
    apply(fresh, kept)

    applied = apply(used, variant)

    assert (applied.changed, applied.variant) == (True, kept)
    assert verify(used, kept) == ()
    assert settled(listing(used, kept)) == settled(listing(fresh, kept))
    for other in set(IPTABLES_VARIANTS) - {kept}:
        assert "ISTIO" not in "".join(save_rules(used, other, family) for family in Family)
    assert "istio-proxy" not in used.shell("nft", "list", "tables")
    assert used.call(observe_sidecar).variants == ((kept,) if kept != "nftables" else ())


def test_guards_of_a_killed_original_go(new_pod: PodMaker) -> None:
    for iptables_variant in IPTABLES_VARIANTS:
        fresh, used = new_pod(), new_pod()
        apply(fresh, iptables_variant)
        for family in Family:
            used.shell(f"{COMMAND[family]}-{iptables_variant}-restore", "--noflush", text=GUARDS)
        apply(used, iptables_variant, PLAIN)
        apply(used, iptables_variant)
        assert save_rules(used, iptables_variant, Family.V4) == save_rules(fresh, iptables_variant, Family.V4)


def test_a_sidecars_rules_alone_stay_when_an_ambient_pod_is_to_be_left(variant: str, pod: Netns) -> None:
    apply_sidecar(pod, SIDECAR, variant)
    before = state(pod)
    pod.call(lambda: prepare_routes(BOTH))
    pod.call(remove_pod)
    assert state(pod) == before


@pytest.mark.parametrize(("former", "latter"), list(permutations(VARIANTS, 2)))
def test_a_change_of_backend_leaves_one_set(former: str, latter: str, fresh: Netns, used: Netns) -> None:
    apply(fresh, latter)
    apply(used, former, PLAIN)
    force = latter if latter != "nftables" else ""
    if force == "":
        assert any(f"rules of ours are in {former} too" in words for words in verify(used, latter))

    applied = apply(used, latter, force=force, keep=True)

    assert (applied.changed, applied.variant) == (True, latter)
    assert verify(used, latter) == ()
    assert settled(listing(used, latter)) == settled(listing(fresh, latter))
    assert not apply(used, latter, force=force).changed
    used.call(remove_pod)
    assert "istio-ambient" not in used.shell("nft", "list", "tables")


# --- under way --------------------------------------------------------------------------------------------------------


class Connections:
    """Connections made one after the other until told to stop, in both directions: those that were answered directly.

    A connection that is refused or cut is none of them: nothing got past ztunnel.
    """

    def __init__(self, node: Node) -> None:
        self.made = self.failed = 0
        self.direct: list[str] = []
        self._stop = threading.Event()
        inbound, outbound = f"inbound {POD[4]} {APP_PORT}", f"outbound {HOST[4]} {SERVER_PORT}"
        self._threads = [
            threading.Thread(target=self._loop, args=(lambda: node.to_pod(4), inbound)),
            threading.Thread(target=self._loop, args=(lambda: node.from_pod(HOST[4]), outbound)),
        ]

    def _loop(self, fetch: Callable[[], list[str]], captured: str) -> None:
        while not self._stop.is_set():
            try:
                lines = fetch()
            except OSError:
                self.failed += 1
                continue
            self.made += 1
            if lines[:1] != [captured]:
                self.direct += lines

    def __enter__(self) -> Connections:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def connections(node: Node) -> Iterator[Connections]:
    with Connections(node) as made:
        yield made
    assert made.made > 0
    assert made.direct == []
    assert made.failed == 0


def test_changes_of_backend_let_nothing_past_ztunnel() -> None:
    order = ["nft", "nftables", "legacy", "nftables", "nft", "legacy", "nft", "nftables"]
    with node_with("nftables", FULL) as node, connections(node) as under_way:
        for variant in order:
            force = variant if variant != "nftables" else ""
            before = under_way.made
            assert apply(node.pod, variant, force=force, keep=True).variant == variant
            wait_for(lambda: under_way.made > before + 10)  # noqa: B023  (called at once)


def test_changes_of_overrides_let_nothing_past_ztunnel(variant: str) -> None:
    with node_with(variant, FULL) as node, connections(node) as under_way:
        for parameters in (PLAIN, FULL, replace(FULL, virtual_interfaces=("k6t-+", "x")), PLAIN, FULL):
            before = under_way.made
            assert apply(node.pod, variant, parameters, keep=True).changed
            wait_for(lambda: under_way.made > before + 10)  # noqa: B023


def wait_for(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _attempt in range(2000):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("it never came true")


# --- failures ---------------------------------------------------------------------------------------------------------


def refused(ruleset: Ruleset) -> Ruleset:
    """Return `ruleset` with one rule more, which no kernel takes: a jump into a chain that does not exist."""
    *tables, table = ruleset.tables
    *chains, chain = table.chains
    broken = replace(chain, rules=(*chain.rules, Rule((), Jump("ISTIO_NOWHERE"), "Into the blue.")))
    return replace(ruleset, tables=(*tables, replace(table, chains=(*chains, broken))))


def backend(variant: str, purpose: Purpose = Purpose.AMBIENT_POD) -> PacketBackend:
    if variant == "nftables":
        return NftablesBackend(purpose=purpose)
    tools = find_tools(variant)
    assert tools is not None
    return IptablesBackend(tools, purpose=purpose)


def fail(pod: Netns, variant: str, ruleset: Ruleset, *, keep: bool) -> None:
    with pytest.raises(ApplyError):
        pod.call(lambda: program(ruleset, KIND[variant], backend(variant), keep_on_failure=keep))


@pytest.mark.parametrize("was_there", [False, True], ids=["fresh", "over an earlier state"])
def test_a_failure_leaves_nothing(was_there: bool, variant: str, pod: Netns) -> None:
    empty = settled(listing(pod, variant))
    if was_there:
        apply(pod, variant, PLAIN)
    fail(pod, variant, refused(pod_ruleset(FULL, BOTH, KIND[variant])), keep=False)
    assert settled(listing(pod, variant)) == empty


def test_a_failure_to_heal_leaves_everything(variant: str, pod: Netns) -> None:
    apply(pod, variant, PLAIN)
    good = settled(listing(pod, variant))
    fail(pod, variant, refused(pod_ruleset(PLAIN, BOTH, KIND[variant])), keep=True)
    # With iptables each table is a transaction of its own, so those before the refused one are as asked for.
    assert settled(listing(pod, variant)) == good


@pytest.mark.parametrize("keep", [False, True], ids=["fresh", "enrolled"])
@pytest.mark.parametrize("iptables_variant", IPTABLES_VARIANTS)
def test_when_ipv6_fails(keep: bool, iptables_variant: str, pod: Netns, tmp_path: Path) -> None:
    tools = tools_that_refuse_ipv6_rules(iptables_variant, tmp_path)
    empty = settled(listing(pod, iptables_variant))
    if keep:
        apply(pod, iptables_variant, PLAIN)
    before_ipv6 = save_rules(pod, iptables_variant, Family.V6)
    ruleset = pod_ruleset(FULL, BOTH, Backend.IPTABLES)

    with pytest.raises(ApplyError, match="no IPv6 today"):
        pod.call(
            lambda: program(
                ruleset,
                Backend.IPTABLES,
                IptablesBackend(tools, purpose=Purpose.AMBIENT_POD),
                keep_on_failure=keep,
            )
        )

    if keep:
        assert save_rules(pod, iptables_variant, Family.V6) == before_ipv6
        assert len(verify(pod, iptables_variant)) > 0
        assert verify(pod, iptables_variant, FULL, V4) != ()
        assert apply(pod, iptables_variant, keep=True).changed
        assert verify(pod, iptables_variant) == ()
    else:
        assert settled(listing(pod, iptables_variant)) == empty


@pytest.mark.parametrize("keep", [False, True], ids=["fresh", "enrolled"])
def test_when_routing_fails(keep: bool, variant: str, pod: Netns) -> None:
    if keep:
        apply(pod, variant)
    pod.ip("link set lo down")  # the kernel takes the routes away and refuses new ones
    before = settled(listing(pod, variant))
    with pytest.raises(ApplyError, match="interface lo of the pod is down"):
        apply(pod, variant, keep=keep)
    assert settled(listing(pod, variant)) == before


def test_new_rules_stay_when_old_ones_cannot_be_taken_out_of_an_enrolled_pod(pod: Netns) -> None:
    class Stubborn(FakeBackend):
        def remove(self, known: Ruleset | None = None) -> None:
            raise ApplyError("not today")

    ruleset = pod_ruleset(FULL, BOTH, Backend.NFTABLES)
    for keep in (True, False):
        other = Stubborn()
        other.held = ruleset
        with pytest.raises(ApplyError, match="not today"):
            pod.call(
                lambda: program(ruleset, Backend.NFTABLES, backend("nftables"), (other,), keep_on_failure=keep)  # noqa: B023
            )
        assert (verify(pod, "nftables") == ()) is keep


def test_a_part_that_cannot_be_removed_does_not_keep_the_others(pod: Netns) -> None:
    class Stubborn(FakeBackend):
        def own_names(self) -> tuple[str, ...]:
            return ("ISTIO_PRERT",)

        def remove(self, known: Ruleset | None = None) -> None:
            raise ApplyError("not today", "wait")

    empty = settled(listing(pod, "nftables"))
    apply(pod, "nftables")

    with pytest.raises(ApplyError, match="not today; not today") as caught:
        pod.call(lambda: remove_pod((Stubborn(), backend("nftables"), Stubborn())))

    assert caught.value.hint == "wait"
    assert settled(listing(pod, "nftables")) == empty


def test_a_pod_with_other_addresses_than_its_own_is_refused(variant: str, new_pod: PodMaker) -> None:
    pod, without = new_pod(), new_pod(frozenset())
    before = state(pod)

    def enroll(address: str) -> Applied:
        return apply_pod(
            FULL, BOTH, KIND[variant], choice=node_choice(variant), expected_addresses=[ip_address(address)]
        )

    with pytest.raises(NetnsError, match=r"none of the pod's addresses 10\.9\.9\.9"):
        pod.call(lambda: enroll("10.9.9.9"))
    with pytest.raises(NetnsError, match="but none"):
        without.call(lambda: enroll("10.77.0.2"))
    assert state(pod) == before
    assert pod.call(lambda: enroll("10.77.0.2")).changed
    assert apply(without, variant).changed  # the node's families count, not the pod's addresses


# --- costs ------------------------------------------------------------------------------------------------------------

VERIFY = """
import sys
from meshcni.pods.ambient import AmbientParameters
from tests.kernel.test_ambient_convergence import BOTH, FULL, V4, verify
from tests.kernel.world import Netns
assert verify(Netns(int(sys.argv[1])), sys.argv[2], FULL, BOTH if sys.argv[3] == "dual" else V4) == ()
"""


@pytest.mark.parametrize("kind", ["v4", "dual"])
def test_processes_of_a_verification(kind: str, variant: str, pod: Netns, tmp_path: Path) -> None:
    families = BOTH if kind == "dual" else V4
    apply(pod, variant, FULL, families)
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=execve", "-o", str(trace)]
    command += [sys.executable, "-c", VERIFY, str(pod.fd), variant, kind]
    subprocess.run(
        command, check=True, pass_fds=[pod.fd], env={"PYTHONPATH": "src:.", "PATH": "/usr/sbin:/usr/bin:/bin"}
    )

    started = re.findall(r'execve\("([^"]*)".* = 0$', trace.read_text(), flags=re.MULTILINE)

    expected = (
        [] if variant == "nftables" else [f"{COMMAND[family]}-{variant}-save" for family in Family][: len(families)]
    )
    assert [path.rpartition("/")[2] for path in started[1:]] == expected
