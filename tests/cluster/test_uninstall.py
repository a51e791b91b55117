"""`helm uninstall` where pods run: the nodes are as they were, new pods start, and every old one can be deleted.

The original leaves nodes on which no pod can start (its owned conf), or pods that are Terminating for days, because the
plugin that their sandboxes name is gone. With MESHCNI_LONG=1 every way to be in the conf meets every order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab.cluster import Cluster, KubeNode, workloads
from lab.cluster.nodeconfig import CONF_DIR, CONF_NAME
from tests.cluster import knocking
from tests.cluster.knocking import PATIENCE_SECONDS, check_started_once
from tests.cluster.releases import AGENTS, CONF, NAME, NAMESPACE, PLUGIN, ROLES, Release, entry, release_on

RBAC = "/apis/rbac.authorization.k8s.io/v1"
WAYS: dict[str, tuple[str, ...]] = {
    "chained": (),
    "standalone": ("chained=false",),
    "owned": ("istioOwnedCNIConfig=true",),
}
FEW = [("chained", False), ("standalone", False), ("owned", True)]
ALL = [(way, is_withdrawn) for way in WAYS for is_withdrawn in (False, True)]

pytestmark = pytest.mark.timeout(knocking.TEST_SECONDS)


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


@pytest.mark.parametrize(
    ("way", "is_withdrawn"),
    ALL if knocking.LONG else FEW,
    ids=lambda value: value if isinstance(value, str) else ("rights-first" if value else "in-helms-order"),
)
def test_uninstall_with_running_pods(cluster: Cluster, release: Release, way: str, is_withdrawn: bool) -> None:
    """`is_withdrawn`: account and roles are gone before the DaemonSet is."""
    before, conditions = confs(cluster), node_conditions(cluster)
    shop = install(cluster, release, way)
    names = start_pods(cluster, shop, way)

    if is_withdrawn:
        withdraw(cluster)
    cluster.helm("uninstall", NAME, "--namespace", NAMESPACE)
    cluster.wait("the agents are gone", lambda: not cluster.pods(NAMESPACE, AGENTS), PATIENCE_SECONDS)

    assert confs(cluster) == before
    for node in cluster.nodes.values():
        assert node.path(PLUGIN).exists()  # the sandboxes that it was called for still name it
    new = [workloads.plain_pod(shop, f"after-{node}", node=node) for node in cluster.nodes]
    cluster.apply(new)
    for pod in new:
        found = cluster.wait_pod(shop, pod["metadata"]["name"], timeout_seconds=PATIENCE_SECONDS)
        check_started_once(found)
        assert cluster.capture(found).is_untouched
    for name in names:
        cluster.delete_pod(shop, name, wait=False)
    for name in names:  # by the kubelet, after a DEL that succeeded; a pod deleted by force would prove nothing
        cluster.wait(f"{name} is gone", lambda name=name: name not in pod_names(cluster, shop), PATIENCE_SECONDS)
    assert node_conditions(cluster) == conditions  # Ready all the time
    assert not [event for event in cluster.events(shop) if event["reason"] == "FailedKillPod"]
    cluster.wait_agreed(PATIENCE_SECONDS)


def install(cluster: Cluster, release: Release, way: str) -> str:
    release.install("profile=ambient", *WAYS[way], wait=False)
    release.wait_rollout(PATIENCE_SECONDS)
    cluster.install_ztunnel()
    for node in cluster.nodes.values():
        assert (entry(node) is not None) == (way == "chained")
        assert (len(list(node.path(CONF_DIR).iterdir())) > 1) == (way != "chained")
    return release.add_namespace("shop")


def start_pods(cluster: Cluster, shop: str, way: str) -> list[str]:
    """Start pods of every kind on every node; returns their names when they are captured.

    Nobody calls a standalone conf here; what is in the mesh there, the agent has seen on the watch.
    """
    made: list[dict[str, Any]] = []
    for node in cluster.nodes:
        made += [
            workloads.sidecar_pod(shop, f"sidecar-{node}", node=node, validate=() if way == "standalone" else (4, 6)),
            workloads.ambient_pod(shop, f"ambient-{node}", node=node),
            workloads.plain_pod(shop, f"plain-{node}", node=node),
        ]
    cluster.apply(made)
    cluster.wait_ready(shop, count=len(made), timeout_seconds=PATIENCE_SECONDS)
    cluster.wait_agreed(PATIENCE_SECONDS)
    return [pod["metadata"]["name"] for pod in made]


def withdraw(cluster: Cluster) -> None:
    for role in ROLES:
        for kind in ("clusterrolebindings", "clusterroles"):
            cluster.api.delete(f"{RBAC}/{kind}/{role}")
    cluster.api.delete(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{NAME}")


def confs(cluster: Cluster) -> dict[str, dict[str, bytes]]:
    return {name: conf_files(node) for name, node in cluster.nodes.items()}


def conf_files(node: KubeNode) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in node.path(CONF_DIR).iterdir()}
    assert CONF_NAME in found, f"{CONF} is missing"
    return found


def node_conditions(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """Since when each node has been Ready, or not."""
    found = {}
    for node in cluster.api.list("/api/v1/nodes"):
        condition = next(each for each in node["status"]["conditions"] if each["type"] == "Ready")
        found[node["metadata"]["name"]] = (condition["status"], condition["lastTransitionTime"])
    return found


def pod_names(cluster: Cluster, namespace: str) -> set[str]:
    return {pod["metadata"]["name"] for pod in cluster.pods(namespace)}
