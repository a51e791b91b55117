"""One worker for each pod that is not as it should be: it performs the next step of the table until none is needed.

Whoever learns something (an ADD, the informer, ztunnel connecting, the verification) changes the record and wakes its
worker. Workers of different pods do not wait for each other; the steps of one pod never overlap.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from meshcni.agent.podrecord import PodRecord
from meshcni.errors import CNI_TRY_AGAIN_LATER, MeshCniError
from meshcni.pods.enrollment import (
    Actual,
    Annotation,
    Intent,
    Life,
    NetnsId,
    Row,
    Step,
    after,
    begun,
    is_captured,
    is_desired,
    is_named,
    next_row,
    undoes,
)
from meshcni.pods.model import pod_addresses

log = logging.getLogger(__name__)

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 10.0
IN_NETNS = frozenset(
    {Step.LOOK, Step.ROUTES, Step.RULES, Step.RELEASE, Step.REMOVE_RULES}
)  # what they did stays in that netns


class EnrollmentError(MeshCniError):
    """A pod cannot be enrolled now; the message names the step."""

    cni_code = CNI_TRY_AGAIN_LATER


class Link(Protocol):
    """What is needed of the link to ztunnel."""

    @property
    def settled(self) -> bool:
        """Whether the newest connection has its whole snapshot."""

    def acked(self, uid: str) -> int | None:
        """The inode of the netns for which the newest connection has acknowledged the pod."""


class Effects(Protocol):
    """Performs steps; agent.steps has the real ones."""

    async def perform(self, step: Step, record: PodRecord) -> None:
        """Do `step` for the pod. Raises MeshCniError; then it may have happened in part."""

    async def failed(self, step: Step, record: PodRecord, error: MeshCniError) -> None:
        """Tell people that a step failed, the first time and when the reason changes."""

    def count(self, step: Step, result: str, seconds: float) -> None:
        """Count a step."""


class Reconciler:
    """The records by pod UID and their workers.

    `on_desired` hears of a pod that has become as it should be, `on_left` of a record that is gone for good. After a
    failed pass the next one waits `first_delay_seconds`, twice as long each time, up to `max_delay_seconds`.
    """

    def __init__(
        self,
        link: Link,
        effects: Effects,
        *,
        on_desired: Callable[[PodRecord], None] = lambda record: None,
        on_left: Callable[[PodRecord], None] = lambda record: None,
        first_delay_seconds: float = FIRST_DELAY_SECONDS,
        max_delay_seconds: float = MAX_DELAY_SECONDS,
    ) -> None:
        self._link = link
        self._effects = effects
        self._on_desired = on_desired
        self._on_left = on_left
        self._records: dict[str, PodRecord] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._woken: set[str] = set()  # while their workers are at it
        self._retries: dict[str, asyncio.TimerHandle] = {}
        self._first_delay_seconds, self._max_delay_seconds = first_delay_seconds, max_delay_seconds
        self._chance = random.Random()
        self._closed = False
        self.paused = True  # until what earlier agents left has been looked at; ADDs are served nevertheless

    def __iter__(self) -> Iterator[PodRecord]:
        return iter(tuple(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)

    def get(self, uid: str) -> PodRecord | None:
        """The record of a pod."""
        return self._records.get(uid)

    def put(self, record: PodRecord) -> None:
        """Take a new record in."""
        self._records[record.uid] = record

    def wake(self, record: PodRecord) -> None:
        """Look at the record now, or once its worker has gone through what it is at, whatever delay it has."""
        if self._closed or (self.paused and record.waiter is None) or self._records.get(record.uid) is not record:
            return
        timer = self._retries.pop(record.uid, None)
        if timer is not None:
            timer.cancel()
        if record.uid in self._workers:
            self._woken.add(record.uid)
            return
        task = asyncio.get_running_loop().create_task(self._work(record), name=f"pod-{record.uid}")
        self._workers[record.uid] = task

    def wake_all(self) -> None:
        """Look at every record that is not as it should be."""
        for record in self:
            if not self.is_desired(record):
                self.wake(record)

    def resume(self) -> None:
        """Begin to work on everything."""
        self.paused = False
        self.wake_all()

    def actual(self, record: PodRecord) -> Actual:
        """What is known to be there, ztunnel's side included."""
        inode = self._link.acked(record.uid)
        netns = record.netns
        acked = None
        if inode is not None:
            acked = netns.id if netns is not None and netns.id.inode == inode else NetnsId(0, inode)
        return replace(record.actual, acked=acked)

    def is_desired(self, record: PodRecord) -> bool:
        """Whether the pod is as it should be."""
        if _lacks_parameters(record) or record.undoing:
            return False
        return is_desired(record.desired, self.actual(record), settled=self._is_settled(record))

    def _is_settled(self, record: PodRecord) -> bool:
        """Whether an enrolled pod's Add is up to us: an ADD of the runtime cannot wait for the snapshot."""
        return self._link.settled or record.waiter is not None

    def is_named(self, record: PodRecord) -> bool:
        """Whether a snapshot for ztunnel names the pod."""
        return is_named(record.desired, self.actual(record), undoing=record.undoing)

    async def close(self) -> None:
        """End all workers; what they have begun in a netns runs to its end."""
        self._closed = True
        for timer in self._retries.values():
            timer.cancel()
        workers = tuple(self._workers.values())
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for record in self:
            record.drop_netns()
            _answer(record, EnrollmentError("the agent stops", "the runtime tries again"))

    # --- the worker ---------------------------------------------------------------------------------------------------

    async def _work(self, record: PodRecord) -> None:
        self._woken.discard(record.uid)
        try:
            await self._pass(record)
        except Exception as error:  # a fault of ours must not leave the pod without a worker
            record.error = _unexpected(record, error)
            _answer(record, record.error)
        finally:
            self._workers.pop(record.uid, None)
        self._settle(record)

    async def _pass(self, record: PodRecord) -> None:
        """Perform steps until none is needed or all that are needed have failed."""
        record.failed.clear()
        while True:
            if record.life is Life.ENDED:
                record.undoing = False  # what has ended leaves, which is more
            self._note_captured(record)
            if _lacks_parameters(record):
                await self._refuse_parameters(record)
                if not record.actual.enrolled:
                    return
            row = next_row(
                record.desired,
                self.actual(record),
                undoing=record.undoing,
                failed=record.failed,
                settled=self._is_settled(record),
            )
            if row is not None:
                await self._step(record, row)
            else:
                if record.undoing:
                    await self._undone(record)
                return

    def _note_captured(self, record: PodRecord) -> None:
        """From now on the pod may not be opened, and the ADD that waits, if any, is answered.

        What was missing last need not have come by a step: a snapshot brings acknowledgements too.
        """
        wanted = record.intent is Intent.ENROLL and not record.undoing
        if wanted and is_captured(record.desired, self.actual(record)):
            record.actual = replace(record.actual, enrolled=True)
            if record.life is Life.STARTING:
                record.life = Life.RUNNING
            _answer(record, None)

    async def _refuse_parameters(self, record: PodRecord) -> None:
        """An annotation makes no rules: a new pod gets nothing, an enrolled one all but rules; people are told once."""
        error = record.error = record.parameters_error
        assert error is not None
        record.failed.add(Step.RULES)
        await self._tell(Step.RULES, record, error)
        _answer(record, error)

    async def _step(self, record: PodRecord, row: Row) -> None:
        step, generation, desired = row.step, record.generation, record.desired
        record.actual, record.step = begun(step, record.actual), step
        begin = time.monotonic()
        try:
            await self._effects.perform(step, record)
        except Exception as error:
            self._effects.count(step, "failed", time.monotonic() - begin)
            if record.generation == generation:
                await self._failed(
                    record, row, error if isinstance(error, MeshCniError) else _unexpected(record, error)
                )
            return
        finally:
            record.step = None
        seconds = time.monotonic() - begin
        self._effects.count(step, "ok", seconds)
        if record.generation != generation and step in IN_NETNS:
            return  # that sandbox is not the pod's any more
        record.reasons.pop(step, None)
        record.milliseconds[step.value] = round(seconds * 1000, 2)
        record.actual = after(step, desired, self.actual(record))

    async def _failed(self, record: PodRecord, row: Row, error: MeshCniError) -> None:
        """Decide what the failure of a step means."""
        if record.undoing or not undoes(row, record.actual):
            record.failed.add(row.step)
        else:
            record.undoing, record.error = True, error
            record.failed.clear()
        if record.error is None or not record.undoing:  # else what is undone is what people should hear of
            record.error = error
        await self._tell(row.step, record, error)

    async def _tell(self, step: Step, record: PodRecord, error: MeshCniError) -> None:
        """Tell people what failed, unless they know."""
        known, record.reasons[step] = record.reasons.get(step), _reason(error)
        if known != record.reasons[step]:
            await self._effects.failed(step, record, error)

    async def _undone(self, record: PodRecord) -> None:
        """All that could be taken back is; who waits is refused, and people see that the pod is on its way."""
        cause = record.error or EnrollmentError("enrolment failed")
        record.undoing = bool(record.failed)
        if record.life is Life.STARTING:  # the runtime gives this sandbox up
            record.life = Life.RUNNING
            record.leave_sandbox(by_add=True)
            record.addresses, record.outdated = frozenset(pod_addresses(record.pod)[0]), frozenset()
        _answer(record, cause)
        if record.in_api and record.actual.annotation is not Annotation.PENDING and record.intent is Intent.ENROLL:
            try:
                await self._effects.perform(Step.PEND, record)
                record.actual = after(Step.PEND, record.desired, self.actual(record))
            except MeshCniError as error:
                log.debug("pod %s was not marked as pending: %s", record.name, error)

    def _settle(self, record: PodRecord) -> None:
        """Decide what comes after a pass: nothing, the end of the record, or another pass, now or later."""
        if self.is_desired(record):
            if record.intent is Intent.LEAVE or record.life is Life.ENDED:
                self._forget(record)
                return
            if record.actual.enrolled:  # else it waits for a sandbox, and why the last one failed is worth knowing
                record.error, record.attempts = None, 0
                record.reasons.clear()
            if record.desired_since is None:
                record.desired_since = time.monotonic()
                self._on_desired(record)
            return
        record.desired_since = None
        if record.uid in self._woken:  # something changed meanwhile
            self.wake(record)
        elif record.undoing or not _lacks_parameters(record) or record.failed - {Step.RULES}:
            record.attempts += 1
            self._retry_later(record)
        # else an edit of the annotation will wake it

    def _retry_later(self, record: PodRecord) -> None:
        grown = self._first_delay_seconds * 2.0 ** min(record.attempts - 1, 16)
        delay = min(grown, self._max_delay_seconds) * self._chance.uniform(0.5, 1.0)
        self._retries[record.uid] = asyncio.get_running_loop().call_later(delay, self.wake, record)

    def _forget(self, record: PodRecord) -> None:
        if self._records.get(record.uid) is record:
            del self._records[record.uid]
            self._woken.discard(record.uid)
        record.drop_netns()
        _answer(record, EnrollmentError(f"pod {record.name} left the mesh while it started"))
        self._on_left(record)


def _lacks_parameters(record: PodRecord) -> bool:
    """Whether the pod's annotations make no rules, and it has none from before that could go on; it has not ended."""
    stays = record.intent is Intent.ENROLL and record.life is not Life.ENDED
    return record.parameters_error is not None and stays and not record.undoing


def _answer(record: PodRecord, error: MeshCniError | None) -> None:
    """Tell the ADD how it ended, once."""
    waiter, record.waiter = record.waiter, None
    if waiter is None or waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)


def _reason(error: MeshCniError) -> str:
    """What makes an error the same news as before: its code or cause, because messages name figures that change."""
    return str(getattr(error, "code", "") or getattr(error, "cause", "") or error.message)


def _unexpected(record: PodRecord, error: Exception) -> EnrollmentError:
    """Log a failure that no step should have, and make an error of it."""
    log.error("reconciling %s failed unexpectedly", record.name, exc_info=error)
    return EnrollmentError(f"{type(error).__name__}: {error}", "see the agent's log")
