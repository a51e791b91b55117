"""The nft transaction and the listing read back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from tests.pure.rules.cases import CASES
from tests.pure.rules.strategies import FAMILIES, INTERCEPTIONS

from meshcni.errors import RulesError
from meshcni.pods.interception import Interception, InterceptionMode, NumberRange
from meshcni.rules import nft, nft_rule
from meshcni.rules.model import (
    Backend,
    ConnectionMark,
    ConntrackZone,
    DestinationPort,
    Family,
    PacketMark,
    Return,
    Rule,
    Ruleset,
)
from meshcni.rules.nft import ObservedChain, ObservedTables
from meshcni.rules.sidecar import sidecar_ruleset

V4 = frozenset({Family.V4})
DEFAULT = Interception()
REMOVAL = [f"{verb} table inet istio-proxy-{table}" for table in ("nat", "mangle", "raw") for verb in ("add", "delete")]


def rules_for(parameters: Interception, families: frozenset[Family] = V4) -> Ruleset:
    return sidecar_ruleset(parameters, families, Backend.NFTABLES)


def test_a_transaction_replaces_all_three_tables_whatever_it_fills() -> None:
    lines = nft.render(rules_for(DEFAULT)).splitlines()
    assert lines[:6] == REMOVAL
    assert lines[6:14] == [
        "add table inet istio-proxy-nat",
        "add chain inet istio-proxy-nat prerouting { type nat hook prerouting priority -100 ; }",
        "add chain inet istio-proxy-nat output { type nat hook output priority -100 ; }",
        "add chain inet istio-proxy-nat istio-inbound",
        "add chain inet istio-proxy-nat istio-redirect",
        "add chain inet istio-proxy-nat istio-in-redirect",
        "add chain inet istio-proxy-nat istio-output",
        "add rule inet istio-proxy-nat prerouting meta l4proto tcp counter jump istio-inbound",
    ]
    assert not any("istio-proxy-mangle" in line or "istio-proxy-raw" in line for line in lines[6:])


def test_tables_and_chains_stand_in_the_order_of_declaration() -> None:
    parameters = replace(
        DEFAULT, mode=InterceptionMode.TPROXY, redirect_dns=True, capture_all_dns=True, drop_invalid=True
    )
    lines = nft.render(rules_for(parameters)).splitlines()
    chains = [" ".join(line.split()[3:5]) for line in lines if line.startswith("add chain ")]
    assert chains == [
        "istio-proxy-nat output",
        "istio-proxy-nat istio-inbound",
        "istio-proxy-nat istio-redirect",
        "istio-proxy-nat istio-in-redirect",
        "istio-proxy-nat istio-output",
        "istio-proxy-nat istio-output-dns",
        "istio-proxy-mangle prerouting",
        "istio-proxy-mangle output",
        "istio-proxy-mangle istio-divert",
        "istio-proxy-mangle istio-tproxy",
        "istio-proxy-mangle istio-inbound",
        "istio-proxy-mangle istio-drop",
        "istio-proxy-raw prerouting",
        "istio-proxy-raw output",
        "istio-proxy-raw istio-inbound",
        "istio-proxy-raw istio-output-dns",
    ]
    assert [line for line in lines if "hook" in line and "raw" in line] == [
        "add chain inet istio-proxy-raw prerouting { type filter hook prerouting priority -300 ; }",
        "add chain inet istio-proxy-raw output { type filter hook output priority -300 ; }",
    ]
    assert "add chain inet istio-proxy-mangle output { type route hook output priority -150 ; }" in lines


def test_removal_names_every_table() -> None:
    assert nft.render_removal().splitlines() == REMOVAL


@settings(max_examples=40)
@given(INTERCEPTIONS, FAMILIES)
def test_every_chain_that_a_rule_jumps_to_is_declared_before(
    parameters: Interception, families: frozenset[Family]
) -> None:
    declared: set[tuple[str, str]] = set()
    for line in nft.render(rules_for(parameters, families)).splitlines():
        words = line.split()
        if line.startswith("add chain"):
            declared.add((words[3], words[4]))
        if line.startswith("add rule"):
            assert (words[3], words[4]) in declared
            if "jump" in words:
                assert (words[3], words[words.index("jump") + 1]) in declared


# --- as listed --------------------------------------------------------------------------------------------------------

# What nft 1.0.6 printed for case `everything`, with another tool's table beside ours.
RECORDED = (Path(__file__).parent / "listings" / "nft-1.0.6.txt").read_text()
EVERYTHING = sidecar_ruleset(CASES["everything"].parameters, CASES["everything"].families, Backend.NFTABLES)


def test_the_listing_is_what_the_kernel_really_lists() -> None:
    ours = RECORDED[RECORDED.index("table inet istio-proxy-nat") :]
    assert nft.listing(EVERYTHING) == re.sub(r" packets \d+ bytes \d+", "", ours)
    assert nft.parse(RECORDED) == nft.expected(EVERYTHING)


@settings(max_examples=40)
@given(INTERCEPTIONS, FAMILIES)
def test_reading_is_the_inverse_of_listing(parameters: Interception, families: frozenset[Family]) -> None:
    ruleset = rules_for(parameters, families)
    counted = nft.listing(ruleset).replace("counter", "counter packets 71 bytes 4260")
    assert nft.parse(counted) == nft.expected(ruleset)


def test_handles_and_comments_are_not_part_of_a_listing() -> None:
    text = """\
# Warning: table ip nat is managed by iptables-nft, do not touch!
table ip nat { # handle 1
	chain ISTIO_INBOUND { # handle 2
		counter packets 0 bytes 0 # handle 3
	}
}
table inet istio-proxy-raw { # handle 7
	chain output { # handle 1
		type filter hook output priority raw; policy accept;
		counter packets 9 bytes 81 jump istio-output-dns # handle 3
	}
}
"""
    chain = ObservedChain("type filter hook output priority raw; policy accept;", ("counter jump istio-output-dns",))
    assert nft.parse(text) == ObservedTables({"istio-proxy-raw": {"output": chain}})


def test_what_is_no_chain_in_our_tables_is_foreign() -> None:
    text = """\
table inet istio-proxy-nat {
	set blocked {
		type ipv4_addr
	}

	chain output {
	}
}
"""
    assert nft.parse(text) == ObservedTables(
        {"istio-proxy-nat": {"output": ObservedChain("")}},
        foreign=("istio-proxy-nat: set blocked {", "istio-proxy-nat: type ipv4_addr"),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [("Error: no such table", "line 1 .* no table"), ("table inet istio-proxy-nat {\n\tchain output {", "ends within")],
)
def test_text_that_is_no_listing_is_refused(text: str, says: str) -> None:
    with pytest.raises(RulesError, match=says):
        nft.parse(text)


@pytest.mark.parametrize(
    ("rule", "written", "listed"),
    [
        (
            Rule((PacketMark(0x111, 0xFFF), ConnectionMark(0x111, 0xFFF, negated=True)), Return(), "."),
            "mark & 0xfff == 0x111 ct mark & 0xfff != 0x111 counter return",
            "meta mark & 0x00000fff == 0x00000111 ct mark & 0x00000fff != 0x00000111 counter return",
        ),
        (
            Rule((DestinationPort("tcp", (NumberRange(53, 53), NumberRange(53, 53))),), ConntrackZone(3), "."),
            "tcp dport { 53, 53 } counter ct zone set 3",
            "tcp dport { 53 } counter ct zone set 3",
        ),
    ],
)
def test_spellings_that_the_sidecar_rules_rarely_use(rule: Rule, written: str, listed: str) -> None:
    assert (nft_rule.written(rule), nft_rule.listed(rule)) == (written, listed)


def test_ranges_are_merged_as_a_set_lists_them() -> None:
    ranges = [NumberRange(7, 9), NumberRange(1, 2), NumberRange(3, 3), NumberRange(8, 12), NumberRange(20, 20)]
    assert nft_rule.merged(ranges) == [NumberRange(1, 3), NumberRange(7, 12), NumberRange(20, 20)]
    assert nft_rule.merged([]) == []


def test_reasons_are_comments_before_their_rules() -> None:
    plain = nft.render(rules_for(DEFAULT)).splitlines()
    explained = nft.render(rules_for(DEFAULT), with_whys=True).splitlines()
    assert [line for line in explained if not line.startswith("#")] == plain
    position = explained.index("add rule inet istio-proxy-nat output counter jump istio-output")
    assert explained[position - 1] == "# Outgoing connections are looked at."


def test_the_listing_of_a_newer_nft_reads_the_same() -> None:
    ruleset = sidecar_ruleset(Interception(), frozenset(Family), Backend.NFTABLES)
    newer = nft.listing(ruleset).replace("hook output priority -100;", "hook output priority dstnat;")
    assert newer != nft.listing(ruleset)
    assert nft.parse(newer) == nft.expected(ruleset)
