"""What is decided about branch ENI rules from a node's policy rules and routes."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, ip_address

import pytest

from meshcni.host.brancheni import BranchRules, Layout, describe
from meshcni.host.rtnetlink import PlainRule

AF = socket.AF_INET
POD, OTHER = IPv4Address("10.0.5.20"), IPv4Address("10.0.5.21")
AWS_RULES = (
    PlainRule(AF, 10, 101, interface="vlan.eth.1"),
    PlainRule(AF, 10, 101, interface="vlanpod"),
    PlainRule(AF, 20, 255),
    PlainRule(AF, 512, 254, POD.packed, 32),
    PlainRule(AF, 32766, 254),
)
TO_POD = PlainRule(AF, 512, 101, POD.packed, 32)
ANSWER = PlainRule(AF, 9, 255, interface="vlanpod")
BEHIND = {(101, "vlanpod"): frozenset((POD.packed,))}
PRESENT = frozenset(("lo", "eth0", "vlan.eth.1", "vlanpod"))


def layout(*more: PlainRule, behind: dict[tuple[int, str], frozenset[bytes]] = BEHIND) -> Layout:
    return Layout(tuple(sorted((*AWS_RULES, *more), key=lambda rule: rule.priority)), behind, PRESENT)


def test_the_two_rules() -> None:
    assert layout().rules_for(POD) == BranchRules(POD, (TO_POD, ANSWER))
    assert layout().rules_for(OTHER) is None
    assert layout(behind={}).rules_for(POD) is None


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ({(102, "vlanpod"): frozenset((POD.packed,))}, None),  # in a table to which no rule of the interface leads
        ({(101, "eth0"): frozenset((POD.packed,))}, None),  # behind an interface without a rule
        ({(254, "vlanpod"): frozenset((POD.packed,))}, None),
    ],
)
def test_route_and_rule_must_be_of_one_interface_and_table(
    behind: dict[tuple[int, str], frozenset[bytes]], expected: BranchRules | None
) -> None:
    assert layout(behind=behind).rules_for(POD) == expected


@pytest.mark.parametrize("table", [0, 253, 254, 255])
def test_shared_tables_are_nobody_s_own(table: int) -> None:
    rules = (PlainRule(AF, 10, table, interface="vlanpod"),)
    assert Layout(rules, {(table, "vlanpod"): frozenset((POD.packed,))}, PRESENT).rules_for(POD) is None


def test_the_first_rule_counts() -> None:
    earlier = PlainRule(AF, 5, 105, interface="vlanpod")
    found = layout(earlier, behind={**BEHIND, (105, "vlanpod"): frozenset((POD.packed,))}).rules_for(POD)
    assert found is not None
    assert [describe(rule) for rule in found.rules] == [
        "priority 512 to 10.0.5.20/32 lookup 105",
        "priority 4 iif vlanpod lookup 255",
    ]


@pytest.mark.parametrize(
    ("more", "ours"),
    [
        ((), ()),
        ((TO_POD, ANSWER), (BranchRules(POD, (TO_POD, ANSWER)),)),
        ((TO_POD,), (BranchRules(POD, (TO_POD,)),)),
        ((ANSWER,), (BranchRules(POD, (ANSWER,)),)),
        (  # of a pod that is gone, interface included
            (PlainRule(AF, 512, 103, OTHER.packed, 32), PlainRule(AF, 9, 255, interface="vlangone")),
            (
                BranchRules(OTHER, (PlainRule(AF, 512, 103, OTHER.packed, 32),)),
                BranchRules(None, (PlainRule(AF, 9, 255, interface="vlangone"),)),
            ),
        ),
        ((PlainRule(AF, 9, 255, interface="tun0"),), ()),  # gone too, but with a name of others
        ((PlainRule(AF, 9, 255, interface="vlan.eth.1"),), ()),  # there, without a pod behind it
        ((PlainRule(AF, 512, 101, bytes((10, 0, 5, 0)), 24),), ()),
        ((PlainRule(AF, 511, 101, OTHER.packed, 32),), ()),
        ((PlainRule(AF, 512, 101, OTHER.packed, 32, "vlanpod"),), ()),
    ],
)
def test_recognition(more: tuple[PlainRule, ...], ours: tuple[BranchRules, ...]) -> None:
    assert tuple(layout(*more).ours()) == ours


def test_a_rule_that_two_addresses_share_is_named_with_both() -> None:
    second = PlainRule(AF, 512, 101, OTHER.packed, 32)
    behind = {(101, "vlanpod"): frozenset((POD.packed, OTHER.packed))}
    assert tuple(layout(TO_POD, second, ANSWER, behind=behind).ours()) == (
        BranchRules(POD, (TO_POD, ANSWER)),
        BranchRules(OTHER, (second, ANSWER)),
    )


def test_words() -> None:
    six = ip_address("fd00:5::20")
    assert (
        describe(PlainRule(socket.AF_INET6, 512, 101, six.packed, 128)) == "priority 512 to fd00:5::20/128 lookup 101"
    )
