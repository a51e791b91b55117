"""Agents and ztunnels are replaced and killed while pods run and others start: none is outside the mesh for a moment.

Nothing that mends pods afterwards is on, so what captures a sidecar pod is the plugin's call alone. The original loses
a third to two thirds of the sidecar pods that start during a rolling update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from lab.cluster import Cluster
from lab.cluster.hostpods import ZTUNNEL
from tests.cluster import knocking
from tests.cluster.knocking import PATIENCE_SECONDS, Stream, check_never_uncaptured, restart
from tests.cluster.releases import AGENTS, DAEMONSET, NAMESPACE, Release, release_on

NOTHING_MENDED = ("repair.enabled=false", "sidecarReconcile=off")
ZTUNNELS = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{ZTUNNEL}"
MOST = 40 if knocking.LONG else 10  # pods of a stream
Done = Callable[[], bool]

pytestmark = pytest.mark.timeout(knocking.TEST_SECONDS)


@pytest.fixture(scope="module")
def release(iptables_cluster: Cluster) -> Iterator[Release]:
    iptables_cluster.restore()
    yield from release_on(iptables_cluster)


@pytest.fixture(scope="module")
def shop(release: Release) -> str:
    return release.add_namespace("shop")


@pytest.fixture(scope="module")
def mesh(release: Release, shop: str) -> list[dict[str, Any]]:
    """Ambient mode; pods of both kinds on both nodes, which knock through all the tests."""
    cluster = release.cluster
    release.install("profile=ambient", *NOTHING_MENDED, wait=False)
    release.wait_rollout(PATIENCE_SECONDS)
    cluster.install_ztunnel()
    makers = (partial(knocking.sidecar, shop), partial(knocking.ambient, shop))
    made = [make(f"{node}-{number}", node=node) for node in cluster.nodes for number, make in enumerate(makers)]
    cluster.apply(made)
    return [cluster.wait_pod(shop, pod["metadata"]["name"], timeout_seconds=PATIENCE_SECONDS) for pod in made]


# --- sidecar mode -----------------------------------------------------------------------------------------------------


def test_agents_of_sidecar_mode(release: Release, shop: str) -> None:
    """A rolling update and then a SIGKILL on each node, under one stream."""
    cluster = release.cluster
    release.install(*NOTHING_MENDED, wait=False)
    release.wait_rollout(PATIENCE_SECONDS)
    stream = Stream(cluster, [shop], [partial(knocking.sidecar, shop)])
    before = uids(release)
    stream.flow_until(restart(cluster, DAEMONSET), MOST)
    assert not before & uids(release)
    stream.flow_until(killed(release), MOST)
    check_never_uncaptured(cluster, stream.wait())
    cluster.wait_agreed(PATIENCE_SECONDS)
    stream.delete()


# --- ambient mode -----------------------------------------------------------------------------------------------------


def roll_agents(release: Release) -> Done:
    return restart(release.cluster, DAEMONSET)


def roll_ztunnels(release: Release) -> Done:
    return restart(release.cluster, ZTUNNELS)


def roll_both(release: Release) -> Done:
    agents, ztunnels = roll_agents(release), roll_ztunnels(release)
    return lambda: agents() and ztunnels()


def killed(release: Release) -> Done:
    """Kill the agent of each node, one after the other; done when all are back."""
    cluster = release.cluster
    counts = {node: agent_restarts(pod) for node, pod in release.agents().items()}
    left = list(cluster.nodes)

    def is_back() -> bool:
        if left:
            cluster.nodes[left.pop()].kill_agent()
            return False
        now = release.agents()
        is_new = all(agent_restarts(now[node]) == count + 1 for node, count in counts.items())
        return is_new and knocking.is_rolled_out(cluster, DAEMONSET)

    return is_back


@pytest.mark.parametrize("change", [roll_agents, roll_ztunnels, roll_both, killed])
def test_ambient_mode(
    release: Release, shop: str, mesh: list[dict[str, Any]], change: Callable[[Release], Done]
) -> None:
    """Sidecar and ambient pods start while agents, ztunnels or both are replaced, or the agents are killed."""
    cluster = release.cluster
    stream = Stream(cluster, [shop], [partial(knocking.sidecar, shop), partial(knocking.ambient, shop)])
    stream.flow_until(change(release), MOST)
    check_never_uncaptured(cluster, [*stream.wait(), *now(cluster, mesh)])
    cluster.wait_agreed(PATIENCE_SECONDS)
    stream.delete()


def now(cluster: Cluster, pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    after = [cluster.pod(pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in pods]
    assert [pod["metadata"]["uid"] for pod in after] == [pod["metadata"]["uid"] for pod in pods]
    return after


def uids(release: Release) -> set[str]:
    return {pod["metadata"]["uid"] for pod in release.cluster.pods(NAMESPACE, AGENTS)}


def agent_restarts(pod: dict[str, Any]) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])
