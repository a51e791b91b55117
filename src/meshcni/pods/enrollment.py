"""A pod's way into ambient redirection and out of it: what is desired, what is there, and the next step, as tables.

The order of the steps is the order in which no connection fails and nothing bypasses the mesh:

- a pod that runs: policy rule and route, ztunnel's listeners, then the packet rules that lead to them; measured against
  the real ztunnel, 0 of 2,657 connections fail so, and 326 of 2,126 with the rules first;
- a sandbox being made: nothing runs in it, so the rules come first and a failure costs the least;
- out again: first the rules that capture new connections, so that none meets a closed listener; then the annotation,
  because peers go by it; then ztunnel; last the rest of the rules, which connections under way need until their end.
  What fails there holds up the rest: a pod that cannot be let go of stays served.

The annotation is also what a fresh agent knows of the work of an earlier one, so a pod that runs is marked as pending
before anything is changed in it, and until nothing of ours is left in it. An API server that does not take the mark
stops nothing: a fresh agent looks at whatever belongs.

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
    in the netns. `released`: but nothing of it captures a new connection. `unseen`: and an earlier agent may have put a
    whole rule set there, in which case nothing may open it. `acked`: the netns for which ztunnel, by its newest
    connection, has listeners. `announced`: some ztunnel may hold the pod. `claimed`: the host's set may hold more of it
    than `addresses`. `enrolled`: it is captured, so a failure must never open it.
    """

    routes: bool = False
    rules: str = ""
    touched: bool = False
    released: bool = False
    unseen: bool = False
    acked: NetnsId | None = None
    announced: bool = False
    addresses: Addresses = frozenset()
    claimed: bool = False
    annotation: Annotation = Annotation.ABSENT
    enrolled: bool = False


NOTHING: Final = Actual()


def adopted(annotation: Annotation, *, belongs: bool = False) -> Actual:
    """Tell what a fresh agent must assume of a pod: all that an earlier one may have done.

    `belongs`: the pod should be enrolled, so that work on it may have been cut short before its annotation was written.
    """
    if annotation is Annotation.ABSENT and not belongs:
        return NOTHING
    is_enrolled = annotation is Annotation.ENABLED
    return Actual(
        touched=True,
        unseen=not is_enrolled,
        announced=True,
        claimed=True,
        annotation=annotation,
        enrolled=is_enrolled,
    )


class Step(Enum):
    """One thing to do for one pod."""

    FIND_NETNS = "find-netns"
    LOOK = "look"
    ROUTES = "routes"
    ADD = "ztunnel-add"
    RULES = "rules"
    ADDRESSES = "addresses"
    ENABLE = "annotate-enabled"
    PEND = "annotate-pending"
    RELEASE = "release"
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
    """One row of a table: the step, when it is needed, what its failure means, and whether what follows needs it."""

    step: Step
    needed: Callable[[Desired, Actual], bool]
    failure: Failure = Failure.RETRY
    gates: bool = False


def is_captured(desired: Desired, actual: Actual) -> bool:
    """Tell whether rules, listeners and, when there are any, addresses are all there."""
    reachable = not desired.addresses or actual.addresses == desired.addresses
    return _has_rules(desired, actual) and not _lacks_ack(desired, actual) and reachable


def _has_rules(desired: Desired, actual: Actual) -> bool:
    return desired.rules != "" and actual.rules == desired.rules


def _lacks_ack(desired: Desired, actual: Actual) -> bool:
    return actual.acked is None or actual.acked != desired.netns


_ADD = Row(Step.ADD, _lacks_ack, Failure.UNDO)
_RULES = Row(Step.RULES, lambda d, a: not _has_rules(d, a), Failure.UNDO)
# No address is an address that is not known: entries of an earlier agent stay, or probes fail after a reboot.
_ADDRESSES = Row(Step.ADDRESSES, lambda d, a: bool(d.addresses) and a.addresses != d.addresses, Failure.UNDO)
# Peers use the tunnel port as soon as they see it, so all the rest has to be true.
_ENABLE = Row(
    Step.ENABLE,
    lambda d, a: (
        d.in_api
        and a.annotation is not Annotation.ENABLED
        and _has_rules(d, a)
        and not _lacks_ack(d, a)
        and (a.enrolled or is_captured(d, a))
    ),
)
_REMOVE_RULES = Row(Step.REMOVE_RULES, lambda d, a: a.touched and d.netns is not None)
_WITHDRAW = Row(Step.WITHDRAW, lambda d, a: d.in_api and a.annotation is not Annotation.ABSENT)
_DEL = Row(Step.DEL, lambda _d, a: a.announced)
_REMOVE_ADDRESSES = Row(Step.REMOVE_ADDRESSES, lambda _d, a: a.claimed or bool(a.addresses))

_UNENABLE = Row(Step.PEND, lambda d, a: d.in_api and a.annotation is Annotation.ENABLED, gates=True)

_LEAVE = (
    # One without an address cannot be found, and has no sandbox that works.
    Row(Step.FIND_NETNS, lambda d, a: a.touched and d.netns is None and bool(d.addresses), gates=True),
    Row(Step.RELEASE, lambda d, a: a.touched and not a.released and d.netns is not None, gates=True),
    _UNENABLE,
    _DEL,
    replace(_REMOVE_RULES, gates=True),
    _WITHDRAW,
    _REMOVE_ADDRESSES,
)
_END = (_REMOVE_ADDRESSES, _DEL, _WITHDRAW)  # nothing runs there any more, and the address may be another pod's soon

TABLES: Final[dict[tuple[Intent, Life], tuple[Row, ...]]] = {
    (Intent.ENROLL, Life.STARTING): (_RULES, _ADD, _ADDRESSES, _ENABLE),
    (Intent.ENROLL, Life.RUNNING): (
        Row(Step.FIND_NETNS, lambda d, _a: d.netns is None, gates=True),
        Row(Step.LOOK, lambda _d, a: a.unseen, gates=True),
        Row(Step.PEND, lambda d, a: d.in_api and a.annotation is Annotation.ABSENT and not a.enrolled),
        Row(Step.ROUTES, lambda _d, a: not a.routes and not a.enrolled, Failure.UNDO),  # RULES looks at them too
        _ADD,
        _RULES,
        _ADDRESSES,
        _ENABLE,
    ),
    (Intent.ENROLL, Life.ENDED): _END,
    (Intent.LEAVE, Life.STARTING): _LEAVE,
    (Intent.LEAVE, Life.RUNNING): _LEAVE,
    (Intent.LEAVE, Life.ENDED): _END,
}
UNDO: Final[dict[Life, tuple[Row, ...]]] = {
    Life.STARTING: (_REMOVE_RULES, _DEL, _REMOVE_ADDRESSES),  # the runtime gives the sandbox up, whatever stays in it
    Life.RUNNING: (replace(_REMOVE_RULES, gates=True), _UNENABLE, _DEL, _REMOVE_ADDRESSES),
    Life.ENDED: _END,
}


def next_row(
    desired: Desired, actual: Actual, *, undoing: bool = False, failed: Collection[Step] = (), settled: bool = True
) -> Row | None:
    """Return the first row whose step is needed, None when there is nothing to do.

    `undoing`: a failure is being undone. `failed`: steps that have failed in this pass and wait for the next one.
    `settled`: ztunnel's newest connection has its snapshot; until then an enrolled pod's Add is the snapshot's own.
    """
    rows = UNDO[desired.life] if undoing else TABLES[desired.intent, desired.life]
    for row in rows:
        if row.step is Step.ADD and actual.enrolled and not settled:
            continue
        if not row.needed(desired, actual):
            continue
        if row.step is Step.FIND_NETNS and not desired.addresses:
            return None  # the sandbox is still to come
        if row.step not in failed:
            return row
        if row.gates or undoes(row, actual):
            return None
    return None


def is_desired(desired: Desired, actual: Actual, *, settled: bool = True) -> bool:
    """Tell whether everything is as it should be."""
    return next_row(desired, actual, settled=settled) is None


def undoes(row: Row, actual: Actual) -> bool:
    """Tell whether the failure of `row` is undone: never for a pod that is captured already."""
    return row.failure is Failure.UNDO and not actual.enrolled


def is_named(desired: Desired, actual: Actual, *, undoing: bool = False) -> bool:
    """Tell whether a snapshot for ztunnel names the pod: some ztunnel may hold it, and a Del is not what comes next."""
    if not actual.announced or desired.life is Life.ENDED:
        return False
    if desired.life is Life.STARTING and not _has_rules(desired, actual):
        return False  # ztunnel may have it for the sandbox before this one
    row = next_row(desired, actual, undoing=undoing)
    return row is None or row.step is not Step.DEL


def after(step: Step, desired: Desired, actual: Actual) -> Actual:
    """Return what is there after `step` succeeded. Later the acknowledgement is the link's to tell."""
    match step:
        case Step.LOOK:
            actual = replace(actual, unseen=False)
        case Step.ROUTES:
            actual = replace(actual, routes=True, touched=True)
        case Step.ADD:
            actual = replace(actual, announced=True, acked=desired.netns)
        case Step.RULES:
            actual = replace(actual, routes=True, touched=True, released=False, unseen=False, rules=desired.rules)
        case Step.ADDRESSES:
            actual = replace(actual, addresses=desired.addresses, claimed=False)
        case Step.ENABLE:
            actual = replace(actual, annotation=Annotation.ENABLED)
        case Step.PEND:
            actual = replace(actual, annotation=Annotation.PENDING)
        case Step.RELEASE:
            actual = replace(actual, rules="", released=True, unseen=False, enrolled=False)
        case Step.REMOVE_RULES:
            actual = replace(
                actual, routes=False, rules="", touched=False, released=False, unseen=False, enrolled=False
            )
        case Step.WITHDRAW:
            actual = replace(actual, annotation=Annotation.ABSENT)
        case Step.DEL:
            actual = replace(actual, announced=False, acked=None)
        case Step.REMOVE_ADDRESSES:
            actual = replace(actual, addresses=frozenset(), claimed=False)
    return replace(actual, enrolled=True) if is_captured(desired, actual) else actual


def begun(step: Step, actual: Actual) -> Actual:
    """Return what must be assumed while `step` is under way, and after it failed: it may have happened in part."""
    match step:
        case Step.ROUTES:
            return replace(actual, touched=True)
        case Step.RULES:
            return replace(actual, touched=True, released=False, rules="")
        case Step.RELEASE:
            return replace(actual, rules="")
        case Step.REMOVE_RULES:
            return replace(actual, routes=False, rules="")
        case Step.ADD:
            return replace(actual, announced=True)
        case Step.ADDRESSES | Step.REMOVE_ADDRESSES:
            return replace(actual, addresses=frozenset(), claimed=True)
    return actual


def seen(desired: Desired, actual: Actual) -> Actual:
    """Return what is there when an earlier agent's rules were found to be the wanted ones: the pod is captured."""
    return replace(actual, routes=True, rules=desired.rules, touched=True, released=False, enrolled=True)


def in_new_sandbox(actual: Actual, *, by_add: bool) -> Actual:
    """Return what is left of `actual` in another netns: rules and routes stayed in the old one.

    In a sandbox that an ADD reports nothing runs, so a failure may be undone; in one that was found the pod runs.
    """
    enrolled = actual.enrolled and not by_add
    return replace(actual, routes=False, rules="", touched=enrolled, released=False, unseen=False, enrolled=enrolled)
