"""What is said about missing capabilities."""

from __future__ import annotations

import pytest

from meshcni.host.capabilities import CAPABILITIES, Capability, complaint, missing_capabilities

CHART = sum(1 << capability.number for capability in CAPABILITIES)


def test_the_charts_set_is_enough() -> None:
    assert missing_capabilities(CHART) == ()
    assert missing_capabilities(CHART | 1) == ()
    assert complaint(()) == ""


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: capability.name)
def test_each_one_is_missed(capability: Capability) -> None:
    assert missing_capabilities(CHART & ~(1 << capability.number)) == (capability,)


def test_without_any() -> None:
    assert missing_capabilities(0) == CAPABILITIES


def test_complaint_names_capability_purpose_and_remedy() -> None:
    assert complaint(missing_capabilities(CHART & ~(1 << 21 | 1 << 12))) == (
        "missing CAP_NET_ADMIN (needed for programming packet rules, addresses and routes in pods); "
        "CAP_SYS_ADMIN (needed for entering the network namespaces of pods (setns)): "
        "add NET_ADMIN, SYS_ADMIN to securityContext.capabilities of the agent's container"
    )
