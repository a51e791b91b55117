"""Running sidecar pods are looked at and healed: with doubles, on a clock that never waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from lab.objects import sidecar_pod, unmeshed_pod
from tests.agent.ambientdoubles import FastLoop
from tests.agent.sidecardoubles import SECONDS, World
from tests.agent.zdsworld import open_descriptors

from meshcni import istio
from meshcni.agent import metrics as m
from meshcni.agent.healing import NOT_PROGRAMMED, NotHealed
from meshcni.agent.sidecarexaminer import FAILED, MISSING, PATIENCE, REPAIRED, Mode
from meshcni.host.podnetns import HOST_NETNS, UNREADABLE, WRONG_ADDRESS
from meshcni.host.sidecarlook import Found
from meshcni.pods.model import Pod, pod_from_object

SOON = 1.0  # well before a round, after the moment in which pods are gathered
ROUND = SECONDS * 1.5  # one has begun and ended
Test = Callable[[World], Awaitable[None]]


def run(test: Test, mode: Mode = Mode.HEAL) -> World:
    """Run a test on the fast loop; afterwards nothing is open and nothing runs."""
    before = open_descriptors()
    with asyncio.Runner(loop_factory=FastLoop) as runner:
        world = runner.run(_tested(test, mode))
    assert open_descriptors() == before
    return world


async def _tested(test: Test, mode: Mode) -> World:
    world = World(mode)
    await test(world)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:  # type: ignore[arg-type]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return world


def sidecar(name: str, ip: str = "10.0.0.2", phase: str = "Running", **changes: object) -> Pod:
    pod = pod_from_object(sidecar_pod("shop", name))
    return replace(pod, ips=(ip,) if ip else (), phase=phase, **changes)  # type: ignore[arg-type]


def test_all_pods_are_looked_at_when_the_first_list_is_read_in_one_walk() -> None:
    async def test(world: World) -> None:
        pods = [sidecar(f"pod-{number}", f"10.0.0.{number + 2}") for number in range(10)]
        boxes = [world.add(pod) for pod in pods[:9]] + [world.add(pods[9], Found.AS_WANTED)]
        world.begin()
        await asyncio.sleep(SOON)
        assert world.walks == 1
        assert [box.heals for box in boxes] == [1] * 9 + [0]
        assert [world.state(pod) for pod in pods] == ["captured"] * 10
        assert world.events == [("Normal", pod.full_name, REPAIRED) for pod in pods[:9]]
        assert world.metrics.value(m.SIDECAR_DRIFT, cause="early", result="healed") == 9

    run(test)


def test_nothing_happens_before_the_agent_may_change_this_node() -> None:
    async def test(world: World) -> None:
        box = world.add(sidecar("early"))
        asyncio.get_running_loop().create_task(world.sidecars.run())
        world.synced.set()
        await asyncio.sleep(ROUND)
        assert (box.looks, world.walks) == (0, 0)
        world.may_begin.set()
        await asyncio.sleep(SOON)
        assert box.heals == 1

    run(test)


@pytest.mark.parametrize(
    "pod",
    [
        sidecar("without-address", ip=""),
        sidecar("done", phase="Succeeded"),
        sidecar("failed", phase="Failed"),
        sidecar("leaving", terminating=True),
        sidecar("on-the-host", host_network=True),
        replace(sidecar("excluded"), namespace="kube-system"),
        replace(pod_from_object(unmeshed_pod("shop", "plain")), ips=("10.0.0.9",), phase="Running"),
        sidecar("no-interception", annotations={istio.SIDECAR_STATUS: "{}", istio.INTERCEPTION_MODE: "NONE"}),
    ],
    ids=lambda pod: pod.name,
)
def test_pods_that_are_left_alone(pod: Pod) -> None:
    async def test(world: World) -> None:
        box = world.add(pod)
        world.begin()
        await asyncio.sleep(ROUND)
        assert box.looks == 0
        assert world.state(pod) == ""
        world.sidecars.measure()
        assert world.metrics.value(m.SIDECAR_EXPECTED) == 0

    run(test)


def test_a_pod_that_gets_its_address_is_looked_at_soon() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(SOON)
        pod = sidecar("late", ip="", phase="Pending")
        box = world.add(pod)
        await asyncio.sleep(SOON)
        assert box.looks == 0
        world.change(replace(pod, ips=("10.0.0.2",)))  # Pending: its init containers may be at it
        await asyncio.sleep(SOON)
        assert box.heals == 1
        assert world.metrics.value(m.SIDECAR_DRIFT, cause="plugin-not-called", result="healed") == 1

    run(test)


def test_a_crowd_takes_one_walk() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(SOON)
        before = world.walks
        for number in range(100):
            world.add(sidecar(f"pod-{number}", f"10.0.1.{number}"))
        await asyncio.sleep(SOON)
        assert world.walks == before + 1
        assert all(box.heals == 1 for box in world.sandboxes.values())

    run(test)


def test_a_pod_of_an_add_waits_for_the_round() -> None:
    """Its rules were looked at a moment ago; starting pods must not cost another walk."""

    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(SOON)
        walks = world.walks
        pod = sidecar("added", ip="", phase="Pending")
        world.sidecars.programmed(pod)
        box = world.add(pod, Found.AS_WANTED)
        assert world.state(pod) == "captured"
        world.change(replace(pod, ips=("10.0.0.2",)))
        world.change(replace(pod, ips=("10.0.0.2",), phase="Running"))
        await asyncio.sleep(SOON)
        assert (world.walks, box.looks) == (walks + 1, 1), "once, when it runs"
        await asyncio.sleep(ROUND)
        assert box.looks > 1
        assert world.events == []

    run(test)


def test_the_conf_that_gets_into_place_has_all_pods_looked_at() -> None:
    async def test(world: World) -> None:
        box = world.add(sidecar("raced"), Found.AS_WANTED)
        world.begin()
        await asyncio.sleep(SOON)
        box.become(Found.NOTHING, "no rules at all")
        world.sidecars.conf_in_place()
        await asyncio.sleep(SOON)
        assert box.heals == 1

    run(test)


def test_a_round_comes_by_itself_and_says_what_was_removed() -> None:
    async def test(world: World) -> None:
        pod = sidecar("flushed")
        box = world.add(pod, Found.AS_WANTED)
        world.begin()
        await asyncio.sleep(SOON)
        box.become(Found.PARTLY, "chain nat OUTPUT does not lead to ISTIO_OUTPUT")
        await asyncio.sleep(ROUND)
        assert box.heals == 1
        assert world.events == [("Normal", "shop/flushed", REPAIRED)]
        assert (
            "somebody changed its rules while it ran; at 2026-03-01T12:00:00Z they were still in order"
            in world.texts[0]
        )
        assert world.metrics.value(m.SIDECAR_DRIFT, cause="removed", result="healed") == 1
        assert "chain nat OUTPUT" in world.shown(pod)["lastMended"]

    run(test)


def test_rules_that_were_in_order_and_are_not_any_more_are_mended_though_they_capture() -> None:
    async def test(world: World) -> None:
        box = world.add(sidecar("edited-by-hand"), Found.AS_WANTED)
        world.begin()
        await asyncio.sleep(SOON)
        box.become(Found.OTHERWISE, "chain nat ISTIO_INBOUND holds a rule that should not be there")
        await asyncio.sleep(ROUND)
        assert box.heals == 1

    run(test)


@pytest.mark.parametrize("mode", [Mode.HEAL, Mode.REPORT])
def test_rules_of_others_that_capture_are_left_and_told_once(mode: Mode, caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        pod = sidecar("originals")
        box = world.add(pod, Found.OTHERWISE, "other rules")
        with caplog.at_level("INFO"):
            world.begin()
            await asyncio.sleep(ROUND * 3)
        assert box.heals == 0
        assert world.state(pod) == "otherwise"
        assert world.events == []
        said = [record for record in caplog.records if "left as they are" in record.getMessage()]
        assert len(said) == 1

    run(test, mode)


def test_an_annotation_that_is_edited_changes_no_rules() -> None:
    """What captured the pod under its old annotations is still there; what it asks for has changed."""

    async def test(world: World) -> None:
        pod = sidecar("edited")
        box = world.add(pod, Found.AS_WANTED)
        world.begin()
        await asyncio.sleep(SOON)
        edited = {**pod.annotations, istio.EXCLUDE_INBOUND_PORTS: "9000"}
        world.change(replace(pod, annotations=edited))
        box.found, box.words = Found.PARTLY, ("differs",)  # as seen from the new annotations; the mark is the same
        await asyncio.sleep(ROUND)
        assert box.heals == 0
        assert world.state(pod) == "otherwise"
        box.become(Found.NOTHING, "no rules at all")
        await asyncio.sleep(ROUND)
        assert box.heals == 1, "once they are gone, they come as the pod asks for now"

    run(test)


def test_report_tells_once_until_something_changes() -> None:
    async def test(world: World) -> None:
        pod = sidecar("reported")
        box = world.add(pod, Found.NOTHING, "no rules at all")
        world.begin()
        await asyncio.sleep(ROUND * 3)
        assert box.heals == 0
        assert world.events == [("Warning", "shop/reported", MISSING)]
        assert world.metrics.value(m.SIDECAR_DRIFT, cause="early", result="reported") == 1
        world.sidecars.measure()
        assert world.metrics.value(m.SIDECAR_PODS, state="uncaptured") == 1
        box.become(Found.AS_WANTED)
        await asyncio.sleep(ROUND)
        assert world.state(pod) == "captured"
        box.become(Found.NOTHING, "no rules at all")
        await asyncio.sleep(ROUND)
        assert world.events == [("Warning", "shop/reported", MISSING)] * 2

    run(test, Mode.REPORT)


def test_what_cannot_be_mended_is_told_once_and_tried_again() -> None:
    async def test(world: World) -> None:
        pod = sidecar("stubborn")
        box = world.add(pod, Found.NOTHING, "no rules at all")
        box.stubborn = NotHealed(NOT_PROGRAMMED, "nft refused the rules", "load nft_redir")
        world.begin()
        await asyncio.sleep(ROUND)
        assert box.heals > PATIENCE
        assert world.events == [("Warning", "shop/stubborn", FAILED)]
        assert "load nft_redir" in world.texts[0]
        assert world.state(pod) == "uncaptured"
        assert "nft refused the rules" in world.shown(pod)["reason"]
        box.stubborn = None
        await asyncio.sleep(ROUND)
        assert world.state(pod) == "captured"
        assert world.events[-1] == ("Normal", "shop/stubborn", REPAIRED)

    run(test)


@pytest.mark.parametrize("code", [WRONG_ADDRESS, HOST_NETNS, UNREADABLE])
def test_a_netns_that_is_not_surely_the_pods_is_not_touched(code: str) -> None:
    async def test(world: World) -> None:
        pod = sidecar("moved")
        box = world.add(pod)
        box.refusal = NotHealed(code, "it is another one's")
        world.begin()
        await asyncio.sleep(ROUND * 2)
        assert box.heals == 0
        assert world.state(pod) == "unknown"
        assert world.shown(pod)["reason"] == "it is another one's"
        assert world.events == []
        box.refusal = None
        await asyncio.sleep(ROUND)
        assert box.heals == 1

    run(test)


def test_a_sandbox_that_is_not_there_yet_is_looked_for_again_soon_but_not_for_ever() -> None:
    async def test(world: World) -> None:
        world.begin()
        await asyncio.sleep(SOON)
        walks = world.walks
        pod = sidecar("slow")
        world.change(pod)  # no sandbox at all
        await asyncio.sleep(12.0)  # five looks, two and a half seconds apart, and no round yet
        assert world.walks == walks + PATIENCE
        await asyncio.sleep(SECONDS * 4)
        assert world.walks <= walks + 1 + PATIENCE + 6, "from then on in rounds"
        world.add(pod)
        await asyncio.sleep(ROUND)
        assert world.state(pod) == "captured"

    run(test)


def test_who_comes_during_a_round_does_not_wait_for_its_end() -> None:
    """A round takes half of the interval; and however many pods come, rounds go on."""

    async def test(world: World) -> None:
        old = [world.add(sidecar(f"old-{number}", f"10.0.0.{number + 2}"), Found.AS_WANTED) for number in range(9)]
        world.begin()
        await asyncio.sleep(SECONDS * 0.55)  # in the midst of the first round that is spread
        seen = [box.looks for box in old]
        assert set(seen) == {1, 2}
        for number in range(60):
            box = world.add(sidecar(f"new-{number}", f"10.0.1.{number}"))
            await asyncio.sleep(SOON)
            assert box.heals == 1
        assert all(box.looks >= 3 for box in old)

    run(test)


def test_a_pod_that_goes_during_a_round_is_not_looked_at() -> None:
    async def test(world: World) -> None:
        pods = [sidecar(f"pod-{number}", f"10.0.0.{number + 2}") for number in range(9)]
        for pod in pods:
            world.add(pod, Found.AS_WANTED)
        world.begin()
        await asyncio.sleep(SECONDS * 0.55)
        for pod in pods:
            world.remove(pod)
        await asyncio.sleep(SECONDS)
        assert world.sidecars.status()["pods"] == []

    run(test)


def test_another_agent_of_this_node_is_left_to_it() -> None:
    async def test(world: World) -> None:
        box = world.add(sidecar("others"))
        world.taken = True
        world.begin()
        await asyncio.sleep(ROUND * 2)
        assert box.looks == 0

    run(test)


def test_a_pod_that_goes_is_forgotten() -> None:
    async def test(world: World) -> None:
        pod = sidecar("gone")
        world.add(pod)
        world.begin()
        await asyncio.sleep(SOON)
        assert world.state(pod) == "captured"
        world.remove(pod)
        world.sidecars.measure()
        assert world.metrics.value(m.SIDECAR_EXPECTED) == 0
        assert world.state(pod) == ""

    run(test)


def test_a_fault_of_one_round_is_not_the_end() -> None:
    async def test(world: World) -> None:
        box = world.add(sidecar("later"))
        locate, world.locate = world.locate, _broken  # type: ignore[method-assign,assignment]
        task = world.begin()
        await asyncio.sleep(SOON)
        world.locate = locate  # type: ignore[method-assign]
        await asyncio.sleep(ROUND)
        assert not task.done()
        assert box.heals == 1

    run(test)


async def _broken(_pods: object) -> dict[str, object]:
    raise RuntimeError("a fault")


def test_bad_parameters_are_shown_and_nothing_is_done() -> None:
    async def test(world: World) -> None:
        pod = sidecar("bad", annotations={istio.SIDECAR_STATUS: "{}", istio.INCLUDE_INBOUND_PORTS: "http"})
        box = world.add(pod)
        box.refusal = NotHealed("bad-parameters", "http is no port")
        world.begin()
        await asyncio.sleep(SOON)
        assert world.state(pod) == "unknown"
        assert box.heals == 0

    run(test)
