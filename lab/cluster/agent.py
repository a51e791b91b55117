"""The node agent on a cluster: its image, and how its objects get there, by our chart or by a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cluster import workloads
from lab.cluster.binaries import ROOT
from lab.cluster.client import objects_in
from lab.imagelayout import Image, find_image
from meshcni import istio

if TYPE_CHECKING:
    from lab.cluster.cluster import Cluster

CHART = ROOT / "charts" / "istio-cni"
RELEASE = "istio-cni"
VARIABLE = "MESHCNI_CLUSTER_IMAGE"  # a folder with an OCI layout, instead of build/image
DAEMON_SET = f"/apis/apps/v1/namespaces/{{}}/daemonsets/{istio.DAEMONSET_NAME}"
READY_SECONDS = 150.0


def cluster_image() -> Image:
    """Return the image of the agent; LabError when there is none."""
    named = os.environ.get(VARIABLE)
    return find_image(layout=Path(named)) if named else find_image()


def install_chart(
    cluster: Cluster, values: Mapping[str, Any], image: Image, namespace: str, chart: Path, *, wait: bool
) -> str:
    """Install or upgrade the release with `values` over those that name the image; returns what helm says."""
    name = cluster.import_image(image)
    given = merged({"image": name, "global": {"imagePullPolicy": "Never"}}, values)
    told = cluster.helm(
        *("upgrade", "--install", RELEASE, str(chart), "--namespace", namespace, "--create-namespace"),
        *("--values", "-"),
        input=json.dumps(given),
    )
    if wait:
        wait_agent(cluster, namespace)
    return told


def install_manifest(cluster: Cluster, path: Path, image: Image, *, wait: bool) -> list[dict[str, Any]]:
    """Apply a manifest with the agent's DaemonSet, whose container is given the image; returns the objects."""
    name = cluster.import_image(image)
    objects = objects_in(path.read_text())
    for obj in objects:
        if obj["kind"] == "DaemonSet":
            use_image(obj, name)
    namespaces = {obj["metadata"]["namespace"] for obj in objects if "namespace" in obj["metadata"]}
    made = {obj["metadata"]["name"] for obj in objects if obj["kind"] == "Namespace"}
    cluster.apply([workloads.namespace(each) for each in sorted(namespaces - made)])
    done = cluster.apply(objects)
    if wait:
        wait_agent(cluster, next(obj["metadata"]["namespace"] for obj in objects if obj["kind"] == "DaemonSet"))
    return done


def use_image(daemon_set: Mapping[str, Any], name: str) -> None:
    """Have the agent's container of a DaemonSet run an imported image."""
    for container in daemon_set["spec"]["template"]["spec"]["containers"]:
        if container["name"] == istio.AGENT_NAME:
            container.update(image=name, imagePullPolicy="Never")


def wait_agent(cluster: Cluster, namespace: str, timeout_seconds: float = READY_SECONDS) -> None:
    """Return when the DaemonSet's newest pods are ready on all nodes; LabError says how its pods are."""
    cluster.wait_rollout(DAEMON_SET.format(namespace), f"k8s-app={istio.DAEMONSET_NAME}", timeout_seconds)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return values in which those above win, also within objects."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
