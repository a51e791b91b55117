"""Ambient rules: the committed files, how many there are, what they lead to over any earlier state."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pure.rules.ambient_cases import AMBIENT_CASES, DEFAULT, DNS, INGRESS, INTERFACES, HostCase, PodCase, texts
from tests.pure.rules.cases import BOTH, V4
from tests.pure.rules.restore import State, empty, observed, restore, spellings
from tests.pure.rules.strategies import INTERCEPTIONS

from meshcni.errors import RulesError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.interception import EVERYTHING, Interception
from meshcni.rules import iptables, narrate, nft, plan
from meshcni.rules.ambient import host_ruleset, pod_ruleset, route_ruleset
from meshcni.rules.model import BUILT_IN_CHAINS, Backend, Family, Jump, Purpose, Ruleset
from meshcni.rules.plan import DriftKind
from meshcni.rules.sidecar import sidecar_ruleset

FOLDER = Path(__file__).parent / "expected-ambient"
COMMITTED = {
    folder.name: {path.name: path.read_text() for path in folder.iterdir()} for folder in sorted(FOLDER.iterdir())
}
INTERFACE_NAMES = st.sampled_from(["eth1", "k6t+", "ip", "counter", "a_b.100", "fifteen-letters", "x:1", "y@z"])
PARAMETERS: st.SearchStrategy[AmbientParameters] = st.builds(
    AmbientParameters,
    dns_capture=st.booleans(),
    ingress=st.booleans(),
    virtual_interfaces=st.lists(INTERFACE_NAMES, max_size=4).map(tuple),
    probe_v4=st.integers(0, 2**32 - 1).map(IPv4Address),
    probe_v6=st.integers(0, 2**128 - 1).map(IPv6Address),
)
FAMILIES = st.sampled_from([V4, BOTH])


def rules_for(parameters: AmbientParameters = DEFAULT, families: frozenset[Family] = V4) -> Ruleset:
    return pod_ruleset(parameters, families, Backend.IPTABLES)


# --- the committed files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AMBIENT_CASES)
def test_the_committed_files_are_up_to_date(name: str) -> None:
    assert texts(AMBIENT_CASES[name]) == COMMITTED.get(name), "run `make expected` and look at the difference"


def test_there_are_no_files_of_forgotten_cases() -> None:
    assert set(COMMITTED) == set(AMBIENT_CASES)


def test_every_case_differs_from_every_other() -> None:
    assert len({repr(COMMITTED[name]) for name in AMBIENT_CASES}) == len(AMBIENT_CASES)


@pytest.mark.parametrize(("kind", "default"), [(PodCase, DEFAULT), (HostCase, HostCase())])
def test_every_parameter_has_a_case(kind: type[PodCase | HostCase], default: object) -> None:
    subjects = [
        case.parameters if isinstance(case, PodCase) else case
        for case in AMBIENT_CASES.values()
        if isinstance(case, kind)
    ]
    names = {field.name for field in fields(default)}  # type: ignore[arg-type]
    assert {name for item in subjects for name in names if getattr(item, name) != getattr(default, name)} == names


# --- what there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "rules"),
    [
        (DNS, 18),
        (DEFAULT, 12),
        (INGRESS, 10),
        (replace(INTERFACES, ingress=True), 14),
        (INTERFACES, 16),
    ],
)
def test_the_number_of_rules_is_the_originals(parameters: AmbientParameters, rules: int) -> None:
    for family in Family:
        tables = rules_for(parameters, BOTH).for_family(family)
        assert sum(len(chain.rules) for table in tables for chain in table.chains) == rules


@given(PARAMETERS, FAMILIES, st.sampled_from(Backend))
def test_every_rule_says_why_and_only_jumps_are_not_counted(
    parameters: AmbientParameters, families: frozenset[Family], backend: Backend
) -> None:
    ruleset = pod_ruleset(parameters, families, backend)
    assert (ruleset.purpose, ruleset.families) == (Purpose.AMBIENT_POD, families)
    for table in ruleset.tables:
        for rule in (rule for chain in table.chains for rule in chain.rules):
            assert rule.why.endswith(".")
            assert rule.is_counted is not isinstance(rule.action, Jump)
            assert rule.family is None or rule.family in families


@given(PARAMETERS, st.sampled_from(Backend))
def test_routing_is_that_of_a_pod_without_packet_rules(parameters: AmbientParameters, backend: Backend) -> None:
    for families in (V4, BOTH):
        pod, routing = pod_ruleset(parameters, families, backend), route_ruleset(families)
        assert (pod.policy_rules, pod.routes, pod.addresses) == (routing.policy_rules, routing.routes, ())
        assert (routing.size, len(routing.policy_rules), len(routing.routes)) == (0, len(families), len(families))


def test_without_a_family_or_the_kubelets_user_there_are_no_rules() -> None:
    with pytest.raises(RulesError, match="no address family"):
        pod_ruleset(DEFAULT, frozenset(), Backend.NFTABLES)
    with pytest.raises(RulesError, match="no address family"):
        route_ruleset(frozenset())
    with pytest.raises(RulesError, match="the kubelet's user"):
        host_ruleset(DEFAULT.probe_v4, DEFAULT.probe_v6, V4, Backend.NFTABLES)
    assert host_ruleset(DEFAULT.probe_v4, DEFAULT.probe_v6, V4, Backend.IPTABLES).size == 2


def test_digests_tell_everything_apart() -> None:
    digests = [plan.digest(case.ruleset(backend)) for case in AMBIENT_CASES.values() for backend in Backend]
    assert len(set(digests)) == len(digests)
    ruleset = rules_for()
    counted = replace(
        ruleset,
        tables=tuple(
            replace(
                table,
                chains=tuple(
                    replace(chain, rules=tuple(replace(rule, is_counted=True) for rule in chain.rules))
                    for chain in table.chains
                ),
            )
            for table in ruleset.tables
        ),
    )
    assert plan.digest(ruleset) != plan.digest(counted)
    assert plan.digest(ruleset) != plan.digest(replace(ruleset, purpose=Purpose.SIDECAR))


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("name", AMBIENT_CASES)
def test_every_rule_has_its_line_and_its_object(name: str, backend: Backend) -> None:
    ruleset = AMBIENT_CASES[name].ruleset(backend)
    lines = narrate.words(ruleset)
    assert sum(" → " in line for line in lines) == ruleset.size
    read = json.loads(json.dumps(narrate.as_objects(ruleset)))
    assert sum(len(chain["rules"]) for table in read["tables"] for chain in table["chains"]) == ruleset.size
    for rule in read["policyRules"]:
        assert (rule["mark"], rule["mask"], rule["priority"], rule["table"]) == (0x111, 0xFFF, 32764, 100)


def test_rules_in_words() -> None:
    pod = narrate.words(rules_for(DNS))
    host = narrate.words(host_ruleset(DEFAULT.probe_v4, DEFAULT.probe_v6, V4, Backend.IPTABLES))
    for line in (
        "  1. marked 0x539 in the bits 0xfff → mark the connection 0x111 in the bits 0xfff. "
        "A connection that ztunnel opened to the application with the client's address is remembered.",
        "  2. not leaving by lo, not marked 0x539 in the bits 0xfff, UDP to port 53 → redirect to port 15053. "
        "DNS queries of the application are answered by ztunnel.",
        "  IPv4 packets with mark 0x111/0xfff are routed by table 100.",
    ):
        assert line in pod
    assert host[-1] == (
        "  1. IPv4: sent by a process of this host, TCP, to an address of set istio-inpod-probes-v4 → send from "
        "169.254.7.127. What this host itself sends to an enrolled pod is taken for a probe, which must not be "
        "captured there."
    )


# --- nft --------------------------------------------------------------------------------------------------------------


@given(PARAMETERS, FAMILIES)
def test_what_nft_lists_reads_back(parameters: AmbientParameters, families: frozenset[Family]) -> None:
    ruleset = pod_ruleset(parameters, families, Backend.NFTABLES)
    counted = nft.listing(ruleset).replace("counter", "counter packets 71 bytes 4260")
    read = nft.parse(counted, Purpose.AMBIENT_POD)
    assert read == nft.expected(ruleset)
    assert plan.drift(ruleset, read) == ()
    assert nft.parse(counted) == nft.ObservedTables()  # none of a sidecar's


def test_a_sidecars_tables_are_leftovers_in_an_ambient_pod_only() -> None:
    ruleset = pod_ruleset(DEFAULT, V4, Backend.NFTABLES)
    leftover = "table inet istio-proxy-raw {\n\tchain output {\n\t}\n}\n"
    found = plan.drift(ruleset, nft.parse(nft.listing(ruleset) + leftover, ruleset.purpose))
    assert [(drift.kind, drift.place) for drift in found] == [(DriftKind.UNEXPECTED_CHAIN, "istio-proxy-raw output")]
    present = {"istio-ambient-nat": ("output",), "istio-proxy-raw": ("output",)}
    assert nft.render_leftovers(ruleset, present).splitlines() == [
        "add table inet istio-proxy-raw",
        "delete table inet istio-proxy-raw",
    ]
    assert nft.render_removal(Purpose.AMBIENT_POD, present).splitlines() == [
        f"{verb} table inet {table}" for table in present for verb in ("add", "delete")
    ]
    assert nft.render_leftovers(sidecar_ruleset(Interception(), V4, Backend.NFTABLES), {"istio-proxy-raw": ()}) == ""


def test_the_hosts_table_keeps_what_is_not_ours() -> None:
    ruleset = host_ruleset(DEFAULT.probe_v4, DEFAULT.probe_v6, BOTH, Backend.NFTABLES, 0)
    present = {"istio-ambient-nat": ("postrouting", "prerouting")}
    everything = [
        nft.render(ruleset),
        nft.render_leftovers(ruleset, present),
        nft.render_removal(ruleset.purpose),
        nft.render_removal(ruleset.purpose, present),
    ]
    assert not any(f"{verb} table" in text for text in everything for verb in ("delete", "flush"))
    assert everything[1:3] == [
        "".join(f"{verb} chain inet istio-ambient-nat prerouting\n" for verb in ("add", "flush", "delete")),
        "",
    ]
    assert [line.split()[-1] for line in everything[3].splitlines()] == ["postrouting"] * 3 + ["prerouting"] * 3
    sets = '\tset istio-inpod-probes-v4 {\n\t\ttype ipv4_addr\n\t\telements = { 10.0.0.1 comment "a" }\n\t}\n\n'
    with_sets = nft.listing(ruleset).replace("\tchain postrouting", f"{sets}\tchain postrouting")
    assert plan.drift(ruleset, nft.parse(with_sets, ruleset.purpose)) == ()


# --- iptables ---------------------------------------------------------------------------------------------------------


def applied(state: State, ruleset: Ruleset, family: Family = Family.V4) -> State:
    return restore(state, iptables.render(ruleset, family, observed(state)), spellings(ruleset, family))


def drift_of(state: State, ruleset: Ruleset) -> list[tuple[DriftKind, str, str]]:
    found = plan.drift(ruleset, {Family.V4: observed(state)})
    return [(drift.kind, drift.place, drift.subject) for drift in found]


def saved_text(state: State) -> str:
    """Return the listing that iptables-save would print, with numbers, of one variant or the other."""
    lines = ["# Generated by iptables-save v1.8.9"]
    for table, chains in reversed(state.items()):
        lines.append(f"*{table}")
        lines += [f":{name} {'ACCEPT' if name in BUILT_IN_CHAINS else '-'} [7:420]" for name in sorted(chains)]
        lines += [f"-A {name} {rule}" for name in chains if name in BUILT_IN_CHAINS for rule in chains[name]]
        own = sorted(name for name in chains if name not in BUILT_IN_CHAINS)
        lines += [f"-A {name} {rule}" for name in own for rule in chains[name]]
        lines += ["COMMIT", "# Completed"]
    return "\n".join(lines) + "\n"


@given(PARAMETERS, FAMILIES)
def test_what_was_just_programmed_has_not_drifted(parameters: AmbientParameters, families: frozenset[Family]) -> None:
    ruleset = rules_for(parameters, families)
    states = {
        family: restore(empty(), iptables.render(ruleset, family), spellings(ruleset, family)) for family in families
    }
    assert plan.drift(ruleset, {family: observed(state) for family, state in states.items()}) == ()
    for family, state in states.items():
        assert iptables.canonical(saved_text(state)) == iptables.listing(ruleset, family)


@pytest.mark.parametrize("line", [":MINE - [0:0]", "-A PREROUTING -j ACCEPT", "-A ISTIO_OUTPUT -j RETURN"])
def test_a_line_more_is_another_text(line: str) -> None:
    ruleset = rules_for(DNS)
    text = saved_text(restore(empty(), iptables.render(ruleset, Family.V4), spellings(ruleset, Family.V4)))
    for table in ("*nat\n", "*filter\n"):
        assert iptables.canonical(text.replace(table, f"{table}{line}\n")) != iptables.listing(ruleset, Family.V4)


@settings(max_examples=40)
@given(INTERCEPTIONS, PARAMETERS, PARAMETERS)
def test_over_a_sidecars_or_other_rules_it_is_as_if_there_had_been_none(
    sidecar: Interception, earlier: AmbientParameters, later: AmbientParameters
) -> None:
    # Nobody can recognise the exclusion of an interface later.
    sidecar = replace(sidecar, exclude_interfaces=(), outbound_cidrs=EVERYTHING)
    fresh = applied(empty(), rules_for(later))
    for before in (sidecar_ruleset(sidecar, V4, Backend.IPTABLES), rules_for(earlier)):
        assert applied(applied(empty(), before), rules_for(later)) == fresh


def test_a_second_run_changes_nothing_and_others_stay() -> None:
    state = empty()
    state["nat"]["OUTPUT"] = ["-o tun0 -j RETURN"]
    state["nat"]["MINE"] = ["-j ACCEPT"]
    state["filter"]["INPUT"] = ["-p tcp -j DROP"]
    ruleset = rules_for(DNS)
    after = applied(state, ruleset)
    assert after["nat"]["OUTPUT"] == ["-o tun0 -j RETURN", "-j ISTIO_OUTPUT"]
    assert after["nat"]["MINE"] == state["nat"]["MINE"]
    assert after["filter"] == state["filter"]
    assert drift_of(after, ruleset) == []
    assert applied(after, ruleset) == after


def test_a_rule_before_our_jump_is_other_peoples_but_a_lost_or_second_jump_is_not() -> None:
    ruleset = rules_for()
    state = applied(empty(), ruleset)
    state["nat"]["OUTPUT"].insert(0, "-p tcp -j ACCEPT")
    assert drift_of(state, ruleset) == []
    state["nat"]["OUTPUT"].append("-j ISTIO_OUTPUT")
    assert drift_of(state, ruleset) == [(DriftKind.UNEXPECTED_RULE, "nat OUTPUT (IPv4)", "-j ISTIO_OUTPUT")]
    state["nat"]["OUTPUT"].clear()
    assert drift_of(state, ruleset) == [(DriftKind.MISSING_RULE, "nat OUTPUT (IPv4)", "-j ISTIO_OUTPUT")]


def test_an_empty_chain_is_made_where_only_a_jump_leads_to_it() -> None:
    state = applied(empty(), rules_for(INGRESS))
    assert state["nat"]["ISTIO_PRERT"] == []
    assert state["nat"]["PREROUTING"] == ["-j ISTIO_PRERT"]
    del state["nat"]["ISTIO_PRERT"]
    assert drift_of(state, rules_for(INGRESS)) == [(DriftKind.MISSING_CHAIN, "nat ISTIO_PRERT (IPv4)", "ISTIO_PRERT")]


def test_the_order_of_match_extensions_is_kept() -> None:
    ruleset = rules_for(DNS)
    rules = restore(empty(), iptables.render(ruleset, Family.V4), spellings(ruleset, Family.V4))
    assert rules["raw"]["ISTIO_OUTPUT"] == ["-p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1"]
    over_tcp = "! -d 127.0.0.1/32 -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053"
    assert over_tcp in rules["nat"]["ISTIO_OUTPUT"]


# --- iptables on the host ---------------------------------------------------------------------------------------------

HOST = host_ruleset(DEFAULT.probe_v4, DEFAULT.probe_v6, V4, Backend.IPTABLES)
JUMP = "-j ISTIO_POSTRT"


def busy_host() -> State:
    state = empty()
    state["nat"]["KUBE-POSTROUTING"] = ["-j MASQUERADE"]
    state["nat"]["POSTROUTING"] = ["-j KUBE-POSTROUTING"]
    state["nat"]["ISTIO_OUTPUT"] = ["-j RETURN"]
    state["nat"]["OUTPUT"] = ["-j ISTIO_OUTPUT"]
    state["filter"]["INPUT"] = ["-p tcp -j DROP", "-p udp -j DROP"]
    return state


def test_on_the_host_only_one_chain_is_ours_and_comes_first() -> None:
    before = busy_host()
    after = applied(before, HOST)
    assert after["nat"].pop("ISTIO_POSTRT") == [
        "-p tcp -m owner --socket-exists -m set --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127"
    ]
    assert after["nat"]["POSTROUTING"].pop(0) == JUMP
    assert after == before


@pytest.mark.parametrize(
    ("jumps", "found"),
    [
        ([JUMP, "-j KUBE-POSTROUTING"], []),
        (["-j KUBE-POSTROUTING"], [(DriftKind.MISSING_RULE, JUMP)]),
        (["-j KUBE-POSTROUTING", JUMP], [(DriftKind.NOT_FIRST, JUMP)]),
        ([JUMP, JUMP], [(DriftKind.UNEXPECTED_RULE, JUMP)]),
        (["-j KUBE-POSTROUTING", JUMP, JUMP], [(DriftKind.UNEXPECTED_RULE, JUMP), (DriftKind.NOT_FIRST, JUMP)]),
    ],
)
def test_the_place_of_the_jump_is_seen_and_set_right(jumps: list[str], found: list[tuple[DriftKind, str]]) -> None:
    state = applied(busy_host(), HOST)
    state["nat"]["POSTROUTING"] = jumps
    assert [(kind, subject) for kind, _place, subject in drift_of(state, HOST)] == found
    healed = applied(state, HOST)
    assert healed["nat"]["POSTROUTING"] == [JUMP, *(jump for jump in jumps if jump != JUMP)]
    assert drift_of(healed, HOST) == []


def test_the_hosts_removal_takes_that_chain_only() -> None:
    before = busy_host()
    state = applied(before, HOST)
    script = iptables.render_removal(observed(state), None, Purpose.AMBIENT_HOST)
    assert restore(state, script, {}) == before
    assert iptables.render_removal(observed(before), None, Purpose.AMBIENT_HOST) == ""


def test_a_family_given_up_loses_its_rules() -> None:
    both = host_ruleset(DEFAULT.probe_v4, DEFAULT.probe_v6, BOTH, Backend.IPTABLES)
    state = applied(busy_host(), both, Family.V6)
    assert applied(state, HOST, Family.V6) == busy_host()
