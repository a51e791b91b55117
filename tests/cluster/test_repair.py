"""Pods that a kubelet has started without the plugin: repaired, deleted or labelled; and running ones that are healed.

They start before the agent is there, so their sandboxes have no rules, and nobody calls the plugin for them again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from lab import namespaces
from lab.cluster import Cluster, workloads
from lab.cluster.client import ready
from tests.cluster import knocking
from tests.cluster.knocking import PATIENCE_SECONDS, check_never_uncaptured
from tests.cluster.releases import Release, release_on

from meshcni import istio

HOW, NODE = "how", "n1"
NOT_REDIRECTED = 126
UNINITIALIZED = "cni.istio.io/uninitialized"
REPAIRED, MISSING, FAILED = "MeshRedirectionRepaired", "MeshRedirectionMissing", "MeshRepairFailed"
DELETED, LABELED = "DeleteBrokenPod", "LabelBrokenPod"
SWEEP_OFF, SWEEP_REPORTS = "sidecarReconcile=off", "sidecarReconcile=report"
OFTEN = "env.AMBIENT_VERIFY_SECONDS=5"
LABEL_MODE = ("repair.repairPods=false", "repair.labelPods=true", SWEEP_REPORTS)
DELETE_MODE = ("repair.repairPods=false", "repair.deletePods=true", SWEEP_REPORTS, f"env.REPAIR_LABEL_SELECTORS={HOW}")
Pod = Mapping[str, Any]

pytestmark = pytest.mark.timeout(knocking.TEST_SECONDS)


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


def install(release: Release, *settings: str) -> None:
    release.install(*settings, wait=False)
    release.wait_rollout(PATIENCE_SECONDS)


# --- repair, and the look at running pods -----------------------------------------------------------------------------


def test_repaired_in_place_and_healed(cluster: Cluster, release: Release) -> None:
    """First the repair controller alone, then the sweep; then somebody flushes the rules of running pods."""
    shop = release.add_namespace("shop")
    broken, never = workloads.sidecar_pod(shop, "broken", node=NODE, validate=(4, 6)), never_again(shop)
    running = [workloads.sidecar_pod(shop, f"running-{node}", node=node, validate=()) for node in cluster.nodes]
    cluster.apply([broken, never, *running])
    first = cluster.wait_pod(shop, "broken", has_failed, timeout_seconds=PATIENCE_SECONDS)
    cluster.wait("the Job's first pod has failed", lambda: job_pods(cluster, shop, "Failed"), PATIENCE_SECONDS)
    lost = job_pods(cluster, shop, "Failed")[0]["metadata"]["name"]
    names = [pod["metadata"]["name"] for pod in running]
    for name in names:
        assert cluster.capture(cluster.wait_pod(shop, name)).is_untouched

    install(release, SWEEP_OFF)
    repaired = cluster.wait_pod(shop, "broken", timeout_seconds=2 * PATIENCE_SECONDS)  # the kubelet's back-off is long
    assert repaired["metadata"]["uid"] == first["metadata"]["uid"]
    assert validation(repaired)["state"]["terminated"]["exitCode"] == 0
    assert cluster.capture(repaired).both
    wait_event(cluster, shop, "broken", REPAIRED)
    wait_event(cluster, shop, lost, FAILED)  # its init container is not started again, so rules would be of no use
    cluster.wait("the Job is done by another pod", lambda: job_pods(cluster, shop, "Succeeded"), 2 * PATIENCE_SECONDS)
    for name in names:
        assert cluster.capture(cluster.pod(shop, name)).is_untouched  # that was the business of repair alone

    install(release, OFTEN)
    for name in names:
        wait_captured(cluster, shop, name)
        wait_event(cluster, shop, name, REPAIRED)
    for name in ("broken", *names):
        flush(cluster, cluster.pod(shop, name))
        wait_captured(cluster, shop, name)
    cluster.wait_agreed(PATIENCE_SECONDS)
    after = [cluster.pod(shop, name) for name in names]
    assert all(each["restartCount"] == 0 for pod in after for each in pod["status"]["containerStatuses"])


def never_again(namespace: str) -> dict[str, Any]:
    """A Job whose pods are not restarted, with a proxy that does not keep them from ending."""
    pod = workloads.sidecar_pod(namespace, "never", node=NODE, native=True)
    return workloads.job(workloads.run_order(pod, "exit", "0"), backoffLimit=6)


def job_pods(cluster: Cluster, namespace: str, phase: str) -> list[dict[str, Any]]:
    found = cluster.pods(namespace, "batch.kubernetes.io/job-name=never")
    return [pod for pod in found if pod["status"].get("phase") == phase]


def flush(cluster: Cluster, pod: Pod) -> None:
    order = partial(subprocess.run, ["nft", "flush ruleset"], check=True)
    namespaces.call_in_netns(cluster.pod_netns(pod), order)


# --- delete and label -------------------------------------------------------------------------------------------------


def test_labelled_and_deleted(cluster: Cluster, release: Release) -> None:
    """First all broken pods are labelled, then those that a selector takes are deleted; running ones are reported."""
    shop = release.add_namespace("shop")
    broken = workloads.sidecar_pod(shop, "broken", node=NODE)
    made_again = workloads.deployment(knocking.sidecar(shop, "again", node=NODE, labels={HOW: "delete"}))
    running = workloads.sidecar_pod(shop, "running", node=NODE, validate=())
    cluster.apply([broken, made_again, running])
    cluster.wait_pod(shop, "broken", has_failed, timeout_seconds=PATIENCE_SECONDS)
    cluster.wait("the Deployment's pod has failed", lambda: has_failed(of(cluster, shop)), PATIENCE_SECONDS)
    old = of(cluster, shop)["metadata"]

    install(release, *LABEL_MODE)
    for name in ("broken", old["name"]):
        cluster.wait_pod(shop, name, is_labelled, timeout_seconds=PATIENCE_SECONDS)
        wait_event(cluster, shop, name, LABELED)
    wait_event(cluster, shop, "running", MISSING)
    for name in ("broken", "running"):
        assert cluster.capture(cluster.pod(shop, name)).is_untouched
    assert not is_labelled(cluster.pod(shop, "running"))

    install(release, *DELETE_MODE)
    cluster.wait("it is deleted", lambda: of(cluster, shop)["metadata"]["uid"] != old["uid"], PATIENCE_SECONDS)
    cluster.wait("its successor is ready", lambda: ready(of(cluster, shop)), PATIENCE_SECONDS)
    check_never_uncaptured(cluster, [of(cluster, shop)])
    wait_event(cluster, shop, old["name"], DELETED)
    assert cluster.pod(shop, "broken")["metadata"].get("deletionTimestamp") is None
    assert not ready(cluster.pod(shop, "broken"))

    install(release)  # as the chart has it: everything that is left is mended
    wait_captured(cluster, shop, "running")
    wait_captured(cluster, shop, "broken")
    cluster.wait_agreed(PATIENCE_SECONDS)


def of(cluster: Cluster, namespace: str) -> dict[str, Any]:
    """The pod of the Deployment that is not on its way out, as soon as there is one: its maker may lag behind."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        pods = cluster.pods(namespace, f"{HOW}=delete")
        found[:] = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return bool(found)

    cluster.wait("the Deployment has a pod", is_there, PATIENCE_SECONDS)
    return found[0]


# --- what pods say ----------------------------------------------------------------------------------------------------


def validation(pod: Pod) -> dict[str, Any]:
    found = pod["status"].get("initContainerStatuses") or ()
    return next((each for each in found if each["name"] == istio.VALIDATION_CONTAINER), {})


def has_failed(pod: Pod) -> bool:
    states = [validation(pod).get(key, {}).get("terminated") for key in ("state", "lastState")]
    return any(state and state["exitCode"] == NOT_REDIRECTED for state in states)


def is_labelled(pod: Pod) -> bool:
    return bool(pod["metadata"]["labels"].get(UNINITIALIZED) == "true")


def wait_captured(cluster: Cluster, namespace: str, name: str) -> None:
    cluster.wait(f"{name} is captured", lambda: cluster.capture(cluster.pod(namespace, name)).both, PATIENCE_SECONDS)


def wait_event(cluster: Cluster, namespace: str, about: str, reason: str) -> None:
    def told() -> list[str]:
        return [event["reason"] for event in cluster.events(namespace, about)]

    cluster.wait(f"an Event {reason} tells of {about}", lambda: reason in told(), PATIENCE_SECONDS)
