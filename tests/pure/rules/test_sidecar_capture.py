"""What counts as captured: each direction leads to the proxy, whoever made the rules and with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

import pytest

from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, NumberRange
from meshcni.rules import capture, iptables, nft
from meshcni.rules.iptables_observed import ObservedChain, ObservedTables
from meshcni.rules.model import Backend, Family, Ruleset
from meshcni.rules.plan import Observation
from meshcni.rules.sidecar import sidecar_ruleset

BOTH = frozenset(Family)
PORTS = (NumberRange.single(80), NumberRange(8000, 8100))
KINDS = {
    "plain": Interception(),
    "tproxy": Interception(mode=InterceptionMode.TPROXY),
    "some ports": Interception(inbound_ports=PORTS, inbound_exclude_ports=()),
    "exclusions": Interception(outbound_exclude_ports=PORTS, outbound_exclude_cidrs=(IPv4Network("10.0.0.0/8"),)),
    "some networks": Interception(outbound_cidrs=(IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/8"))),
    "some outbound ports": Interception(outbound_cidrs=(), outbound_ports=PORTS),
    "other ports and users": Interception(proxy_port=15101, inbound_capture_port=15106, proxy_uids=PORTS[:1]),
    "interfaces": Interception(exclude_interfaces=("net1",), virtual_interfaces=("tap0",)),
    "groups": Interception(owner_groups=PORTS),
    "invalid": Interception(drop_invalid=True),
}
DNS = {
    "dns": Interception(redirect_dns=True, capture_all_dns=True),
    "dns and tproxy": Interception(redirect_dns=True, capture_all_dns=True, mode=InterceptionMode.TPROXY),
}
NOTHING_IN = Interception(inbound_ports=())
NOTHING_OUT = Interception(outbound_cidrs=())
BACKENDS = list(Backend)


def rules(parameters: Interception, backend: Backend, families: frozenset[Family] = BOTH) -> Ruleset:
    return sidecar_ruleset(parameters, families, backend)


def held(ruleset: Ruleset, backend: Backend) -> Observation:
    if backend is Backend.NFTABLES:
        return nft.parse(nft.listing(ruleset))
    return {family: iptables.expected(ruleset, family) for family in ruleset.families}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("there", [*KINDS, *DNS])
def test_any_parameters_capture_what_any_others_want(backend: Backend, wanted: str, there: str) -> None:
    """An annotation that was edited after the pod's start is no fault of its rules."""
    observed = held(rules((KINDS | DNS)[there], backend), backend)
    assert capture.gaps(rules(KINDS[wanted], backend), observed) == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", DNS)
@pytest.mark.parametrize("there", DNS)
def test_dns_is_captured_by_any_rules_that_do(backend: Backend, wanted: str, there: str) -> None:
    assert capture.gaps(rules(DNS[wanted], backend), held(rules(DNS[there], backend), backend)) == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("wanted", "there", "word"),
    [
        (Interception(), NOTHING_IN, "inbound connections"),
        (Interception(), NOTHING_OUT, "outbound connections"),
        (KINDS["tproxy"], NOTHING_IN, "inbound connections"),
        (DNS["dns"], Interception(), "DNS questions"),
    ],
)
def test_a_direction_that_leads_nowhere_is_a_gap(
    backend: Backend, wanted: Interception, there: Interception, word: str
) -> None:
    found = capture.gaps(rules(wanted, backend), held(rules(there, backend), backend))
    assert found
    assert all(gap.startswith(f"{word} are not captured") for gap in found), found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_direction_that_is_not_wanted_is_no_gap(backend: Backend) -> None:
    for wanted in (NOTHING_IN, NOTHING_OUT):
        for there in (NOTHING_IN if wanted is NOTHING_IN else NOTHING_OUT, Interception()):
            assert capture.gaps(rules(wanted, backend), held(rules(there, backend), backend)) == ()


def test_nothing_at_all_has_a_gap_for_each_direction_and_family() -> None:
    iptables_gaps = capture.gaps(rules(Interception(), Backend.IPTABLES), {})
    assert [gap.partition(":")[0] for gap in iptables_gaps] == [
        "inbound connections are not captured (IPv4)",
        "outbound connections are not captured (IPv4)",
        "inbound connections are not captured (IPv6)",
        "outbound connections are not captured (IPv6)",
    ]
    nft_gaps = capture.gaps(rules(Interception(), Backend.NFTABLES), nft.ObservedTables())
    assert [gap.partition(":")[0] for gap in nft_gaps] == [
        "inbound connections are not captured",
        "outbound connections are not captured",
    ]


@pytest.mark.parametrize("there", [*KINDS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_chain_that_is_emptied_or_lost_is_a_gap(backend: Backend, there: str) -> None:
    """But for those that only leave things out: nat INBOUND with TPROXY, DROP, and mangle OUTPUT's marks."""
    ruleset = rules(KINDS[there], backend, frozenset({Family.V4}))
    for (table, chain), change in every_chain(held(ruleset, backend)):
        if not is_needed(table, chain, KINDS[there]):
            continue
        for without in (change(lambda _rules: ()), change(None)):
            assert capture.gaps(ruleset, without), f"{table} {chain}"


def is_needed(table: str, chain: str, parameters: Interception) -> bool:
    chain = chain.upper().replace("-", "_")
    transparent = parameters.mode is InterceptionMode.TPROXY
    inbound = {"PREROUTING", "ISTIO_INBOUND", "ISTIO_TPROXY"} if table.endswith("mangle") else set()
    outbound = {"OUTPUT", "ISTIO_OUTPUT", "ISTIO_REDIRECT"} if table.endswith("nat") else set()
    if transparent:
        return chain in inbound | outbound
    plain = {"PREROUTING", "ISTIO_INBOUND", "ISTIO_IN_REDIRECT"} if table.endswith("nat") else set()
    return chain in plain | outbound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("verdict", ["accept", "return", "drop"])
def test_a_rule_before_ours_that_takes_everything_is_a_gap(backend: Backend, verdict: str) -> None:
    ruleset = rules(Interception(), backend, frozenset({Family.V4}))
    text = f"counter {verdict}" if backend is Backend.NFTABLES else f"-j {verdict.upper()}"
    own = "istio-output" if backend is Backend.NFTABLES else "ISTIO_OUTPUT"
    for (_table, chain), change in every_chain(held(ruleset, backend)):
        found = capture.gaps(ruleset, change(lambda there: (text, *there)))
        assert bool(found) is (chain.lower() not in ("output", "prerouting")) or chain == own, (chain, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_for_some_packets_that_no_mesh_makes_is_a_gap(backend: Backend) -> None:
    ruleset = rules(Interception(), backend, frozenset({Family.V4}))
    text = "tcp dport 443 counter accept" if backend is Backend.NFTABLES else "-p tcp -m tcp --dport 443 -j ACCEPT"
    changes = [
        change for (_, chain), change in every_chain(held(ruleset, backend)) if chain.lower().endswith("o_output")
    ]
    changes += [c for (_, chain), c in every_chain(held(ruleset, backend)) if chain == "istio-output"]
    for change in changes:
        assert any("no mesh puts there" in gap for gap in capture.gaps(ruleset, change(lambda there: (text, *there))))
    assert changes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_proxy_that_is_not_exempted_is_a_gap(backend: Backend) -> None:
    """Its own connections would come back to it for ever."""
    ruleset = rules(Interception(), backend, frozenset({Family.V4}))

    def without_owners(there: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(rule for rule in there if not ("owner" in rule or "skuid" in rule or "skgid" in rule))

    found = [
        gap
        for _, change in every_chain(held(ruleset, backend))
        for gap in capture.gaps(ruleset, change(without_owners))
    ]
    assert found
    assert all("come back to it" in gap for gap in found)


def test_a_base_chain_off_its_hook_is_a_gap() -> None:
    ruleset = rules(Interception(), Backend.NFTABLES)
    text = nft.listing(ruleset).replace("type nat hook output priority -100; policy accept;\n", "\n")
    assert any("outbound" in gap for gap in capture.gaps(ruleset, nft.parse(text)))


def test_rules_of_ipv4_alone_are_gaps_of_ipv6_with_iptables() -> None:
    only_v4 = held(rules(Interception(), Backend.IPTABLES, frozenset({Family.V4})), Backend.IPTABLES)
    assert all("(IPv6)" in gap for gap in capture.gaps(rules(Interception(), Backend.IPTABLES), only_v4))
    assert not capture.holds_own_chains(only_v4, Family.V6)
    assert capture.holds_own_chains(only_v4, Family.V4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_needs_routes(backend: Backend) -> None:
    for parameters in (*KINDS.values(), *DNS.values()):
        transparent = parameters.mode is InterceptionMode.TPROXY and parameters.inbound_ports in (EVERYTHING, PORTS)
        assert capture.is_transparent(held(rules(parameters, backend), backend)) is transparent


def test_other_peoples_chains_do_not_count() -> None:
    ruleset = rules(Interception(), Backend.IPTABLES, frozenset({Family.V4}))
    plain = iptables.expected(ruleset, Family.V4)
    nat = {**plain.tables["nat"], "KUBE-SERVICES": ObservedChain("-", ("-j ACCEPT",))}
    nat["OUTPUT"] = ObservedChain("ACCEPT", ("-j KUBE-SERVICES", *nat["OUTPUT"].rules))
    assert capture.gaps(ruleset, {Family.V4: ObservedTables({**plain.tables, "nat": nat})}) == ()


Change = Callable[[Callable[[tuple[str, ...]], tuple[str, ...]] | None], Observation]


def every_chain(observed: Observation) -> list[tuple[tuple[str, str], Change]]:
    """Each chain, with what gives the observation with other rules in it, or (None) without it."""
    tables = observed.tables if isinstance(observed, nft.ObservedTables) else observed[Family.V4].tables

    def changing(table: str, chain: str) -> Change:
        def change(edit: Callable[[tuple[str, ...]], tuple[str, ...]] | None) -> Observation:
            chains = {name: held for name, held in tables[table].items() if edit is not None or name != chain}
            if edit is not None:
                chains[chain] = replace(chains[chain], rules=edit(chains[chain].rules))
            return packed(observed, {**tables, table: chains})

        return change

    return [((table, chain), changing(table, chain)) for table, chains in tables.items() for chain in chains]


def packed(like: Observation, tables: Mapping[str, Mapping[str, object]]) -> Observation:
    if isinstance(like, nft.ObservedTables):
        return nft.ObservedTables(tables)  # type: ignore[arg-type]
    return {Family.V4: ObservedTables(tables)}  # type: ignore[arg-type]
