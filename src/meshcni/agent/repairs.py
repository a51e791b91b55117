"""What is done to one broken pod, and how people are told: in the log, in Events at the pod, in one metric.

Upstream: cni/pkg/repair/repaircontroller.go, whose Events and metric labels are kept word for word.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from meshcni import istio
from meshcni.agent import metrics as m
from meshcni.agent.healing import Healed, NotHealed
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.errors import KubeError
from meshcni.kube.failures import ApiError
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.model import Pod
from meshcni.pods.repair import Action, Broken, Mode, treat

log = logging.getLogger("meshcni.agent.repair")

DELETED, LABELED = "DeleteBrokenPod", "LabelBrokenPod"  # reasons of Events: upstream's
REPAIRED, NOT_REPAIRED = "MeshRedirectionRepaired", "MeshRepairFailed"  # ours; upstream tells nothing in repair mode
MAX_LOGGED_CHARACTERS = 200  # of a message, so that a line stays below 400 bytes
MAX_DRIFT = 2  # differences in an Event
DELETE_BURST = 10.0  # pods of a node at once, and then one in
DELETE_SECONDS = 6.0  # so many: whatever breaks every new pod must not make a storm
# What a 403 means: the chart's role has one of these rules, for the first mode that is on.
GRANTS: Final = {
    Mode.DELETE: "the right to delete pods, which comes with the chart's value repair.deletePods=true",
    Mode.LABEL: "the right to patch pods/status, which comes with the chart's value repair.labelPods=true",
}


class Next(Enum):
    """When to look at the pod again."""

    WHEN_CHANGED = "when it changes"
    AGAIN = "after a back-off"
    LATE = "after the longest back-off"
    TURN = "when others have had theirs"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a treatment; `wait_seconds` is the least to wait, where somebody asked for that."""

    next: Next
    said: str = ""
    wait_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Case:
    """A broken pod under treatment: its newest state, and what has been done and told so far."""

    pod: Pod
    broken: Broken
    failures: int = 0  # in a row
    last: str = ""  # what came of the last treatment, for status
    netns: NetnsId | None = None  # in which the rules were last seen in place
    restarts: int = 0  # of the init container, then
    done: bool = False  # labelled by us, or told for good


class Heals(Protocol):
    """What is needed of the healer."""

    async def heal(self, pod: Pod) -> Healed | NotHealed:
        """Put the pod's rules in place."""


class ChangesPods(Protocol):
    """What is needed of the API client; both raise ApiError."""

    async def delete_pod(self, namespace: str, name: str, uid: str, resource_version: str) -> None:
        """Delete the pod as it was seen."""

    async def label_pod(self, namespace: str, name: str, uid: str, key: str, value: str) -> None:
        """Set a label."""


class PostsEvents(Protocol):
    """What is needed of the recorder; both return at once."""

    async def warn(self, pod: Pod, reason: str, message: str, *, component: str) -> None:
        """Post a warning."""

    async def note(self, pod: Pod, reason: str, message: str, *, component: str) -> None:
        """Post good news."""


class Allowance:
    """So many at once, and one more in `seconds`."""

    def __init__(self, burst: float, seconds: float, clock: Callable[[], float]) -> None:
        self._burst, self._seconds, self._clock = burst, seconds, clock
        self._left, self._at = burst, clock()

    def take(self) -> float:
        """Take one; returns 0, or how many seconds to wait because none is left."""
        now = self._clock()
        self._left, self._at = min(self._burst, self._left + (now - self._at) / self._seconds), now
        if self._left < 1:
            return (1 - self._left) * self._seconds
        self._left -= 1
        return 0.0


class Repairs:
    """Treats cases in one mode. `label` is key and value."""

    def __init__(
        self,
        mode: Mode,
        label: tuple[str, str],
        healer: Heals,
        api: ChangesPods,
        events: PostsEvents,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = mode
        self._label = label
        self._healer = healer
        self._api = api
        self._events = events
        self._metrics = metrics
        self._deletions = Allowance(DELETE_BURST, DELETE_SECONDS, clock)
        self._under_way: set[asyncio.Future[Outcome]] = set()
        self._work: dict[Action, Callable[[Case, str], Awaitable[Outcome]]] = {
            Action.PROGRAM: self._program,
            Action.DELETE: self._delete,
            Action.LABEL: self._set_label,
            Action.SKIP: self._skip,
            Action.GIVE_UP: self._give_up,
            Action.TELL: self._tell,
        }

    async def treat(self, case: Case) -> Outcome:
        """Do what is to be done now. Raises nothing for anything about the pod or the API server."""
        treatment = treat(case.pod, case.broken, self._mode, self._label[0])
        return await self._work[treatment.action](case, treatment.reason)

    # --- repair -------------------------------------------------------------------------------------------------------

    async def _program(self, case: Case, reason: str) -> Outcome:
        pod, broken = case.pod, case.broken
        healed = await self._healer.heal(pod)
        if isinstance(healed, NotHealed):
            self._count("fail")
            said = f"its redirection cannot be repaired: {healed}"
            self._log(logging.WARNING, case, said, code=healed.code)
            await self._warn(pod, NOT_REPAIRED, f"pod detected as broken ({broken}), and {said}")
            return Outcome(Next.LATE if healed.lasting else Next.AGAIN, said)
        if healed.changed:
            said = f"its redirection was missing and is in place now; {reason}"
            self._count("success")
            self._log(logging.INFO, case, said, by=healed.variant, wrong=len(healed.drift))
            message = f"pod detected as broken ({broken}), {said}. {_wrong(healed)}"
            await self._events.note(pod, REPAIRED, message, component=istio.REPAIR_COMPONENT)
        elif case.netns != healed.netns:
            said = f"its redirection is in place already; {reason}"
            self._count("skip")
            self._log(logging.INFO, case, said)
        else:
            return await self._look_again(case)
        case.netns, case.restarts, case.done = healed.netns, broken.restarts, False
        return Outcome(Next.WHEN_CHANGED, said)

    async def _look_again(self, case: Case) -> Outcome:
        """The rules stayed in place; when the container was started since and failed, it is not them it misses."""
        if case.done or case.broken.restarts < case.restarts + 2:  # one run may have begun before the rules were in
            return Outcome(Next.WHEN_CHANGED, case.last)
        said = "its redirection is in place, and its init container failed again: that container's own log tells why"
        case.done = True
        self._count("fail")
        self._log(logging.WARNING, case, said)
        await self._warn(case.pod, NOT_REPAIRED, f"pod detected as broken ({case.broken}); {said}")
        return Outcome(Next.WHEN_CHANGED, said)

    async def _give_up(self, case: Case, reason: str) -> Outcome:
        said = f"not repaired: {reason}"
        if not case.done:
            case.done = True
            self._count("fail")
            self._log(logging.WARNING, case, said)
            await self._warn(case.pod, NOT_REPAIRED, f"pod detected as broken ({case.broken}), and {said}")
        return Outcome(Next.WHEN_CHANGED, said)

    # --- delete and label ---------------------------------------------------------------------------------------------

    async def _delete(self, case: Case, reason: str) -> Outcome:
        wait = self._deletions.take()
        if wait:
            said = f"not deleted yet: {DELETE_BURST:.0f} pods were deleted within a moment"
            self._log(logging.WARNING, case, said, seconds=round(wait))
            return Outcome(Next.TURN, said, wait)
        # The watch may tell of the deletion before the answer comes, which ends this treatment; people are told of it
        # all the same.
        deletion = asyncio.ensure_future(self._delete_and_tell(case, reason))
        self._under_way.add(deletion)
        deletion.add_done_callback(self._under_way.discard)
        return await asyncio.shield(deletion)

    async def _delete_and_tell(self, case: Case, reason: str) -> Outcome:
        pod = case.pod
        try:
            await self._api.delete_pod(pod.namespace, pod.name, pod.uid, pod.resource_version)
        except KubeError as error:
            return await self._refused(case, error, DELETED, "delete")
        return await self._done(case, DELETED, "deleted", reason)

    async def _set_label(self, case: Case, reason: str) -> Outcome:
        pod = case.pod
        try:
            await self._api.label_pod(pod.namespace, pod.name, pod.uid, *self._label)
        except KubeError as error:
            return await self._refused(case, error, LABELED, "label")
        return await self._done(case, LABELED, "labeled", reason)

    async def _done(self, case: Case, event: str, what: str, reason: str) -> Outcome:
        case.done = True
        self._count("success")
        self._log(logging.WARNING, case, f"{what}; {reason}")
        await self._warn(case.pod, event, f"pod detected as broken, {what}")
        return Outcome(Next.WHEN_CHANGED, what)

    async def _refused(self, case: Case, error: KubeError, event: str, verb: str) -> Outcome:
        if error.status in (404, 409):  # it is gone, or newer than we have seen: the watch will tell
            self._log(logging.INFO, case, f"not {verb}ed: {error.message}")
            return Outcome(Next.WHEN_CHANGED if error.status == 404 else Next.AGAIN, error.message)
        self._count("fail")
        text = str(error)
        if error.status == 403:
            text = f"the agent's role lacks {GRANTS[self._mode]}: {error.message}"
        self._log(logging.WARNING, case, f"failed to {verb}: {text}")
        await self._warn(case.pod, event, f"pod detected as broken, but failed to {verb}: {text}")
        asked = error.retry_after_seconds if isinstance(error, ApiError) else None
        return Outcome(Next.LATE if error.status == 403 else Next.AGAIN, text, asked or 0.0)

    async def _skip(self, case: Case, reason: str) -> Outcome:
        if not case.done:
            case.done = True
            self._count("skip")
            self._log(logging.INFO, case, f"nothing to do: {reason}")
        return Outcome(Next.WHEN_CHANGED, reason)

    async def _tell(self, case: Case, reason: str) -> Outcome:
        if not case.done:
            case.done = True
            self._log(logging.WARNING, case, f"nothing is done: {reason}")
        return Outcome(Next.WHEN_CHANGED, reason)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _count(self, result: str) -> None:
        self._metrics.count(m.PODS_REPAIRED, type=self._mode.value, result=result)

    def _log(self, level: int, case: Case, text: str, **values: object) -> None:
        cause = str(case.broken)[:MAX_LOGGED_CHARACTERS]
        extra = labels(pod=case.pod.full_name, uid=case.pod.uid, cause=cause, **values)
        log.log(level, "broken pod: %s", text[:MAX_LOGGED_CHARACTERS], extra=extra)

    async def _warn(self, pod: Pod, reason: str, message: str) -> None:
        await self._events.warn(pod, reason, message, component=istio.REPAIR_COMPONENT)


def _wrong(healed: Healed) -> str:
    more = f" and {len(healed.drift) - MAX_DRIFT} more" if len(healed.drift) > MAX_DRIFT else ""
    return f"What was wrong: {'; '.join(healed.drift[:MAX_DRIFT])}{more}"
