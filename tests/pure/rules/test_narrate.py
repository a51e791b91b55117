"""Rules in words and as objects."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given, settings
from tests.pure.rules.cases import CASES
from tests.pure.rules.strategies import FAMILIES, INTERCEPTIONS

from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules import narrate
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

DEFAULT = Interception()


def test_the_default_rules_in_words() -> None:
    lines = narrate.words(sidecar_ruleset(DEFAULT, frozenset({Family.V4}), Backend.NFTABLES))
    assert lines[:15] == [
        "For IPv4.",
        "",
        "nat PREROUTING: packets that arrive",
        "  1. TCP → continue in ISTIO_INBOUND. Arriving TCP connections are looked at.",
        "",
        "nat OUTPUT: packets that this pod sends",
        "  1. everything → continue in ISTIO_OUTPUT. Outgoing connections are looked at.",
        "",
        "nat ISTIO_INBOUND",
        "  1. TCP to port 15008 → leave alone. Tunnelled traffic already comes to the proxy's own port.",
        "  2. TCP to port 15020 → leave alone. Inbound port 15020 is excluded.",
        "  3. TCP to port 15021 → leave alone. Inbound port 15021 is excluded.",
        "  4. TCP to port 15090 → leave alone. Inbound port 15090 is excluded.",
        "  5. TCP → continue in ISTIO_IN_REDIRECT. Every other inbound port is captured.",
        "",
    ]


def test_tproxy_in_words_names_what_is_beside_the_rules() -> None:
    parameters = replace(DEFAULT, mode=InterceptionMode.TPROXY)
    lines = narrate.words(sidecar_ruleset(parameters, frozenset(Family), Backend.IPTABLES))
    assert lines[0] == "For IPv4 and IPv6."
    assert lines[-6:] == [
        "Beside the packet rules",
        "  IPv4 packets with mark 1337 are routed by table 133.",
        "  IPv6 packets with mark 1337 are routed by table 133.",
        "  In routing table 133, 0.0.0.0/0 is delivered locally.",
        "  In routing table 133, ::/0 is delivered locally.",
        "  ::6/128 is an address of lo.",
    ]
    assert any("IPv6: TCP, not to ::1/128 → deliver to port 15006 with mark 1337." in line for line in lines)


@settings(max_examples=40)
@given(INTERCEPTIONS, FAMILIES)
def test_every_rule_has_its_line_and_its_object(parameters: Interception, families: frozenset[Family]) -> None:
    for backend in Backend:
        ruleset = sidecar_ruleset(parameters, families, backend)
        rules = [rule for table in ruleset.tables for chain in table.chains for rule in chain.rules]
        lines = narrate.words(ruleset)
        assert sum(" → " in line for line in lines) == len(rules)
        objects = narrate.as_objects(ruleset)
        assert json.loads(json.dumps(objects)) == objects
        described = [rule for table in objects["tables"] for chain in table["chains"] for rule in chain["rules"]]
        assert [rule["why"] for rule in described] == [rule.why for rule in rules]


def test_a_rule_as_object() -> None:
    case = CASES["everything"]
    objects = narrate.as_objects(sidecar_ruleset(case.parameters, case.families, Backend.IPTABLES))
    (chain,) = [
        chain
        for table in objects["tables"]
        if table["name"] == "nat"
        for chain in table["chains"]
        if chain["name"] == "PREROUTING"
    ]
    assert chain["rules"][0] == {
        "why": "What comes from virtual interface k6t-eth0 to fd00::/8 is captured as outbound traffic.",
        "family": "IPv6",
        "matches": [
            {"kind": "inInterface", "name": "k6t-eth0", "words": "arriving on k6t-eth0"},
            {"kind": "destination", "network": "fd00::/8", "negated": False, "words": "to fd00::/8"},
        ],
        "action": {"kind": "jump", "chain": "ISTIO_REDIRECT", "words": "continue in ISTIO_REDIRECT"},
    }
    assert objects["families"] == ["IPv4", "IPv6"]
    assert objects["policyRules"] == [
        {"family": "IPv4", "mark": 1337, "table": 133},
        {"family": "IPv6", "mark": 1337, "table": 133},
    ]
    assert objects["routes"] == [{"destination": "0.0.0.0/0", "table": 133}, {"destination": "::/0", "table": 133}]
    assert objects["addresses"] == ["::6/128"]
