"""Any order of events and failures: what must never be never is, and what should be is in the end.

The machine is the agent's worker without its event loop: `agent.reconciler` does with the tables what `Agent` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.pure.pods.enrollmentworld import ApiPod, Outcome, World, Ztunnel

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

    def desired(self) -> Desired:
        one = self.record
        assert one is not None
        return Desired(one.intent, one.life, one.netns, self.wanted, one.addresses, one.in_api)

    def actual(self) -> Actual:
        assert self.record is not None
        return replace(self.record.actual, acked=self.world.acked(UID))

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
        if one.life is Life.STARTING and one.actual.enrolled and not one.undoing:
            one.life = Life.RUNNING
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
        if step in (Step.ENABLE, Step.PEND, Step.WITHDRAW) and UID in self.world.api:
            one.patched = self.world.api[UID].version
        one.actual = after(step, flight.desired, self.actual())

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
                one.actual = after(Step.PEND, self.desired(), self.actual())
        one.failed.clear()
        if self.is_idle and (one.intent is Intent.LEAVE or one.life is Life.ENDED):
            self.answer(False)
            self.record = None

    def _check_undone(self, one: Record) -> None:
        if one.netns is not None:
            inside = self.world.netns[one.netns]
            assert (inside.rules, inside.routes) == ("", False), "a failed enrolment left rules"
        assert UID not in self.world.held.values(), "a failed enrolment left an address in the set"
        assert not self.world.served_by(UID), "a failed enrolment left listeners"

    def answer(self, is_good: bool) -> None:
        assert self.record is not None
        if self.record.waits:
            self.record.waits = False
            self.answers.append(is_good)


class EnrollmentMachine(RuleBasedStateMachine):
    """One pod, its node, and agents that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.api[UID] = ApiPod()
        self.answers: list[bool] = []  # to the ADD that waits
        self.agent = Agent(self.world, "rules-1", self.answers)
        self.sandbox: NetnsId | None = None
        self.visible = False  # its processes can be found
        self.made_by_add = False  # the runtime waits for an answer
        self.news: list[ApiPod | None] = []  # what the informer has still to tell; None: deleted
        self.number = 0

    @property
    def pod(self) -> ApiPod | None:
        return self.world.api.get(UID)

    def find(self) -> NetnsId | None:
        return self.sandbox if self.visible else None

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

    # --- the API ------------------------------------------------------------------------------------------------------

    @initialize(
        annotation=st.sampled_from(Annotation),
        runs=st.booleans(),
        right=st.booleans(),
        served=st.booleans(),
        settles=st.sampled_from((0, 0, ENOUGH)),
    )
    def begin(self, annotation: Annotation, runs: bool, right: bool, served: bool, settles: int) -> None:
        """A fresh agent on a node where earlier ones may have been at work."""
        assert self.pod is not None
        self.pod.annotation = annotation
        if runs:
            self.sandbox, self.visible = self.world.new_netns(), True
            self.pod.addresses = self.new_addresses(1)
            if right and annotation is not Annotation.ABSENT:
                self.world.netns[self.sandbox].rules = self.agent.wanted
        self.restart()
        if served:
            self.ztunnel_starts()
            self.ztunnel_reconnects(False)
            for _ in range(settles):
                self.work([Outcome.OK])

    @precondition(lambda self: self.pod)
    @rule(belongs=st.booleans())
    def label(self, belongs: bool) -> None:
        self.change(belongs=belongs)

    @precondition(lambda self: self.news)
    @rule(all_of_it=st.booleans())
    def informer_tells(self, all_of_it: bool) -> None:
        while self.news:
            one = self.news.pop(0)
            if one is None:
                self.agent.gone()
            else:
                self.agent.observe(one)
            if not all_of_it:
                return

    @precondition(lambda self: self.pod and self.visible)
    @rule()
    def ends(self) -> None:
        """All its containers end; a pod like that is never started again."""
        self.change(terminated=True)
        self.visible = False

    @precondition(lambda self: self.pod)
    @rule()
    def deleted(self) -> None:
        del self.world.api[UID]
        self.visible, self.made_by_add = False, False
        self.tell()

    @rule(number=st.integers(1, 3))
    def parameters_change(self, number: int) -> None:
        """An annotation is edited, or a new version of the agent makes other rules."""
        self.agent.wanted = f"rules-{number}"
        self.nobody_can_tell()

    @precondition(lambda self: self.visible)
    @rule()
    def tampered(self) -> None:
        if self.sandbox and self.world.netns[self.sandbox].rules:
            self.world.netns[self.sandbox].rules = "tampered"
            self.nobody_can_tell()
            if self.agent.record is not None and self.agent.record.netns == self.sandbox:
                self.verified()  # at once, as what is between is nobody's fault

    def nobody_can_tell(self) -> None:
        """That an earlier agent held a pod for enrolled, with the rules as they are and without the annotation."""
        if self.sandbox and not (self.pod and self.pod.annotation is Annotation.ENABLED):
            self.world.netns[self.sandbox].captured = False

    # --- the node -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.pod and self.pod.belongs and not self.pod.terminated and not self.made_by_add)
    @rule(count=st.integers(1, 2), same=st.booleans())
    def cni_add(self, count: int, same: bool) -> None:
        """The runtime makes a sandbox, its first or another after the one before has died."""
        assert self.pod is not None
        self.visible, self.made_by_add = False, True
        self.answers.clear()
        self.sandbox = self.world.new_netns()
        addresses = self.pod.addresses if same and self.pod.addresses else self.new_addresses(count)
        self.agent.add(self.pod, self.sandbox, addresses)
        self.in_sandbox = addresses

    @precondition(lambda self: self.made_by_add and self.agent.record and self.agent.record.waits)
    @rule(another=st.booleans())
    def runtime_gives_up(self, another: bool) -> None:
        """The ADD takes too long; perhaps the next one comes before all is undone."""
        self.agent.give_up()
        self.made_by_add, self.sandbox = False, None
        if another and self.pod and self.pod.belongs and not self.pod.terminated:
            self.cni_add(1, False)

    @precondition(lambda self: self.made_by_add and self.answers)
    @rule()
    def runtime_goes_on(self) -> None:
        is_good, self.made_by_add = self.answers[-1], False
        if not is_good:
            self.sandbox = None
        else:
            assert self.sandbox is not None
            self.visible = True
            if self.pod and not self.pod.terminated:
                self.change(addresses=self.in_sandbox)

    @precondition(lambda self: self.pod and not self.pod.terminated and not self.made_by_add)
    @rule()
    def sandbox_made_without_us(self) -> None:
        self.sandbox, self.visible = self.world.new_netns(), True
        self.change(addresses=self.new_addresses(1))

    @precondition(lambda self: self.visible)
    @rule()
    def verified(self) -> None:
        """A round of verification: the netns, then what is in it."""
        record = self.agent.record
        if record is None or self.sandbox is None:
            return
        if self.visible:
            self.agent.found(self.sandbox)
        held = self.world.netns[record.netns].rules if record.netns else ""
        if record.actual.enrolled and record.actual.rules and record.actual.rules != held:
            record.actual = replace(record.actual, rules="")

    # --- ztunnel and the agent ----------------------------------------------------------------------------------------

    @rule()
    def ztunnel_starts(self) -> None:
        if len(self.world.ztunnels) < 2:
            self.world.ztunnels.append(Ztunnel(connected=True))

    @precondition(lambda self: self.world.ztunnels)
    @rule(which=st.integers(0, 1), ends=st.booleans())
    def ztunnel_disconnects(self, which: int, ends: bool) -> None:
        one = self.world.ztunnels[which % len(self.world.ztunnels)]
        one.disconnect()
        if ends:
            self.world.ztunnels.remove(one)

    @precondition(lambda self: self.world.ztunnels)
    @rule(refuses=st.booleans())
    def ztunnel_reconnects(self, refuses: bool) -> None:
        """Whoever is not connected comes back, as the newest; every one gets its snapshot."""
        for one in [one for one in self.world.ztunnels if not one.connected]:
            self.world.ztunnels.remove(one)
            self.world.ztunnels.append(one)
            one.connected = True
        for one in self.world.ztunnels:
            if not one.complete:
                one.take_snapshot(self.agent.snapshot(), frozenset({UID}) if refuses else frozenset())

    @rule()
    def restart(self) -> None:
        """The agent dies, whatever it is at, and another one starts from what the API says."""
        if self.made_by_add and self.agent.record and self.agent.record.waits:
            self.made_by_add, self.sandbox = False, None  # the plugin's call fails
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

    # --- work ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.agent.flight)
    @rule()
    def step_begins(self) -> None:
        self.agent.begin()

    @precondition(lambda self: self.agent.flight)
    @rule(outcome=st.sampled_from(Outcome))
    def step_ends(self, outcome: Outcome) -> None:
        self.finish(outcome)

    @rule(outcomes=st.lists(st.sampled_from((*[Outcome.OK] * 9, *Outcome)), min_size=1, max_size=9))
    def work(self, outcomes: list[Outcome]) -> None:
        """Some steps in a row, most of them well."""
        for outcome in outcomes:
            if self.agent.flight or self.agent.begin():
                self.finish(outcome)

    def finish(self, outcome: Outcome) -> None:
        before = self.pod.version if self.pod else 0
        self.agent.finish(outcome, self.find)
        if self.pod and self.pod.version != before:
            self.tell()

    @invariant()
    def believed_is_remembered(self) -> None:
        """What an agent holds for enrolled stays captured, also by its successors."""
        record = self.agent.record
        if record and record.netns and record.actual.enrolled and record.netns == self.sandbox:
            held = self.world.netns[record.netns]
            held.captured = held.captured or held.rules == self.agent.wanted

    def teardown(self) -> None:
        """Failures stop: everything comes to what it should be."""
        self.informer_tells(True)
        if not self.world.ztunnels:
            self.ztunnel_starts()
        self.ztunnel_reconnects(False)
        for _ in range(ENOUGH):
            is_busy = self.agent.flight or self.agent.begin()
            if is_busy:
                self.finish(Outcome.OK)
            self.informer_tells(True)
            if self.made_by_add and self.answers:
                self.runtime_goes_on()
            self.verified()
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
            assert record is None
            assert not world.addresses_of(UID)
            assert not world.served_by(UID)
            assert pod is None or pod.annotation is Annotation.ABSENT
            if inside:
                assert (inside.rules, inside.routes) in {("", False), ("tampered", False)}
                assert not inside.rest


TestEnrollment = EnrollmentMachine.TestCase
TestEnrollment.settings = settings(max_examples=4 * settings().max_examples)
