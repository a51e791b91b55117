"""Pods that try to get past the mesh from their first moment to their last, and say in their log whether they could.

An address to which no node has a route is knocked at: who is not redirected is told so by the kernel; who is, ends at a
proxy, or is refused where the proxy is away.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lab.cluster import Cluster, workloads
from lab.cluster.addresses import NOWHERE_V4, NOWHERE_V6
from lab.cluster.client import STRATEGIC_PATCH, ready

from meshcni import istio

Object = dict[str, Any]
Maker = Callable[[str], Object]

LONG = os.environ.get("MESHCNI_LONG") == "1"  # the numbers and durations that the tier is too slow for every day
PATIENCE_SECONDS = 300.0  # of a machine that others use too
TEST_SECONDS = 1800 if LONG else 900  # for a whole test, against a standstill
KNOCK_MS = 300
UNCAPTURED = ("No route to host", "Network is unreachable")
IN_FLIGHT = 4  # pods of a stream that are not ready yet, at most
LOOK_SECONDS = 0.2
PROXY_PORTS = (istio.PROXY_PORT, istio.INBOUND_CAPTURE_PORT, workloads.READINESS_PORT)
HOSTNAME = "kubernetes.io/hostname"


def sidecar(namespace: str, name: str, **options: Any) -> Object:
    """A sidecar pod that knocks; its istio-validation looks at both families.

    Its proxy answers by itself. If it led connections on, to where nobody answers, the kernel would remember each for
    two minutes as one that is not to be redirected, and take one of the application's from the same port for it.
    """
    pod = workloads.sidecar_pod(namespace, name, validate=(4, 6), **options)
    proxy = next(each for each in pod["spec"]["containers"] if each["name"] == istio.PROXY_CONTAINER)
    proxy["args"] = ["serve", *(str(port) for port in PROXY_PORTS)]
    return knocking(pod)


def ambient(namespace: str, name: str, **options: Any) -> Object:
    """An ambient pod that knocks."""
    return knocking(workloads.ambient_pod(namespace, name, **options))


def knocking(pod: Object) -> Object:
    """The pod with two containers in the place of `app`: one knocks by IPv4, the other by IPv6."""
    made = workloads.run_order(pod, "knock", NOWHERE_V4, "80", str(KNOCK_MS))
    other = workloads.container("app6", "knock", NOWHERE_V6, "80", str(KNOCK_MS))
    made["spec"]["containers"] = [*made["spec"]["containers"], other]
    return made


def check_never_uncaptured(cluster: Cluster, pods: Iterable[Mapping[str, Any]]) -> None:
    """Nobody was ever outside the mesh, and nothing was restarted to get there."""
    for pod in pods:
        name = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        check_started_once(pod)
        for container in ("app", "app6"):
            cluster.wait(f"{name} has knocked", partial(cluster.log, *name, container), PATIENCE_SECONDS)
            log = cluster.log(*name, container)
            assert not any(text in log for text in UNCAPTURED), f"{container} of {name} was outside the mesh: {log}"


def check_started_once(pod: Mapping[str, Any]) -> None:
    """No container was started twice; istio-validation has passed."""
    status, name = pod["status"], pod["metadata"]["name"]
    for each in [*(status.get("initContainerStatuses") or []), *status["containerStatuses"]]:
        assert each["restartCount"] == 0, (name, each)
        if each["name"] == istio.VALIDATION_CONTAINER:
            assert each["state"]["terminated"]["exitCode"] == 0, (name, each)


class Stream:
    """New pods, one after the other, of each kind and on each node in turn; none of them is deleted by it."""

    def __init__(self, cluster: Cluster, namespaces: Sequence[str], makers: Sequence[Maker]) -> None:
        self.cluster, self.namespaces, self.makers = cluster, namespaces, makers
        self.made: list[tuple[str, str]] = []

    def flow_until(self, is_done: Callable[[], object], most: int) -> None:
        """Start pods until something is done, `most` at most; then wait for it, and for all the pods."""
        limit = len(self.made) + most
        end = time.monotonic() + PATIENCE_SECONDS
        while not is_done():
            assert time.monotonic() < end, "it takes too long"
            if len(self.made) < limit and self._waiting() < IN_FLIGHT:
                self._start_one()
            else:
                time.sleep(LOOK_SECONDS)
        self._start_one()  # one more, that meets the new one
        self.wait()

    def wait(self) -> list[Object]:
        """Return the pods as soon as all are ready."""
        return [self.cluster.wait_pod(*name, timeout_seconds=PATIENCE_SECONDS) for name in self.made]

    def delete(self) -> None:
        """Delete its pods and forget them; they go on their own time."""
        for name in self.made:
            self.cluster.delete_pod(*name, wait=False)
        self.made = []

    def _start_one(self) -> None:
        number = next(_numbers)
        made = self.makers[number % len(self.makers)](f"stream-{number}")
        nodes = list(self.cluster.nodes)
        made["spec"]["nodeSelector"] = {HOSTNAME: nodes[number // len(self.makers) % len(nodes)]}
        self.cluster.apply(made)
        self.made.append((made["metadata"]["namespace"], made["metadata"]["name"]))

    def _waiting(self) -> int:
        pods = [pod for namespace in self.namespaces for pod in self.cluster.pods(namespace)]
        return sum(not ready(pod) and "deletionTimestamp" not in pod["metadata"] for pod in pods)


_numbers = itertools.count()


def restart(cluster: Cluster, daemon_set: str) -> Callable[[], bool]:
    """Roll a DaemonSet, as `kubectl rollout restart` does; returns what tells whether it is done."""
    change = {"spec": {"template": {"metadata": {"annotations": {"restarted": str(time.time_ns())}}}}}
    wanted = cluster.api.patch(daemon_set, change, STRATEGIC_PATCH)["metadata"]["generation"]
    return lambda: is_rolled_out(cluster, daemon_set, wanted)


def is_rolled_out(cluster: Cluster, daemon_set: str, generation: int = 0) -> bool:
    """Whether all pods of a DaemonSet are its newest, ready ones."""
    found = cluster.api.get(daemon_set)
    status, wanted = found["status"], max(generation, found["metadata"]["generation"])
    counts = {status.get(count, 0) for count in ("updatedNumberScheduled", "numberReady", "numberAvailable")}
    return status.get("observedGeneration", 0) >= wanted and counts == {len(cluster.nodes)}
