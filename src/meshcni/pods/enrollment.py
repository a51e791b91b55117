"""A pod's way into ambient redirection and out of it: what is desired, what is there, and the next step, as tables.

The order of the steps is the order in which no connection fails and nothing bypasses the mesh:

- a pod that runs: policy rule and route, ztunnel's listeners, then the packet rules that lead to them; measured against
  the real ztunnel, 0 of 2,657 connections fail so, and 326 of 2,126 with the rules first;
- a sandbox being made: nothing runs in it, so the rules come first and a failure costs the least;
- out again: the rules first, so that no connection meets a closed listener; then the annotation, so that an agent that
  dies in between leaves a state its successor understands; then ztunnel.

Pure: the agent performs the steps and reports what became of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from meshcni import istio
from meshcni.pods.eligibility import Verdict
from meshcni.pods.model import Pod

Addresses = frozenset[IPv4Address | IPv6Address]


class NetnsId(NamedTuple):
    """Which network namespace: device and inode of its file, as `fstat` tells them."""

    device: int
    inode: int


class Annotation(Enum):
    """What `ambient.istio.io/redirection` of a pod says; any other value counts as absent."""

    ABSENT = ""
    PENDING = istio.REDIRECTION_PENDING
    ENABLED = istio.REDIRECTION_ENABLED


def annotation_of(pod: Pod) -> Annotation:
    """Read a pod's annotation."""
    text = pod.annotations.get(istio.AMBIENT_REDIRECTION, "")
    return Annotation(text) if text in (istio.REDIRECTION_PENDING, istio.REDIRECTION_ENABLED) else Annotation.ABSENT


class Intent(Enum):
    """Where a pod belongs."""

    ENROLL = "enroll"
    LEAVE = "leave"


def intent_of(verdict: Verdict, is_ours: bool) -> Intent:
    """Tell where a pod with `verdict` belongs; one that nothing is known about stays where it is (`is_ours`)."""
    if verdict is Verdict.ERROR:
        return Intent.ENROLL if is_ours else Intent.LEAVE
    return Intent.ENROLL if verdict is Verdict.AMBIENT else Intent.LEAVE


class Life(Enum):
    """How far a pod is: its sandbox is being made (an ADD waits), it runs, or nothing of it runs any more."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Desired:
    """What a pod should be. `rules` names the wanted rule set; `in_api`: there is an object to annotate."""

    intent: Intent
    life: Life
    netns: NetnsId | None
    rules: str
    addresses: Addresses
    in_api: bool = True


@dataclass(frozen=True, slots=True)
class Actual:
    """What is known to be there; everything but the annotation is empty in a fresh agent.

    `rules` is the rule set known to be in the netns, empty when that is not known. `touched`: something of ours may be
    in the netns. `acked`: the netns for which ztunnel, by its newest connection, has listeners. `announced`: some
    ztunnel may hold the pod. `enrolled`: it is captured, so a failure must never open it.
    """

    routes: bool = False
    rules: str = ""
    touched: bool = False
    acked: NetnsId | None = None
    announced: bool = False
    addresses: Addresses = frozenset()
    annotation: Annotation = Annotation.ABSENT
    enrolled: bool = False


NOTHING: Final = Actual()


def adopted(annotation: Annotation) -> Actual:
    """Tell what a fresh agent must assume of a pod that an earlier one annotated: all of it may be there."""
    if annotation is Annotation.ABSENT:
        return NOTHING
    return Actual(touched=True, announced=True, annotation=annotation, enrolled=True)


class Step(Enum):
    """One thing to do for one pod."""

    FIND_NETNS = "find-netns"
    ROUTES = "routes"
    ADD = "ztunnel-add"
    RULES = "rules"
    ADDRESSES = "addresses"
    ENABLE = "annotate-enabled"
    PEND = "annotate-pending"
    REMOVE_RULES = "remove-rules"
    WITHDRAW = "remove-annotation"
    DEL = "ztunnel-del"
    REMOVE_ADDRESSES = "remove-addresses"


class Failure(Enum):
    """What the failure of a step means."""

    UNDO = "undo what was done, then try again later"  # unless the pod is enrolled already: then it stays captured
    RETRY = "try again later"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: the step, when it is needed, what its failure means."""

    step: Step
    needed: Callable[[Desired, Actual], bool]
    failure: Failure = Failure.RETRY


def _lacks_ack(desired: Desired, actual: Actual) -> bool:
    return actual.acked is None or actual.acked != desired.netns


_FIND = Row(Step.FIND_NETNS, lambda d, _a: d.netns is None)
_ADD = Row(Step.ADD, _lacks_ack, Failure.UNDO)
_RULES = Row(Step.RULES, lambda d, a: a.rules != d.rules, Failure.UNDO)
# No address is an address that is not known: entries of an earlier agent stay, or probes fail after a reboot.
_ADDRESSES = Row(Step.ADDRESSES, lambda d, a: bool(d.addresses) and a.addresses != d.addresses, Failure.UNDO)
# Peers use the tunnel port as soon as they see it, so all the rest has to be true.
_ENABLE = Row(
    Step.ENABLE,
    lambda d, a: (
        d.in_api
        and a.annotation is not Annotation.ENABLED
        and a.rules == d.rules
        and a.enrolled
        and not _lacks_ack(d, a)
    ),
)
_REMOVE_RULES = Row(Step.REMOVE_RULES, lambda d, a: a.touched and d.netns is not None)
_WITHDRAW = Row(Step.WITHDRAW, lambda d, a: d.in_api and a.annotation is not Annotation.ABSENT)
_DEL = Row(Step.DEL, lambda _d, a: a.announced)
_REMOVE_ADDRESSES = Row(Step.REMOVE_ADDRESSES, lambda _d, a: bool(a.addresses))

TABLES: Final[dict[tuple[Intent, Life], tuple[Row, ...]]] = {
    (Intent.ENROLL, Life.STARTING): (_RULES, _ADD, _ADDRESSES, _ENABLE),
    (Intent.ENROLL, Life.RUNNING): (
        _FIND,
        Row(Step.ROUTES, lambda _d, a: not a.routes and not a.enrolled, Failure.UNDO),  # RULES looks at them too
        _ADD,
        _RULES,
        _ADDRESSES,
        _ENABLE,
    ),
    (Intent.LEAVE, Life.RUNNING): (
        Row(Step.FIND_NETNS, lambda d, a: a.touched and d.netns is None),
        _REMOVE_RULES,
        _WITHDRAW,
        _DEL,
        _REMOVE_ADDRESSES,
    ),
    (Intent.LEAVE, Life.ENDED): (_REMOVE_ADDRESSES, _DEL, _WITHDRAW),
}
UNDO: Final = (_REMOVE_RULES, _DEL, _REMOVE_ADDRESSES)


def rows_of(desired: Desired) -> tuple[Row, ...]:
    """Return the table that applies. What has ended leaves, and so does what stops belonging while it starts."""
    if desired.life is Life.ENDED:
        return TABLES[Intent.LEAVE, Life.ENDED]
    if desired.intent is Intent.LEAVE:
        return TABLES[Intent.LEAVE, Life.RUNNING]
    return TABLES[desired.intent, desired.life]


def next_row(
    desired: Desired, actual: Actual, *, undoing: bool = False, failed: Collection[Step] = (), settled: bool = True
) -> Row | None:
    """Return the first row whose step is needed, None when there is nothing to do.

    `undoing`: a failure is being undone. `failed`: steps that have failed in this pass and wait for the next one.
    `settled`: ztunnel's newest connection has its snapshot; until then an enrolled pod's Add is the snapshot's own.
    """
    rows = UNDO if undoing else rows_of(desired)
    for row in rows:
        if row.step in failed:
            if row.step is Step.FIND_NETNS or (row.step is Step.WITHDRAW and desired.life is Life.RUNNING):
                return None  # what follows needs it
            continue
        if row.step is Step.ADD and actual.enrolled and not settled:
            continue
        if row.needed(desired, actual):
            waits = row.step is Step.FIND_NETNS and not desired.addresses  # the sandbox is still to come
            return None if waits else row
    return None


def is_desired(desired: Desired, actual: Actual, *, settled: bool = True) -> bool:
    """Tell whether everything is as it should be."""
    return next_row(desired, actual, settled=settled) is None


def undoes(row: Row, actual: Actual) -> bool:
    """Tell whether the failure of `row` is undone: never for a pod that is captured already."""
    return row.failure is Failure.UNDO and not actual.enrolled


def after(step: Step, desired: Desired, actual: Actual) -> Actual:
    """Return what is there after `step` succeeded. The acknowledgement itself is read from the link, not kept here."""
    match step:
        case Step.ROUTES:
            return replace(actual, routes=True, touched=True)
        case Step.ADD:
            return _captured(desired, replace(actual, announced=True, acked=desired.netns))
        case Step.RULES:
            return _captured(desired, replace(actual, routes=True, touched=True, rules=desired.rules))
        case Step.ADDRESSES:
            return _captured(desired, replace(actual, addresses=desired.addresses))
        case Step.ENABLE:
            return replace(actual, annotation=Annotation.ENABLED)
        case Step.PEND:
            return replace(actual, annotation=Annotation.PENDING)
        case Step.REMOVE_RULES:
            return replace(actual, routes=False, rules="", touched=False, enrolled=False)
        case Step.WITHDRAW:
            return replace(actual, annotation=Annotation.ABSENT)
        case Step.DEL:
            return replace(actual, announced=False, acked=None)
        case Step.REMOVE_ADDRESSES:
            return replace(actual, addresses=frozenset())
    return actual


def _captured(desired: Desired, actual: Actual) -> Actual:
    """A pod is captured once rules, listeners and addresses are all there."""
    listening = actual.acked is not None and actual.acked == desired.netns
    reachable = not desired.addresses or actual.addresses == desired.addresses
    complete = actual.rules == desired.rules and listening and reachable
    return replace(actual, enrolled=True) if complete else actual


def begun(step: Step, actual: Actual) -> Actual:
    """Return what must be assumed while `step` is under way, and after it failed: it may have happened."""
    match step:
        case Step.ROUTES | Step.RULES:
            return replace(actual, touched=True)
        case Step.ADD:
            return replace(actual, announced=True)
    return actual


def in_new_sandbox(actual: Actual, *, by_add: bool) -> Actual:
    """Return what is left of `actual` in another netns: rules and routes stayed in the old one.

    In a sandbox that an ADD reports nothing runs, so a failure may be undone; in one that was found the pod runs.
    """
    enrolled = actual.enrolled and not by_add
    return replace(actual, routes=False, rules="", touched=not by_add and actual.enrolled, enrolled=enrolled)
