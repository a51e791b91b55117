"""Values that must not be taken, and what helm says about them: which value, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from tests.chart.facts import DIGEST, HUB
from tests.chart.releases import IMAGE, refusal, release

# Values that do not go together: refused by the templates.
TEMPLATES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no image": ({}, ("which image?", "`image`", "`hub` with `tag` or `digest`")),
    "hub alone": ({"hub": HUB}, ("which image?",)),
    "tag alone": ({"global": {"tag": "1"}}, ("which image?",)),
    "two digests": ({"image": f"{HUB}/x@sha256:{'f' * 64}", "digest": DIGEST}, (DIGEST, "f" * 64, "give one of them")),
    "prefix defaults": ({"image": IMAGE, "defaults": {"hub": "x"}}, ("`defaults` is not a value", "Drop the prefix")),
    "profile": ({"image": IMAGE, "profile": "ambiant"}, ('unknown profile "ambiant"', "ambient, ", ", stable")),
    "platform": (
        {"image": IMAGE, "global": {"platform": "eks"}},
        ('unknown platform "eks"; there are: gke, k3d, k3s, microk8s, minikube, openshift\n',),
    ),
    "version": (
        {"image": IMAGE, "compatibilityVersion": 1.3},
        ('unknown compatibilityVersion "1.3"; there are: 1.25, 1.26, 1.27, 1.28, 1.29, 1.30\n',),
    ),
    "path as profile": ({"image": IMAGE, "profile": "../x"}, ('unknown profile "../x"',)),
    "two repair modes": (
        {"image": IMAGE, "repair": {"deletePods": True}},
        ("repair.repairPods and repair.deletePods are true", "set the others to false"),
    ),
    "two other repair modes": (
        {"image": IMAGE, "cni": {"repair": {"deletePods": True, "labelPods": True, "repairPods": False}}},
        ("repair.deletePods and repair.labelPods are true",),
    ),
    "surge beside the default": (
        {"image": IMAGE, "updateStrategy": {"rollingUpdate": {"maxSurge": 1}}},
        ("with maxSurge, maxUnavailable must be 0",),
    ),
    "no update": (
        {"image": IMAGE, "updateStrategy": {"rollingUpdate": {"maxUnavailable": 0}}},
        ("one of maxUnavailable and maxSurge must be above 0",),
    ),
}
EXPRESSION = {"key": "a", "operator": "Is"}
SELECTORS = {
    "ambient": {"enablementSelectors": [{"podSelectors": {}}, {"podSelector": {"matchExpressions": [EXPRESSION]}}]}
}
# One value by itself: refused by the schema, at each of three places.
SCHEMA: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"ambiant": {"enabled": True}}, "", "additional properties 'ambiant' not allowed"),
    "unknown below": ({"ambient": {"enable": True}}, "/ambient", "additional properties 'enable' not allowed"),
    "text for a switch": ({"ambient": {"enabled": "true"}}, "/ambient/enabled", "got string, want null or boolean"),
    "text for a list": ({"excludeNamespaces": "a,b"}, "/excludeNamespaces", "got string, want null or array"),
    "version as a number": ({"tag": 1.3}, "/tag", "got number, want"),
    "relative path": ({"cniConfDir": "etc"}, "/cniConfDir", "'etc' does not match pattern"),
    "path as a name": ({"cniConfFileName": "/etc/x"}, "/cniConfFileName", "does not match pattern"),
    "owned conf": (
        {"istioOwnedCNIConfigFileName": "x.conf"},
        "/istioOwnedCNIConfigFileName",
        "'x.conf' does not",
    ),
    "digest": ({"digest": "sha256:12"}, "/digest", "'sha256:12' does not match pattern"),
    "choice": ({"sidecarReconcile": "repair"}, "/sidecarReconcile", "value must be one of 'heal', 'report', 'off'"),
    "scope": ({"global": {"resourceScope": "some"}}, "/global/resourceScope", "value must be one of 'all', 'cluster'"),
    "global switch": ({"global": {"nativeNftables": 1}}, "/global/nativeNftables", "got number, want null or boolean"),
    "label": ({"podLabels": {"a": True}}, "/podLabels/a", "got boolean, want null or string"),
    "quantity": ({"resources": {"limits": {"memory": "1 GB"}}}, "/resources/limits/memory", "'1 GB' does not match"),
    "port": ({"healthPort": 70000}, "/healthPort", "maximum"),
    "selector": (SELECTORS, "/ambient/enablementSelectors/0", "additional properties 'podSelectors' not allowed"),
    "operator": (
        SELECTORS,
        "/ambient/enablementSelectors/1/podSelector/matchExpressions/0/operator",
        "value must be one of 'In'",
    ),
    "environment": ({"env": {"A": ["x"]}}, "/env/A", "got array, want"),
    "toleration": (
        {"tolerations": [{"effects": "x"}]},
        "/tolerations/0",
        "additional properties 'effects' not allowed",
    ),
}
PREFIXES = ("", "cni", "_internal_defaults_do_not_set")


@pytest.mark.parametrize("name", TEMPLATES)
def test_values_that_do_not_fit(name: str) -> None:
    values, texts = TEMPLATES[name]
    said = refusal(values)
    assert "istio-cni: " in said
    for text in texts:
        assert text in said


def test_ill_typed_and_unknown_values() -> None:
    """Each of them is named, with its place, at all three places at once."""
    together: dict[str, Any] = {"image": IMAGE}
    for values, _, _ in SCHEMA.values():
        together = joined(together, values)
    said = refusal({**together, "cni": together, "_internal_defaults_do_not_set": together})
    for prefix in PREFIXES:
        for name, (_, at, complaint) in SCHEMA.items():
            place = f"/{prefix}{at}" if prefix else at
            assert any(f"at '{place}': " in line and complaint in line for line in said.splitlines()), (name, place)


def test_one_ill_typed_value_is_one_line() -> None:
    said = refusal({"image": IMAGE, "ambient": {"enabled": "yes"}})
    assert [line for line in said.splitlines() if line.startswith("- at ")] == [
        "- at '/ambient/enabled': got string, want null or boolean"
    ]


def test_repair_modes_do_not_matter_while_repair_is_off() -> None:
    made = release({"repair": {"enabled": False, "deletePods": True, "labelPods": True}})
    assert made.at(["ConfigMap", "data", "REPAIR_ENABLED"]) == "false"


def test_cluster_scope_needs_no_image() -> None:
    made = release({"image": None, "global": {"resourceScope": "cluster"}})
    assert "ClusterRole/istio-cni" in made.names


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, map by map."""
    found = dict(one)
    for key, value in other.items():
        old = found.get(key)
        found[key] = joined(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found
