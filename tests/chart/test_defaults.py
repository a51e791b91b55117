"""A release with nothing but an image, whole; and what ambient mode adds to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.releases import ABSENT, CHART, Release, release

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
LABELS = {
    "app": "istio-cni",
    "release": "istio-cni",
    "istio.io/rev": "default",
    "install.operator.istio.io/owning-resource": "unknown",
    "operator.istio.io/component": "Cni",
    "app.kubernetes.io/name": "istio-cni",
    "app.kubernetes.io/managed-by": "Helm",
    "app.kubernetes.io/instance": "istio-cni",
    "app.kubernetes.io/part-of": "istio",
    "app.kubernetes.io/version": VERSION,
    "helm.sh/chart": f"cni-{VERSION}",
}
CHECKSUM = ["DaemonSet", "spec", "template", "metadata", "annotations", "checksum/config"]
ZTUNNEL_MOUNT = {"name": "cni-ztunnel-sock-dir", "mountPath": "/var/run/ztunnel"}
ZTUNNEL_VOLUME = {
    "name": "cni-ztunnel-sock-dir",
    "hostPath": {"path": "/var/run/ztunnel", "type": "DirectoryOrCreate"},
}


@pytest.fixture(scope="module")
def sidecar() -> Release:
    return release({})


@pytest.fixture(scope="module")
def ambient() -> Release:
    return release({"ambient": {"enabled": True}})


def by_name(objects: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in objects}


def expected(checksum: str) -> dict[str, Any]:
    text = (Path(__file__).parent / "expected" / "sidecar.yaml").read_text()
    text = text.replace("REPAIR_LABELS", json.dumps({"k8s-app": "istio-cni-repair", **LABELS}))
    text = text.replace("LABELS}", json.dumps(LABELS) + "}").replace("CHECKSUM", checksum)
    text = re.sub(r"\bVERSION\b", VERSION, text)
    return by_name(list(yaml.safe_load_all(text)))


def test_sidecar_mode_whole(sidecar: Release) -> None:
    checksum = sidecar.at(CHECKSUM)
    assert re.fullmatch(r"[0-9a-f]{64}", checksum)
    assert by_name(list(sidecar.objects)) == expected(checksum)


def test_ambient_mode_adds_mounts_a_role_and_settings(sidecar: Release, ambient: Release) -> None:
    whole = expected(ambient.at(CHECKSUM))
    pod = whole["DaemonSet/istio-cni-node"]["spec"]["template"]["spec"]
    pod["containers"][0]["volumeMounts"].append(ZTUNNEL_MOUNT)
    pod["volumes"].append(ZTUNNEL_VOLUME)
    whole["ConfigMap/istio-cni-config"]["data"]["AMBIENT_ENABLED"] = "true"
    namespaces = {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "list", "watch"]}
    whole["ClusterRole/istio-cni"]["rules"].insert(1, namespaces)
    found = by_name(list(ambient.objects))
    role, binding = found.pop("ClusterRole/istio-cni-ambient"), found.pop("ClusterRoleBinding/istio-cni-ambient")
    assert found == whole
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}]
    assert binding["roleRef"]["name"] == "istio-cni-ambient"
    assert binding["subjects"] == whole["ClusterRoleBinding/istio-cni"]["subjects"]
    assert binding["metadata"]["labels"]["k8s-app"] == "istio-cni-repair"
    assert ambient.at(CHECKSUM) != sidecar.at(CHECKSUM)


def test_nothing_is_made_that_was_not_asked_for(sidecar: Release) -> None:
    for kind in ("NetworkPolicy", "ResourceQuota", "NetworkAttachmentDefinition"):
        assert sidecar.find(kind) is ABSENT
