"""The reconciler with steps that do what the test says, a ztunnel that is a dict, and a clock that never waits."""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from tests.agent.zdsworld import open_descriptors

from meshcni.agent.podrecord import Netns, PodRecord
from meshcni.agent.reconciler import EnrollmentError, Reconciler
from meshcni.errors import MeshCniError
from meshcni.pods.enrollment import Annotation, Intent, Life, Step, adopted
from meshcni.pods.model import Pod

FIRST_DELAY_SECONDS = 1.0  # of the clock that never waits
MAX_DELAY_SECONDS = 8.0
LONG_SECONDS = 1000.0  # any retry has come by then
MOMENT_SECONDS = 0.001


class _NoWaiting(selectors.DefaultSelector):
    """Instead of waiting it puts the clock forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for something that cannot come any more"
        self.now += max(timeout, 0.0)
        return super().select(0)


class FastLoop(asyncio.SelectorEventLoop):
    """A loop on which delays are exact and take no time; a test that would hang fails."""

    def __init__(self) -> None:
        self._pace = _NoWaiting()
        super().__init__(self._pace)

    def time(self) -> float:
        return self._pace.now


async def quiet() -> None:
    """Let everything happen that waits for no time to pass."""
    await asyncio.sleep(MOMENT_SECONDS)


class Trouble(MeshCniError):
    """A step's failure; `cause` is what makes it the same news as before."""

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class FakeLink:
    """See reconciler.Link."""

    def __init__(self) -> None:
        self.settled = True
        self.inodes: dict[str, int] = {}

    def acked(self, uid: str) -> int | None:
        return self.inodes.get(uid)


class Gate:
    """Holds a step back: `entered` when it has begun, until `open` is set."""

    def __init__(self) -> None:
        self.entered, self.open = asyncio.Event(), asyncio.Event()


class FakeEffects:
    """See reconciler.Effects. `steps` are those that were begun, with the time; `told` what people heard of."""

    def __init__(self, link: FakeLink) -> None:
        self.link = link
        self.steps: list[tuple[str, Step, float]] = []
        self.told: list[tuple[Step, MeshCniError]] = []
        self.counted: list[tuple[Step, str]] = []
        self.overlaps: list[tuple[str, Step]] = []
        self.sandboxes: dict[str, int] = {}  # descriptors, for FIND_NETNS
        self.cannot_tell = False
        self._busy: set[str] = set()
        self._gates: dict[tuple[str, Step], Gate] = {}
        self._trouble: dict[tuple[str, Step], list[Exception]] = {}

    def hold(self, uid: str, step: Step) -> Gate:
        """Hold this step of the pod back."""
        gate = self._gates[uid, step] = Gate()
        return gate

    def fail(self, uid: str, step: Step, *errors: Exception) -> None:
        """Let the next ones of this step fail, each with one of the errors."""
        self._trouble[uid, step] = list(errors)

    async def perform(self, step: Step, record: PodRecord) -> None:
        uid, netns = record.uid, record.netns
        if uid in self._busy:
            self.overlaps.append((uid, step))
        self._busy.add(uid)
        try:
            self.steps.append((uid, step, asyncio.get_running_loop().time()))
            gate = self._gates.get((uid, step))
            if gate is not None:
                gate.entered.set()
                await gate.open.wait()
            await asyncio.sleep(0)
            errors = self._trouble.get((uid, step))
            if errors:
                raise errors.pop(0)
            self._do(step, record, netns)
        finally:
            self._busy.discard(uid)

    def _do(self, step: Step, record: PodRecord, netns: Netns | None) -> None:
        match step:
            case Step.FIND_NETNS:
                if record.uid not in self.sandboxes:
                    raise Trouble("no such netns", "not-found")
                record.netns = Netns(os.dup(self.sandboxes[record.uid]))
            case Step.ADD:
                if netns is None:
                    raise Trouble("an Add without a netns")
                self.link.inodes[record.uid] = netns.id.inode
            case Step.DEL:
                self.link.inodes.pop(record.uid, None)

    async def failed(self, step: Step, record: PodRecord, error: MeshCniError) -> None:
        self.told.append((step, error))
        if self.cannot_tell:
            raise RuntimeError("a fault of ours")

    def count(self, step: Step, result: str, seconds: float) -> None:
        self.counted.append((step, result))

    def of(self, uid: str) -> list[Step]:
        """The steps of a pod."""
        return [step for one, step, _ in self.steps if one == uid]

    def times(self, uid: str, step: Step) -> list[float]:
        """When a step of a pod was begun."""
        return [time for one, other, time in self.steps if (one, other) == (uid, step)]


class World:
    """The real reconciler between the doubles."""

    def __init__(self) -> None:
        self.link = FakeLink()
        self.effects = FakeEffects(self.link)
        self.desired: list[str] = []
        self.left: list[str] = []
        self.records = Reconciler(
            self.link,
            self.effects,
            on_desired=lambda record: self.desired.append(record.uid),
            on_left=lambda record: self.left.append(record.uid),
            first_delay_seconds=FIRST_DELAY_SECONDS,
            max_delay_seconds=MAX_DELAY_SECONDS,
        )
        self.records.paused = False
        self.faults: list[dict[str, Any]] = []  # what the loop was told of

    def new_record(self, uid: str, life: Life = Life.RUNNING, annotation: Annotation = Annotation.ABSENT) -> PodRecord:
        """A pod that belongs, of which nothing else is known."""
        address = f"10.0.0.{len(self.records) + 1}"
        record = PodRecord(
            Pod("shop", uid, uid=uid, ips=(address,)), Intent.ENROLL, "test", life=life, actual=adopted(annotation)
        )
        record.wanted_rules, record.addresses = "rules-1", frozenset({ip_address(address)})
        self.records.put(record)
        return record

    def running(self, uid: str) -> PodRecord:
        """A pod that runs, its netns can be found."""
        self.effects.sandboxes[uid] = os.memfd_create(uid)
        return self.new_record(uid)

    def add(self, uid: str) -> asyncio.Future[None]:
        """An ADD with a new sandbox, as agent.ambient takes it in; returns what it waits for."""
        record = self.records.get(uid) or self.new_record(uid, Life.STARTING)
        if record.waiter is not None and not record.waiter.done():
            record.waiter.set_exception(EnrollmentError("another ADD of the same pod came after this one"))
        record.leave_sandbox(by_add=True)
        record.netns, record.life = Netns(os.memfd_create(uid)), Life.STARTING
        record.undoing, record.error, record.attempts, record.desired_since = False, None, 0, None
        record.reasons.clear()
        waiter = record.waiter = asyncio.get_running_loop().create_future()
        self.records.wake(record)
        return waiter

    async def enrolled(self, uid: str) -> PodRecord:
        """A pod that an ADD has enrolled; what was done for it is forgotten."""
        await self.add(uid)
        await quiet()
        record = self.records.get(uid)
        assert record is not None
        assert self.records.is_desired(record)
        self.effects.steps.clear()
        self.effects.counted.clear()
        return record

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Give back what the test's pods were found in."""
        try:
            yield
        finally:
            for descriptor in self.effects.sandboxes.values():
                os.close(descriptor)


def run(body: Callable[[World], Awaitable[None]]) -> None:
    """Run a test's coroutine; afterwards nothing may have overlapped, been left open or gone unheard."""

    async def main() -> None:
        loop, before = asyncio.get_running_loop(), open_descriptors()
        world = World()
        loop.set_exception_handler(lambda _loop, context: world.faults.append(context))
        with world.opened():
            try:
                await body(world)
            finally:
                await world.records.close()
        assert world.effects.overlaps == []
        assert world.faults == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert open_descriptors() == before

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(main())
