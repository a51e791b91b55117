"""One running sidecar pod is looked at: what captures it is left, what does not is healed or reported.

A pod that is captured is never touched, whoever captured it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Protocol, TypeVar

from meshcni.agent import metrics as m
from meshcni.agent.healing import NOT_PROGRAMMED, Healed, NotHealed
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.agent.podrecord import Netns
from meshcni.agent.sidecarrecord import SidecarRecord, SidecarState, timestamp
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.mending import Mending
from meshcni.host.podnetns import NO_ADDRESS, NOT_FOUND, WRONG_ADDRESS
from meshcni.host.sidecarlook import Found, Look
from meshcni.pods.assess import Assessment
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.interception import Interception
from meshcni.pods.model import Pod

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE = 5  # looks at a pod whose netns is not there yet or was not mended, before it waits for the next round
PATIENCE_SECONDS = 2.0
MAX_TOLD_CHARACTERS = 160  # of what is wrong, so that with its cause a line stays below 400 bytes

REPAIRED = "MeshRedirectionRepaired"  # reasons of Events
MISSING = "MeshRedirectionMissing"
FAILED = "MeshRepairFailed"
MAY_COME = frozenset({NO_ADDRESS, NOT_FOUND, WRONG_ADDRESS})  # the sandbox is being made, or the API is behind


class Mode(Enum):
    """What is done about a running sidecar pod that is not captured."""

    HEAL = "heal"
    REPORT = "report"
    OFF = "off"


class Heals(Protocol):
    """What is needed of the healer."""

    async def locate(self, pods: Sequence[Pod]) -> dict[str, Netns | NotHealed]:
        """Namespaces by UID, the caller's to close."""

    async def visit(
        self, pod: Pod, netns: Netns | None, work: Callable[[Mending, VariantChoice | None], T]
    ) -> tuple[NetnsId, T] | NotHealed:
        """Work in the pod's netns."""

    async def heal(self, pod: Pod, netns: Netns | None = None) -> Healed | NotHealed:
        """Put the pod's rules in place."""

    def assess(self, pod: Pod) -> Assessment:
        """What is to be done with the pod."""


class PostsEvents(Protocol):
    """What is needed of the recorder of Events."""

    async def warn(self, pod: Pod, reason: str, message: str) -> None:
        """Post a warning."""

    async def note(self, pod: Pod, reason: str, message: str) -> None:
        """Post good news."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong with a pod: the cause in one word, what it means, and what it is with its likely cause."""

    cause: str
    harm: str
    what: str


class SidecarExaminer:
    """Examines one pod at a time and notes in its record what it found. `suspect` has a pod, by UID, looked at soon."""

    def __init__(
        self,
        mode: Mode,
        *,
        healer: Heals,
        events: PostsEvents,
        metrics: Metrics,
        suspect: Callable[[str], None],
        look: Callable[[Mending, Look | None], Look],
        now: Callable[[], datetime],
    ) -> None:
        self._mode = mode
        self._healer, self._events, self._metrics = healer, events, metrics
        self._suspect, self._look, self._now = suspect, look, now

    async def examine(self, record: SidecarRecord, where: Netns | NotHealed) -> NotHealed | None:
        """Look into the pod's netns, heal what is wrong there, close it; returns why that could not be looked at."""
        refusal = where if isinstance(where, NotHealed) else await self._enter(record, where)
        if refusal is not None:
            self._not_seen(record, refusal)
        return refusal

    async def _enter(self, record: SidecarRecord, netns: Netns) -> NotHealed | None:
        def work(wanted: Mending, _choice: VariantChoice | None) -> tuple[Look, Interception]:
            is_same = record.netns == netns.id and record.parameters == wanted.parameters
            return self._look(wanted, record.look if is_same else None), wanted.parameters

        try:
            outcome = await self._healer.visit(record.pod, netns, work)
            if isinstance(outcome, NotHealed):
                return outcome
            seen, parameters = outcome[1]
            await self._judge(record, seen, netns, parameters)
        finally:
            netns.close()
        record.parameters = parameters
        return None

    async def _judge(self, record: SidecarRecord, seen: Look, netns: Netns, parameters: Interception) -> None:
        if seen.is_captured and not record.is_drift(seen, netns.id, parameters):
            self._captured(record, seen, netns.id)
        elif record.is_edited(seen, netns.id):
            self._captured(record, replace(seen, found=Found.OTHERWISE), netns.id)
        else:
            await self._uncaptured(record, seen, netns)

    def _captured(self, record: SidecarRecord, seen: Look, netns: NetnsId) -> None:
        record.attempts = 0
        record.look, record.netns, record.seen_at = seen, netns, timestamp(self._now())
        as_wanted = seen.found is Found.AS_WANTED
        record.state = SidecarState.CAPTURED if as_wanted else SidecarState.OTHERWISE
        record.reason = "" if as_wanted else f"its rules are others than those it asks for: {'; '.join(seen.words)}"
        if as_wanted:
            record.told = None
        elif _is_news(record, "otherwise", netns):
            log.info(
                "captured by rules that are left as they are, because they do capture it: %s",
                "; ".join(seen.words)[:MAX_TOLD_CHARACTERS],
                extra=labels(pod=record.pod.full_name, variant=seen.variant),
            )

    def _not_seen(self, record: SidecarRecord, why: NotHealed) -> None:
        """Its netns could not be looked at: what was known of it is not known any more, and nothing is changed."""
        record.state, record.reason = SidecarState.UNKNOWN, str(why)
        if why.code in MAY_COME:
            self._look_again_soon(record)

    def _look_again_soon(self, record: SidecarRecord) -> None:
        record.attempts += 1
        if record.attempts <= PATIENCE:
            asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._suspect, record.pod.uid)

    # --- healing ------------------------------------------------------------------------------------------------------

    async def _uncaptured(self, record: SidecarRecord, seen: Look, netns: Netns) -> None:
        """Heal, or say that somebody should."""
        cause, why = record.why(seen, netns.id)
        harm = "its redirection was changed" if seen.is_captured else "its connections pass by the mesh"
        wrong = Wrong(cause, harm, f"{'; '.join(seen.words)[:MAX_TOLD_CHARACTERS]}: {why}")
        record.state = SidecarState.OTHERWISE if seen.is_captured else SidecarState.UNCAPTURED
        record.reason = wrong.what
        if self._mode is Mode.HEAL:
            await self._heal(record, netns, wrong)
        elif _is_news(record, cause, netns.id):
            self._metrics.count(m.SIDECAR_DRIFT, cause=cause, result="reported")
            log.warning("%s: %s", harm, wrong.what, extra=labels(pod=record.pod.full_name, cause=cause))
            await self._events.warn(record.pod, MISSING, f"{harm}: {wrong.what}")

    async def _heal(self, record: SidecarRecord, netns: Netns, wrong: Wrong) -> None:
        pod = record.pod
        healed = await self._healer.heal(pod, netns)
        again = healed
        if isinstance(healed, Healed):
            visited = await self._healer.visit(pod, netns, lambda wanted, _choice: self._look(wanted, None))
            if not isinstance(visited, NotHealed) and visited[1].is_captured:
                self._captured(record, visited[1], netns.id)
                await self._say_healed(record, healed, wrong)
                return
            again = visited if isinstance(visited, NotHealed) else _still(visited[1])
        record.reason = f"{wrong.what}; not healed: {again}"
        self._metrics.count(m.SIDECAR_DRIFT, cause=wrong.cause, result="failed")
        self._look_again_soon(record)
        if _is_news(record, f"failed {getattr(again, 'code', '')}", netns.id):
            log.error("not healed: %s", str(again)[:MAX_TOLD_CHARACTERS], extra=labels(pod=pod.full_name))
            await self._events.warn(pod, FAILED, f"{wrong.harm}: {wrong.what}; and that was not mended: {again}")

    async def _say_healed(self, record: SidecarRecord, healed: Healed, wrong: Wrong) -> None:
        if not healed.changed:
            return  # somebody was faster, such as the repair controller
        record.mended = wrong.what
        self._metrics.count(m.SIDECAR_DRIFT, cause=wrong.cause, result="healed")
        said = labels(pod=record.pod.full_name, cause=wrong.cause, variant=healed.variant)
        log.warning("healed: %s", wrong.what, extra=said)
        await self._events.note(record.pod, REPAIRED, f"its redirection is in place again: {wrong.what}")


def _is_news(record: SidecarRecord, cause: str, netns: NetnsId) -> bool:
    """Whether people do not know it yet."""
    before, record.told = record.told, (cause, netns)
    return before != record.told


def _still(look: Look) -> NotHealed:
    return NotHealed(NOT_PROGRAMMED, f"after programming it still is not captured: {'; '.join(look.words)}")
