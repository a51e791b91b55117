"""What kernel, agent and ztunnel's stand-in know of a pod, while it is there and when it should be forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lab.cluster import Cluster
from lab.cluster.hostpods import ZTUNNEL_FOLDER
from lab.cluster.workloads import APP_PORT
from lab.ztunnel.client import order
from lab.ztunnel.record import read_records

from meshcni.errors import MeshCniError


def addresses(pod: Mapping[str, Any]) -> list[str]:
    """The addresses that the API says a pod has."""
    return [each["ip"] for each in pod["status"]["podIPs"]]


def uid(pod: Mapping[str, Any]) -> str:
    """A pod's UID."""
    return str(pod["metadata"]["uid"])


def host_set(cluster: Cluster, node: str) -> str:
    """The host's set, whose entries carry the uids of pods as comments, as the kernel prints it."""
    either = "exec 2>/dev/null; ipset save; nft list table inet istio-ambient-nat; true"
    return cluster.nodes[node].run(["sh", "-c", either])


def ztunnel(cluster: Cluster, node: str) -> dict[str, Any]:
    """The state of ztunnel's stand-in on a node."""
    return order(cluster.nodes[node].path(f"{ZTUNNEL_FOLDER}/control.sock"))


def connections(cluster: Cluster, pod: Mapping[str, Any], direction: str) -> list[dict[str, Any]]:
    """What ztunnel's stand-in has led on for a pod."""
    path = cluster.node_of(pod).path(f"{ZTUNNEL_FOLDER}/record.jsonl")
    found = read_records(path, "connection")
    return [each for each in found if each["uid"] == uid(pod) and each["direction"] == direction]


def traces(cluster: Cluster, pod: Mapping[str, Any]) -> list[str]:
    """Who on the node still knows a pod that has gone: the host's set, ztunnel, the agent."""
    node = pod["spec"]["nodeName"]
    try:
        status = json.dumps(cluster.nodes[node].agent_status())
    except MeshCniError as error:
        status = f"{uid(pod)}: {error}"  # not known
    known = {"host set": host_set(cluster, node), "ztunnel": json.dumps(ztunnel(cluster, node)), "agent": status}
    return [name for name, text in known.items() if uid(pod) in text]


def wait_forgotten(cluster: Cluster, *pods: Mapping[str, Any]) -> None:
    """Return when nobody on their nodes knows the pods any more."""
    for pod in pods:
        cluster.wait(f"nobody knows {pod['metadata']['name']}", lambda pod=pod: not traces(cluster, pod))


def check_captured(cluster: Cluster, pod: Mapping[str, Any], *, ambient: bool) -> None:
    """Both families are redirected; an ambient pod is also in the host's set and in ztunnel."""
    found = cluster.capture(pod)
    assert found.both, (pod["metadata"]["name"], found)
    assert found.tunnel == ambient
    if ambient:
        assert uid(pod) in host_set(cluster, pod["spec"]["nodeName"])
        assert uid(pod) in json.dumps(ztunnel(cluster, pod["spec"]["nodeName"]))


def connect(cluster: Cluster, pod: Mapping[str, Any], address: str, port: int = APP_PORT) -> str:
    """What a server answers a pod; LabError when it does not."""
    meta = pod["metadata"]
    return cluster.exec(meta["namespace"], meta["name"], "/workload", "connect", address, str(port))
