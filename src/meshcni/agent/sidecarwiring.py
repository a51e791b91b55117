"""From `Settings` to the looking after running sidecar pods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from meshcni.agent import hostmounts
from meshcni.agent.metrics import Metrics
from meshcni.agent.prerequisites import Prerequisites
from meshcni.agent.settings import Settings
from meshcni.agent.sidecarexaminer import Heals, Mode, PostsEvents
from meshcni.agent.sidecars import Pods, Sidecars
from meshcni.kube.reducer import Change
from meshcni.pods.model import Pod

NO_PROCFS = "the host's /proc is not mounted, so the network namespaces of running pods cannot be found"


class WatchedPods(Pods, Protocol):
    """What is needed of the informer of this node's pods."""

    def subscribe(self, callback: Callable[[Change[Pod]], None]) -> None:
        """Call for every change."""


def make_sidecars(
    settings: Settings,
    pods: WatchedPods,
    healer: Heals,
    events: PostsEvents,
    metrics: Metrics,
    prerequisites: Prerequisites,
    superseded: Callable[[], bool],
) -> Sidecars | None:
    """What looks after running sidecar pods, subscribed to them; None when that is off.

    `run` it unless it has `trouble`.
    """
    mode = Mode(settings.sidecar_drift)
    if mode is Mode.OFF:
        return None
    sidecars = Sidecars(
        mode,
        settings.ambient_verify_seconds,
        pods=pods,
        healer=healer,
        events=events,
        metrics=metrics,
        may_begin=prerequisites.released,
        superseded=superseded,
    )
    if prerequisites.lacks(hostmounts.PROC):
        sidecars.trouble = NO_PROCFS  # which prerequisites say in the log, with what to put into the manifest
    pods.subscribe(sidecars.pod_changed)
    return sidecars
