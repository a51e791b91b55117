"""From a pod's creation to Ready on a real Kubernetes: a node with our plugin beside a node without any.

Both nodes share the machine and the control plane, and their pods take turns, so the ratio is what plugin, agent and,
in ambient mode, ztunnel add. Without the plugin the same pod is started: same containers, labels and annotations.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lab.cluster import ApiClient, Cluster, workloads
from lab.cluster.client import ready
from lab.node import LabError

from bench.report import Row, ratio

ROUNDS, ROUNDS_AT_ONCE, AT_ONCE = 12, 2, 20
WITH, WITHOUT = "n1", "n2"
PATIENCE_SECONDS = 180
NAMESPACE = "bench"
# Targets: issue "A real Kubernetes". The second figure is for 20 at once.
TARGETS = {"unmeshed": (1.1, 1.15), "sidecar": (1.2, 1.3), "ambient": (1.2, 1.3)}
ON_ONE_NODE = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [WITH]}]}
            ]
        }
    }
}

Object = dict[str, Any]


def measure() -> list[Row]:
    """Start a cluster of its own and return the rows; LabError when it cannot run here."""
    make: dict[str, Callable[[str, str], Object]] = {"unmeshed": plain, "sidecar": sidecar, "ambient": ambient}
    rows = []
    with Cluster(nodes=2) as cluster:
        cluster.install_agent({"profile": "ambient", "affinity": ON_ONE_NODE})
        cluster.install_ztunnel()
        cluster.apply(workloads.namespace(NAMESPACE))
        cluster.wait_service_account(NAMESPACE)
        bench = Bench(cluster)
        for kind, pod in make.items():
            rows += bench.compare(kind, pod)
    return rows


def plain(name: str, node: str) -> Object:
    """Return a pod outside the mesh."""
    return workloads.plain_pod(NAMESPACE, name, node=node, readiness=False)


def sidecar(name: str, node: str) -> Object:
    """Return an injected pod whose proxy and app count as ready when they run; without the check of its rules."""
    pod = workloads.sidecar_pod(NAMESPACE, name, validate=(), node=node, readiness=False)
    for container in pod["spec"]["containers"]:
        container.pop("readinessProbe", None)
    return pod


def ambient(name: str, node: str) -> Object:
    """Return a pod of ambient mode."""
    return workloads.ambient_pod(NAMESPACE, name, node=node, readiness=False)


class Bench:
    """Starts pods and measures how long they take, by the client's clock, from create to the watch's word."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._numbers = itertools.count()

    def compare(self, kind: str, pod: Callable[[str, str], Object]) -> list[Row]:
        """Return the rows of one kind of pod: one at a time, and many at once."""
        one, many = TARGETS[kind]
        return [
            self._row(f"create to Ready, {kind} pod", pod, 1, ROUNDS, one),
            self._row(f"create to Ready, {AT_ONCE} {kind} pods at once", pod, AT_ONCE, ROUNDS_AT_ONCE, many),
        ]

    def _row(self, what: str, pod: Callable[[str, str], Object], count: int, rounds: int, target: float) -> Row:
        seconds: dict[str, list[float]] = {WITH: [], WITHOUT: []}
        self._start(pod, WITH, count), self._start(pod, WITHOUT, count)  # the first of a kind is slower
        for number in range(rounds):
            for node in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
                seconds[node].append(self._start(pod, node, count))
        ours, plain_node = (statistics.median(seconds[node]) * 1000 for node in (WITH, WITHOUT))
        return ratio(what, ours, plain_node, target, "the same pod on a node without the plugin")

    def _start(self, pod: Callable[[str, str], Object], node: str, count: int) -> float:
        """Create pods at the same moment; seconds until the last one is Ready. They are removed afterwards."""
        names = {f"p{next(self._numbers)}" for _ in range(count)}
        objects = [pod(name, node) for name in sorted(names)]
        with watched(self._cluster.api, set(names)) as waiting:
            begin = time.perf_counter()
            for each in objects:
                self._cluster.api.create(each)
            seconds = waiting() - begin
        for name in names:
            self._cluster.delete_pod(NAMESPACE, name, grace_seconds=1, wait=False)
        self._cluster.wait("the pods are gone", lambda: not self._cluster.pods(NAMESPACE))
        return seconds


@contextmanager
def watched(api: ApiClient, names: set[str]) -> Iterator[Callable[[], float]]:
    """Watch from now on; the function inside returns the moment when all of the pods have been seen ready."""
    since = api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["metadata"]["resourceVersion"]
    done = threading.Event()
    moment = [0.0]

    def look() -> None:
        path = f"/api/v1/namespaces/{NAMESPACE}/pods"
        for _, pod in api.watch(path, since=since, timeout_seconds=PATIENCE_SECONDS):
            if is_ready(pod):
                names.discard(pod["metadata"]["name"])
            if not names:
                moment[0] = time.perf_counter()
                done.set()
                return

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()

    def wait() -> float:
        if not done.wait(PATIENCE_SECONDS):
            raise LabError(f"not ready after {PATIENCE_SECONDS} s: {', '.join(sorted(names))}")
        return moment[0]

    yield wait
    thread.join()


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Tell whether an object of a watch is a pod that is ready."""
    return pod.get("kind", "Pod") == "Pod" and ready(pod)
