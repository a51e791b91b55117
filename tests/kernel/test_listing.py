"""What the kernel lists after each case equals what the rules say, in every backend; a second run changes nothing."""

from __future__ import annotations

import pytest
from tests.kernel.conftest import PodMaker
from tests.kernel.world import KIND, apply_rules, nft_list, policy, save, state
from tests.pure.rules.cases import CASES

from meshcni.rules import iptables, nft
from meshcni.rules.model import Family
from meshcni.rules.sidecar import sidecar_ruleset


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 35


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, variant: str, new_pod: PodMaker) -> None:
    case = CASES[name]
    pod = new_pod(case.families)
    ruleset = sidecar_ruleset(case.parameters, case.families, KIND[variant])

    applied = apply_rules(pod, ruleset, variant)

    assert applied.changed
    assert applied.variant == variant
    if variant == "nftables":
        assert nft_list(pod) == nft.listing(ruleset)
    else:
        for family in Family:
            assert save(pod, variant, family) == iptables.listing(ruleset, family)
    routing = policy(pod)
    for rule in ruleset.policy_rules:
        assert routing.count(f"fwmark {rule.mark:#x} lookup {rule.table}") == len(case.families)
    for address in ruleset.addresses:
        assert f" {address.address}/{address.prefix_length} " in routing

    before = state(pod)
    again = apply_rules(pod, ruleset, variant)
    assert not again.changed
    assert state(pod) == before
