"""What becomes of warnings: posted, counted, held back, given up; never in anybody's way."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.kube.worlds import double_and_api, pod_object, until

from meshcni.kube import events
from meshcni.kube.client import Object
from meshcni.kube.events import EventRecorder, Stats
from meshcni.kube.failures import ApiError
from meshcni.pods.model import Pod

POD = Pod(namespace="apps", name="web-0", uid="u1")


class World:
    """An API that answers from a list, time that a test moves, and a recorder between them."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)  # statuses; an empty list accepts everything
        self.posted: list[Object] = []
        self.calls = 0
        self.seconds = 1000.0
        self.slept: list[float] = []
        self.recorder = EventRecorder(
            self,
            node="n1",
            clock=lambda: self.seconds,
            now=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds),
            sleep=self.sleep,
        )

    @property
    def stats(self) -> Stats:
        return self.recorder.stats

    async def create_event(self, namespace: str, event: Object) -> None:
        self.calls += 1
        status = self.answers.pop(0) if self.answers else 201
        if status != 201:
            raise ApiError(status, f"HTTP {status}", retry_after_seconds=9.0 if status == 429 else None)
        assert namespace == event["metadata"]["namespace"]
        self.posted.append(event)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)

    async def warn(self, pod: Pod = POD, reason: str = "Failed", message: str = "why") -> None:
        await self.recorder.warn(pod, reason, message)
        for _ in range(10):
            await asyncio.sleep(0)


async def test_an_event_tells_who_what_and_when() -> None:
    world = World()

    await world.warn(message="x" * 5000)

    (event,) = world.posted
    assert event["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "apps",
        "name": "web-0",
        "uid": "u1",
    }
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "Failed", 1)
    assert event["source"] == {"component": "istio-cni", "host": "n1"}
    assert event["firstTimestamp"] == event["lastTimestamp"] == "2026-01-01T00:16:40Z"
    assert event["metadata"]["name"].startswith("web-0.")
    assert len(event["message"]) == 1024


async def test_good_news_are_of_type_normal_and_name_who_tells_them() -> None:
    world = World()

    await world.recorder.note(POD, "Repaired", "all is well", component="cni-repair")
    await world.warn()

    normal, warning = world.posted
    assert (normal["type"], normal["reason"], normal["message"]) == ("Normal", "Repaired", "all is well")
    assert normal["source"] == {"component": "cni-repair", "host": "n1"}
    assert normal["reportingComponent"] == "cni-repair"
    assert (warning["type"], warning["source"]["component"]) == ("Warning", "istio-cni")


async def test_repetitions_are_counted_and_posted_ever_less_often() -> None:
    world = World()

    for _ in range(720):  # every 10 s for two hours, as a kubelet tries a sandbox again
        await world.warn()
        world.seconds += 10

    assert [event["count"] for event in world.posted] == [1, 30, 60, 120, 240]
    assert len({event["metadata"]["name"] for event in world.posted}) == 5
    assert world.posted[-1]["firstTimestamp"] == "2026-01-01T00:16:40Z"
    assert world.stats == Stats(posted=5, repeated=715)


async def test_other_pods_reasons_and_successors_have_their_own_events() -> None:
    world = World()

    for pod in (POD, Pod("apps", "web-1", "u2"), Pod("apps", "web-0", "u3")):
        for reason in ("Failed", "Drifted"):
            await world.warn(pod, reason)

    assert world.stats.posted == 6


async def test_a_node_posts_only_so_many() -> None:
    world = World()

    for number in range(50):
        await world.warn(Pod("apps", f"p{number}"))
    assert (world.stats.posted, world.stats.limited) == (events.BURST, 50 - events.BURST)

    world.seconds += 2 * events.REFILL_SECONDS
    for number in range(50, 55):
        await world.warn(Pod("apps", f"p{number}"))
    assert world.stats.posted == events.BURST + 2


async def test_without_the_right_nothing_is_tried_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    world = World(403)
    with caplog.at_level(logging.INFO, "meshcni.kube"):
        for number in range(5):
            await world.warn(Pod("apps", f"p{number}"))
    assert (world.calls, world.stats) == (1, Stats(refused=5))
    assert len(caplog.records) == 1

    world.seconds += events.REFUSED_SECONDS
    await world.warn(Pod("apps", "p5"))
    assert world.stats.posted == 1


# answers, what is posted, how long it waited, what is counted
ANSWERS: list[tuple[list[int], int, list[float], Stats]] = [
    ([500], 1, [1.0], Stats(posted=1)),
    ([0, 503], 1, [1.0, 2.0], Stats(posted=1)),
    ([429], 1, [9.0], Stats(posted=1)),
    ([401], 1, [1.0], Stats(posted=1)),
    ([500, 500, 500], 0, [1.0, 2.0], Stats(failed=1)),
    ([404], 0, [], Stats(failed=1)),
    ([422], 0, [], Stats(failed=1)),
]


@pytest.mark.parametrize(("answers", "posted", "slept", "stats"), ANSWERS)
async def test_what_the_server_may_answer(answers: list[int], posted: int, slept: list[float], stats: Stats) -> None:
    world = World(*answers)

    await world.warn()

    assert (len(world.posted), world.slept, world.stats) == (posted, slept, stats)


async def test_a_slow_server_delays_nobody_and_fills_no_memory(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.add_namespace("apps")
        server.fault("hang", count=-1)
        seconds = [0.0]
        recorder = EventRecorder(api, clock=lambda: seconds[0])
        for number in range(500):
            seconds[0] += events.REFILL_SECONDS
            await recorder.warn(Pod("apps", f"p{number}"), "Failed", "why")  # never lets the loop turn
        assert server.requests == []
        assert recorder.stats.limited == 500 - events.MAX_QUEUED

        server.clear_faults()
        await until(lambda: recorder.stats.posted == events.MAX_QUEUED)
        await recorder.close()

    assert len(asyncio.all_tasks()) == 1


async def test_memory_of_pods_is_bounded(account: Path) -> None:
    world = World()
    for number in range(2 * events.MAX_REMEMBERED):
        world.seconds += events.REFILL_SECONDS
        await world.warn(Pod("apps", f"p{number}"))

    assert world.stats.posted == 2 * events.MAX_REMEMBERED
    assert len(world.recorder._seen) == events.MAX_REMEMBERED


async def test_forbidden_by_a_server_names_the_rule(account: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with double_and_api(account) as (server, api):
        server.add_pod(pod_object("web-0"))
        server.fault("status", status=403)
        recorder: Any = EventRecorder(api)
        await recorder.warn(POD, "Failed", "why")
        await until(lambda: recorder.stats.refused)

    assert "create events in namespace apps" in caplog.text
