"""What looks after sidecar pods, with a healer whose netns are values, pods in a list, and a clock that never waits."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from meshcni.agent.healing import Healed, NotHealed
from meshcni.agent.metrics import Metrics
from meshcni.agent.podrecord import Netns
from meshcni.agent.sidecarexaminer import Mode
from meshcni.agent.sidecars import Sidecars
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.mending import Mending
from meshcni.host.podnetns import NOT_FOUND
from meshcni.host.rulesmark import RulesMark
from meshcni.host.sidecarlook import Found, Look
from meshcni.kube.reducer import Change, ChangeKind
from meshcni.pods.assess import Assessment, assess
from meshcni.pods.eligibility import Policy
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.model import Pod
from meshcni.rules.model import Backend

T = TypeVar("T")
_generations = itertools.count(1)
SECONDS = 45.0


@dataclass
class Sandbox:
    """The rules of one pod's netns. `refusal`: why nobody gets in, `stubborn`: why nobody mends it."""

    found: Found
    words: tuple[str, ...] = ()
    mark: RulesMark | None = None
    refusal: NotHealed | None = None
    stubborn: NotHealed | None = None
    looks: int = 0
    heals: int = 0

    def become(self, found: Found, *words: str) -> None:
        """Somebody changes the rules."""
        self.found, self.words = found, words
        self.mark = RulesMark(1, next(_generations))


class World:
    """Pods, their sandboxes, and what was told. See sidecarexaminer.Heals and PostsEvents, sidecars.Pods."""

    def __init__(self, mode: Mode = Mode.HEAL) -> None:
        self.synced = asyncio.Event()
        self.pods: dict[str, Pod] = {}
        self.sandboxes: dict[str, Sandbox] = {}
        self.events: list[tuple[str, str, str]] = []  # type, pod, reason
        self.texts: list[str] = []
        self.walks = 0
        self.metrics = Metrics(of_process=False)
        self.may_begin = asyncio.Event()
        self.taken = False
        self.sidecars = Sidecars(
            mode,
            SECONDS,
            pods=self,
            healer=self,
            events=self,
            metrics=self.metrics,
            may_begin=self.may_begin,
            superseded=lambda: self.taken,
            look=self._look,
            now=lambda: datetime(2026, 3, 1, 12, tzinfo=UTC),
        )
        self._inside: Sandbox | None = None

    # --- what the test does -------------------------------------------------------------------------------------------

    def add(self, pod: Pod, found: Found = Found.NOTHING, *words: str) -> Sandbox:
        """A pod comes, with what its netns holds."""
        sandbox = self.sandboxes.setdefault(pod.uid, Sandbox(found, words, RulesMark(1, next(_generations))))
        self.change(pod)
        return sandbox

    def change(self, pod: Pod) -> None:
        """The informer tells of a pod."""
        old, self.pods[pod.uid] = self.pods.get(pod.uid), pod
        kind = ChangeKind.ADDED if old is None else ChangeKind.MODIFIED
        self.sidecars.pod_changed(Change(kind, (pod.namespace, pod.name), old, pod))

    def remove(self, pod: Pod) -> None:
        """The pod is no more."""
        old = self.pods.pop(pod.uid)
        self.sidecars.pod_changed(Change(ChangeKind.DELETED, (pod.namespace, pod.name), old, None))

    def begin(self) -> asyncio.Task[None]:
        """The first list was read and the agent may change this node."""
        self.synced.set()
        self.may_begin.set()
        return asyncio.get_running_loop().create_task(self.sidecars.run())

    def state(self, pod: Pod) -> str:
        """How the status says that the pod is."""
        return next((one["state"] for one in self.sidecars.status()["pods"] if one["uid"] == pod.uid), "")

    def shown(self, pod: Pod) -> dict[str, Any]:
        """The pod in the status document."""
        return next(one for one in self.sidecars.status()["pods"] if one["uid"] == pod.uid)

    # --- the informer -------------------------------------------------------------------------------------------------

    def items(self) -> tuple[Pod, ...]:
        return tuple(self.pods.values())

    def get(self, namespace: str, name: str) -> Pod | None:
        return next((pod for pod in self.pods.values() if (pod.namespace, pod.name) == (namespace, name)), None)

    # --- the healer ---------------------------------------------------------------------------------------------------

    async def locate(self, pods: Sequence[Pod]) -> dict[str, Netns | NotHealed]:
        self.walks += 1
        nothing = NotHealed(NOT_FOUND, "no process of it was found")
        return {
            pod.uid: Netns(os.open("/proc/self/ns/net", os.O_RDONLY)) if pod.uid in self.sandboxes else nothing
            for pod in pods
        }

    async def visit(
        self, pod: Pod, netns: Netns | None, work: Callable[[Mending, VariantChoice | None], T]
    ) -> tuple[NetnsId, T] | NotHealed:
        assert netns is not None, "found before, for all pods at once"
        os.fstat(netns.descriptor)  # still open
        sandbox = self._inside = self.sandboxes[pod.uid]
        if sandbox.refusal is not None:
            return sandbox.refusal
        derived = self.assess(pod).derived
        assert derived is not None
        return netns.id, work(Mending(derived.interception, (), Backend.NFTABLES), None)

    async def heal(self, pod: Pod, netns: Netns | None = None) -> Healed | NotHealed:
        assert netns is not None
        sandbox = self.sandboxes[pod.uid]
        sandbox.heals += 1
        if sandbox.stubborn is not None:
            return sandbox.stubborn
        drift = sandbox.words if sandbox.found is not Found.AS_WANTED else ()
        sandbox.become(Found.AS_WANTED)
        return Healed(netns.id, drift or ("no rules",), "nftables")

    def assess(self, pod: Pod) -> Assessment:
        return assess(pod, None, Policy(exclude_namespaces=frozenset({"kube-system"})))

    def _look(self, _wanted: Mending, known: Look | None) -> Look:
        sandbox = self._inside
        assert sandbox is not None
        sandbox.looks += 1
        if known is not None and known.is_captured and known.mark == sandbox.mark:
            return known
        return Look(sandbox.found, sandbox.words, "nftables", sandbox.mark)

    # --- Events -------------------------------------------------------------------------------------------------------

    async def warn(self, pod: Pod, reason: str, message: str) -> None:
        self.events.append(("Warning", pod.full_name, reason))
        self.texts.append(message)

    async def note(self, pod: Pod, reason: str, message: str) -> None:
        self.events.append(("Normal", pod.full_name, reason))
        self.texts.append(message)
