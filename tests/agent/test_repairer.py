"""The repair controller against the API server's double: what is asked of it, what is told, and how long it waits."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from lab.apiserver import ApiServer
from lab.objects import NODE_NAME, sidecar_pod

from meshcni.agent import metrics as m
from meshcni.agent.healing import BAD_PARAMETERS, Healed, NotHealed
from meshcni.agent.metrics import Metrics
from meshcni.agent.repairer import SETTLED_SECONDS, Repairer
from meshcni.agent.repairs import DELETE_BURST, Repairs
from meshcni.agent.repairwiring import make_repairer
from meshcni.agent.resolution import resolve
from meshcni.kube.client import PODS, KubeApi
from meshcni.kube.credentials import InCluster
from meshcni.kube.events import EventRecorder
from meshcni.kube.informer import Informer
from meshcni.kube.reducer import Change, ChangeKind
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.model import Pod, pod_from_object
from meshcni.pods.repair import BACK_OFF_SECONDS, JITTER, RepairRules, choose_mode
from meshcni.pods.selectorsyntax import parse_selection

LABEL = "cni.istio.io/uninitialized"
FAILED_ONCE = {"name": "istio-validation", "lastState": {"terminated": {"exitCode": 126}}, "restartCount": 1}
NETNS = NetnsId(4, 4026531)


class Time:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, future))
        await future

    def clock(self) -> float:
        return self.now

    @property
    def pauses(self) -> list[float]:
        """How long whoever sleeps still has to."""
        return [when - self.now for when, future in self._sleepers if not future.done()]

    async def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for when, future in self._sleepers:
            if when <= self.now and not future.done():
                future.set_result(None)
        await turns()


class FakeHealer:
    """Answers as a test says, and remembers who was asked for."""

    def __init__(self) -> None:
        self.asked: list[Pod] = []
        self.answers: list[Healed | NotHealed | Exception] = []
        self.last: Healed | NotHealed = Healed(NETNS)

    async def heal(self, pod: Pod) -> Healed | NotHealed:
        self.asked.append(pod)
        answer = self.answers.pop(0) if self.answers else self.last
        if isinstance(answer, Exception):
            raise answer
        return answer


class World:
    """A double with a client, an informer, a recorder, a repairer with its settings, and time that a test moves."""

    def __init__(self, server: ApiServer, api: KubeApi) -> None:
        self.server, self.api = server, api
        self.time, self.healer, self.metrics = Time(), FakeHealer(), Metrics(of_process=False)
        self.events = EventRecorder(api, node=NODE_NAME)
        self.pods = Informer(api, PODS, pod_from_object, field_selector=f"spec.nodeName={NODE_NAME}")
        self.repairer: Repairer
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self, *, repair: bool = False, delete: bool = False, label: bool = False, selector: str = "") -> None:
        choice = choose_mode(repair=repair, delete=delete, label=label)
        repairs = Repairs(
            choice.mode, (LABEL, "true"), self.healer, self.api, self.events, self.metrics, self.time.clock
        )
        selection = parse_selection(selector, "")
        self.repairer = Repairer(
            choice, RepairRules(), selection, repairs, sleep=self.time.sleep, chance=random.Random(7)
        )
        self.pods.subscribe(self.repairer.pod_changed)
        self.tasks = [asyncio.create_task(self.pods.run()), asyncio.create_task(self.repairer.run())]

    def add(self, name: str = "cart", *, broken: bool = True, **spec: Any) -> dict[str, Any]:
        """Add a pod as the API has it, broken from the start."""
        pod = sidecar_pod("shop", name)
        pod["spec"].update(spec)
        pod["status"] = {"phase": "Pending", "podIP": "10.0.0.7", "podIPs": [{"ip": "10.0.0.7"}]}
        if broken:
            pod["status"]["initContainerStatuses"] = [FAILED_ONCE]
        return self.server.add_pod(pod)

    def report(self, name: str = "cart", **status: Any) -> None:
        """The kubelet tells something of a pod."""
        self.server.patch("pods", "shop", name, {"status": status}, "status")

    def api_pod(self, name: str = "cart") -> dict[str, Any]:
        return next(one for one in self.server.cluster.objects("pods") if one["metadata"]["name"] == name)

    @property
    def told(self) -> list[tuple[str, str, str]]:
        """Type, reason and message of the Events."""
        return [(one["type"], one["reason"], one["message"]) for one in self.server.cluster.objects("events")]

    def counted(self, kind: str, result: str) -> int:
        return int(self.metrics.value(m.PODS_REPAIRED, type=kind, result=result))

    def requests(self, method: str) -> list[dict[str, Any]]:
        """Bodies of the requests about pods."""
        found = [record.request for record in self.server.requests if record.request.method == method]
        return [json.loads(one.body) for one in found if "/pods/" in one.path]

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.events.close()


@asynccontextmanager
async def new_world(folder: Path) -> AsyncIterator[World]:
    async with ApiServer() as server:
        server.write_service_account(folder / "account", "t")
        (folder / "account" / "ca.crt").touch()
        async with KubeApi(InCluster(server.environment(), str(folder / "account"))) as api:
            world = World(server, api)
            try:
                yield world
            finally:
                await world.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that other tasks are about to do."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


Scenario = Callable[[World], Any]


def run(folder: Path, scenario: Scenario) -> None:
    async def inside() -> None:
        async with new_world(folder) as world:
            await scenario(world)

    asyncio.run(inside())


# --- delete -----------------------------------------------------------------------------------------------------------


def test_a_broken_pod_is_deleted_as_it_was_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(world: World) -> None:
        pod = world.add()["metadata"]
        world.add("fine", broken=False)
        world.begin(delete=True)
        await until(lambda: world.told)

        (options,) = world.requests("DELETE")
        assert options["preconditions"] == {"uid": pod["uid"], "resourceVersion": pod["resourceVersion"]}
        assert "deletionTimestamp" in world.api_pod()["metadata"]
        assert "deletionTimestamp" not in world.api_pod("fine")["metadata"]
        assert world.told == [("Warning", "DeleteBrokenPod", "pod detected as broken, deleted")]
        (event,) = world.server.cluster.objects("events")
        assert event["source"]["component"] == "cni-repair"
        assert event["involvedObject"]["uid"] == pod["uid"]
        assert world.counted("delete", "success") == 1
        await until(lambda: not world.repairer.cases)  # it is being deleted: no case any more

    run(tmp_path, scenario)
    (told,) = [one for one in caplog.records if "broken pod: deleted" in one.getMessage()]
    assert "init container istio-validation last ended with status 126" in str(vars(told))


def test_a_deletion_is_told_of_though_the_watch_is_faster_than_the_answer(tmp_path: Path) -> None:
    class LateAnswers:
        """The API server on a busy day: what it did is seen by everybody before it answers who asked."""

        def __init__(self, world: World) -> None:
            self.world, self.server = world, world.api

        async def delete_pod(self, *pod: str) -> None:
            await self.server.delete_pod(*pod)
            await until(lambda: not self.world.repairer.cases)
            await turns()

    async def scenario(world: World) -> None:
        world.api = cast("KubeApi", LateAnswers(world))
        world.add()
        world.begin(delete=True)
        await until(lambda: world.told)
        assert world.told == [("Warning", "DeleteBrokenPod", "pod detected as broken, deleted")]
        assert world.counted("delete", "success") == 1

    run(tmp_path, scenario)


def test_a_newer_version_of_the_pod_is_looked_at_before_it_is_deleted(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.server.fault("status", method="DELETE", status=409, reason="Conflict", count=1)
        world.add()
        world.begin(delete=True)
        await until(lambda: world.time.pauses)
        assert world.told == []
        assert world.counted("delete", "fail") == 0

        world.report(initContainerStatuses=[{"name": "istio-validation", "state": {"terminated": {"exitCode": 0}}}])
        await until(lambda: not world.repairer.cases)
        await world.time.pass_by(1000)
        assert len(world.requests("DELETE")) == 1

    run(tmp_path, scenario)


def test_a_successor_of_the_same_name_is_not_deleted_for_its_predecessor(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.server.fault("status", method="DELETE", status=500, count=1)
        first = world.add()["metadata"]["uid"]
        world.begin(delete=True)
        await until(lambda: world.time.pauses)

        world.server.delete_pod("shop", "cart")
        world.add(broken=False)
        await until(lambda: not world.repairer.cases)
        await world.time.pass_by(1000)

        assert [one["preconditions"]["uid"] for one in world.requests("DELETE")] == [first]
        assert "deletionTimestamp" not in world.api_pod()["metadata"]

    run(tmp_path, scenario)


def test_a_broken_successor_is_a_case_of_its_own(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        first = world.add()["metadata"]["uid"]
        world.begin(delete=True)
        await until(lambda: world.counted("delete", "success") == 1)
        world.server.delete_pod("shop", "cart")
        second = world.add()["metadata"]["uid"]
        await until(lambda: world.counted("delete", "success") == 2)
        assert [one["preconditions"]["uid"] for one in world.requests("DELETE")] == [first, second]

    run(tmp_path, scenario)


def test_a_pod_that_ended_for_good_is_deleted_too(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        pod = world.add(broken=False, restartPolicy="Never")["metadata"]
        world.begin(delete=True)
        await until(lambda: world.pods.synced.is_set())
        ended = {"name": "istio-validation", "state": {"terminated": {"exitCode": 126, "reason": "Error"}}}
        world.report(phase="Failed", initContainerStatuses=[ended])
        await until(lambda: world.counted("delete", "success") == 1)
        assert world.requests("DELETE")[0]["preconditions"]["uid"] == pod["uid"]

    run(tmp_path, scenario)


def test_what_breaks_every_pod_makes_no_storm(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        for number in range(int(DELETE_BURST) + 3):
            world.add(f"cart-{number}")
        world.begin(delete=True)
        await until(lambda: world.counted("delete", "success") == DELETE_BURST)
        await until(lambda: len(world.time.pauses) >= 3)
        assert len(world.requests("DELETE")) == DELETE_BURST

        for _ in range(6):
            await world.time.pass_by(6.0)
            await asyncio.sleep(0.05)
        await until(lambda: world.counted("delete", "success") == DELETE_BURST + 3)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("mode", "right", "event", "value"),
    [
        ("delete", "delete pods", "DeleteBrokenPod", "repair.deletePods=true"),
        ("label", "patch pods/status", "LabelBrokenPod", "repair.labelPods=true"),
    ],
)
def test_without_the_right_it_is_said_which_one_is_missing(
    tmp_path: Path, mode: str, right: str, event: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(world: World) -> None:
        world.server.denied.deny(right)
        world.add()
        world.begin(**{mode: True})
        await until(lambda: world.told)

        ((kind, reason, message),) = world.told
        assert (kind, reason) == ("Warning", event)
        assert message.startswith(f"pod detected as broken, but failed to {mode}: ")
        assert right in message
        assert value in message
        assert world.counted(mode, "fail") == 1

        await world.time.pass_by(BACK_OFF_SECONDS[0])
        (rest,) = world.time.pauses  # nothing is tried for minutes
        assert BACK_OFF_SECONDS[-1] * (1 - JITTER) <= rest + BACK_OFF_SECONDS[0] <= BACK_OFF_SECONDS[-1]
        world.server.denied.allow(right)
        await world.time.pass_by(rest)
        await until(lambda: world.counted(mode, "success") == 1)

    run(tmp_path, scenario)
    assert value in caplog.text


def test_failures_wait_longer_and_longer(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        fault = world.server.fault("status", method="DELETE", status=500, count=-1)
        world.add()
        world.begin(delete=True)
        waited = []
        for attempt in range(1, len(BACK_OFF_SECONDS) + 3):
            await until(lambda: world.counted("delete", "fail") == attempt)  # noqa: B023
            await until(lambda: world.time.pauses)
            begin = world.time.now
            while world.counted("delete", "fail") == attempt and len(world.requests("DELETE")) == attempt:
                await world.time.pass_by(max(world.time.pauses, default=0.0))
                await asyncio.sleep(0.02)
            waited.append(world.time.now - begin)
        world.server.faults.remove(fault)
        for seconds, most in zip(waited, [*BACK_OFF_SECONDS, *[BACK_OFF_SECONDS[-1]] * 2], strict=True):
            assert most * (1 - JITTER) <= seconds <= most
        assert len([one for one in world.told if one[1] == "DeleteBrokenPod"]) == 1  # the recorder counts the others

    run(tmp_path, scenario)


def test_a_server_that_asks_for_patience_gets_it(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.server.fault("status", method="DELETE", status=429, retry_after_seconds=77, count=1)
        world.add()
        world.begin(delete=True)
        await until(lambda: world.time.pauses)
        assert world.time.pauses == [77.0]
        await world.time.pass_by(77.0)
        await until(lambda: world.counted("delete", "success") == 1)

    run(tmp_path, scenario)


# --- label ------------------------------------------------------------------------------------------------------------


def test_a_broken_pod_is_labelled_once(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        pod = world.add()["metadata"]
        world.begin(label=True)
        await until(lambda: world.told)

        assert world.requests("PATCH") == [{"metadata": {"uid": pod["uid"], "labels": {LABEL: "true"}}}]
        assert world.api_pod()["metadata"]["labels"][LABEL] == "true"
        assert world.told == [("Warning", "LabelBrokenPod", "pod detected as broken, labeled")]
        for restarts in range(2, 5):
            world.report(initContainerStatuses=[FAILED_ONCE | {"restartCount": restarts}])
            await asyncio.sleep(0.02)
            await world.time.pass_by(SETTLED_SECONDS)
        assert len(world.requests("PATCH")) == 1
        assert (world.counted("label", "success"), world.counted("label", "skip")) == (1, 0)

    run(tmp_path, scenario)


def test_a_label_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.server.patch("pods", "shop", "cart", {"metadata": {"labels": {LABEL: "seen"}}})
        world.begin(label=True)
        await until(lambda: world.counted("label", "skip") == 1)
        world.report(initContainerStatuses=[FAILED_ONCE | {"restartCount": 2}])
        await asyncio.sleep(0.02)
        await world.time.pass_by(SETTLED_SECONDS)
        assert world.counted("label", "skip") == 1
        assert world.requests("PATCH") == []
        assert world.told == []
        assert world.api_pod()["metadata"]["labels"][LABEL] == "seen"

    run(tmp_path, scenario)


# --- repair -----------------------------------------------------------------------------------------------------------


def test_a_repaired_pod_is_told_of_and_looked_at_again(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        pod = world.add()["metadata"]
        world.healer.answers = [Healed(NETNS, ("chain nat ISTIO_OUTPUT is missing",), "nft")]
        world.begin(repair=True)
        await until(lambda: world.told)

        assert [one.uid for one in world.healer.asked] == [pod["uid"]]
        ((kind, reason, message),) = world.told
        assert (kind, reason) == ("Normal", "MeshRedirectionRepaired")
        assert "init container istio-validation last ended with status 126" in message
        assert "chain nat ISTIO_OUTPUT is missing" in message
        assert world.counted("repair", "success") == 1

        world.report(initContainerStatuses=[FAILED_ONCE | {"restartCount": 2}])
        await asyncio.sleep(0.02)
        assert len(world.healer.asked) == 1  # never two looks within a moment
        await world.time.pass_by(SETTLED_SECONDS)
        await until(lambda: len(world.healer.asked) == 2)
        assert world.repairer.status()["pods"][0]["failures"] == 0

        world.report(initContainerStatuses=[{"name": "istio-validation", "state": {"terminated": {"exitCode": 0}}}])
        await until(lambda: not world.repairer.cases)
        assert (world.counted("repair", "success"), world.counted("repair", "fail")) == (1, 0)
        assert len(world.told) == 1

    run(tmp_path, scenario)


def test_a_sandbox_made_anew_is_repaired_anew(tmp_path: Path) -> None:
    """The same pod, another netns: what was done in the first one counts for nothing."""

    async def scenario(world: World) -> None:
        world.add()
        drift = ("chain nat ISTIO_OUTPUT is missing",)
        world.healer.answers = [Healed(NETNS, drift, "nft"), Healed(NetnsId(4, 99), drift, "nft")]
        world.begin(repair=True)
        await until(lambda: world.counted("repair", "success") == 1)
        world.report(podIP="10.0.0.8", podIPs=[{"ip": "10.0.0.8"}])
        await asyncio.sleep(0.02)
        await world.time.pass_by(SETTLED_SECONDS)
        await until(lambda: world.counted("repair", "success") == 2)

    run(tmp_path, scenario)


def test_rules_that_are_there_are_no_repair(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.begin(repair=True)
        await until(lambda: world.counted("repair", "skip") == 1)
        assert world.told == []

    run(tmp_path, scenario)


def test_a_pod_that_fails_with_its_rules_in_place_is_told_of(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.begin(repair=True)
        await until(lambda: world.counted("repair", "skip") == 1)
        for restarts in (2, 3, 4):
            world.report(initContainerStatuses=[FAILED_ONCE | {"restartCount": restarts}])
            await asyncio.sleep(0.02)
            await world.time.pass_by(SETTLED_SECONDS)
            await asyncio.sleep(0.02)
            assert world.counted("repair", "fail") == (0 if restarts == 2 else 1)
        ((kind, reason, message),) = world.told
        assert (kind, reason) == ("Warning", "MeshRepairFailed")
        assert "its redirection is in place, and its init container failed again" in message

    run(tmp_path, scenario)


def test_what_cannot_be_repaired_says_why_and_is_tried_again(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.healer.answers = [NotHealed("not-found", "no process of it was found", "is /proc mounted?")]
        world.healer.last = Healed(NETNS, ("everything",), "nft")
        world.begin(repair=True)
        await until(lambda: world.told)

        ((kind, reason, message),) = world.told
        assert (kind, reason) == ("Warning", "MeshRepairFailed")
        assert message.endswith("cannot be repaired: no process of it was found (is /proc mounted?)")
        assert world.counted("repair", "fail") == 1
        assert world.repairer.status()["pods"][0]["failures"] == 1
        await world.time.pass_by(BACK_OFF_SECONDS[0])
        await until(lambda: world.counted("repair", "success") == 1)
        await until(lambda: len(world.told) == 2)

    run(tmp_path, scenario)


def test_another_sandbox_shortens_the_wait(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.healer.answers = [NotHealed(BAD_PARAMETERS, "annotation x is wrong")]
        world.begin(repair=True)
        await until(lambda: world.counted("repair", "fail") == 1)
        await world.time.pass_by(BACK_OFF_SECONDS[0])
        assert world.time.pauses[0] > 200  # only a change can help
        world.report(initContainerStatuses=[FAILED_ONCE | {"restartCount": 2}])  # which this is not
        await asyncio.sleep(0.02)
        assert len(world.healer.asked) == 1

        world.server.patch("pods", "shop", "cart", {"metadata": {"annotations": {"x": "right"}}})
        await until(lambda: len(world.healer.asked) == 2)
        assert world.time.now == BACK_OFF_SECONDS[0]

    run(tmp_path, scenario)


def test_a_pod_that_ends_for_good_is_not_programmed(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add(restartPolicy="Never", broken=False)
        world.begin(repair=True)
        ended = {"name": "istio-validation", "state": {"terminated": {"exitCode": 126, "reason": "Error"}}}
        world.report(phase="Failed", initContainerStatuses=[ended])
        await until(lambda: world.told)
        assert world.healer.asked == []
        ((kind, reason, message),) = world.told
        assert (kind, reason) == ("Warning", "MeshRepairFailed")
        assert "restartPolicy is Never" in message
        assert "REPAIR_DELETE_PODS=true" in message
        assert world.counted("repair", "fail") == 1

    run(tmp_path, scenario)


def test_a_mistake_of_ours_ends_no_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.healer.answers = [RuntimeError("a bug"), Healed(NETNS, ("everything",), "nft")]
        world.begin(repair=True)
        await until(lambda: world.time.pauses)
        await world.time.pass_by(BACK_OFF_SECONDS[0])
        await until(lambda: world.counted("repair", "success") == 1)

    run(tmp_path, scenario)
    assert "a bug" in caplog.text


def test_only_a_few_pods_are_treated_at_once(tmp_path: Path) -> None:
    class SlowHealer(FakeHealer):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.most = 0

        async def heal(self, pod: Pod) -> Healed | NotHealed:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.005)
            self.now -= 1
            return await super().heal(pod)

    async def scenario(world: World) -> None:
        world.healer = SlowHealer()
        for number in range(20):
            world.add(f"cart-{number}")
        world.begin(repair=True)
        await until(lambda: world.counted("repair", "skip") == 20)
        assert world.healer.most == 4

    run(tmp_path, scenario)


# --- modes and selection ----------------------------------------------------------------------------------------------


def test_without_a_mode_broken_pods_are_only_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.begin()
        await until(lambda: world.repairer.cases and world.time.pauses)
        world.report(initContainerStatuses=[FAILED_ONCE | {"restartCount": 2}])
        await asyncio.sleep(0.02)
        await world.time.pass_by(SETTLED_SECONDS)
        assert world.told == []
        assert world.requests("DELETE") + world.requests("PATCH") == []
        assert world.healer.asked == []
        assert world.repairer.status()["mode"] == "none"

    run(tmp_path, scenario)
    told = [line for line in caplog.messages if "nothing is done" in line]
    assert len(told) == 1


def test_more_than_one_mode_is_warned_of_and_the_first_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        world.add()
        world.begin(repair=True, delete=True, label=True)
        await until(lambda: world.healer.asked)
        assert world.requests("DELETE") + world.requests("PATCH") == []

    run(tmp_path, scenario)
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.startswith("REPAIR_DELETE_PODS and REPAIR_LABEL_PODS are of no effect")


def test_only_selected_pods_are_looked_at(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.add("not-this")
        world.add("this")
        world.server.patch("pods", "shop", "this", {"metadata": {"labels": {"repair": "yes"}}})
        world.begin(repair=True, selector="repair=yes")
        await until(lambda: world.healer.asked)
        assert [one.name for one in world.healer.asked] == ["this"]
        assert len(world.repairer.cases) == 1

    run(tmp_path, scenario)


def test_a_pod_that_leaves_while_it_is_treated_is_forgotten(tmp_path: Path) -> None:
    class StuckHealer(FakeHealer):
        async def heal(self, pod: Pod) -> Healed | NotHealed:
            self.asked.append(pod)
            await asyncio.Event().wait()
            raise AssertionError

    async def scenario(world: World) -> None:
        world.healer = StuckHealer()
        world.add()
        world.begin(repair=True)
        await until(lambda: world.healer.asked)
        world.server.delete_pod("shop", "cart")
        await until(lambda: not world.repairer.cases)
        await turns()
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("repair ")] == []

    run(tmp_path, scenario)


def test_ending_gives_up_what_is_under_way(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.server.fault("hang", method="DELETE")
        world.add()
        world.begin(delete=True)
        await until(lambda: world.requests("DELETE"))
        world.tasks[1].cancel()
        await asyncio.gather(world.tasks[1], return_exceptions=True)
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("repair ")] == []
        pod = pod_from_object(world.api_pod())
        later = replace(pod, name="later", uid="u2")
        world.repairer.pod_changed(Change(ChangeKind.ADDED, ("shop", "later"), None, later))
        await turns()
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("repair ")] == []

    run(tmp_path, scenario)


# --- from settings ----------------------------------------------------------------------------------------------------


def wired(world: World, **variables: str) -> Repairer | None:
    settings = resolve([], {"NODE_NAME": NODE_NAME, **variables})
    return make_repairer(settings, world.pods, world.healer, world.api, world.events, world.metrics)


def watches(world: World) -> list[dict[str, str]]:
    """The selectors of the watches of pods."""
    found = [record.request.query for record in world.server.requests if record.is_watch]
    return [{key: one[key] for key in ("labelSelector", "fieldSelector") if key in one} for one in found]


@pytest.mark.parametrize(
    ("variables", "second"),
    [
        ({}, None),
        ({"REPAIR_NODE_NAME": NODE_NAME}, None),
        ({"REPAIR_LABEL_SELECTORS": "a=b", "REPAIR_FIELD_SELECTORS": "metadata.namespace!=x"}, None),
        (
            {"REPAIR_LABEL_SELECTORS": "a=b,priority>3"},
            {"labelSelector": "a=b,priority>3", "fieldSelector": f"spec.nodeName={NODE_NAME}"},
        ),
        (
            {"REPAIR_NODE_NAME": "n2", "REPAIR_FIELD_SELECTORS": "status.phase!=Running"},
            {"fieldSelector": "status.phase!=Running,spec.nodeName=n2"},
        ),
    ],
)
def test_a_second_watch_only_where_it_is_needed(
    tmp_path: Path, variables: dict[str, str], second: dict[str, str] | None
) -> None:
    async def scenario(world: World) -> None:
        repairer = wired(world, REPAIR_DELETE_PODS="true", **variables)
        assert repairer is not None
        world.repairer = repairer
        world.tasks = [asyncio.create_task(world.pods.run()), asyncio.create_task(repairer.run())]
        own = {"fieldSelector": f"spec.nodeName={NODE_NAME}"}
        expected = [own] if second is None else [own, second]
        await until(lambda: len(watches(world)) == len(expected))
        await asyncio.sleep(0.05)
        assert sorted(watches(world), key=str) == sorted(expected, key=str)

    run(tmp_path, scenario)


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert wired(world, REPAIR_ENABLED="false", REPAIR_DELETE_PODS="true") is None

    run(tmp_path, scenario)


def test_every_setting_reaches_its_place(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        pod = world.add(broken=False)
        repairer = wired(
            world,
            REPAIR_LABEL_PODS="true",
            REPAIR_BROKEN_POD_LABEL_KEY="mesh.example/broken",
            REPAIR_BROKEN_POD_LABEL_VALUE="1",
            REPAIR_SIDECAR_ANNOTATION="mesh.example/injected",
            REPAIR_INIT_CONTAINER_NAME="check",
            REPAIR_INIT_CONTAINER_EXIT_CODE="3",
            REPAIR_INIT_CONTAINER_TERMINATION_MESSAGE="no rules",
            REPAIR_LABEL_SELECTORS="look=yes",
        )
        assert repairer is not None
        world.repairer = repairer
        world.tasks = [asyncio.create_task(world.pods.run()), asyncio.create_task(repairer.run())]
        metadata = {"annotations": {"mesh.example/injected": ""}, "labels": {"look": "yes"}}
        world.server.patch("pods", "shop", "cart", {"metadata": metadata})
        end = {"terminated": {"exitCode": 3, "message": "no rules\n"}}
        world.report(initContainerStatuses=[{"name": "check", "lastState": end, "restartCount": 1}])
        await until(lambda: world.counted("label", "success") == 1)
        assert world.api_pod()["metadata"]["labels"]["mesh.example/broken"] == "1"
        assert world.requests("PATCH")[0]["metadata"]["uid"] == pod["metadata"]["uid"]

    run(tmp_path, scenario)
