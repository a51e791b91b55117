"""When pods are looked at, on a clock that never waits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from tests.agent.ambientdoubles import FastLoop

from meshcni.agent.rounds import GATHER_SECONDS, JITTER, SPREAD, Rounds

SECONDS = 60.0
PODS = 10
FIRST = SECONDS * SPREAD  # the latest moment of the first round that nobody asks for
SOON = GATHER_SECONDS * 1.5
CHURN_SECONDS = GATHER_SECONDS * 0.8  # between two suspects: one is always waiting
Test = Callable[["World"], Awaitable[None]]


class World:
    """Ten pods. Looking at one takes `pod_seconds`, at all suspects of a moment `walk_seconds`."""

    def __init__(self) -> None:
        self.rounds = Rounds("looking", SECONDS, self._whole, self._some)
        self.begun: list[tuple[float, float]] = []  # when whole rounds began, and over what they were to be spread
        self.ended: list[float] = []
        self.looks: list[float] = []  # at single pods of whole rounds
        self.seen: list[tuple[float, set[str]]] = []  # when suspects were looked at, and which
        self.pod_seconds = self.walk_seconds = 0.0
        self.fault = False

    async def _whole(self, spread_seconds: float) -> None:
        self.begun.append((now(), spread_seconds))
        if self.fault:
            raise RuntimeError("a fault of a round")
        rest = self.rounds.pace(PODS, spread_seconds)
        for _ in range(PODS):
            await asyncio.sleep(self.pod_seconds)
            self.looks.append(now())
            await rest()
        self.ended.append(now())

    async def _some(self, uids: frozenset[str]) -> None:
        self.seen.append((now(), set(uids)))
        await asyncio.sleep(self.walk_seconds)
        if self.fault:
            raise RuntimeError("a fault of a look")

    async def churn(self) -> None:
        """Pods come without end."""
        number = 0
        while True:
            self.rounds.suspect(f"new-{number}")
            number += 1
            await asyncio.sleep(CHURN_SECONDS)

    def begin(self, work: Awaitable[None] | None = None) -> None:
        self._tasks = [asyncio.ensure_future(one) for one in (self.rounds.run(), work) if one is not None]

    def end(self) -> None:
        for task in self._tasks:
            assert not task.done()
            task.cancel()


def now() -> float:
    return asyncio.get_running_loop().time()


def run(test: Test) -> None:
    async def main() -> None:
        world = World()
        await test(world)
        world.end()

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(main())


def test_a_round_begins_once_an_interval_and_is_spread_over_half_of_it() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(SECONDS * 20)
        assert FIRST - SECONDS * JITTER <= world.begun[0][0] <= FIRST
        beginnings = [begin for begin, _ in world.begun]
        between = [later - earlier for earlier, later in itertools.pairwise(beginnings)]
        assert all(SECONDS * (1 - JITTER) - 0.01 <= seconds <= SECONDS + 0.01 for seconds in between)
        assert len(set(between)) > 1, "jittered"
        assert {spread for _, spread in world.begun} == {SECONDS * SPREAD}
        first = [look - world.begun[0][0] for look in world.looks[:PODS]]
        assert first == pytest.approx([SECONDS * SPREAD / PODS * number for number in range(PODS)])
        assert world.ended[0] - world.begun[0][0] == pytest.approx(SECONDS * SPREAD)

    run(test)


def test_slow_looks_do_not_prolong_a_round_that_is_spread() -> None:
    async def test(world: World) -> None:
        world.pod_seconds = SECONDS * SPREAD / PODS * 0.9
        world.begin()
        await asyncio.sleep(SECONDS * 2)
        assert world.ended[0] - world.begun[0][0] == pytest.approx(SECONDS * SPREAD)

    run(test)


def test_all_now_begins_a_round_at_once_that_is_not_spread() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(1.0)
        world.rounds.all_now()
        await asyncio.sleep(0.001)
        assert world.begun == [(pytest.approx(1.0), 0.0)]
        assert len(world.looks) == PODS

    run(test)


def test_all_now_before_the_beginning_is_not_lost() -> None:
    async def test(world: World) -> None:
        world.rounds.all_now()
        world.begin()
        await asyncio.sleep(1.0)
        assert world.begun == [(0.0, 0.0)]

    run(test)


def test_all_now_ends_the_rests_of_a_round_and_is_followed_by_another_one() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(FIRST + 1.0)
        assert 0 < len(world.looks) < PODS
        world.rounds.all_now()
        await asyncio.sleep(0.001)
        assert [spread for _, spread in world.begun] == [SECONDS * SPREAD, 0.0]
        assert len(world.looks) == PODS * 2

    run(test)


def test_suspects_of_a_moment_are_looked_at_together() -> None:
    async def test(world: World) -> None:
        world.begin()
        for uid in ("a", "b", "a", "c"):
            world.rounds.suspect(uid)
            await asyncio.sleep(GATHER_SECONDS / 10)
        await asyncio.sleep(SOON)
        assert world.seen == [(pytest.approx(GATHER_SECONDS), {"a", "b", "c"})]
        assert world.begun == []

    run(test)


def test_a_suspect_leads_to_no_round_and_moves_none() -> None:
    async def test(world: World) -> None:
        world.begin(world.churn())
        await asyncio.sleep(SECONDS * 10)
        assert 9 <= len(world.begun) <= 13
        assert {spread for _, spread in world.begun} == {SECONDS * SPREAD}
        lasted = [end - begin for (begin, _), end in zip(world.begun, world.ended, strict=False)]
        assert lasted == pytest.approx([SECONDS * SPREAD] * len(lasted), abs=CHURN_SECONDS)

    run(test)


def test_a_suspect_does_not_wait_for_the_end_of_a_spread_round() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(FIRST + 1.0)
        world.rounds.suspect("late")
        await asyncio.sleep(SOON)
        assert [uids for _, uids in world.seen] == [{"late"}]
        assert world.ended == []

    run(test)


def test_rounds_go_on_when_looking_at_suspects_takes_all_of_the_time() -> None:
    """A walk over a busy host's processes may take longer than the next suspects take to come."""

    async def test(world: World) -> None:
        world.walk_seconds = GATHER_SECONDS * 4
        world.pod_seconds = 0.1
        world.begin(world.churn())
        await asyncio.sleep(SECONDS * 10)
        assert len(world.ended) >= 9
        assert all(len(uids) > 1 for _, uids in world.seen[1:])

    run(test)


def test_all_now_and_a_suspect_together_are_a_whole_round() -> None:
    """It looks at the suspect too."""

    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(1.0)
        world.rounds.suspect("a")
        world.rounds.all_now()
        world.rounds.suspect("b")
        await asyncio.sleep(SOON)
        assert [spread for _, spread in world.begun] == [0.0]
        assert world.seen == []

    run(test)


def test_a_suspect_that_comes_during_an_unspread_round_is_looked_at_after_it() -> None:
    async def test(world: World) -> None:
        world.pod_seconds = 1.0
        world.rounds.all_now()
        world.begin()
        await asyncio.sleep(1.5)
        world.rounds.suspect("late")
        await asyncio.sleep(PODS)
        assert world.seen == [(pytest.approx(PODS * 1.0), {"late"})]

    run(test)


def test_a_fault_is_logged_and_the_next_turn_comes(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.fault = True
        world.begin()
        world.rounds.suspect("a")
        await asyncio.sleep(SOON)
        world.rounds.all_now()
        await asyncio.sleep(0.001)
        world.fault = False
        world.rounds.suspect("b")
        await asyncio.sleep(SECONDS * 2)
        assert [uids for _, uids in world.seen] == [{"a"}, {"b"}]
        assert len(world.ended) >= 1
        faults = [record.exc_info[1] for record in caplog.records if record.exc_info]
        assert list(map(str, faults)) == ["a fault of a look", "a fault of a round"]
        assert {record.getMessage() for record in caplog.records} == {"looking failed"}

    run(test)


def test_a_fault_while_suspects_are_looked_at_does_not_end_the_round_under_way() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(FIRST + 1.0)
        world.fault = True
        world.rounds.suspect("a")
        await asyncio.sleep(SECONDS * SPREAD)
        assert len(world.looks) == PODS
        assert len(world.ended) == 1

    run(test)
