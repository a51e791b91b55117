"""Running sidecar pods are looked at: at the start, once the conf is in place, when they get an address, and in rounds.

The runtime calls the plugin once a sandbox. Whatever goes wrong around that call (a conf that came too late, another
one that came first, rules that somebody flushed) stays for as long as the pod lives, unless somebody looks. A pod that
is captured is never touched, whoever captured it; one that is not gets its rules in place, or is reported.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from typing import Any, Protocol, TypeVar

from meshcni.agent import metrics as m
from meshcni.agent import sidecarreport
from meshcni.agent.healing import NOT_PROGRAMMED, Healed, NotHealed
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.agent.podrecord import Netns
from meshcni.agent.sidecarrecord import SidecarRecord, SidecarState
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.mending import Mending
from meshcni.host.podnetns import NO_ADDRESS, NOT_FOUND, WRONG_ADDRESS
from meshcni.host.sidecarlook import Found, Look, look_at_capture
from meshcni.kube.reducer import Change
from meshcni.pods.assess import Assessment
from meshcni.pods.eligibility import Verdict
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.interception import Interception
from meshcni.pods.model import Pod

T = TypeVar("T")
log = logging.getLogger(__name__)

SPREAD = 0.5  # the part of an interval over which a round is spread
JITTER = 0.2  # of the interval
GATHER_SECONDS = 0.5  # pods come in crowds; one walk over the host's processes does for all of a moment
PATIENCE = 5  # looks at a pod whose netns is not there yet or was not mended, before it waits for the next round
PATIENCE_SECONDS = 2.0
MAX_TOLD_CHARACTERS = 160  # of what is wrong, so that with its cause a line stays below 400 bytes

REPAIRED = "MeshRedirectionRepaired"  # reasons of Events
MISSING = "MeshRedirectionMissing"
FAILED = "MeshRepairFailed"
MAY_COME = frozenset({NO_ADDRESS, NOT_FOUND, WRONG_ADDRESS})  # the sandbox is being made, or the API is behind
RUNNING_PHASES = frozenset({"Running", "Pending"})


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


class Pods(Protocol):
    """What is needed of the informer of pods."""

    synced: asyncio.Event

    def items(self) -> tuple[Pod, ...]:
        """All pods of this node."""

    def get(self, namespace: str, name: str) -> Pod | None:
        """One of them."""


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


class Sidecars:
    """The running sidecar pods of this node, looked at until `run` is cancelled.

    `may_begin` is set when the agent may change this node; `superseded` tells that another agent serves it now.
    """

    def __init__(
        self,
        mode: Mode,
        seconds: float,
        *,
        pods: Pods,
        healer: Heals,
        events: PostsEvents,
        metrics: Metrics,
        may_begin: asyncio.Event,
        superseded: Callable[[], bool] = lambda: False,
        look: Callable[[Mending, Look | None], Look] = look_at_capture,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.mode = mode
        self.trouble = ""  # why nothing is looked at
        self._seconds = seconds
        self._pods, self._healer, self._events, self._metrics = pods, healer, events, metrics
        self._may_begin, self._superseded = may_begin, superseded
        self._look, self._sleep, self._now = look, sleep, now
        self._records: dict[str, SidecarRecord] = {}
        self._wake = asyncio.Event()
        self._all = False  # a whole round is asked for
        self._due = 0.0  # when the next one begins by itself, in the loop's time
        self._suspects: set[str] = set()
        self._fresh: set[str] = set()  # programmed by an ADD, whose address the informer has not told yet
        self._conf_in_place = False
        self._older: set[str] = set()  # UIDs
        self._said: frozenset[str] = frozenset()

    # --- what others tell ---------------------------------------------------------------------------------------------

    def conf_in_place(self) -> None:
        """The runtime calls the plugin from now on: look at all pods, some may have started just before."""
        if not self._conf_in_place:
            self._note_older()
        self._all, self._conf_in_place = True, True
        self._wake.set()

    def _note_older(self) -> None:
        """Those pods that are there by now are older than the conf, or than this agent."""
        self._older |= {pod.uid for pod in self._pods.items()}

    def programmed(self, pod: Pod) -> None:
        """An ADD has just put the pod's rules in place: it need not be looked at before the next round."""
        record = SidecarRecord(pod, early=False, state=SidecarState.CAPTURED, seen_at=_timestamp(self._now()))
        self._records[pod.uid] = record
        self._fresh.add(pod.uid)

    def pod_changed(self, change: Change[Pod]) -> None:
        """Take in a change of the informer: a pod that now has an address, or another one, is looked at soon."""
        old, new = change.old, change.new
        if old is not None and (new is None or new.uid != old.uid):
            self._records.pop(old.uid, None)
            self._fresh.discard(old.uid)
        if new is None or not self._pods.synced.is_set():
            return
        record = self._records.get(new.uid)
        known = record.pod if record is not None else None
        if known is not None and (known.ips, known.phase) == (new.ips, new.phase):
            return
        if not self._is_expected(new):
            return
        if record is not None and new.uid in self._fresh:
            self._fresh.discard(new.uid)
            record.pod = new
            return
        self._suspect(new.uid)

    def _suspect(self, uid: str) -> None:
        self._suspects.add(uid)
        self._wake.set()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look until cancelled."""
        await self._may_begin.wait()
        await self._pods.synced.wait()
        self._note_older()
        self._all = True
        while True:
            try:
                await self._turn()
            except Exception:  # the next round may do better
                log.exception("looking at sidecar pods failed")
            await self._pause()

    async def _turn(self) -> None:
        """A round when one is due or asked for, else a look at the pods that have just come."""
        loop = asyncio.get_running_loop()
        asked, self._all = self._all, False
        whole = asked or loop.time() >= self._due
        suspects = self._take_suspects()
        if whole:
            pause = self._seconds * (random.uniform(1 - JITTER, 1) - SPREAD)
            self._due = loop.time() + max(pause, 0.1) + (0.0 if asked else self._seconds * SPREAD)
        if self._superseded():
            return
        if not asked:
            await self._look_at_suspects(suspects)  # before a round, which takes its time
        if whole:
            await self.round(0.0 if asked else self._seconds * SPREAD)

    def _take_suspects(self) -> set[str]:
        suspects, self._suspects = self._suspects, set()
        self._wake.clear()
        return suspects

    async def _pause(self) -> None:
        """Wait until a round is due or there is something to do."""
        if not self._all and await self._woken(self._due - asyncio.get_running_loop().time()):
            await self._sleep(GATHER_SECONDS)

    async def _rest(self, seconds: float) -> None:
        """Pause within a round; who has just come does not wait for its end."""
        if not self._all and await self._woken(seconds):
            await self._sleep(GATHER_SECONDS)
            await self._look_at_suspects(self._take_suspects())

    async def _woken(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def round(self, spread_seconds: float) -> None:
        """Look at every running sidecar pod once, spread over `spread_seconds`."""
        begin = time.monotonic()
        there = self._pods.items()
        self._older &= {pod.uid for pod in there}
        pods = [pod for pod in there if self._is_expected(pod)]
        for uid in self._records.keys() - {pod.uid for pod in pods}:
            del self._records[uid]
        await self._look_at(pods, spread_seconds)
        self._metrics.observe(m.SIDECAR_VERIFICATION, time.monotonic() - begin)

    async def _look_at_suspects(self, uids: Iterable[str]) -> None:
        wanted = set(uids)
        pods = [pod for pod in self._pods.items() if pod.uid in wanted and self._is_expected(pod)]
        if pods:
            await self._look_at(pods, 0.0)

    def _is_expected(self, pod: Pod) -> bool:
        """Whether the pod runs, has a network of its own, and should be captured."""
        if pod.phase not in RUNNING_PHASES or not pod.ips or pod.terminating or pod.host_network:
            return False
        record = self._records.get(pod.uid)
        if record is not None and record.pod is pod:
            return True
        assessment = self._healer.assess(pod)
        return assessment.decision.verdict is Verdict.SIDECAR or assessment.error is not None

    # --- looking ------------------------------------------------------------------------------------------------------

    async def _look_at(self, pods: Sequence[Pod], spread_seconds: float) -> None:
        """One walk over the host's processes for all pods, then into each netns, one after the other."""
        found = await self._healer.locate(pods)
        refused: dict[str, list[str]] = {}
        try:
            for pod in pods:
                where = found.pop(pod.uid)
                now = self._pods.get(pod.namespace, pod.name)
                if now is None or now.uid != pod.uid or not self._is_expected(now):
                    _close(where)  # it has gone or ended since
                    continue
                record = self._record(now)
                outcome = where if isinstance(where, NotHealed) else await self._examine(record, where)
                if outcome is not None:
                    self._not_seen(record, outcome)
                    refused.setdefault(outcome.code, []).append(f"{pod.full_name}: {outcome}")
                if spread_seconds:
                    await self._rest(spread_seconds / len(pods))
        finally:
            for rest in found.values():
                _close(rest)
        self._say_refusals(refused)

    def _record(self, pod: Pod) -> SidecarRecord:
        record = self._records.get(pod.uid)
        if record is None:
            record = self._records[pod.uid] = SidecarRecord(pod, early=pod.uid in self._older)
        record.pod = pod
        return record

    async def _examine(self, record: SidecarRecord, netns: Netns) -> NotHealed | None:
        """Look into the pod's netns, and heal what is wrong there; returns why that could not be looked at."""
        derived = self._healer.assess(record.pod).derived
        parameters = derived.interception if derived is not None else None
        known = record.look if record.netns == netns.id and record.parameters == parameters else None
        try:
            outcome = await self._healer.visit(record.pod, netns, lambda wanted, _choice: self._look(wanted, known))
            if isinstance(outcome, NotHealed):
                return outcome
            await self._judge(record, outcome[1], netns, parameters)
        finally:
            netns.close()
        record.parameters = parameters
        return None

    async def _judge(self, record: SidecarRecord, seen: Look, netns: Netns, parameters: Interception | None) -> None:
        if seen.is_captured and not record.is_drift(seen, netns.id, parameters):
            self._captured(record, seen, netns.id)
        elif record.is_edited(seen, netns.id):
            self._captured(record, replace(seen, found=Found.OTHERWISE), netns.id)
        else:
            await self._uncaptured(record, seen, netns)

    def _captured(self, record: SidecarRecord, seen: Look, netns: NetnsId) -> None:
        record.attempts = 0
        record.look, record.netns, record.seen_at = seen, netns, _timestamp(self._now())
        as_wanted = seen.found is Found.AS_WANTED
        record.state = SidecarState.CAPTURED if as_wanted else SidecarState.OTHERWISE
        record.reason = "" if as_wanted else f"its rules are others than those it asks for: {'; '.join(seen.words)}"
        if as_wanted:
            record.told = None
        elif self._is_news(record, "otherwise", netns):
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
            loop = asyncio.get_running_loop()
            loop.call_later(PATIENCE_SECONDS, partial(self._suspect, record.pod.uid))

    def _say_refusals(self, refused: dict[str, list[str]]) -> None:
        """One line for all pods that cannot be looked at for the same new reason."""
        for code, texts in refused.items():
            if code not in self._said and code not in MAY_COME:
                log.warning("%d sidecar pods cannot be looked at, such as %s", len(texts), texts[0][:400])
        self._said = frozenset(refused) | (self._said & MAY_COME)

    # --- healing ------------------------------------------------------------------------------------------------------

    async def _uncaptured(self, record: SidecarRecord, seen: Look, netns: Netns) -> None:
        """Heal, or say that somebody should."""
        cause, why = record.why(seen, netns.id)
        harm = "its redirection was changed" if seen.is_captured else "its connections pass by the mesh"
        wrong = Wrong(cause, harm, f"{'; '.join(seen.words)[:MAX_TOLD_CHARACTERS]}: {why}")
        record.state = SidecarState.OTHERWISE if seen.is_captured else SidecarState.UNCAPTURED
        record.reason = wrong.what
        if self.mode is Mode.HEAL:
            await self._heal(record, netns, wrong)
        elif self._is_news(record, cause, netns.id):
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
        if self._is_news(record, f"failed {getattr(again, 'code', '')}", netns.id):
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

    def _is_news(self, record: SidecarRecord, cause: str, netns: NetnsId) -> bool:
        """Whether people do not know it yet."""
        before, record.told = record.told, (cause, netns)
        return before != record.told

    # --- telling ------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Set the gauges."""
        states = Counter(record.state for record in self._records.values())
        for state in SidecarState:
            self._metrics.set(m.SIDECAR_PODS, states[state], state=state.value)
        self._metrics.set(m.SIDECAR_EXPECTED, len(self._records))

    def status(self) -> dict[str, Any]:
        """What `install-cni status` shows."""
        return sidecarreport.status(self.mode.value, self.trouble, self._records.values())


def _still(look: Look) -> NotHealed:
    return NotHealed(NOT_PROGRAMMED, f"after programming it still is not captured: {'; '.join(look.words)}")


def _close(where: Netns | NotHealed) -> None:
    if isinstance(where, Netns):
        where.close()


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
