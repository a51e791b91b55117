"""Any order of events and failures: what must never be never is, and what should be is in the end.

The machine is the agent's worker without its event loop: `agent.reconciler` does with the tables what `Agent` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pure.pods.enrollmentworld import TAMPERED, ApiPod, Outcome, World, Ztunnel

from meshcni.pods.enrollment import (
    Actual,
    Addresses,
    Annotation,
    Desired,
    Intent,
    Life,
    NetnsId,
    Row,
    Step,
    adopted,
    after,
    begun,
    in_new_sandbox,
    is_captured,
    is_desired,
    is_named,
    next_row,
    seen,
    undoes,
)

UID = "5f0c"
ENOUGH = 100  # steps, for whatever there is to do
IN_NETNS = {Step.LOOK, Step.ROUTES, Step.RULES, Step.RELEASE, Step.REMOVE_RULES}


@dataclass
class Record:
    """What an agent knows of the pod."""

    intent: Intent
    actual: Actual
    life: Life = Life.RUNNING
    netns: NetnsId | None = None
    addresses: Addresses = frozenset()
    outdated: Addresses = frozenset()
    in_api: bool = True
    undoing: bool = False
    waits: bool = False  # an ADD does
    generation: int = 0
    patched: int = 0
    failed: set[Step] = field(default_factory=set)


@dataclass
class Flight:
    """A step under way."""

    row: Row
    generation: int
    desired: Desired
    believed: Actual


class Agent:
    """One agent's memory, and what it does with it."""

    def __init__(self, world: World, wanted: str, answers: list[bool]) -> None:
        self.world = world
        self.answers = answers
        self.wanted = wanted
        self.record: Record | None = None
        self.flight: Flight | None = None
        self.starting = True
        self.withdrawn = 0  # the version in which the pod left

    def desired(self) -> Desired:
        one = self.record
        assert one is not None
        return Desired(one.intent, one.life, one.netns, self.wanted, one.addresses, one.in_api)

    def actual(self) -> Actual:
        assert self.record is not None
        return replace(self.record.actual, acked=self.world.acked(UID))

    @property
    def waits(self) -> bool:
        """Whether an ADD waits for an answer."""
        return self.record is not None and self.record.waits

    @property
    def settled(self) -> bool:
        assert self.record is not None
        return self.world.settled or self.record.waits

    @property
    def is_idle(self) -> bool:
        """As it should be, or without the pod."""
        if self.record is None:
            return True
        return not self.record.undoing and is_desired(self.desired(), self.actual(), settled=self.settled)

    # --- what it is told ----------------------------------------------------------------------------------------------

    def observe(self, pod: ApiPod) -> None:
        intent = Intent.ENROLL if pod.belongs else Intent.LEAVE
        if pod.version < self.withdrawn:
            pod = replace(pod, annotation=Annotation.ABSENT)
        if self.record is None:
            nothing = intent is Intent.LEAVE or pod.terminated or not pod.addresses
            if pod.annotation is Annotation.ABSENT and nothing:
                return
            belongs = self.starting and intent is Intent.ENROLL
            self.record = Record(intent, adopted(pod.annotation, belongs=belongs))
            self.record.actual = replace(self.record.actual, addresses=self.world.addresses_of(UID))
        one = self.record
        one.intent, one.in_api = intent, True
        if pod.addresses and pod.addresses != one.outdated:
            one.addresses, one.outdated = pod.addresses, frozenset()
        if pod.terminated:
            one.life = Life.ENDED
        if pod.version >= one.patched:
            one.actual = replace(one.actual, annotation=pod.annotation)

    def gone(self) -> None:
        if self.record is not None:
            self.record.life, self.record.in_api = Life.ENDED, False

    def add(self, pod: ApiPod, netns: NetnsId, addresses: Addresses) -> None:
        if self.record is None:
            self.record = Record(Intent.ENROLL, adopted(pod.annotation))
        one = self.record
        one.intent, one.in_api = Intent.ENROLL, True
        if one.netns == netns:
            one.actual = replace(one.actual, rules="")
        else:
            self.leave_sandbox(by_add=True)
            one.netns = netns
        one.addresses = addresses
        one.outdated = pod.addresses if pod.addresses != addresses else frozenset()
        if not one.actual.enrolled:
            one.life = Life.STARTING
        one.undoing, one.waits = False, True
        one.failed.clear()

    def give_up(self) -> None:
        assert self.record is not None
        self.record.waits = False
        self.answers.append(False)
        if self.record.life is Life.STARTING:
            self.record.undoing = True

    def found(self, netns: NetnsId) -> None:
        """A round of verification saw the pod's processes."""
        one = self.record
        if one is None or one.life is not Life.RUNNING or one.netns == netns:
            return
        if one.netns is not None:
            self.leave_sandbox(by_add=False)
        one.netns = netns

    def leave_sandbox(self, *, by_add: bool) -> None:
        assert self.record is not None
        self.record.netns = None
        self.record.generation += 1
        self.record.failed.clear()
        self.record.actual = in_new_sandbox(self.record.actual, by_add=by_add)

    def snapshot(self) -> list[tuple[str, NetnsId | None]]:
        one = self.record
        if one is None or not is_named(self.desired(), self.actual(), undoing=one.undoing):
            return []
        return [(UID, one.netns)]

    # --- what it does -------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Begin the next step, or end the pass; False when the pass is over."""
        one = self.record
        if one is None:
            return False
        if one.life is Life.ENDED:
            one.undoing = False
        if one.intent is Intent.ENROLL and not one.undoing and is_captured(self.desired(), self.actual()):
            one.actual = replace(one.actual, enrolled=True)
            one.life = Life.RUNNING if one.life is Life.STARTING else one.life
            self.answer(True)
        row = next_row(self.desired(), self.actual(), undoing=one.undoing, failed=one.failed, settled=self.settled)
        if row is None:
            self._end_pass()
            return False
        self.flight = Flight(row, one.generation, self.desired(), self.actual())
        self.world.begin(row.step, UID, self.desired(), self.actual())
        one.actual = begun(row.step, one.actual)
        return True

    def finish(self, outcome: Outcome, find: Callable[[], NetnsId | None]) -> None:
        """End the step under way."""
        flight, self.flight, one = self.flight, None, self.record
        assert flight is not None
        assert one is not None
        row, step = flight.row, flight.row.step
        works = self.world.perform(step, UID, flight.desired, flight.believed, outcome)
        if step is Step.FIND_NETNS and works and one.generation == flight.generation:
            works = self._find(find())
        if not works:
            if one.generation == flight.generation:
                if one.undoing or not undoes(row, one.actual):
                    one.failed.add(step)
                else:
                    one.undoing = True
            return
        if one.generation != flight.generation and step in IN_NETNS:
            return
        if step is Step.LOOK and flight.desired.netns and self.world.netns[flight.desired.netns].rules == self.wanted:
            one.actual = seen(flight.desired, one.actual)
        self._remember_patch(step)
        one.actual = after(step, flight.desired, self.actual())

    def _remember_patch(self, step: Step) -> None:
        """What the informer tells from before the patch is older than what is known."""
        if step in (Step.ENABLE, Step.PEND, Step.WITHDRAW) and UID in self.world.api and self.record:
            self.record.patched = self.world.api[UID].version

    def _find(self, netns: NetnsId | None) -> bool:
        one = self.record
        assert one is not None
        if netns is not None:
            one.netns = netns
        elif one.intent is Intent.LEAVE:
            one.actual = replace(one.actual, touched=False)
        return netns is not None or one.intent is Intent.LEAVE

    def _end_pass(self) -> None:
        one = self.record
        assert one is not None
        if one.undoing:
            one.undoing = bool(one.failed)
            if not one.undoing:
                self._check_undone(one)
            if one.life is Life.STARTING:
                one.life = Life.RUNNING
                self.leave_sandbox(by_add=True)
                one.addresses = self.world.api[UID].addresses if UID in self.world.api else frozenset()
                one.outdated = frozenset()
            self.answer(False)
            if one.in_api and one.intent is Intent.ENROLL and one.actual.annotation is not Annotation.PENDING:
                self.world.perform(Step.PEND, UID, self.desired(), self.actual(), Outcome.OK)
                self._remember_patch(Step.PEND)
                one.actual = after(Step.PEND, self.desired(), self.actual())
        one.failed.clear()
        if self.is_idle and (one.intent is Intent.LEAVE or one.life is Life.ENDED):
            self.answer(False)
            self.withdrawn = one.patched
            self.record = None

    def _check_undone(self, one: Record) -> None:
        if one.netns is not None:
            inside = self.world.netns[one.netns]
            assert (inside.rules, inside.routes) == ("", False), "a failed enrolment left rules"
        assert UID not in self.world.held.values(), "a failed enrolment left an address in the set"
        assert not self.world.served_by(UID), "a failed enrolment left listeners"

    def answer(self, is_good: bool) -> None:
        one = self.record
        assert one is not None
        if one.waits:
            one.waits = False
            self.answers.append(is_good)
            assert not is_good or (one.netns and self.world.netns[one.netns].rules), "an ADD without rules"


class Scenario:
    """One pod, its node, and agents that come and go."""

    def __init__(self) -> None:
        self.world = World()
        self.world.api[UID] = ApiPod()
        self.answers: list[bool] = []  # to the ADD that waits
        self.agent = Agent(self.world, "rules-1", self.answers)
        self.sandbox: NetnsId | None = None
        self.in_sandbox: Addresses = frozenset()  # what the runtime gave it
        self.by_add: NetnsId | None = None  # the sandbox that an ADD was answered for
        self.made_by_add = False  # the runtime waits for an answer
        self.news: list[ApiPod | None] = []  # what the informer has still to tell; None: deleted
        self.traceless: NetnsId | None = None
        self.number = 0

    @property
    def pod(self) -> ApiPod | None:
        """The pod as the API has it."""
        return self.world.api.get(UID)

    @property
    def startable(self) -> ApiPod | None:
        """The pod, when a sandbox may be made for it now."""
        pod = self.pod
        return pod if pod and pod.belongs and not pod.terminated and not self.made_by_add else None

    @property
    def visible(self) -> bool:
        """Whether its processes can be found."""
        return UID in self.world.running

    @visible.setter
    def visible(self, is_it: bool) -> None:
        self.world.running.pop(UID, None)
        if is_it and self.sandbox:
            self.world.running[UID] = self.sandbox

    def find(self) -> NetnsId | None:
        return self.world.running.get(UID)

    def new_addresses(self, count: int) -> Addresses:
        self.number += 10
        return frozenset(IPv4Address(f"10.0.{self.number // 250}.{self.number % 250 + one}") for one in range(count))

    def tell(self) -> None:
        self.news.append(replace(self.pod) if self.pod else None)

    def change(self, **values: Any) -> None:
        assert self.pod is not None
        for name, value in values.items():
            setattr(self.pod, name, value)
        self.pod.version += 1
        self.tell()

    def begin(self, chance: Random) -> None:
        """A fresh agent on a node where earlier ones may have been at work."""
        assert self.pod is not None
        self.pod.annotation = chance.choice(list(Annotation))
        if chance.random() < 0.7:
            self.sandbox, self.visible = self.world.new_netns(), True
            self.pod.addresses = self.new_addresses(1)
            if self.pod.annotation is not Annotation.ABSENT and chance.random() < 0.7:
                self.world.netns[self.sandbox].rules = self.agent.wanted
        self.restart(chance)
        if chance.random() < 0.7:
            self.ztunnel_starts(chance)
            self.ztunnel_reconnects(chance)
        if chance.random() < 0.5:
            for _ in range(ENOUGH):
                self.step(Outcome.OK)

    # --- the API ------------------------------------------------------------------------------------------------------

    def label(self, chance: Random) -> None:
        if self.pod:
            self.change(belongs=not self.pod.belongs)

    def informer_tells(self, chance: Random) -> None:
        if self.news:
            one = self.news.pop(0)
            if one is None:
                self.agent.gone()
            else:
                self.agent.observe(one)

    def ends(self, chance: Random) -> None:
        """All its containers end; a pod like that is never started again."""
        if self.pod and self.visible and chance.random() < 0.3:
            self.change(terminated=True)
            self.visible = False

    def deleted(self, chance: Random) -> None:
        if self.pod and chance.random() < 0.2:
            del self.world.api[UID]
            self.visible, self.made_by_add = False, False
            self.tell()

    def parameters_change(self, chance: Random) -> None:
        """An annotation is edited, or a new version of the agent makes other rules."""
        self.agent.wanted = f"rules-{chance.randint(1, 3)}"
        self.nobody_can_tell()

    # --- the node -----------------------------------------------------------------------------------------------------

    def tampered(self, chance: Random) -> None:
        if self.visible and self.sandbox and self.world.netns[self.sandbox].rules:
            self.world.netns[self.sandbox].rules = TAMPERED
            self.nobody_can_tell()
            if self.agent.record is not None and self.agent.record.netns == self.sandbox:
                self.verified(chance)  # at once, as what is between is nobody's fault

    def nobody_can_tell(self) -> None:
        """That an earlier agent held a pod for enrolled, with the rules as they are and without the annotation."""
        if self.sandbox and not (self.pod and self.pod.annotation is Annotation.ENABLED):
            self.world.netns[self.sandbox].captured = False

    def cni_add(self, chance: Random) -> None:
        """The runtime makes a sandbox, its first or another after the one before has died."""
        pod = self.startable
        if pod is None:
            return
        self.visible, self.made_by_add = False, True
        self.answers.clear()
        self.sandbox = self.world.new_netns()
        same = pod.addresses and chance.random() < 0.5
        self.in_sandbox = pod.addresses if same else self.new_addresses(chance.randint(1, 2))
        self.agent.add(pod, self.sandbox, self.in_sandbox)

    def cni_add_again(self, chance: Random) -> None:
        """The runtime asks once more about the netns that it has already asked about."""
        if self.made_by_add and self.pod and self.pod.belongs and self.sandbox and self.agent.waits:
            self.agent.add(self.pod, self.sandbox, self.in_sandbox)

    def runtime_gives_up(self, chance: Random) -> None:
        """The ADD takes too long; perhaps the next one comes before all is undone."""
        if self.made_by_add and self.agent.waits:
            self.agent.give_up()
            self.made_by_add, self.sandbox = False, None
            if chance.random() < 0.5:
                self.cni_add(chance)

    def runtime_goes_on(self, chance: Random) -> None:
        if not self.made_by_add or not self.answers:
            return
        is_good, self.made_by_add = self.answers[-1], False
        if not is_good:
            self.sandbox = None
            return
        assert self.sandbox is not None
        self.visible, self.by_add = True, self.sandbox
        if self.pod and not self.pod.terminated:
            self.change(addresses=self.in_sandbox)

    def sandbox_made_without_us(self, chance: Random) -> None:
        if self.pod and not self.pod.terminated and not self.made_by_add and chance.random() < 0.3:
            self.sandbox, self.visible = self.world.new_netns(), True
            self.change(addresses=self.new_addresses(1))

    def verified(self, chance: Random) -> None:
        """A round of verification: the netns, then what is in it."""
        record = self.agent.record
        if record is None:
            return
        if self.visible and self.sandbox is not None:
            self.agent.found(self.sandbox)
        held = self.world.netns[record.netns].rules if record.netns else ""
        if record.actual.enrolled and record.actual.rules and record.actual.rules != held:
            record.actual = replace(record.actual, rules="")

    # --- ztunnel and the agent ----------------------------------------------------------------------------------------

    def ztunnel_starts(self, chance: Random) -> None:
        if len(self.world.ztunnels) < 2:
            self.world.ztunnels.append(Ztunnel(connected=True))

    def ztunnel_disconnects(self, chance: Random) -> None:
        if self.world.ztunnels:
            one = chance.choice(self.world.ztunnels)
            one.disconnect()
            if chance.random() < 0.5:
                self.world.ztunnels.remove(one)

    def ztunnel_reconnects(self, chance: Random) -> None:
        """Whoever is not connected comes back, as the newest; every one gets its snapshot."""
        for one in [one for one in self.world.ztunnels if not one.connected]:
            self.world.ztunnels.remove(one)
            self.world.ztunnels.append(one)
            one.connected = True
        refused = frozenset({UID}) if chance.random() < 0.2 else frozenset()
        for one in self.world.ztunnels:
            if not one.complete:
                one.take_snapshot(self.agent.snapshot(), refused)

    def restart(self, chance: Random) -> None:
        """The agent dies, whatever it is at, and another one starts from what the API says."""
        if self.made_by_add and self.agent.waits:
            self.made_by_add, self.sandbox = False, None  # the plugin's call fails
        self.runtime_goes_on(chance)  # soon enough, as an agent takes a while to start
        self.agent = Agent(self.world, self.agent.wanted, self.answers)
        for one in self.world.ztunnels:
            one.disconnect()
        self.news.clear()
        if self.pod:
            self.agent.observe(self.pod)
        if self.find() and self.agent.record and self.agent.record.addresses:
            self.agent.record.netns = self.find()
        self.agent.starting = False
        if self.agent.record is None:
            self.world.take_addresses(UID)  # no pod that is known: the adoption of the set drops them
            # What no agent can know: one died between its answer to an ADD and the annotation, or could not annotate,
            # and then the pod's label went away before the next one came.
            found = self.find()
            if found and (found == self.by_add or found in self.world.unmarked):
                self.traceless = found
                self.world.netns[found].captured = False

    # --- work ---------------------------------------------------------------------------------------------------------

    def half_a_step(self, chance: Random) -> None:
        """Begin a step, or end the one that was begun; other events may come in between."""
        with self.watching():
            if self.agent.flight:
                self.agent.finish(chance.choice(OUTCOMES), self.find)
            else:
                self.agent.begin()

    def steps(self, chance: Random) -> None:
        for _ in range(chance.randint(1, 6)):
            self.step(chance.choice(OUTCOMES))

    def step(self, outcome: Outcome) -> bool:
        """One step; False when there is none."""
        with self.watching():
            is_busy = bool(self.agent.flight) or self.agent.begin()
            if is_busy:
                self.agent.finish(outcome, self.find)
        record = self.agent.record
        if record and record.netns and record.actual.enrolled and record.netns == self.sandbox:
            held = self.world.netns[record.netns]
            held.captured = held.captured or held.rules == self.agent.wanted
        return is_busy

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The informer hears of what the agent patches."""
        before = self.pod.version if self.pod else 0
        yield
        if self.pod and self.pod.version != before:
            self.tell()

    # --- the end ------------------------------------------------------------------------------------------------------

    def converge(self) -> None:
        """Failures stop: everything comes to what it should be."""
        chance = Random(1)
        if not self.world.ztunnels:
            self.ztunnel_starts(chance)
        while not self.world.settled:
            self.ztunnel_reconnects(chance)
        for _ in range(ENOUGH):
            is_busy = self.step(Outcome.OK) or bool(self.news)
            self.informer_tells(chance)
            self.runtime_goes_on(chance)
            self.verified(chance)
            if not is_busy and self.agent.is_idle and not self.made_by_add and not self.news:
                break
        else:
            waits_for_sandbox = self.find() is None and self.agent.record is not None
            assert waits_for_sandbox, f"never done: {self.agent.record}, {self.world.steps[-12:]}"
        self.check_end()

    def check_end(self) -> None:
        world, pod, record = self.world, self.pod, self.agent.record
        inside = world.netns[self.sandbox] if self.sandbox and self.visible else None
        if pod and pod.belongs and not pod.terminated and inside and pod.addresses:
            assert record is not None
            assert (inside.rules, inside.routes or record.actual.enrolled) == (self.agent.wanted, True)
            assert world.acked(UID) == self.sandbox
            assert world.addresses_of(UID) == pod.addresses
            assert pod.annotation is Annotation.ENABLED
        elif not pod or not pod.belongs or pod.terminated:
            assert record is None, record
            assert not world.addresses_of(UID)
            assert not world.served_by(UID)
            assert pod is None or pod.annotation is Annotation.ABSENT
            if inside and self.sandbox != self.traceless:
                assert (inside.rules, inside.routes, inside.rest) == ("", False, False)


EVENTS: dict[str, int] = {  # how often each comes
    Scenario.half_a_step.__name__: 30,
    Scenario.steps.__name__: 20,
    Scenario.informer_tells.__name__: 10,
    Scenario.cni_add.__name__: 4,
    Scenario.cni_add_again.__name__: 1,
    Scenario.runtime_goes_on.__name__: 6,
    Scenario.runtime_gives_up.__name__: 2,
    Scenario.label.__name__: 4,
    Scenario.ztunnel_starts.__name__: 2,
    Scenario.ztunnel_reconnects.__name__: 6,
    Scenario.ztunnel_disconnects.__name__: 2,
    Scenario.sandbox_made_without_us.__name__: 2,
    Scenario.verified.__name__: 3,
    Scenario.tampered.__name__: 1,
    Scenario.parameters_change.__name__: 1,
    Scenario.restart.__name__: 3,
    Scenario.ends.__name__: 1,
    Scenario.deleted.__name__: 1,
}
OUTCOMES = (*[Outcome.OK] * 12, *Outcome)


def play(numbers: list[int]) -> None:
    """Each number is an event with all its accidents; 0 is none, so that what fails can be made shorter."""
    scenario = Scenario()
    told: list[str] = []
    try:
        scenario.begin(Random(numbers[0]))
        for number in numbers[1:]:
            if number:
                chance = Random(number)
                name = chance.choices(list(EVENTS), list(EVENTS.values()))[0]
                told.append(name)
                getattr(scenario, name)(chance)
        told.append("converge")
        scenario.converge()
    except AssertionError as error:
        error.add_note(f"events: {', '.join(told)}\nsteps: {[step.value for _uid, step in scenario.world.steps]}")
        raise


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=60, max_size=60))
def test_any_order_of_events(numbers: list[int]) -> None:
    play(numbers)
