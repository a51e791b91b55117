"""The rule sets against tables typed in from the contract's description, not from our output."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from tests.pure.rules.strategies import FAMILIES, INTERCEPTIONS

from meshcni.errors import RulesError
from meshcni.pods.interception import Interception, InterceptionMode, NumberRange
from meshcni.rules import iptables_rule, nft_rule
from meshcni.rules.model import (
    Backend,
    Family,
    Jump,
    LocalRoute,
    LoopbackAddress,
    PolicyRule,
    Ruleset,
    TableName,
)
from meshcni.rules.sidecar import sidecar_ruleset

V4 = frozenset({Family.V4})
BOTH = frozenset(Family)
Listing = dict[str, list[str]]

DEFAULT = Interception()
TPROXY = replace(DEFAULT, mode=InterceptionMode.TPROXY)
DNS = replace(DEFAULT, redirect_dns=True, capture_all_dns=True)


def for_iptables(parameters: Interception, family: Family = Family.V4) -> Listing:
    """Return `table CHAIN` and its rules as written."""
    ruleset = sidecar_ruleset(parameters, frozenset({Family.V4, family}), Backend.IPTABLES)
    return {
        f"{table.name.value} {chain.name}": [iptables_rule.written(rule) for rule in chain.rules]
        for table in ruleset.for_family(family)
        for chain in table.chains
    }


def for_nft(parameters: Interception, families: frozenset[Family] = V4) -> Listing:
    return {
        f"{table.name.value} {nft_rule.chain_name(chain.name)}": [nft_rule.written(rule) for rule in chain.rules]
        for table in sidecar_ruleset(parameters, families, Backend.NFTABLES).tables
        for chain in table.chains
    }


# --- iptables ---------------------------------------------------------------------------------------------------------

DEFAULT_TABLE: Listing = {
    "nat PREROUTING": ["-p tcp -j ISTIO_INBOUND"],
    "nat OUTPUT": ["-j ISTIO_OUTPUT"],
    "nat ISTIO_INBOUND": [
        "-p tcp --dport 15008 -j RETURN",
        "-p tcp --dport 15020 -j RETURN",
        "-p tcp --dport 15021 -j RETURN",
        "-p tcp --dport 15090 -j RETURN",
        "-p tcp -j ISTIO_IN_REDIRECT",
    ],
    "nat ISTIO_REDIRECT": ["-p tcp -j REDIRECT --to-ports 15001"],
    "nat ISTIO_IN_REDIRECT": ["-p tcp -j REDIRECT --to-ports 15006"],
    "nat ISTIO_OUTPUT": [
        "-p tcp --dport 15020 -j RETURN",
        "-p udp --dport 15020 -j RETURN",
        "-o lo -s 127.0.0.6/32 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-o lo -m owner ! --uid-owner 1337 -j RETURN",
        "-m owner --uid-owner 1337 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-o lo -m owner ! --gid-owner 1337 -j RETURN",
        "-m owner --gid-owner 1337 -j RETURN",
        "-d 127.0.0.1/32 -j RETURN",
        "-j ISTIO_REDIRECT",
    ],
}


def test_default_redirect() -> None:
    assert for_iptables(DEFAULT) == DEFAULT_TABLE


def test_default_redirect_for_ipv6_has_the_other_addresses() -> None:
    def other(rule: str) -> str:
        return rule.replace("127.0.0.6/32", "::6/128").replace("127.0.0.1/32", "::1/128")

    assert for_iptables(DEFAULT, Family.V6) == {
        chain: [other(rule) for rule in rules] for chain, rules in DEFAULT_TABLE.items()
    }


TPROXY_MANGLE: Listing = {
    "mangle ISTIO_DIVERT": ["-j MARK --set-mark 1337", "-j ACCEPT"],
    "mangle ISTIO_TPROXY": ["! -d 127.0.0.1/32 -p tcp -j TPROXY --tproxy-mark 1337/0xffffffff --on-port 15006"],
    "mangle PREROUTING": ["-p tcp -j ISTIO_INBOUND", "-p tcp -m mark --mark 1337 -j CONNMARK --save-mark"],
    "mangle OUTPUT": [
        "-o lo -p tcp -m mark --mark 1337 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp -m owner --uid-owner 1337 -j MARK --set-mark 1338",
        "-o lo ! -d 127.0.0.1/32 -p tcp -m owner --gid-owner 1337 -j MARK --set-mark 1338",
        "-p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark",
    ],
    "mangle ISTIO_INBOUND": [
        "-p tcp -m mark --mark 1337 -j RETURN",
        "-i lo -s 127.0.0.6/32 -p tcp -j RETURN",
        "-i lo -p tcp -m mark ! --mark 1338 -j RETURN",
        "-p tcp --dport 15020 -j RETURN",
        "-p tcp --dport 15021 -j RETURN",
        "-p tcp --dport 15090 -j RETURN",
        "-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT",
        "-p tcp -j ISTIO_TPROXY",
    ],
}


def test_tproxy_moves_inbound_capture_to_mangle() -> None:
    expected = {**DEFAULT_TABLE, **TPROXY_MANGLE, "nat ISTIO_INBOUND": ["-p tcp --dport 15008 -j RETURN"]}
    del expected["nat PREROUTING"]
    assert for_iptables(TPROXY) == expected


def test_tproxy_keeps_iptables_order_when_both_families_are_there() -> None:
    ruleset = sidecar_ruleset(TPROXY, BOTH, Backend.IPTABLES)
    for family, source in ((Family.V4, "127.0.0.6/32"), (Family.V6, "::6/128")):
        (inbound,) = [
            chain
            for table in ruleset.for_family(family)
            for chain in table.chains
            if (table.name, chain.name) == (TableName.MANGLE, "ISTIO_INBOUND")
        ]
        assert [iptables_rule.written(rule) for rule in inbound.rules[:3]] == [
            "-p tcp -m mark --mark 1337 -j RETURN",
            f"-i lo -s {source} -p tcp -j RETURN",
            "-i lo -p tcp -m mark ! --mark 1338 -j RETURN",
        ]


def test_dns_capture_changes_the_default_like_this() -> None:
    output = list(DEFAULT_TABLE["nat ISTIO_OUTPUT"])
    output[3] = (
        "-o lo ! -d 127.0.0.1/32 -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT"
    )
    output[4] = "-o lo -p tcp ! --dport 53 -m owner ! --uid-owner 1337 -j RETURN"
    output[7] = "-o lo -p tcp ! --dport 53 -m owner ! --gid-owner 1337 -j RETURN"
    output.insert(9, "-j ISTIO_OUTPUT_DNS")
    assert for_iptables(DNS) == {
        **DEFAULT_TABLE,
        "nat ISTIO_OUTPUT": output,
        "nat ISTIO_OUTPUT_DNS": [
            "-p tcp --dport 53 -j REDIRECT --to-ports 15053",
            "-p udp --dport 53 -j REDIRECT --to-ports 15053",
        ],
        "raw OUTPUT": ["-j ISTIO_OUTPUT_DNS"],
        "raw PREROUTING": ["-j ISTIO_INBOUND"],
        "raw ISTIO_OUTPUT_DNS": [
            "-p udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1",
            "-p udp --sport 15053 -m owner --uid-owner 1337 -j CT --zone 2",
            "-p udp --dport 53 -m owner --gid-owner 1337 -j CT --zone 1",
            "-p udp --sport 15053 -m owner --gid-owner 1337 -j CT --zone 2",
            "-p udp --dport 53 -j CT --zone 2",
        ],
        "raw ISTIO_INBOUND": ["-p udp --sport 53 -j CT --zone 1"],
    }


RESOLVER = replace(DEFAULT, redirect_dns=True, dns_servers=(IPv4Address("10.96.0.10"),))


def test_dns_capture_of_one_server() -> None:
    rules = for_iptables(RESOLVER)
    assert rules["nat ISTIO_OUTPUT_DNS"] == [
        "-d 10.96.0.10/32 -p tcp --dport 53 -j REDIRECT --to-ports 15053",
        "-d 10.96.0.10/32 -p udp --dport 53 -j REDIRECT --to-ports 15053",
    ]
    assert rules["raw ISTIO_OUTPUT_DNS"][-1] == "-d 10.96.0.10/32 -p udp --dport 53 -j CT --zone 2"
    assert rules["raw ISTIO_INBOUND"] == ["-s 10.96.0.10/32 -p udp --sport 53 -j CT --zone 1"]


def test_a_family_without_captured_server_gets_zones_but_no_capture() -> None:
    rules = for_iptables(RESOLVER, Family.V6)
    assert "nat ISTIO_OUTPUT_DNS" not in rules
    assert "-j ISTIO_OUTPUT_DNS" not in rules["nat ISTIO_OUTPUT"]
    assert rules["raw OUTPUT"] == ["-j ISTIO_OUTPUT_DNS"]
    assert "raw PREROUTING" not in rules


def test_dns_capture_without_any_server_is_off() -> None:
    assert for_iptables(replace(DEFAULT, redirect_dns=True)) == DEFAULT_TABLE


@pytest.mark.parametrize(
    ("change", "chain", "rules"),
    [
        ({"inbound_ports": ()}, "nat ISTIO_INBOUND", ["-p tcp --dport 15008 -j RETURN"]),
        (
            {"inbound_ports": (NumberRange(80, 80), NumberRange(90, 99))},
            "nat ISTIO_INBOUND",
            [
                "-p tcp --dport 15008 -j RETURN",
                "-p tcp --dport 80 -j ISTIO_IN_REDIRECT",
                "-p tcp --dport 90:99 -j ISTIO_IN_REDIRECT",
            ],
        ),
        (
            {"drop_invalid": True},
            "mangle PREROUTING",
            ["-m conntrack --ctstate INVALID -j ISTIO_DROP"],
        ),
        ({"drop_invalid": True}, "mangle ISTIO_DROP", ["-j DROP"]),
        (
            {"exclude_interfaces": ("net1", "net2")},
            "nat PREROUTING",
            ["-i net1 -j RETURN", "-i net2 -j RETURN", "-p tcp -j ISTIO_INBOUND"],
        ),
        (
            {"exclude_interfaces": ("net1", "net2")},
            "nat OUTPUT",
            ["-o net1 -j RETURN", "-o net2 -j RETURN", "-j ISTIO_OUTPUT"],
        ),
        (
            {"virtual_interfaces": ("a", "b"), "exclude_interfaces": ("c",)},
            "nat PREROUTING",
            [
                "-i b -j ISTIO_REDIRECT",
                "-i a -j ISTIO_REDIRECT",
                "-i b -j RETURN",
                "-i a -j RETURN",
                "-i c -j RETURN",
                "-p tcp -j ISTIO_INBOUND",
            ],
        ),
        (
            {"virtual_interfaces": ("a", "b"), "outbound_cidrs": (ip_network("10.0.0.0/8"), ip_network("11.0.0.0/8"))},
            "nat PREROUTING",
            [
                "-i b -d 11.0.0.0/8 -j ISTIO_REDIRECT",
                "-i a -d 11.0.0.0/8 -j ISTIO_REDIRECT",
                "-i b -d 10.0.0.0/8 -j ISTIO_REDIRECT",
                "-i a -d 10.0.0.0/8 -j ISTIO_REDIRECT",
                "-i b -j RETURN",
                "-i a -j RETURN",
                "-p tcp -j ISTIO_INBOUND",
            ],
        ),
    ],
)
def test_one_parameter_and_the_chain_it_changes(change: dict[str, object], chain: str, rules: list[str]) -> None:
    assert for_iptables(replace(DEFAULT, **change))[chain] == rules  # type: ignore[arg-type]


OWNER_BLOCK_END = 9  # rules of ISTIO_OUTPUT before owner groups


@pytest.mark.parametrize(
    ("change", "tail"),
    [
        ({"outbound_cidrs": ()}, ["-d 127.0.0.1/32 -j RETURN"]),
        (
            {"outbound_ports": (NumberRange(80, 80), NumberRange(90, 99)), "outbound_cidrs": ()},
            [
                "-d 127.0.0.1/32 -j RETURN",
                "-p tcp --dport 80 -j ISTIO_REDIRECT",
                "-p tcp --dport 90:99 -j ISTIO_REDIRECT",
            ],
        ),
        (
            {
                "outbound_cidrs": (ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
                "outbound_exclude_cidrs": (ip_network("10.1.0.0/16"), ip_network("fd01::/16")),
                "outbound_ports": (NumberRange(443, 443),),
            },
            [
                "-d 127.0.0.1/32 -j RETURN",
                "-d 10.1.0.0/16 -j RETURN",
                "-p tcp --dport 443 -j ISTIO_REDIRECT",
                "-d 10.0.0.0/8 -j ISTIO_REDIRECT",
            ],
        ),
        (
            {"owner_groups_exclude": (NumberRange(5, 5), NumberRange(7, 9))},
            [
                "-m owner --gid-owner 5 -j RETURN",
                "-m owner --gid-owner 7-9 -j RETURN",
                "-d 127.0.0.1/32 -j RETURN",
                "-j ISTIO_REDIRECT",
            ],
        ),
        (
            {"owner_groups": (NumberRange(5, 5), NumberRange(7, 9)), "owner_groups_exclude": (NumberRange(1, 1),)},
            [
                "-m owner ! --gid-owner 5 -m owner ! --gid-owner 7-9 -j RETURN",
                "-d 127.0.0.1/32 -j RETURN",
                "-j ISTIO_REDIRECT",
            ],
        ),
        ({"owner_groups": ()}, ["-j RETURN", "-d 127.0.0.1/32 -j RETURN", "-j ISTIO_REDIRECT"]),
        (
            {"outbound_ports": Interception().inbound_ports, "outbound_cidrs": ()},
            ["-d 127.0.0.1/32 -j RETURN", "-p tcp -j ISTIO_REDIRECT"],
        ),
    ],
)
def test_what_follows_the_proxys_own_traffic(change: dict[str, object], tail: list[str]) -> None:
    rules = for_iptables(replace(DEFAULT, **change))["nat ISTIO_OUTPUT"]  # type: ignore[arg-type]
    assert rules[OWNER_BLOCK_END:] == tail


@pytest.mark.parametrize("network", ["127.0.0.0/8", "127.3.4.0/24", "::1/128"])
def test_an_included_loopback_network_captures_loopback_of_both_families(network: str) -> None:
    parameters = replace(DEFAULT, outbound_cidrs=(ip_network(network), ip_network("10.0.0.0/8")))
    for family in Family:
        rules = for_iptables(parameters, family)["nat ISTIO_OUTPUT"]
        assert not any("! --uid-owner" in rule or "! --gid-owner" in rule for rule in rules)


def test_the_loopback_network_replaces_the_address_everywhere() -> None:
    parameters = replace(DEFAULT, loopback_cidr=IPv4Network("127.0.0.0/8"))
    wanted = [rule.replace("127.0.0.1/32", "127.0.0.0/8") for rule in DEFAULT_TABLE["nat ISTIO_OUTPUT"]]
    assert for_iptables(parameters)["nat ISTIO_OUTPUT"] == wanted
    assert not any("127.0.0.0/8" in rule for rule in for_iptables(parameters, Family.V6)["nat ISTIO_OUTPUT"])


# --- nft --------------------------------------------------------------------------------------------------------------


def test_default_redirect_in_nft() -> None:
    assert for_nft(DEFAULT) == {
        "nat prerouting": ["meta l4proto tcp counter jump istio-inbound"],
        "nat output": ["counter jump istio-output"],
        "nat istio-inbound": [
            "meta l4proto tcp tcp dport 15008 counter return",
            "meta l4proto tcp tcp dport 15020 counter return",
            "meta l4proto tcp tcp dport 15021 counter return",
            "meta l4proto tcp tcp dport 15090 counter return",
            "meta l4proto tcp counter jump istio-in-redirect",
        ],
        "nat istio-redirect": ["meta l4proto tcp counter redirect to :15001"],
        "nat istio-in-redirect": ["meta l4proto tcp counter redirect to :15006"],
        "nat istio-output": [
            "tcp dport 15020 counter return",
            "udp dport 15020 counter return",
            'oifname "lo" ip saddr 127.0.0.6/32 counter return',
            'oifname "lo" meta l4proto tcp ip daddr != 127.0.0.1/32 tcp dport != 15008 skuid 1337 '
            "counter jump istio-in-redirect",
            'oifname "lo" skuid != 1337 counter return',
            "skuid 1337 counter return",
            'oifname "lo" meta l4proto tcp ip daddr != 127.0.0.1/32 tcp dport != 15008 skgid 1337 '
            "counter jump istio-in-redirect",
            'oifname "lo" skgid != 1337 counter return',
            "skgid 1337 counter return",
            "ip daddr 127.0.0.1/32 counter return",
            "counter jump istio-redirect",
        ],
    }


def test_tproxy_in_nft_orders_the_exceptions_of_both_families_like_this() -> None:
    rules = for_nft(TPROXY, BOTH)
    assert rules["mangle istio-inbound"][:4] == [
        "meta l4proto tcp mark 1337 counter return",
        'iifname "lo" meta l4proto tcp ip6 saddr ::6/128 counter return',
        'iifname "lo" meta l4proto tcp mark != 1338 counter return',
        'iifname "lo" meta l4proto tcp ip saddr 127.0.0.6/32 counter return',
    ]
    assert rules["mangle istio-tproxy"] == [
        "meta l4proto tcp ip daddr != 127.0.0.1/32 tproxy ip to :15006 meta mark set 1337 counter accept",
        "meta l4proto tcp ip6 daddr != ::1/128 tproxy ip6 to :15006 meta mark set 1337 counter accept",
    ]
    assert rules["mangle istio-inbound"][-2:] == [
        "meta l4proto tcp ct state related,established counter jump istio-divert",
        "meta l4proto tcp counter jump istio-tproxy",
    ]
    assert rules["mangle output"] == [
        'oifname "lo" meta l4proto tcp mark 1337 counter return',
        'oifname "lo" meta l4proto tcp ip daddr != 127.0.0.1/32 skuid 1337 counter meta mark set 1338',
        'oifname "lo" meta l4proto tcp ip6 daddr != ::1/128 skuid 1337 counter meta mark set 1338',
        'oifname "lo" meta l4proto tcp ip daddr != 127.0.0.1/32 skgid 1337 counter meta mark set 1338',
        'oifname "lo" meta l4proto tcp ip6 daddr != ::1/128 skgid 1337 counter meta mark set 1338',
        "meta l4proto tcp ct mark 1337 counter meta mark set ct mark",
    ]
    assert rules["mangle prerouting"] == [
        "meta l4proto tcp counter jump istio-inbound",
        "meta l4proto tcp mark 1337 counter ct mark set mark",
    ]
    assert rules["mangle istio-divert"] == ["counter meta mark set 1337", "counter accept"]


def test_tproxy_for_listed_ports_in_nft() -> None:
    rules = for_nft(replace(TPROXY, inbound_ports=(NumberRange(80, 80),)))
    assert rules["mangle istio-inbound"][-2:] == [
        "meta l4proto tcp ct state related,established tcp dport 80 counter jump istio-divert",
        "meta l4proto tcp tcp dport 80 counter jump istio-tproxy",
    ]


def test_nft_drops_invalid_tcp_only() -> None:
    rules = for_nft(replace(DEFAULT, drop_invalid=True))
    assert rules["mangle prerouting"] == ["meta l4proto tcp ct state invalid counter jump istio-drop"]
    assert rules["mangle istio-drop"] == ["counter drop"]


def test_dns_capture_of_servers_in_nft_takes_all_tcp_before_all_udp() -> None:
    servers = (ip_address("fd00::a"), ip_address("10.96.0.10"))
    rules = for_nft(replace(DEFAULT, redirect_dns=True, dns_servers=servers), BOTH)
    assert rules["nat istio-output-dns"] == [
        "ip daddr 10.96.0.10/32 tcp dport 53 counter redirect to :15053",
        "ip6 daddr fd00::a/128 tcp dport 53 counter redirect to :15053",
        "ip daddr 10.96.0.10/32 udp dport 53 counter redirect to :15053",
        "ip6 daddr fd00::a/128 udp dport 53 counter redirect to :15053",
    ]
    assert rules["raw istio-inbound"] == [
        "udp sport 53 ip saddr 10.96.0.10/32 counter ct zone set 1",
        "udp sport 53 ip6 saddr fd00::a/128 counter ct zone set 1",
    ]
    assert rules["raw istio-output-dns"] == [
        "udp dport 53 skuid 1337 counter ct zone set 1",
        "udp sport 15053 skuid 1337 counter ct zone set 2",
        "udp dport 53 skgid 1337 counter ct zone set 1",
        "udp sport 15053 skgid 1337 counter ct zone set 2",
        "udp dport 53 ip daddr 10.96.0.10/32 counter ct zone set 2",
        "udp dport 53 ip6 daddr fd00::a/128 counter ct zone set 2",
    ]


def test_dns_capture_exempts_dns_for_users_only() -> None:
    rules = for_nft(DNS)["nat istio-output"]
    loops = [rule for rule in rules if rule.endswith("jump istio-in-redirect")]
    assert ["{ 53, 15008 }" in rule for rule in loops] == [True, False]


# --- routes, limits, properties ---------------------------------------------------------------------------------------


def surroundings(parameters: Interception, families: frozenset[Family]) -> Ruleset:
    return replace(sidecar_ruleset(parameters, families, Backend.IPTABLES), tables=())


def test_tproxy_routes_marked_packets_in_each_family() -> None:
    parameters = replace(TPROXY, tproxy_mark=99, tproxy_table=177)
    assert surroundings(parameters, BOTH) == Ruleset(
        BOTH,
        (),
        policy_rules=(PolicyRule(Family.V4, 99, 177), PolicyRule(Family.V6, 99, 177)),
        routes=(LocalRoute(IPv4Network("0.0.0.0/0"), 177), LocalRoute(IPv6Network("::/0"), 177)),
        addresses=(LoopbackAddress(ip_address("::6"), 128),),
    )


@pytest.mark.parametrize("parameters", [DEFAULT, replace(TPROXY, inbound_ports=())])
def test_without_transparent_inbound_there_is_nothing_to_route(parameters: Interception) -> None:
    assert surroundings(parameters, V4) == Ruleset(V4, ())
    assert surroundings(parameters, BOTH) == Ruleset(BOTH, (), addresses=(LoopbackAddress(ip_address("::6"), 128),))


@pytest.mark.parametrize(("backend", "most"), [(Backend.IPTABLES, 49), (Backend.NFTABLES, 64)])
def test_owner_groups_are_limited_to_what_the_tools_take(backend: Backend, most: int) -> None:
    groups = tuple(NumberRange.single(2 * number) for number in range(most + 1))
    sidecar_ruleset(replace(DEFAULT, owner_groups=groups[:-1]), V4, backend)
    with pytest.raises(RulesError, match=f"{most + 1} owner groups"):
        sidecar_ruleset(replace(DEFAULT, owner_groups=groups), V4, backend)


def test_sixty_four_owner_groups_become_a_set_in_nft() -> None:
    groups = tuple(NumberRange(number, number + 2) for number in range(0, 320, 5))
    rules = for_nft(replace(DEFAULT, owner_groups=groups))["nat istio-output"]
    assert rules[OWNER_BLOCK_END].startswith("skgid != { 0-2, 5-7, 10-12, ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loopback_cidr": IPv4Network("10.0.0.0/8")}, "10.0.0.0/8"),
        ({"loopback_cidr": IPv4Network("126.0.0.0/7")}, "126.0.0.0/7"),
        ({"exclude_interfaces": ("eth0 -j ACCEPT",)}, "eth0 -j ACCEPT"),
        ({"virtual_interfaces": ('eth0"',)}, 'eth0"'),
        ({"virtual_interfaces": ("",)}, "''"),
        ({"exclude_interfaces": ("sixteen-letters-",)}, "sixteen-letters-"),
        ({"exclude_interfaces": ("äääääääää",)}, "äääääääää"),
    ],
)
def test_parameters_that_make_no_rules_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(RulesError, match=says.replace("(", r"\(")):
        sidecar_ruleset(replace(DEFAULT, **change), V4, Backend.NFTABLES)  # type: ignore[arg-type]


def test_a_netns_without_any_family_is_refused() -> None:
    with pytest.raises(RulesError, match="address family"):
        sidecar_ruleset(DEFAULT, frozenset(), Backend.NFTABLES)


@given(INTERCEPTIONS, FAMILIES)
def test_every_jump_has_a_target_and_every_rule_a_reason(parameters: Interception, families: frozenset[Family]) -> None:
    for backend in Backend:
        ruleset = sidecar_ruleset(parameters, families, backend)
        views = (ruleset.tables, *(ruleset.for_family(family) for family in families))
        for tables in views:
            for table in tables:
                names = {chain.name for chain in table.chains}
                rules = [rule for chain in table.chains for rule in chain.rules]
                assert {rule.action.chain for rule in rules if isinstance(rule.action, Jump)} <= names
                assert all(rule.why.endswith((".", ")", "none")) and len(rule.why) < 200 for rule in rules)
                assert all(rule.family is None or rule.family in families for rule in rules)
