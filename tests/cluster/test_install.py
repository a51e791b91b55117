"""The chart on a real Kubernetes: installed by Helm where pods run already, upgraded under way, in both modes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from lab.cluster import Cluster, workloads
from lab.cluster.hostpods import ztunnel_daemon_set
from tests.cluster.releases import (
    AGENTS,
    DAEMONSET,
    NAMESPACE,
    Release,
    entry,
    is_enrolled,
    moment,
    release_on,
    restarts,
    status_written,
)

AVAILABLE_SECONDS = 5.0  # from the agent's being ready; with the kubelet's default it would be up to 10
INSTALLED = "\tinstalled: "
WHILE_ROLLING = 30  # pods at most


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


# --- sidecar mode -----------------------------------------------------------------------------------------------------


def test_sidecar_mode(cluster: Cluster, release: Release) -> None:
    """Install where pods run; new pods are captured, others not; the upgrade restarts the agents and loses no pod."""
    shop, excluded = release.add_namespace("shop"), release.add_namespace("closed")
    cluster.apply([workloads.plain_pod(shop, f"running-{node}", node=node) for node in cluster.nodes])
    cluster.wait_ready(shop, count=len(cluster.nodes))

    values = (f"cni.excludeNamespaces={{kube-system,{excluded}}}", "logging.level=info")
    release.install(*values)
    check_available_soon(release)
    for node in cluster.nodes.values():
        assert (entry(node) or {})["exclude_namespaces"] == ["kube-system", excluded]  # both styles of values count
    check_status_by_kubectl(cluster, user=0)

    cluster.apply([workloads.sidecar_pod(shop, f"new-{node}", node=node, validate=(4, 6)) for node in cluster.nodes])
    cluster.apply(workloads.sidecar_pod(excluded, "new", validate=()))
    cluster.wait_ready(shop, count=2 * len(cluster.nodes))
    cluster.wait_ready(excluded, count=1)
    for pod in cluster.pods(shop):
        found = cluster.capture(pod)
        assert found.both if pod["metadata"]["name"].startswith("new") else found.is_untouched
    assert cluster.capture(cluster.pod(excluded, "new")).is_untouched

    before = release.agents()
    release.install(*values)
    assert identities(release.agents()) == identities(before)  # nothing changed: nothing restarts
    upgrade_under_way(cluster, release, shop, excluded)


def upgrade_under_way(cluster: Cluster, release: Release, shop: str, excluded: str) -> None:
    before, running = release.agents(), len(cluster.pods(shop))
    release.install(
        *(f"excludeNamespaces={{kube-system,{excluded},other}}", "runAsNonRoot=true", "readOnlyRootFilesystem=true"),
        image=release.by_digest,
        wait=False,
    )
    started = 0
    while not is_rolled_out(release, before) and started < WHILE_ROLLING:
        node = list(cluster.nodes)[started % len(cluster.nodes)]
        cluster.apply(workloads.sidecar_pod(shop, f"under-way-{started}", node=node))
        started += 1
        cluster.wait_pod(shop, f"under-way-{started - 1}", has_sandbox)
    release.wait_rollout()
    assert started
    assert not set(identities(before)) & set(identities(release.agents()))
    pods = cluster.wait_ready(shop, count=running + started)
    for pod in pods:
        if pod["metadata"]["name"].startswith("under-way"):
            assert cluster.capture(pod).both
            assert restarts(pod) == 0  # never looked at without its rules, so nothing had to be repaired
    for node in cluster.nodes.values():
        assert (entry(node) or {})["exclude_namespaces"] == ["kube-system", excluded, "other"]
    for pod in release.agents().values():
        assert pod["spec"]["containers"][0]["image"] == release.by_digest
    check_status_by_kubectl(cluster, user=65532)


def identities(agents: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(pod["metadata"]["uid"] for pod in agents.values())


def is_rolled_out(release: Release, before: dict[str, dict[str, Any]]) -> bool:
    status = release.cluster.api.get(DAEMONSET)["status"]
    return status.get("updatedNumberScheduled") == len(before) and status.get("numberAvailable") == len(before)


def has_sandbox(pod: dict[str, Any]) -> bool:
    return bool(pod["status"].get("podIP"))


def check_available_soon(release: Release) -> None:
    """Available follows the agent's own readiness, by the times that agent and API server wrote down."""
    available = status_written(release.cluster.api.get(DAEMONSET))
    installed = [line for node in release.cluster.nodes for line in release.log(node).splitlines() if INSTALLED in line]
    assert len(installed) == len(release.cluster.nodes)
    last = max(moment(line.split("\t")[0]) for line in installed)
    assert (available - last).total_seconds() < AVAILABLE_SECONDS


def check_status_by_kubectl(cluster: Cluster, *, user: int) -> None:
    """`install-cni status` as the chart's notes say it, as the user of the container's security context."""
    for pod in cluster.pods(NAMESPACE, AGENTS):
        command = ("-n", NAMESPACE, "exec", pod["metadata"]["name"], "-c", "install-cni", "--")
        output = cluster.kubectl(*command, "install-cni", "status", "--output", "json")
        assert json.loads(output)["ready"]
        assert pod["spec"]["containers"][0]["securityContext"]["runAsUser"] == user


# --- ambient mode -----------------------------------------------------------------------------------------------------


# --- ambient mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy_mode", ["iptables", "nftables"])
def test_ambient_mode(request: pytest.FixtureRequest, proxy_mode: str) -> None:
    """Pods that run are enrolled, new ones captured by the plugin, others left alone, whatever kube-proxy programs."""
    is_native = proxy_mode == "nftables"
    cluster: Cluster = request.getfixturevalue("nftables_cluster" if is_native else "cluster")
    with contextmanager(release_on)(cluster) as release:
        ambient_mode(cluster, release, native_nftables=is_native)


def ambient_mode(cluster: Cluster, release: Release, *, native_nftables: bool) -> None:
    mesh, other = release.add_namespace("mesh", ambient=True), release.add_namespace("other")
    cluster.apply([workloads.plain_pod(mesh, f"running-{node}", node=node) for node in cluster.nodes])
    cluster.apply(workloads.plain_pod(other, "running"))
    cluster.wait_ready(mesh, count=len(cluster.nodes))
    cluster.wait_ready(other)

    native = f"cni.global.nativeNftables={json.dumps(native_nftables)}"
    release.install("profile=ambient", native, wait=False)
    cluster.apply(ztunnel_daemon_set())
    release.wait_rollout()
    for node in cluster.nodes:
        cluster.wait_pod(mesh, f"running-{node}", is_enrolled)

    cluster.apply([workloads.plain_pod(mesh, f"new-{node}", node=node) for node in cluster.nodes])
    cluster.apply([workloads.ambient_pod(other, "labelled"), workloads.plain_pod(other, "new")])
    for pod in cluster.wait_ready(mesh, count=2 * len(cluster.nodes)):
        found = cluster.capture(pod)
        assert found.both
        assert found.tunnel
        assert is_enrolled(cluster.pod(mesh, pod["metadata"]["name"]))
    cluster.wait_ready(other, count=3)
    assert cluster.capture(cluster.pod(other, "labelled")).both
    for name in ("running", "new"):
        assert cluster.capture(cluster.pod(other, name)).is_untouched
    check_status_by_kubectl(cluster, user=0)
    cluster.wait_agreed()
