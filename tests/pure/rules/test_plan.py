"""Drift: what distinguishes the kernel from the desired rules; digest: whether two rule sets are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from tests.pure.rules.cases import CASES
from tests.pure.rules.restore import State, empty, observed, restore, spellings
from tests.pure.rules.strategies import FAMILIES, INTERCEPTIONS

from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules import iptables, nft, plan
from meshcni.rules.model import Backend, Chain, Family, Rule, Ruleset, Table
from meshcni.rules.plan import Drift, DriftKind
from meshcni.rules.sidecar import sidecar_ruleset

V4 = frozenset({Family.V4})
DEFAULT = Interception()
LISTINGS = {path.name: path.read_text() for path in (Path(__file__).parent / "listings").iterdir()}


def rules_for(parameters: Interception = DEFAULT, backend: Backend = Backend.IPTABLES) -> Ruleset:
    return sidecar_ruleset(parameters, V4, backend)


def programmed(ruleset: Ruleset) -> State:
    return restore(empty(), iptables.render(ruleset, Family.V4), spellings(ruleset, Family.V4))


def drift_of(state: State, ruleset: Ruleset) -> list[tuple[DriftKind, str, str]]:
    found = plan.drift(ruleset, {Family.V4: observed(state)})
    return [(drift.kind, drift.place, drift.subject) for drift in found]


@settings(max_examples=30)
@given(INTERCEPTIONS, FAMILIES)
def test_what_was_just_programmed_has_not_drifted(parameters: Interception, families: frozenset[Family]) -> None:
    ruleset = sidecar_ruleset(parameters, families, Backend.IPTABLES)
    tables = {
        family: observed(restore(empty(), iptables.render(ruleset, family), spellings(ruleset, family)))
        for family in families
    }
    assert plan.drift(ruleset, tables) == ()
    in_nft = sidecar_ruleset(parameters, families, Backend.NFTABLES)
    assert plan.drift(in_nft, nft.parse(nft.listing(in_nft))) == ()


def test_recorded_listings_of_the_kernel_have_not_drifted() -> None:
    case = CASES["everything"]
    for variant in ("nft", "legacy"):
        tables = {
            Family.V4: iptables.parse(LISTINGS[f"iptables-{variant}-1.8.9.txt"]),
            Family.V6: iptables.parse(LISTINGS[f"ip6tables-{variant}-1.8.9.txt"]),
        }
        assert plan.drift(sidecar_ruleset(case.parameters, case.families, Backend.IPTABLES), tables) == ()
    in_nft = sidecar_ruleset(case.parameters, case.families, Backend.NFTABLES)
    assert plan.drift(in_nft, nft.parse(LISTINGS["nft-1.0.6.txt"])) == ()


def test_a_family_that_was_not_looked_at_counts_as_empty() -> None:
    both = sidecar_ruleset(DEFAULT, frozenset(Family), Backend.IPTABLES)
    found = plan.drift(both, {Family.V4: observed(programmed(rules_for()))})
    assert {drift.place for drift in found} == {
        "nat PREROUTING (IPv6)",
        "nat OUTPUT (IPv6)",
        "nat ISTIO_INBOUND (IPv6)",
        "nat ISTIO_REDIRECT (IPv6)",
        "nat ISTIO_IN_REDIRECT (IPv6)",
        "nat ISTIO_OUTPUT (IPv6)",
    }


def test_other_peoples_rules_are_no_drift() -> None:
    state = programmed(rules_for())
    state["nat"]["OUTPUT"].insert(0, "-o tun0 -j RETURN")
    state["nat"]["PREROUTING"].append("-p tcp -j ACCEPT")
    state["nat"]["THEIRS"] = ["-j ACCEPT"]
    state["filter"]["INPUT"] = ["-p tcp -j DROP"]
    assert drift_of(state, rules_for()) == []


def remove_chain(state: State) -> None:
    del state["nat"]["ISTIO_IN_REDIRECT"]


def add_chain(state: State) -> None:
    state["raw"]["ISTIO_INBOUND"] = []


def remove_jump(state: State) -> None:
    state["nat"]["OUTPUT"].clear()


def double_jump(state: State) -> None:
    state["nat"]["OUTPUT"].append("-j ISTIO_OUTPUT")


def leave_jump_of_tproxy(state: State) -> None:
    state["mangle"]["PREROUTING"].append("-p tcp -j ISTIO_INBOUND")


def leave_mark_of_tproxy(state: State) -> None:
    state["mangle"]["OUTPUT"].append("-o lo -p tcp -m mark --mark 0x539 -j RETURN")


def change_port(state: State) -> None:
    state["nat"]["ISTIO_REDIRECT"][0] = "-p tcp -j REDIRECT --to-ports 16001"


def swap(state: State) -> None:
    rules = state["nat"]["ISTIO_OUTPUT"]
    rules[0], rules[-1] = rules[-1], rules[0]


def jump_from_elsewhere(state: State) -> None:
    state["nat"]["THEIRS"] = ["-j ISTIO_OUTPUT"]


@pytest.mark.parametrize(
    ("disturb", "found"),
    [
        (remove_chain, [(DriftKind.MISSING_CHAIN, "nat ISTIO_IN_REDIRECT (IPv4)", "ISTIO_IN_REDIRECT")]),
        (add_chain, [(DriftKind.UNEXPECTED_CHAIN, "raw ISTIO_INBOUND (IPv4)", "ISTIO_INBOUND")]),
        (remove_jump, [(DriftKind.MISSING_RULE, "nat OUTPUT (IPv4)", "-j ISTIO_OUTPUT")]),
        (double_jump, [(DriftKind.UNEXPECTED_RULE, "nat OUTPUT (IPv4)", "-j ISTIO_OUTPUT")]),
        (
            leave_jump_of_tproxy,
            [(DriftKind.UNEXPECTED_RULE, "mangle PREROUTING (IPv4)", "-p tcp -j ISTIO_INBOUND")],
        ),
        (
            leave_mark_of_tproxy,
            [(DriftKind.UNEXPECTED_RULE, "mangle OUTPUT (IPv4)", "-o lo -p tcp -m mark --mark 0x539 -j RETURN")],
        ),
        (
            change_port,
            [
                (DriftKind.MISSING_RULE, "nat ISTIO_REDIRECT (IPv4)", "-p tcp -j REDIRECT --to-ports 15001"),
                (DriftKind.UNEXPECTED_RULE, "nat ISTIO_REDIRECT (IPv4)", "-p tcp -j REDIRECT --to-ports 16001"),
            ],
        ),
        (swap, [(DriftKind.WRONG_ORDER, "nat ISTIO_OUTPUT (IPv4)", "-j ISTIO_REDIRECT")]),
    ],
)
def test_each_disturbance_is_named(disturb: object, found: list[tuple[DriftKind, str, str]]) -> None:
    state = programmed(rules_for())
    assert callable(disturb)
    disturb(state)
    assert drift_of(state, rules_for()) == found


def test_our_entries_in_the_wrong_order_are_drift() -> None:
    ruleset = rules_for(replace(DEFAULT, mode=InterceptionMode.TPROXY))
    state = programmed(ruleset)
    state["mangle"]["PREROUTING"].reverse()
    state["mangle"]["PREROUTING"].insert(1, "-j THEIRS")
    assert [drift[:2] for drift in drift_of(state, ruleset)] == [
        (DriftKind.WRONG_ORDER, "mangle PREROUTING (IPv4)"),
    ]


def test_other_parameters_are_drift() -> None:
    assert drift_of(programmed(rules_for()), rules_for(replace(DEFAULT, proxy_port=16001))) != []
    assert drift_of(programmed(rules_for(replace(DEFAULT, redirect_dns=True, capture_all_dns=True))), rules_for()) != []


NFT_DISTURBANCES = [
    ("\t\tmeta l4proto tcp counter redirect to :15006\n", "", DriftKind.MISSING_RULE),
    (
        "\t\tcounter jump istio-output\n",
        "\t\tcounter accept\n\t\tcounter jump istio-output\n",
        DriftKind.UNEXPECTED_RULE,
    ),
    ("priority -100; policy accept;", "priority -100; policy drop;", DriftKind.WRONG_HOOK),
    ("\tchain istio-inbound {", "\tchain istio-inbound2 {", DriftKind.MISSING_CHAIN),
    ("\tchain istio-inbound {", "\tchain extra {\n\t}\n\n\tchain istio-inbound {", DriftKind.UNEXPECTED_CHAIN),
    ("\tchain prerouting {", "\tflags dormant\n\n\tchain prerouting {", DriftKind.UNEXPECTED_OBJECT),
    (
        "\t\ttcp dport 15020 counter return\n\t\ttcp dport 15021 counter return\n",
        "\t\ttcp dport 15021 counter return\n\t\ttcp dport 15020 counter return\n",
        DriftKind.WRONG_ORDER,
    ),
]


@pytest.mark.parametrize(("before", "after", "kind"), NFT_DISTURBANCES)
def test_each_disturbance_in_nft_is_named(before: str, after: str, kind: DriftKind) -> None:
    ruleset = rules_for(backend=Backend.NFTABLES)
    text = nft.listing(ruleset)
    assert before in text
    found = plan.drift(ruleset, nft.parse(text.replace(before, after, 1)))
    assert found[0].kind is kind
    assert len(found) == (2 if kind is DriftKind.MISSING_CHAIN else 1)


def test_tables_that_should_be_gone_are_drift() -> None:
    dns = rules_for(replace(DEFAULT, redirect_dns=True, capture_all_dns=True), Backend.NFTABLES)
    desired = rules_for(backend=Backend.NFTABLES)
    assert "istio-proxy-raw output" in {drift.place for drift in plan.drift(desired, nft.parse(nft.listing(dns)))}
    empty_table = nft.parse(nft.listing(desired) + "table inet istio-proxy-raw {\n}\n")
    assert [drift.kind for drift in plan.drift(desired, empty_table)] == [DriftKind.UNEXPECTED_TABLE]


@pytest.mark.parametrize("kind", DriftKind)
def test_every_drift_is_a_sentence(kind: DriftKind) -> None:
    text = str(Drift(kind, "nat OUTPUT (IPv4)", "-j ISTIO_OUTPUT"))
    assert "nat OUTPUT (IPv4)" in text
    assert len(text.split()) >= 4


# --- digest -----------------------------------------------------------------------------------------------------------


def test_the_digest_tells_rule_sets_apart_but_not_their_reasons() -> None:
    def with_other_reasons(ruleset: Ruleset) -> Ruleset:
        return replace(
            ruleset,
            tables=tuple(
                Table(
                    table.name,
                    tuple(
                        Chain(
                            chain.name,
                            tuple(Rule(rule.matches, rule.action, "Other.", rule.family) for rule in chain.rules),
                            chain.inserted,
                        )
                        for chain in table.chains
                    ),
                )
                for table in ruleset.tables
            ),
        )

    assert plan.digest(rules_for()) == plan.digest(with_other_reasons(rules_for()))
    # Cases that show that something has no effect share a digest with the default.
    same = {"default", "dns-without-resolvers", "dns-all-not-redirected"}
    digests = {
        plan.digest(sidecar_ruleset(case.parameters, case.families, Backend.IPTABLES))
        for name, case in CASES.items()
        if name not in same
    }
    assert len(digests) == len(CASES) - len(same)
    assert plan.digest(rules_for()) not in digests
    assert all(len(digest) == 16 and set(digest) <= set("0123456789abcdef") for digest in digests)
