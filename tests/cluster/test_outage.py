"""The API server is away, or the agent is: mesh pods wait and are captured afterwards, other pods start where they can.

The original leaves four of five ambient pods outside the mesh for good when the API server is away for 30 s.
MESHCNI_LONG=1 makes that outage the two minutes that it takes to replace a control plane's machine.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from lab.cluster import Cluster, workloads
from lab.cluster.client import STRATEGIC_PATCH, ready
from lab.cluster.cluster import pod_path
from lab.node import LabError
from tests.cluster import knocking
from tests.cluster.knocking import PATIENCE_SECONDS, UNCAPTURED, check_never_uncaptured, check_started_once
from tests.cluster.releases import NAMESPACE, Release, release_on, restarts

from meshcni import istio

OUTAGE_SECONDS = 120.0 if knocking.LONG else 30.0
NEW = 5  # pods of each kind
NODE = "n1"
REFUSED = "FailedCreatePodSandBox"
VALUES = ("profile=ambient", "repair.enabled=false", "sidecarReconcile=off")
UNABLE = "meshcni.test/nowhere:1"  # an image that no node has
Names = list[tuple[str, str]]

pytestmark = pytest.mark.timeout(knocking.TEST_SECONDS)


@pytest.fixture(scope="module")
def release(iptables_cluster: Cluster) -> Iterator[Release]:
    iptables_cluster.restore()
    yield from release_on(iptables_cluster)


@pytest.fixture(scope="module")
def shop(release: Release) -> str:
    """A namespace with agents and ztunnels around it."""
    release.install(*VALUES, wait=False)
    release.wait_rollout(PATIENCE_SECONDS)
    release.cluster.install_ztunnel()
    return release.add_namespace("shop")


# --- the API server ---------------------------------------------------------------------------------------------------


def test_api_server_is_away(release: Release, shop: str) -> None:
    """It goes just after pods were scheduled; others run meanwhile, and a container of one is started again."""
    cluster, node = release.cluster, release.cluster.nodes[NODE]
    cluster.apply(
        [
            *(make(shop, f"running-{make.__name__}", node=NODE) for make in (knocking.sidecar, knocking.ambient)),
            workloads.plain_pod(shop, "plain", node=NODE),
            knocking.ambient(shop, "restarting", node=NODE),
        ]
    )
    before = cluster.wait_ready(shop, count=4, timeout_seconds=PATIENCE_SECONDS)
    # bound to the node from the start, and in no need of a token that only the API server could give
    spec = {"nodeName": NODE, "automountServiceAccountToken": False}
    made = [
        make(shop, f"new-{make.__name__}-{number}", **spec)
        for number in range(NEW)
        for make in (knocking.sidecar, knocking.ambient)
    ]
    for pod in made:
        cluster.api.create(pod)
    cluster.stop_api_server()
    end = time.monotonic() + OUTAGE_SECONDS
    app = node.runtime.container(shop, "restarting", "app")
    app.signal(signal.SIGKILL)
    cluster.wait("the container ends", lambda: not app.is_running, PATIENCE_SECONDS)
    cluster.wait("it is started again", partial(runs, cluster, shop, "restarting", "app"), PATIENCE_SECONDS)
    time.sleep(max(0.0, end - time.monotonic()))
    cluster.start_api_server()
    cluster.wait_nodes(timeout_seconds=PATIENCE_SECONDS)

    after = cluster.wait_ready(shop, count=len(before) + len(made), timeout_seconds=PATIENCE_SECONDS)
    cluster.wait_agreed(PATIENCE_SECONDS)
    uids = {pod["metadata"]["uid"] for pod in after}
    assert {pod["metadata"]["uid"] for pod in before} <= uids
    for pod in after:
        name = pod["metadata"]["name"]
        if name == "plain":
            check_started_once(pod)
            assert cluster.capture(pod).is_untouched
        elif name == "restarting":
            assert restarts(pod) == 1
            assert not any(text in cluster.log(shop, name, "app") for text in UNCAPTURED)
        else:
            check_never_uncaptured(cluster, [pod])


def runs(cluster: Cluster, namespace: str, name: str, container: str) -> bool:
    """Whether a container runs, by the runtime: there is no API server to ask."""
    try:
        return cluster.nodes[NODE].runtime.container(namespace, name, container).is_running
    except LabError:
        return False


# --- the agent --------------------------------------------------------------------------------------------------------


def test_agent_is_away(release: Release, shop: str) -> None:
    """Its container cannot be started: pods outside the mesh do not wait for it, those of the mesh do, and say so.

    Its pod stays. With the pod the API server would forget the token by which the plugin asks for itself.
    """
    cluster = release.cluster
    break_agent(release)
    plain = [workloads.plain_pod(shop, f"unmeshed-{number}", node=NODE) for number in range(3)]
    mesh = [make(shop, f"meshed-{make.__name__}", node=NODE) for make in (knocking.sidecar, knocking.ambient)]
    cluster.apply([*mesh, *plain])
    for pod in plain:
        found = cluster.wait_pod(shop, pod["metadata"]["name"], timeout_seconds=PATIENCE_SECONDS)
        check_started_once(found)
        assert cluster.capture(found).is_untouched
        assert not refusals(cluster, shop, pod["metadata"]["name"])  # who waits is refused in the end
    for pod in mesh:
        name = pod["metadata"]["name"]
        cluster.wait(f"{name} is refused", partial(refusals, cluster, shop, name), PATIENCE_SECONDS)
        told = refusals(cluster, shop, name)[-1]
        assert not ready(cluster.pod(shop, name))
        assert "the node agent did not answer within" in told, told
        assert "says that the pod is for the mesh" in told, told
    assert not cluster.nodes[NODE].agent_alive()
    cluster.delete_pod(NAMESPACE, release.agents()[NODE]["metadata"]["name"])
    release.wait_rollout(PATIENCE_SECONDS)
    found = [cluster.wait_pod(shop, pod["metadata"]["name"], timeout_seconds=PATIENCE_SECONDS) for pod in mesh]
    check_never_uncaptured(cluster, found)
    cluster.wait_agreed(PATIENCE_SECONDS)


def break_agent(release: Release) -> None:
    """Give the pod of NODE's agent an image that is nowhere; returns when the agent has ended."""
    cluster = release.cluster
    name = release.agents()[NODE]["metadata"]["name"]
    change = {"spec": {"containers": [{"name": istio.AGENT_NAME, "image": UNABLE}]}}
    cluster.api.patch(pod_path(NAMESPACE, name), change, STRATEGIC_PATCH)
    cluster.wait("the agent ends", lambda: not cluster.nodes[NODE].agent_alive(), PATIENCE_SECONDS)


def refusals(cluster: Cluster, namespace: str, name: str) -> list[str]:
    events: list[dict[str, Any]] = cluster.events(namespace, name)
    return [event["message"] for event in events if event["reason"] == REFUSED]
