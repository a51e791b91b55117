"""A node loses power: what runs on it afterwards is in the mesh, in whatever order its daemons come back.

The original leaves every sidecar pod outside the mesh when the primary CNI writes its conf anew at boot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from lab.cluster import Cluster, workloads
from lab.cluster.client import ready
from tests.cluster.releases import Release, entry, release_on, restarts

SIDECARS, AMBIENT, PLAIN = 6, 4, 4
RUNTIME_FIRST, KUBELET_FIRST = ("containerd", "kubelet"), ("kubelet", "containerd")
BACK_SECONDS = 180.0
NODE = "n1"


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


@pytest.fixture
def pods(cluster: Cluster, release: Release) -> list[dict[str, Any]]:
    """Pods of every kind on one node, all of them as they should be."""
    release.install("profile=ambient")
    cluster.install_ztunnel()
    shop, quiet = release.add_namespace("shop"), release.add_namespace("quiet", ambient=True)
    cluster.apply(
        [
            *(workloads.sidecar_pod(shop, f"sidecar-{n}", node=NODE, validate=()) for n in range(SIDECARS)),
            *(workloads.plain_pod(shop, f"plain-{n}", node=NODE) for n in range(PLAIN)),
            *(workloads.plain_pod(quiet, f"ambient-{n}", node=NODE) for n in range(AMBIENT)),
        ]
    )
    cluster.wait_ready(shop, count=SIDECARS + PLAIN)
    cluster.wait_ready(quiet, count=AMBIENT)
    cluster.wait_agreed()
    return [pod for namespace in (shop, quiet) for pod in cluster.pods(namespace)]


@pytest.mark.timeout(600)
def test_every_pod_is_captured_after_each_kind_of_boot(
    cluster: Cluster, release: Release, pods: list[dict[str, Any]]
) -> None:
    """The conflist written anew or kept, the run directory empty, the runtime or the kubelet first.

    Where it is kept, our entry is in it before our agent runs, so its own pod's ADD is answered by the plugin alone.
    """
    node = cluster.nodes[NODE]
    for order, is_kept in ((RUNTIME_FIRST, False), (KUBELET_FIRST, True)):
        node.power_loss()
        node.keep_conflist = is_kept
        node.start(order)
        assert (entry(node) is not None) == is_kept
        pods = back_after(cluster, pods)
        release.wait_rollout(BACK_SECONDS)
        cluster.wait_agreed(BACK_SECONDS)
        for pod in pods:
            found = cluster.capture(pod)
            if pod["metadata"]["name"].startswith("plain"):
                assert found.is_untouched, found
            else:
                assert found.both, (pod["metadata"]["name"], order, is_kept, found)


def back_after(cluster: Cluster, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same pods as soon as every container of them has been started again and they are ready."""
    names = {(pod["metadata"]["namespace"], pod["metadata"]["name"]): restarts(pod) for pod in before}

    def now() -> list[dict[str, Any]]:
        return [cluster.pod(*name) for name in names]

    def is_back(pod: dict[str, Any]) -> bool:
        return ready(pod) and restarts(pod) > names[pod["metadata"]["namespace"], pod["metadata"]["name"]]

    cluster.wait("all pods are back after the power loss", lambda: all(map(is_back, now())), BACK_SECONDS)
    after = now()
    assert [pod["metadata"]["uid"] for pod in after] == [pod["metadata"]["uid"] for pod in before]
    return after
