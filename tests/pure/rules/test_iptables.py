"""Restore input: over whatever an earlier run left, with other people's rules around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pure.rules.cases import CASES
from tests.pure.rules.restore import HOOKS, State, empty, observed, restore, save, spellings
from tests.pure.rules.strategies import INTERCEPTIONS

from meshcni.errors import RulesError
from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode
from meshcni.rules import iptables
from meshcni.rules.iptables import ObservedChain, ObservedTables
from meshcni.rules.iptables_observed import target
from meshcni.rules.model import BUILT_IN_CHAINS, Backend, Family, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

V4 = frozenset({Family.V4})
DEFAULT = Interception()
TPROXY = replace(DEFAULT, mode=InterceptionMode.TPROXY)

FEW = settings(max_examples=20)  # a drawn netns costs some 10 ms; one test below draws more

# Rules that look like ours but are not.
FOREIGN_RULES = (
    "-j KUBE-SERVICES",
    "-p tcp -j ACCEPT",
    "-i tun0 -j RETURN",
    "-o tun0 -j RETURN",
    '-m comment --comment "see -j ISTIO_OUTPUT" -j ACCEPT',
    "-p tcp -m mark --mark 0x77 -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
    "-o lo -p tcp -m mark --mark 0x77 -j RETURN",
    "-p tcp -m connmark --mark 0x77 -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
    "-o lo -p tcp -m owner --uid-owner 1337 -j MARK --set-xmark 0x77/0xffffffff",
    "-d 10.0.0.0/8 -j FOREIGN",
    "-j ISTIO",
)


@st.composite
def surroundings(draw: st.DrawFn) -> State:
    """Draw a netns with other tools' rules and chains in it."""
    state = empty()
    for table, chains in HOOKS.items():
        state[table]["FOREIGN"] = list(draw(st.lists(st.sampled_from(FOREIGN_RULES[:5]), max_size=2)))
        state[table]["ISTIOD-LIKE"] = []
        for chain in chains:
            state[table][chain] = list(draw(st.lists(st.sampled_from(FOREIGN_RULES), max_size=3)))
    return state


def scattered(state: State, places: st.DataObject) -> State:
    """Return the state with further foreign rules between all others, as if another tool had worked after us."""
    extra = "-p icmp -j ACCEPT"
    for table, chains in HOOKS.items():
        for chain in chains:
            rules = state[table][chain]
            rules.insert(places.draw(st.integers(0, len(rules))), extra)
    return state


def rules_for(parameters: Interception) -> Ruleset:
    return sidecar_ruleset(parameters, V4, Backend.IPTABLES)


def applied(state: State, ruleset: Ruleset, *, clean: bool = False) -> State:
    script = iptables.render(ruleset, Family.V4, None if clean else observed(state))
    return restore(state, script, spellings(ruleset, Family.V4))


def of_others(state: State, ours: Ruleset) -> State:
    """Return what is left when our chains and the entries of `ours` are taken away, each once."""
    left = {
        table: {name: list(rules) for name, rules in chains.items() if not name.startswith("ISTIO_")}
        for table, chains in state.items()
    }
    for table, chains in iptables.expected(ours, Family.V4).tables.items():
        for name in set(chains) & set(BUILT_IN_CHAINS):
            for rule in chains[name].rules:
                left[table][name].remove(rule)
    return left


def recognisable(parameters: Interception) -> Interception:
    """Return parameters without the entries that nobody can recognise later: the exclusion of an interface."""
    return replace(parameters, exclude_interfaces=(), outbound_cidrs=EVERYTHING)


@FEW
@given(surroundings(), INTERCEPTIONS)
def test_other_peoples_rules_stay_and_ours_are_added(state: State, parameters: Interception) -> None:
    ruleset = rules_for(parameters)
    after = applied(state, ruleset)
    # An interface's exclusion that was there before, word for word, becomes ours; all others stay in their order.
    assert of_others(after, ruleset) == state
    wanted = iptables.expected(ruleset, Family.V4).tables
    for table, chains in after.items():
        ours = {name: tuple(rules) for name, rules in chains.items() if name.startswith("ISTIO_")}
        assert ours == {
            name: chain.rules for name, chain in wanted.get(table, {}).items() if name not in BUILT_IN_CHAINS
        }


@given(surroundings(), INTERCEPTIONS, INTERCEPTIONS, st.data())
@settings(max_examples=40)
def test_applied_over_an_earlier_run_it_is_as_if_there_had_been_none(
    state: State, earlier: Interception, later: Interception, places: st.DataObject
) -> None:
    ruleset = rules_for(later)
    dirty = scattered(applied(state, rules_for(recognisable(earlier))), places)
    clean = of_others(dirty, rules_for(recognisable(earlier)))
    assert by_chain(applied(dirty, ruleset)) == by_chain(applied(clean, ruleset))


def by_chain(state: State) -> dict[tuple[str, str], list[str]]:
    return {(table, name): rules for table, chains in state.items() for name, rules in chains.items()}


@FEW
@given(surroundings(), INTERCEPTIONS)
def test_applied_twice_it_is_the_same(state: State, parameters: Interception) -> None:
    ruleset = rules_for(parameters)
    once = applied(state, ruleset)
    assert applied(once, ruleset) == once


@FEW
@given(surroundings(), INTERCEPTIONS)
def test_removal_leaves_exactly_what_others_had(state: State, parameters: Interception) -> None:
    parameters = recognisable(parameters)
    after = applied(state, rules_for(parameters))
    assert restore(after, iptables.render_removal(observed(after)), {}) == state


@FEW
@given(surroundings(), INTERCEPTIONS)
def test_removal_of_what_is_known_to_be_applied_takes_every_entry(state: State, parameters: Interception) -> None:
    ruleset = rules_for(parameters)
    after = applied(state, ruleset)
    script = iptables.render_removal(observed(after), iptables.expected(ruleset, Family.V4))
    assert restore(after, script, {}) == state


@FEW
@given(INTERCEPTIONS)
def test_in_a_fresh_netns_nothing_has_to_be_observed(parameters: Interception) -> None:
    ruleset = rules_for(parameters)
    assert applied(empty(), ruleset, clean=True) == applied(empty(), ruleset)


@FEW
@given(surroundings())
def test_where_nothing_is_ours_removal_does_nothing(state: State) -> None:
    assert iptables.render_removal(observed(state)) == ""


def test_a_jump_of_another_tool_into_our_chain_goes_only_with_the_chain() -> None:
    state = empty()
    state["nat"]["THEIRS"] = ["-j ISTIO_INBOUND", "-p udp -g ISTIO_OUTPUT_DNS", "-j ACCEPT"]
    dns = replace(DEFAULT, redirect_dns=True, capture_all_dns=True)
    ruleset = rules_for(dns)
    state = restore(state, iptables.render(ruleset, Family.V4, observed(state)), spellings(ruleset, Family.V4))
    assert applied(state, rules_for(DEFAULT))["nat"]["THEIRS"] == ["-j ISTIO_INBOUND", "-j ACCEPT"]
    assert restore(state, iptables.render_removal(observed(state)), {})["nat"]["THEIRS"] == ["-j ACCEPT"]


def test_rules_of_another_mark_are_recognised_by_our_chains_that_use_it() -> None:
    earlier = replace(TPROXY, tproxy_mark=99)
    state = applied(empty(), rules_for(earlier))
    assert any("0x63" in rule for rule in state["mangle"]["PREROUTING"])
    assert applied(state, rules_for(TPROXY)) == applied(empty(), rules_for(TPROXY))


def test_an_interface_excluded_in_both_modes_leaves_nothing_in_mangle() -> None:
    transparent = replace(TPROXY, exclude_interfaces=("net1",))
    redirecting = replace(DEFAULT, exclude_interfaces=("net1",))
    state = applied(empty(), rules_for(transparent))
    assert state["mangle"]["OUTPUT"][0] == "-o net1 -j RETURN"
    after = applied(state, rules_for(redirecting))
    assert after["nat"]["OUTPUT"] == ["-o net1 -j RETURN", "-j ISTIO_OUTPUT"]
    assert after["mangle"] == empty()["mangle"]


def test_virtual_interfaces_come_before_other_peoples_rules_and_the_rest_behind() -> None:
    state = empty()
    state["nat"]["PREROUTING"] = ["-j THEIRS"]
    parameters = replace(DEFAULT, virtual_interfaces=("k6t",), exclude_interfaces=("net1",))
    assert applied(state, rules_for(parameters))["nat"]["PREROUTING"] == [
        "-i k6t -j ISTIO_REDIRECT",
        "-i k6t -j RETURN",
        "-j THEIRS",
        "-i net1 -j RETURN",
        "-p tcp -j ISTIO_INBOUND",
    ]


GUARDS = ["-p udp -j DROP", "-p tcp -j DROP"]


def test_guards_that_the_original_left_when_it_was_killed_are_taken_away() -> None:
    state = empty()
    for chain in HOOKS["filter"]:
        state["filter"][chain] = [*GUARDS, "-j THEIRS"]
    after = applied(state, rules_for(DEFAULT))
    assert after["filter"] == {chain: ["-j THEIRS"] for chain in HOOKS["filter"]}


def test_drop_rules_that_are_not_all_six_guards_stay() -> None:
    state = empty()
    state["filter"]["INPUT"] = list(GUARDS)
    state["filter"]["OUTPUT"] = list(GUARDS)
    assert applied(state, rules_for(DEFAULT))["filter"] == state["filter"]


def test_a_family_that_is_not_wanted_is_cleared_of_earlier_rules() -> None:
    earlier = sidecar_ruleset(DEFAULT, frozenset(Family), Backend.IPTABLES)
    state = restore(empty(), iptables.render(earlier, Family.V6), spellings(earlier, Family.V6))
    script = iptables.render(rules_for(DEFAULT), Family.V6, observed(state))
    assert restore(state, script, {}) == empty()
    assert iptables.render(rules_for(DEFAULT), Family.V6) == ""


# --- reading ----------------------------------------------------------------------------------------------------------

SAVED = """\
# Generated by iptables-nft-save v1.8.9 (nf_tables) on Tue Nov 24 03:20:38 2026
*nat
:PREROUTING ACCEPT [12:720]
:POSTROUTING DROP [0:0]
:ISTIO_OUTPUT - [0:0]
[3:180] -A PREROUTING -p tcp -m comment --comment "a \\"quoted\\" -j X" -j ACCEPT
-A ISTIO_OUTPUT
COMMIT
# Completed on Tue Nov 24 03:20:38 2026
# Warning: iptables-legacy tables present, use iptables-legacy-save to see them
"""


def test_reading_a_listing() -> None:
    assert iptables.parse(SAVED) == ObservedTables(
        {
            "nat": {
                "PREROUTING": ObservedChain("ACCEPT", ('-p tcp -m comment --comment "a \\"quoted\\" -j X" -j ACCEPT',)),
                "POSTROUTING": ObservedChain("DROP"),
                "ISTIO_OUTPUT": ObservedChain("-", ("",)),
            }
        }
    )
    assert iptables.parse("") == ObservedTables()


@FEW
@given(surroundings(), INTERCEPTIONS)
def test_reading_is_the_inverse_of_printing(state: State, parameters: Interception) -> None:
    after = applied(state, rules_for(parameters))
    assert iptables.parse(save(after)) == observed(after)


LISTINGS = {path.name: path.read_text() for path in (Path(__file__).parent / "listings").iterdir()}
RECORDED = sidecar_ruleset(CASES["everything"].parameters, CASES["everything"].families, Backend.IPTABLES)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(("program", "family"), [("iptables", Family.V4), ("ip6tables", Family.V6)])
def test_the_listing_is_what_the_kernel_really_lists(program: str, family: Family, variant: str) -> None:
    """The files were printed for case `everything`, with one rule of another tool in nat OUTPUT."""
    found = iptables.parse(LISTINGS[f"{program}-{variant}-1.8.9.txt"])
    lines = []
    for table in iptables.TABLE_ORDER:
        chains = found.tables.get(table.value, {})
        rules = [f"-A {name} {rule}" for name, chain in chains.items() for rule in chain.rules]
        if rules:
            own = [f":{name} -" for name in chains if name not in BUILT_IN_CHAINS]
            lines += [f"*{table.value}", *own, *rules, "COMMIT"]
    foreign = {Family.V4: "-A OUTPUT -d 203.0.113.0/24 -j RETURN", Family.V6: "-A OUTPUT -d 2001:db8::/32 -j RETURN"}
    lines.remove(foreign[family])
    assert iptables.listing(RECORDED, family).splitlines() == lines


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-A OUTPUT -j ACCEPT", "line 1 .* belongs to no table"),
        ("*nat\nCOMMIT\n:OUTPUT ACCEPT [0:0]", "line 3 .* belongs to no table"),
        ("*nat\n-A OUTPUT -j ACCEPT", "line 2 .* cannot be read"),
        ("*nat\n:OUTPUT ACCEPT [0:0]\nsomething else", "line 3 .* cannot be read: something else"),
        ("iptables: Permission denied", "belongs to no table"),
    ],
)
def test_text_that_is_no_listing_is_refused(text: str, says: str) -> None:
    with pytest.raises(RulesError, match=says):
        iptables.parse(text)


@pytest.mark.parametrize(
    ("rule", "leads_to"),
    [
        ("-p tcp -j ISTIO_INBOUND", "ISTIO_INBOUND"),
        ("-g ISTIO_INBOUND", "ISTIO_INBOUND"),
        ('-m comment --comment "x -j ISTIO_OUTPUT" -j ACCEPT', "ACCEPT"),
        ('-m comment --comment "a \\" -j ISTIO_OUTPUT"', ""),
        ("", ""),
    ],
)
def test_where_a_rule_leads(rule: str, leads_to: str) -> None:
    assert target(rule) == leads_to


def test_the_listing_of_the_default_rules() -> None:
    dns = replace(DEFAULT, redirect_dns=True, capture_all_dns=True, drop_invalid=True)
    lines = iptables.listing(rules_for(dns), Family.V4).splitlines()
    assert lines[:6] == [
        "*mangle",
        ":ISTIO_DROP -",
        "-A PREROUTING -m conntrack --ctstate INVALID -j ISTIO_DROP",
        "-A ISTIO_DROP -j DROP",
        "COMMIT",
        "*nat",
    ]
    assert lines[6:11] == [
        ":ISTIO_INBOUND -",
        ":ISTIO_IN_REDIRECT -",
        ":ISTIO_OUTPUT -",
        ":ISTIO_OUTPUT_DNS -",
        ":ISTIO_REDIRECT -",
    ]
    own_calls = [line for line in lines if line.startswith("-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m ")]
    assert [line.partition(" -p tcp ")[2] for line in own_calls] == [
        "-m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-m tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT",
    ]
    assert lines[-2:] == ["-A ISTIO_OUTPUT_DNS -p udp -m udp --dport 53 -j CT --zone 2", "COMMIT"]


def test_reasons_are_comments_before_their_rules() -> None:
    plain = iptables.render(rules_for(DEFAULT), Family.V4).splitlines()
    explained = iptables.render(rules_for(DEFAULT), Family.V4, with_whys=True).splitlines()
    assert [line for line in explained if not line.startswith("#")] == plain
    position = explained.index("-A OUTPUT -j ISTIO_OUTPUT")
    assert explained[position - 1] == "# Outgoing connections are looked at."
