"""Workers, waiters, retries and ends of the reconciler; the order of the steps is tried in tests/pure/pods."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from ipaddress import ip_address
from itertools import pairwise

import pytest
from tests.agent.ambientdoubles import (
    FIRST_DELAY_SECONDS,
    LONG_SECONDS,
    MAX_DELAY_SECONDS,
    Trouble,
    World,
    quiet,
    run,
)

from meshcni.agent.podrecord import PodRecord
from meshcni.agent.reconciler import EnrollmentError
from meshcni.errors import CNI_TRY_AGAIN_LATER, PodSpecError
from meshcni.pods.enrollment import Annotation, Intent, Life, Step

STARTING = [Step.RULES, Step.ADD, Step.ADDRESSES, Step.ENABLE]
RUNNING = [Step.FIND_NETNS, Step.PEND, Step.ROUTES, Step.ADD, Step.RULES, Step.ADDRESSES, Step.ENABLE]
LEAVING = [Step.RELEASE, Step.PEND, Step.DEL, Step.REMOVE_RULES, Step.WITHDRAW, Step.REMOVE_ADDRESSES]
MANY = 50


def now() -> float:
    return asyncio.get_running_loop().time()


def at(w: World, uid: str) -> PodRecord:
    record = w.records.get(uid)
    assert record is not None
    return record


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STARTING[:3])
def test_a_step_that_hangs_delays_no_other_pod(step: Step) -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("slow", step)
        slow = w.add("slow")
        others = [w.add(f"pod-{number}") for number in range(MANY)]
        await asyncio.gather(*others)
        await quiet()
        assert not slow.done()
        assert w.effects.of("slow")[-1] is step
        assert all(w.effects.of(f"pod-{number}") == STARTING for number in range(MANY))
        assert len(w.desired) == MANY
        gate.open.set()
        await slow

    run(body)


@pytest.mark.parametrize("step", RUNNING)
def test_steps_of_one_pod_never_overlap(step: Step) -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        gate = w.effects.hold("pod", step)
        w.records.wake(record)
        await gate.entered.wait()
        for _ in range(3):
            w.records.wake(record)
            w.records.wake_all()
            await quiet()
        assert w.effects.of("pod") == RUNNING[: RUNNING.index(step) + 1]
        assert record.step is step
        gate.open.set()
        await quiet()
        assert w.effects.of("pod") == RUNNING
        assert record.step is None

    run(body)


def test_what_changes_during_a_step_is_seen_after_it() -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("pod", Step.ENABLE)
        await w.add("pod")
        await gate.entered.wait()
        record = at(w, "pod")
        record.addresses |= {ip_address("fd00::1")}
        w.records.wake(record)
        gate.open.set()
        await quiet()
        assert w.effects.of("pod") == [*STARTING, Step.ADDRESSES]
        assert w.desired == ["pod"]

    run(body)


def test_a_wake_during_a_pass_leads_to_another_pass_at_once() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.wanted_rules, record.actual = "rules-2", replace(record.actual, addresses=frozenset())
        w.effects.fail("pod", Step.RULES, Trouble("no"))
        gate = w.effects.hold("pod", Step.ADDRESSES)
        w.records.wake(record)
        await gate.entered.wait()
        w.records.wake(record)
        gate.open.set()
        await quiet()
        assert w.effects.of("pod") == [Step.RULES, Step.ADDRESSES, Step.RULES]
        assert now() < FIRST_DELAY_SECONDS / 2
        assert w.records.is_desired(record)

    run(body)


def test_a_wake_does_not_wait_for_the_delay_and_takes_its_place() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.wanted_rules = "rules-2"
        w.effects.fail("pod", Step.RULES, Trouble("no"))
        w.records.wake(record)
        await quiet()
        record.addresses |= {ip_address("fd00::1")}
        w.records.wake(record)
        await quiet()
        assert now() < FIRST_DELAY_SECONDS / 2
        assert w.effects.of("pod") == [Step.RULES, Step.RULES, Step.ADDRESSES]
        await asyncio.sleep(LONG_SECONDS)
        assert len(w.effects.of("pod")) == 3

    run(body)


def test_a_delay_that_was_cut_short_is_not_served_too() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.wanted_rules = "rules-2"
        w.effects.fail("pod", Step.RULES, Trouble("no"), Trouble("no"))
        w.records.wake(record)
        await quiet()
        w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        _, second, third = w.effects.times("pod", Step.RULES)
        assert third - second >= FIRST_DELAY_SECONDS  # half of the second delay, which is twice the first

    run(body)


def test_a_pod_that_is_as_it_should_be_costs_no_step() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        w.records.wake(record)
        w.records.wake_all()
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.of("pod") == []
        assert w.desired == ["pod"]

    run(body)


def test_only_the_record_that_is_kept_is_worked_on() -> None:
    async def body(w: World) -> None:
        old = w.running("pod")
        new = w.new_record("pod")
        assert w.records.get("pod") is new
        w.records.wake(old)
        await quiet()
        assert w.effects.steps == []
        w.records.wake(new)
        await quiet()
        assert w.records.is_desired(new)

    run(body)


# --- the ADD ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", STARTING)
def test_an_add_succeeds_once_its_pod_is_captured(last: Step) -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("pod", last)
        waiter = w.add("pod")
        await gate.entered.wait()
        await quiet()
        assert waiter.done() == (last is Step.ENABLE)  # the annotation is not waited for
        gate.open.set()
        await waiter
        assert at(w, "pod").waiter is None
        assert at(w, "pod").life is Life.RUNNING
        await quiet()
        assert w.effects.of("pod") == STARTING
        assert w.effects.counted == [(step, "ok") for step in STARTING]

    run(body)


def test_an_add_without_addresses_needs_none() -> None:
    async def body(w: World) -> None:
        w.new_record("pod", Life.STARTING).addresses = frozenset()
        await w.add("pod")
        await quiet()
        assert w.effects.of("pod") == [Step.RULES, Step.ADD, Step.ENABLE]

    run(body)


def test_an_acknowledgement_by_a_snapshot_answers_the_add() -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("pod", Step.RULES)
        waiter = w.add("pod")
        await gate.entered.wait()
        netns = at(w, "pod").netns
        assert netns is not None
        w.link.inodes["pod"] = netns.id.inode
        gate.open.set()
        await waiter
        await quiet()
        assert w.effects.of("pod") == [Step.RULES, Step.ADDRESSES, Step.ENABLE]

    run(body)


def test_an_acknowledgement_for_another_netns_does_not() -> None:
    async def body(w: World) -> None:
        w.link.inodes["pod"] = 1
        await w.add("pod")
        await quiet()
        assert w.effects.of("pod") == STARTING

    run(body)


def test_an_add_does_not_wait_for_a_snapshot() -> None:
    async def body(w: World) -> None:
        w.link.settled = False
        await w.add("pod")

    run(body)


def test_neither_does_one_that_the_runtime_repeats_for_an_enrolled_pod() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        w.link.settled = False
        w.link.inodes.clear()
        record.actual = replace(record.actual, rules="")  # as agent.ambient does for the same netns
        record.waiter = asyncio.get_running_loop().create_future()
        w.records.wake(record)
        await asyncio.gather(record.waiter)
        assert w.effects.of("pod") == [Step.ADD, Step.RULES]

    run(body)


UNDONE = {
    Step.RULES: [Step.REMOVE_RULES],
    Step.ADD: [Step.REMOVE_RULES, Step.DEL],
    Step.ADDRESSES: [Step.REMOVE_RULES, Step.DEL, Step.REMOVE_ADDRESSES],
}


@pytest.mark.parametrize(("step", "undone"), UNDONE.items())
def test_an_add_is_refused_after_its_failure_was_undone(step: Step, undone: list[Step]) -> None:
    async def body(w: World) -> None:
        error = Trouble("no")
        w.effects.fail("pod", step, error)
        gate = w.effects.hold("pod", undone[-1])
        waiter = w.add("pod")
        await gate.entered.wait()
        await quiet()
        assert not waiter.done()
        gate.open.set()
        with pytest.raises(Trouble) as raised:
            await waiter
        assert raised.value is error
        await quiet()
        done = STARTING[: STARTING.index(step) + 1]
        assert w.effects.of("pod") == [*done, *undone, Step.PEND]
        record = at(w, "pod")
        assert record.waiter is record.netns is None
        assert w.link.inodes == {}
        assert not record.undoing
        assert record.actual.annotation is Annotation.PENDING
        assert not record.actual.addresses
        assert w.effects.told == [(step, error)]
        assert w.desired == []

    run(body)


def test_a_repeated_add_succeeds() -> None:
    async def body(w: World) -> None:
        w.effects.fail("pod", Step.ADD, Trouble("no"))
        with pytest.raises(Trouble):
            await w.add("pod")
        await w.add("pod")
        await quiet()
        assert w.effects.of("pod")[-len(STARTING) :] == STARTING
        assert w.desired == ["pod"]

    run(body)


@pytest.mark.parametrize("undoing", [Step.REMOVE_RULES, Step.DEL, Step.REMOVE_ADDRESSES])
def test_what_cannot_be_undone_keeps_neither_the_add_nor_the_rest_waiting(undoing: Step) -> None:
    async def body(w: World) -> None:
        error = Trouble("the first one")
        w.effects.fail("pod", Step.ADDRESSES, error)
        w.effects.fail("pod", undoing, Trouble("another one"))
        with pytest.raises(Trouble) as raised:
            await w.add("pod")
        assert raised.value is error
        await quiet()
        assert w.effects.of("pod") == [*STARTING[:3], *UNDONE[Step.ADDRESSES], Step.PEND]
        w.effects.steps.clear()
        await asyncio.sleep(FIRST_DELAY_SECONDS)
        again = [] if undoing is Step.REMOVE_RULES else [undoing]  # the sandbox is the runtime's
        assert [step for step in w.effects.of("pod") if step is not Step.FIND_NETNS] == again
        assert not at(w, "pod").undoing

    run(body)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("step", STARTING[:3])
def test_a_later_add_takes_the_place_of_an_earlier_one(step: Step, fails: bool) -> None:
    async def body(w: World) -> None:
        if fails:
            w.effects.fail("pod", step, Trouble("of the old sandbox"))
        gate = w.effects.hold("pod", step)
        first = w.add("pod")
        await gate.entered.wait()
        second = w.add("pod")
        with pytest.raises(EnrollmentError, match="another ADD"):
            await first
        assert not second.done()
        gate.open.set()
        await second
        await quiet()
        before = STARTING[: STARTING.index(step) + 1]
        anew = STARTING if fails or step is not Step.ADDRESSES else [Step.RULES, Step.ADD, Step.ENABLE]
        assert w.effects.of("pod") == [*before, *anew]
        assert w.effects.told == []

    run(body)


def test_a_later_add_comes_while_the_earlier_one_is_undone() -> None:
    async def body(w: World) -> None:
        w.effects.fail("pod", Step.ADD, Trouble("of the old sandbox"))
        gate = w.effects.hold("pod", Step.DEL)
        first = w.add("pod")
        await gate.entered.wait()
        second = w.add("pod")
        gate.open.set()
        await second
        with pytest.raises(EnrollmentError, match="another ADD"):
            await first
        await quiet()
        assert w.records.is_desired(at(w, "pod"))
        assert w.effects.of("pod")[-len(STARTING) :] == STARTING

    run(body)


def test_a_later_add_comes_while_the_pod_is_marked_after_the_undoing() -> None:
    async def body(w: World) -> None:
        w.effects.fail("pod", Step.ADD, Trouble("of the old sandbox"))
        gate = w.effects.hold("pod", Step.PEND)
        with pytest.raises(Trouble):
            await w.add("pod")
        await gate.entered.wait()
        second = w.add("pod")
        await quiet()
        assert not second.done()
        gate.open.set()
        await second
        await quiet()
        assert now() < FIRST_DELAY_SECONDS / 2
        assert at(w, "pod").actual.annotation is Annotation.ENABLED

    run(body)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("step", STARTING[:3])
def test_an_add_that_nobody_waits_for_any_more_is_undone(step: Step, paused: bool) -> None:
    async def body(w: World) -> None:
        w.records.paused = paused
        gate = w.effects.hold("pod", step)
        waiter = w.add("pod")
        await gate.entered.wait()
        record = at(w, "pod")
        waiter.cancel()
        record.waiter, record.undoing = None, True  # as agent.ambient gives up
        w.records.wake(record)
        gate.open.set()
        await quiet()
        looked = [] if paused else [Step.FIND_NETNS]  # for the sandbox that the runtime makes next
        done = STARTING[: STARTING.index(step) + 1]
        assert w.effects.of("pod") == [*done, *UNDONE[step], Step.PEND, *looked]
        assert record.netns is None
        assert not record.undoing

    run(body)


@pytest.mark.parametrize("step", [Step.RULES, Step.ADD, Step.ADDRESSES])
def test_an_add_is_refused_when_the_agent_closes(step: Step) -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("pod", step)
        waiter = w.add("pod")
        await gate.entered.wait()
        await w.records.close()
        with pytest.raises(EnrollmentError, match="the agent stops") as raised:
            await waiter
        assert raised.value.cni_code == CNI_TRY_AGAIN_LATER

    run(body)


@pytest.mark.parametrize("deleted", [False, True])
def test_an_add_is_refused_when_its_pod_leaves(deleted: bool) -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("pod", Step.ADD)
        waiter = w.add("pod")
        await gate.entered.wait()
        record = at(w, "pod")
        if deleted:
            record.life, record.in_api = Life.ENDED, False
        else:
            record.intent = Intent.LEAVE
        w.records.wake(record)
        gate.open.set()
        with pytest.raises(EnrollmentError, match="left the mesh"):
            await waiter
        assert w.left == ["pod"]
        assert w.link.inodes == {}

    run(body)


# --- captured pods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step.RULES, Step.ADD, Step.ADDRESSES, Step.ENABLE])
def test_a_failure_of_a_captured_pod_is_not_undone_and_holds_up_nothing_else(step: Step) -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.wanted_rules = "rules-2"
        record.actual = replace(record.actual, addresses=frozenset(), annotation=Annotation.PENDING)
        w.link.inodes.clear()
        w.effects.fail("pod", step, *[Trouble("no")] * 8)
        w.records.wake(record)
        await quiet()
        truth = [Step.ADD, Step.RULES, Step.ADDRESSES, Step.ENABLE]
        if step in (Step.ADD, Step.RULES):  # peers must not be told before they are there
            truth.remove(Step.ENABLE)
        assert w.effects.of("pod") == truth
        assert record.actual.enrolled
        await asyncio.sleep(LONG_SECONDS)
        assert w.records.is_desired(record)
        assert len(w.effects.of("pod")) == 8 + 4  # each of the others once
        assert set(w.effects.of("pod")) == {Step.ADD, Step.RULES, Step.ADDRESSES, Step.ENABLE}
        assert w.effects.counted.count((step, "failed")) == 8
        assert w.desired == ["pod", "pod"]
        assert record.attempts == 0

    run(body)


def test_delays_grow_up_to_the_longest_and_begin_anew_after_success() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        for round_ in range(2):
            w.effects.steps.clear()
            record.wanted_rules = f"rules of round {round_}"
            w.effects.fail("pod", Step.RULES, *[Trouble("no")] * 7)
            w.records.wake(record)
            await asyncio.sleep(LONG_SECONDS)
            times = w.effects.times("pod", Step.RULES)
            assert len(times) == 8
            for number, (one, next_) in enumerate(pairwise(times)):
                longest = min(FIRST_DELAY_SECONDS * 2**number, MAX_DELAY_SECONDS)
                assert longest / 2 <= next_ - one + 1e-6
                assert next_ - one <= longest + 1e-6

    run(body)


@pytest.mark.parametrize("step", [Step.FIND_NETNS, Step.ENABLE])
def test_a_retry_repeats_no_step_that_is_in_place(step: Step) -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        w.effects.fail("pod", step, *[Trouble("no")] * 3)
        w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        assert w.records.is_desired(record)
        assert sorted(w.effects.of("pod"), key=str) == sorted([*RUNNING, *[step] * 3], key=str)

    run(body)


def test_a_failure_of_a_running_pod_that_is_not_captured_is_undone_and_tried_again() -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        w.effects.fail("pod", Step.RULES, Trouble("no"))
        w.records.wake(record)
        await quiet()
        begun = RUNNING[: RUNNING.index(Step.RULES) + 1]
        assert w.effects.of("pod") == [*begun, Step.REMOVE_RULES, Step.DEL]
        assert record.netns is not None  # it runs there
        w.effects.steps.clear()
        await asyncio.sleep(FIRST_DELAY_SECONDS)
        assert w.effects.of("pod") == RUNNING[RUNNING.index(Step.ROUTES) :]
        assert w.records.is_desired(record)

    run(body)


def test_ztunnel_that_lost_the_pod_gets_it_again() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        w.link.inodes.clear()
        w.link.settled = False
        w.records.wake_all()
        await quiet()
        assert w.effects.of("pod") == []  # the snapshot brings it
        w.link.settled = True
        w.records.wake_all()
        await quiet()
        assert w.effects.of("pod") == [Step.ADD]
        assert w.records.is_desired(record)

    run(body)


# --- paused -----------------------------------------------------------------------------------------------------------


def test_while_paused_only_adds_are_served() -> None:
    async def body(w: World) -> None:
        w.records.paused = True
        idle = [w.running(f"idle-{number}") for number in range(3)]
        for record in idle:
            w.records.wake(record)
        w.records.wake_all()
        await w.add("pod")
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.of("pod") == STARTING
        assert {uid for uid, _, _ in w.effects.steps} == {"pod"}
        w.records.resume()
        await quiet()
        assert all(w.effects.of(record.uid) == RUNNING for record in idle)
        assert w.effects.of("pod") == STARTING

    run(body)


def test_an_add_that_failed_while_paused_is_taken_up_afterwards() -> None:
    async def body(w: World) -> None:
        w.records.paused = True
        w.effects.fail("pod", Step.ADD, Trouble("no"))
        w.effects.fail("pod", Step.DEL, Trouble("neither"))
        with pytest.raises(Trouble):
            await w.add("pod")
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.of("pod").count(Step.DEL) == 1
        w.records.resume()
        await quiet()
        assert w.effects.of("pod").count(Step.DEL) == 2
        assert not at(w, "pod").undoing

    run(body)


# --- what people hear -------------------------------------------------------------------------------------------------


def test_people_hear_of_a_reason_once() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.actual = replace(record.actual, annotation=Annotation.PENDING)
        same = [Trouble(f"no answer for {number} s", "timeout") for number in range(3)]
        other = [Trouble("refused", "nack") for _ in range(2)]
        w.effects.fail("pod", Step.ENABLE, *same, *other)
        w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.told == [(Step.ENABLE, same[0]), (Step.ENABLE, other[0])]
        assert record.error is None
        record.actual = replace(record.actual, annotation=Annotation.PENDING)
        again = Trouble("refused", "nack")  # it had worked in between
        w.effects.fail("pod", Step.ENABLE, again)
        w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.told[2:] == [(Step.ENABLE, again)]

    run(body)


def test_a_reason_is_news_again_once_its_step_has_worked() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.addresses |= {ip_address("fd00::1")}
        w.effects.fail("pod", Step.ADDRESSES, *[Trouble("always", "always")] * 99)  # so nothing is ever all right
        for rules in ("rules-2", "rules-3"):
            record.wanted_rules = rules
            w.effects.fail("pod", Step.RULES, Trouble("no"), Trouble("no"))
            w.records.wake(record)
            await asyncio.sleep(MAX_DELAY_SECONDS * 4)
        assert [step for step, _ in w.effects.told] == [Step.RULES, Step.ADDRESSES, Step.RULES]

    run(body)


def test_people_hear_once_of_what_is_undone_each_time() -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        w.effects.fail("pod", Step.RULES, *[Trouble("no")] * 4)
        w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.of("pod").count(Step.REMOVE_RULES) == 4
        assert [step for step, _ in w.effects.told] == [Step.RULES]
        assert w.records.is_desired(record)

    run(body)


def test_reasons_of_different_steps_and_pods_are_different_news() -> None:
    async def body(w: World) -> None:
        for uid in ("a", "b"):
            record = await w.enrolled(uid)
            record.wanted_rules, record.addresses = "rules-2", frozenset({ip_address("fd00::1")})
            w.effects.fail(uid, Step.RULES, Trouble("no"), Trouble("no"))
            w.effects.fail(uid, Step.ADDRESSES, Trouble("no"), Trouble("no"))
            w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        assert [step for step, _ in w.effects.told].count(Step.RULES) == 2
        assert [step for step, _ in w.effects.told].count(Step.ADDRESSES) == 2

    run(body)


def test_an_annotation_that_makes_no_rules_is_told_once_and_begins_nothing() -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        error = PodSpecError("no interface")
        record.parameters_error, record.wanted_rules = error, ""
        for _ in range(3):
            w.records.wake(record)
            await asyncio.sleep(LONG_SECONDS)
        assert w.effects.steps == []
        assert w.effects.told == [(Step.RULES, error)]
        record.parameters_error, record.wanted_rules = None, "rules-1"
        w.records.wake(record)
        await quiet()
        assert w.effects.of("pod") == RUNNING

    run(body)


# --- as it should be, and gone ----------------------------------------------------------------------------------------


def test_becoming_as_it_should_be_is_told_once() -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        w.effects.fail("pod", Step.ADDRESSES, Trouble("no"), Trouble("no"))
        for _ in range(5):
            w.records.wake(record)
            await asyncio.sleep(LONG_SECONDS)
            w.records.wake_all()
            await quiet()
        assert w.desired == ["pod"]
        assert record.desired_since is not None

    run(body)


def test_a_pod_that_left_is_forgotten() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.intent = Intent.LEAVE
        w.records.wake(record)
        w.records.wake(record)
        await quiet()
        assert w.effects.of("pod") == LEAVING
        assert w.left == ["pod"]
        assert len(w.records) == 0
        assert w.records.get("pod") is record.netns is None
        w.records.wake(record)
        await asyncio.sleep(LONG_SECONDS)
        assert w.left == w.desired == ["pod"]

    run(body)


@pytest.mark.parametrize("step", [Step.RELEASE, Step.DEL, Step.REMOVE_RULES, Step.WITHDRAW, Step.REMOVE_ADDRESSES])
def test_a_pod_is_not_forgotten_before_it_has_left(step: Step) -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.intent = Intent.LEAVE
        w.effects.fail("pod", step, Trouble("no"), Trouble("no"))
        w.records.wake(record)
        await quiet()
        assert w.records.get("pod") is record
        assert w.left == []
        await asyncio.sleep(LONG_SECONDS)
        assert w.left == ["pod"]
        assert sorted(w.effects.of("pod"), key=str) == sorted([*LEAVING, step, step], key=str)

    run(body)


def test_a_pod_that_ended_leaves_without_its_netns_being_touched() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        record.life, record.in_api = Life.ENDED, False
        w.records.wake(record)
        await quiet()
        assert w.effects.of("pod") == [Step.REMOVE_ADDRESSES, Step.DEL]
        assert w.left == ["pod"]

    run(body)


def test_a_pod_that_comes_back_before_it_left_stays() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        gate = w.effects.hold("pod", Step.DEL)
        record.intent = Intent.LEAVE
        w.records.wake(record)
        await gate.entered.wait()
        record.intent = Intent.ENROLL
        w.records.wake(record)
        gate.open.set()
        await quiet()
        assert w.left == []
        assert w.records.is_desired(record)
        assert record.actual.enrolled

    run(body)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", RUNNING)
def test_an_unexpected_exception_in_a_step_is_a_failure_like_others(step: Step) -> None:
    async def body(w: World) -> None:
        record = w.running("pod")
        w.effects.fail("pod", step, ZeroDivisionError("a fault of ours"))
        w.records.wake(record)
        await quiet()
        ((told, error),) = w.effects.told
        assert told is step
        assert "ZeroDivisionError: a fault of ours" in error.message
        assert w.records.is_desired(record) == (step is Step.PEND)  # nothing waits for that mark, or needs it later
        await asyncio.sleep(LONG_SECONDS)
        assert w.records.is_desired(record)

    run(body)


@pytest.mark.parametrize("step", STARTING[:3])
def test_an_add_is_refused_for_an_unexpected_exception_too(step: Step) -> None:
    async def body(w: World) -> None:
        w.effects.fail("pod", step, ZeroDivisionError("a fault of ours"))
        with pytest.raises(EnrollmentError, match="a fault of ours"):
            await w.add("pod")
        assert w.effects.of("pod")[-len(UNDONE[step]) - 1 :] == [*UNDONE[step], Step.PEND]

    run(body)


def test_a_fault_outside_of_steps_leaves_the_pod_with_a_worker_later() -> None:
    async def body(w: World) -> None:
        w.effects.cannot_tell = True
        record = w.running("pod")
        w.effects.fail("pod", Step.PEND, Trouble("no"))
        w.records.wake(record)
        waiter = w.add("other")
        await waiter  # nobody else is concerned
        await quiet()
        assert isinstance(record.error, EnrollmentError)
        await asyncio.sleep(LONG_SECONDS)
        assert w.records.is_desired(record)

    run(body)


def test_a_fault_outside_of_steps_answers_the_add() -> None:
    async def body(w: World) -> None:
        w.effects.cannot_tell = True
        w.effects.fail("pod", Step.ADD, Trouble("no"))
        with pytest.raises(EnrollmentError, match="RuntimeError"):
            await w.add("pod")
        await asyncio.sleep(LONG_SECONDS)
        assert {Step.REMOVE_RULES, Step.DEL} <= set(w.effects.of("pod"))
        assert w.link.inodes == {}

    run(body)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_closing_leaves_no_task_no_timer_and_no_descriptor() -> None:
    async def body(w: World) -> None:
        gate = w.effects.hold("held", Step.ADD)
        held = w.add("held")
        await gate.entered.wait()
        late = await w.enrolled("late")
        late.wanted_rules = "rules-2"
        w.effects.fail("late", Step.RULES, *[Trouble("no")] * 99)
        w.records.wake(late)
        found = w.running("found")
        w.records.wake(found)
        await quiet()
        begun = w.running("begun")
        w.records.wake(begun)  # its worker has not run yet
        await w.records.close()
        with pytest.raises(EnrollmentError):
            await held
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert all(record.netns is None for record in w.records)
        w.effects.steps.clear()
        w.records.wake_all()
        w.records.resume()
        await asyncio.sleep(LONG_SECONDS)
        assert w.effects.steps == []

    run(body)


def test_a_descriptor_is_closed_once() -> None:
    async def body(w: World) -> None:
        record = await w.enrolled("pod")
        assert record.netns is not None
        netns, number = record.netns, record.netns.descriptor
        await w.records.close()
        with pytest.raises(OSError):
            os.fstat(number)
        others = [os.memfd_create("of-somebody-else")]
        while others[-1] < number:
            others.append(os.memfd_create("of-somebody-else"))
        assert number in others
        record.drop_netns()
        netns.close()
        await w.records.close()
        os.fstat(number)
        for other in others:
            os.close(other)

    run(body)


@pytest.mark.parametrize("step", [Step.RULES, Step.ADD, Step.ADDRESSES, None])
def test_sandboxes_that_come_and_go_leave_no_descriptor(step: Step | None) -> None:
    async def body(w: World) -> None:
        for number in range(10):
            if step is not None:
                w.effects.fail("pod", step, Trouble(str(number)))
            await asyncio.gather(w.add("pod"), return_exceptions=True)
        record = at(w, "pod")
        record.life = Life.ENDED
        w.records.wake(record)
        await quiet()
        assert w.left == ["pod"]
        # `run` counts them

    run(body)
