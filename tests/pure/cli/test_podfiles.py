"""The policy that the people's commands decide by: flags, else the agent's own variables."""

from __future__ import annotations

import pytest
import yaml  # noqa: F401  (read_policy imports it late, and a pure test may not look into folders)

from meshcni.cli.podfiles import POLICY_FLAGS, read_policy
from meshcni.errors import UsageError
from meshcni.pflag import parse
from meshcni.pods.eligibility import Policy
from meshcni.pods.selectors import EnablementSelector, LabelSelector

SELECTOR = "[{podSelector: {matchLabels: {a: b}}}]"
FLAG = "--ambient-enablement-selector"
SELECTORS = (EnablementSelector(pod=LabelSelector((("a", "b"),))),)

CASES: dict[str, tuple[list[str], dict[str, str], Policy]] = {
    "nothing": ([], {}, Policy()),
    "variables": (
        [],
        {
            "EXCLUDE_NAMESPACES": "a, b,,",
            "POD_NAMESPACE": "istio-system",
            "AMBIENT_ENABLED": "true",
            "AMBIENT_ENABLEMENT_SELECTOR": SELECTOR,
            "SYSTEM_NAMESPACE": "mesh",
        },
        Policy(frozenset({"a", "b"}), "istio-system", True, SELECTORS, "mesh"),
    ),
    "empty variables": ([], {flag.env[0]: "" for flag in POLICY_FLAGS}, Policy()),
    "flags": (
        ["--exclude-namespaces=a", "--agent-namespace=x", "--ambient-enabled", f"{FLAG}={SELECTOR}"],
        {},
        Policy(frozenset({"a"}), "x", True, SELECTORS),
    ),
    "flags beat variables": (
        ["--exclude-namespaces=", "--ambient-enabled=false"],
        {"EXCLUDE_NAMESPACES": "a", "AMBIENT_ENABLED": "true"},
        Policy(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "environment", "policy"), CASES.values(), ids=CASES)
def test_policy(arguments: list[str], environment: dict[str, str], policy: Policy) -> None:
    assert read_policy(parse(POLICY_FLAGS, arguments), environment) == policy


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AMBIENT_ENABLED": "yes"}, "env AMBIENT_ENABLED is 'yes': 'yes' is not a boolean"),
        ({"AMBIENT_ENABLEMENT_SELECTOR": "["}, "env AMBIENT_ENABLEMENT_SELECTOR is not YAML"),
        ({"AMBIENT_ENABLEMENT_SELECTOR": "a"}, "env AMBIENT_ENABLEMENT_SELECTOR is 'a', expected a list"),
    ],
)
def test_wrong_policy(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_policy(parse(POLICY_FLAGS, []), environment)
    assert message in caught.value.message
