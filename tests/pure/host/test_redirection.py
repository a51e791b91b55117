"""Which families are programmed, and whether a namespace is the pod's."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from meshcni.errors import NetnsError
from meshcni.host.netns import NetnsFacts
from meshcni.host.redirection import FamilyPolicy, check_addresses, choose_families
from meshcni.rules.model import Family

V4, BOTH = frozenset({Family.V4}), frozenset(Family)
BY_ADDRESS, ORIGINAL = FamilyPolicy.BY_ADDRESS, FamilyPolicy.ORIGINAL


def having(*addresses: str) -> NetnsFacts:
    return NetnsFacts(tuple(map(ip_address, addresses)))


@pytest.mark.parametrize(
    ("addresses", "policy", "dual_stack", "families"),
    [
        (("10.0.0.2",), BY_ADDRESS, False, V4),
        (("10.0.0.2",), BY_ADDRESS, True, V4),
        (("10.0.0.2", "fd00::2"), BY_ADDRESS, False, BOTH),
        (("10.0.0.2", "fd00::2"), BY_ADDRESS, True, BOTH),
        (("fd00::2",), BY_ADDRESS, False, BOTH),
        (("10.0.0.2",), ORIGINAL, False, V4),
        (("10.0.0.2",), ORIGINAL, True, V4),
        (("10.0.0.2", "fd00::2"), ORIGINAL, False, V4),
        (("10.0.0.2", "10.0.1.2", "fd00::2"), ORIGINAL, True, BOTH),
        (("fd00::2",), ORIGINAL, False, BOTH),
        (("fd00::2", "10.0.0.2"), ORIGINAL, False, BOTH),
    ],
)
def test_families(
    addresses: tuple[str, ...], policy: FamilyPolicy, dual_stack: bool, families: frozenset[Family]
) -> None:
    assert choose_families(having(*addresses), dual_stack, policy) == families


@pytest.mark.parametrize("policy", FamilyPolicy)
def test_no_address(policy: FamilyPolicy) -> None:
    with pytest.raises(NetnsError, match="no valid local IP address found") as caught:
        choose_families(having(), True, policy)
    assert caught.value.cni_code == 4
    assert "istio-cni must come after" in caught.value.hint


@pytest.mark.parametrize(
    ("expected", "there"),
    [
        ((), ("10.0.0.2",)),
        (("10.0.0.2",), ("10.0.0.2",)),
        (("10.0.0.2", "fd00::2"), ("10.9.9.9", "fd00::2")),
    ],
)
def test_a_namespace_with_one_of_the_addresses_is_the_pods(expected: tuple[str, ...], there: tuple[str, ...]) -> None:
    check_addresses(having(*there), map(ip_address, expected))


@pytest.mark.parametrize(("there", "words"), [(("10.0.0.3", "10.0.0.1"), "10.0.0.1, 10.0.0.3"), ((), "none")])
def test_a_namespace_with_none_of_them_is_not(there: tuple[str, ...], words: str) -> None:
    with pytest.raises(NetnsError) as caught:
        check_addresses(having(*there), [ip_address("10.0.0.2"), ip_address("fd00::2")])
    assert caught.value.message == (
        f"the network namespace has none of the pod's addresses 10.0.0.2, fd00::2, but {words}"
    )
