"""Looks for broken pods and has each treated by a task of its own, until it is well or gone.

Pods are known by UID, never by name. Nothing is taken from memory: whenever the pod changes, its rules are looked at
again. A pod that cannot be helped is tried again after seconds, later minutes, however often it changes meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from meshcni.agent.logs import labels
from meshcni.agent.repairs import Case, Next, Outcome, Repairs
from meshcni.kube.reducer import Change
from meshcni.pods.model import Pod
from meshcni.pods.repair import BACK_OFF_SECONDS, ModeChoice, RepairRules, back_off_seconds, detect
from meshcni.pods.selectorsyntax import PodSelection

log = logging.getLogger("meshcni.agent.repair")

AT_ONCE = 4  # treatments under way; a call of the API may take seconds
SETTLED_SECONDS = 5.0  # the least between two looks at a pod that keeps changing
MAX_LISTED = 50  # pods in the status


@dataclass(slots=True, eq=False)
class _Watched:
    """A case and its task; `changed` is set by every new state, `moved` by one that makes another outcome likely."""

    case: Case
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Repairer:
    """The repair controller of one node: give it the informer's changes, and `run` it.

    `watch` is run beside it, for an informer of its own.
    """

    def __init__(
        self,
        choice: ModeChoice,
        rules: RepairRules,
        selection: PodSelection,
        repairs: Repairs,
        *,
        watch: Callable[[], Coroutine[Any, Any, None]] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: random.Random | None = None,
    ) -> None:
        self.choice = choice
        self._rules = rules
        self._selection = selection
        self._repairs = repairs
        self._watch = watch
        self._sleep = sleep
        self._chance = chance or random.Random()
        self._watched: dict[str, _Watched] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._running = False

    @property
    def cases(self) -> tuple[Case, ...]:
        """The pods that are broken now."""
        return tuple(watched.case for watched in self._watched.values())

    def status(self) -> dict[str, Any]:
        """What `install-cni status` shows."""
        shown = [
            {
                "pod": case.pod.full_name,
                "uid": case.pod.uid,
                "cause": str(case.broken),
                "failures": case.failures,
                "last": case.last,
            }
            for case in self.cases[:MAX_LISTED]
        ]
        return {
            "mode": self.choice.mode.value,
            "reason": self.choice.reason,
            "broken": len(self._watched),
            "pods": shown,
        }

    def pod_changed(self, change: Change[Pod]) -> None:
        """Take a change of the informer; returns at once."""
        old, new = change.old, change.new
        if old is not None and (new is None or new.uid != old.uid):
            self._forget(old.uid, "it is gone")
        if new is None:
            return
        broken = detect(new, self._rules) if self._selection.matches(new) else None
        if broken is None:
            self._forget(new.uid, "it is being deleted" if new.terminating else "it is not broken any more")
            return
        watched = self._watched.get(new.uid)
        if watched is None:
            watched = self._watched[new.uid] = _Watched(Case(new, broken))
            if self._running:
                self._start(watched)
            return
        before = watched.case.pod
        watched.case.pod, watched.case.broken = new, broken
        watched.changed.set()
        if (before.ips, before.annotations) != (new.ips, new.annotations):
            watched.moved.set()

    async def run(self) -> None:
        """Until cancelled; then every treatment under way is given up, but for a deletion that was asked for."""
        self._say_mode()
        self._running = True
        watching = asyncio.ensure_future(self._watch()) if self._watch is not None else None
        for watched in self._watched.values():
            self._start(watched)
        try:
            await (watching or asyncio.get_running_loop().create_future())
        finally:
            self._running = False
            tasks = [watched.task for watched in self._watched.values() if watched.task is not None]
            tasks += [watching] if watching is not None else []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _say_mode(self) -> None:
        log.info("repair: %s", self.choice.reason, extra=labels(mode=self.choice.mode.value))
        if self.choice.ignored:
            log.warning(
                "%s of no effect: only one mode of repair is in force, %s; turn the others off to be sure which",
                f"{' and '.join(self.choice.ignored)} {'is' if len(self.choice.ignored) == 1 else 'are'}",
                self.choice.mode.value,
            )

    def _start(self, watched: _Watched) -> None:
        name = f"repair {watched.case.pod.full_name}"
        watched.task = asyncio.get_running_loop().create_task(self._look_after(watched), name=name)

    def _forget(self, uid: str, why: str) -> None:
        watched = self._watched.pop(uid, None)
        if watched is None:
            return
        log.info("no case for repair any more: %s", why, extra=labels(pod=watched.case.pod.full_name, uid=uid))
        if watched.task is not None:
            watched.task.cancel()

    async def _look_after(self, watched: _Watched) -> None:
        while True:
            watched.changed.clear()
            watched.moved.clear()
            async with self._slots:
                outcome = await self._treat(watched.case)
            await self._pause(watched, outcome)

    async def _treat(self, case: Case) -> Outcome:
        try:
            outcome = await self._repairs.treat(case)
        except Exception as error:  # ours or a library's mistake must not end the looking after
            log.exception("repair failed unexpectedly", extra=labels(pod=case.pod.full_name))
            outcome = Outcome(Next.AGAIN, f"{type(error).__name__}: {error}")
        if outcome.next is not Next.TURN:
            case.failures = 0 if outcome.next is Next.WHEN_CHANGED else case.failures + 1
        case.last = outcome.said
        return outcome

    async def _pause(self, watched: _Watched, outcome: Outcome) -> None:
        """Wait until it is time to look again; another sandbox or annotation makes it earlier, but never at once."""
        if outcome.next is Next.WHEN_CHANGED:
            await self._sleep(SETTLED_SECONDS)
            await watched.changed.wait()
            return
        if outcome.next is Next.TURN:
            await self._sleep(outcome.wait_seconds * (1 + self._chance.random()))
            return
        failures = len(BACK_OFF_SECONDS) if outcome.next is Next.LATE else watched.case.failures
        whole = max(back_off_seconds(failures, self._chance.random()), outcome.wait_seconds)
        first = min(max(back_off_seconds(1, 0.0), outcome.wait_seconds), whole)
        await self._sleep(first)
        if whole > first:
            await self._sleep_until_moved(watched, whole - first)
        if watched.moved.is_set():
            watched.case.failures = 0

    async def _sleep_until_moved(self, watched: _Watched, seconds: float) -> None:
        tasks = [asyncio.ensure_future(self._sleep(seconds)), asyncio.ensure_future(watched.moved.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
