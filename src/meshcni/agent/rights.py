"""What the agent's service account must be allowed at the API server, and which of it is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from meshcni import istio
from meshcni.agent.needs import Weight
from meshcni.errors import KubeError
from meshcni.kube.client import DAEMONSETS, EVENTS, NAMESPACES, NODES, PODS, Resource
from meshcni.pods.repair import Mode

# Values of the chart, as people set them.
ALWAYS, AMBIENT, REPAIR = "always", "ambient.enabled=true", "repair.enabled=true"
REVIEW_SECONDS = 5.0  # for all questions, one after the other on one connection; nothing is installed before
# That a "yes" counts for. Longer than a review takes that gets a single answer from each attempt, and bounded: a right
# may be withdrawn while nobody answers.
KEEP_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Right:
    """One verb on one kind of object; `name` is empty where it holds for all of them.

    `without` says what is not done, or not known, while it is refused; `chart` the values of the chart that grant it.
    """

    verb: str
    resource: Resource
    needed_for: str
    weight: Weight = Weight.STOPS
    subresource: str = ""
    name: str = ""
    without: str = ""
    chart: str = ALWAYS

    @property
    def target(self) -> str:
        """The resource in RBAC's words: `pods/status`."""
        return "/".join(filter(None, (self.resource.plural, self.subresource)))

    def __str__(self) -> str:
        return f"{self.verb} {self.target}"

    def as_object(self) -> dict[str, str]:
        """For the status document."""
        return {"right": str(self), "weight": self.weight.name.lower(), "without": self.without, "chart": self.chart}


_MEMBERS = "knowing which pods of this node belong to the mesh"
_LABELS = "knowing which namespaces are in ambient mode"
_DEPARTURE = "telling at the end whether the agent was taken off this node"
_NOTHING_INSTALLED = "nothing is installed on the node"
# Where an earlier agent has installed the plugin, one without rights answers ADDs too: what nobody knows must fail.
_NOT_KNOWN = (
    f"{_NOTHING_INSTALLED}, and where the plugin is in place already, pods that nobody knows do not start, in the mesh "
    "or not"
)
PODS_RIGHTS = (
    Right("get", PODS, _MEMBERS, without=f"{_NOT_KNOWN}: a pod that the watch has not shown yet is not known"),
    Right("list", PODS, _MEMBERS, without=f"{_NOTHING_INSTALLED}: no pod is known before its ADD asks for it"),
    Right("watch", PODS, _MEMBERS, without=f"{_NOTHING_INSTALLED}: what is known of pods grows old"),
)
AMBIENT_RIGHTS = (
    *(
        Right(verb, NAMESPACES, _LABELS, without=loss, chart=AMBIENT)
        for verb, loss in (
            ("get", f"{_NOT_KNOWN}: a namespace that the watch has not shown yet is not known"),
            ("list", f"{_NOTHING_INSTALLED}: no namespace is known before an ADD in it asks for it"),
            ("watch", f"{_NOTHING_INSTALLED}: labels that change are not noticed"),
        )
    ),
    Right(
        "patch",
        PODS,
        "telling the mesh which pods are captured",
        subresource="status",
        without=f"{_NOTHING_INSTALLED}: peers would send plain traffic to a captured pod that is not annotated",
        chart=AMBIENT,
    ),
)
EVENTS_RIGHT = Right(
    "create",
    EVENTS,
    "Events at pods that cannot join the mesh",
    Weight.DEGRADES,
    without="`kubectl describe pod` shows nothing of ours; log, metrics and `install-cni status` still do",
    chart=REPAIR,
)
DEPARTURE_RIGHTS = (
    Right(
        "get",
        NODES,
        _DEPARTURE,
        Weight.HELPS,
        without="a DaemonSet that leaves this node by labels or affinity looks like a rollout: the files stay",
    ),
    Right(
        "get",
        DAEMONSETS,
        _DEPARTURE,
        Weight.HELPS,
        name=istio.DAEMONSET_NAME,
        without="the other agent pods decide instead, and the only agent of a cluster cannot tell a rollout from an "
        "uninstall: it cleans up in sidecar mode, and keeps everything in ambient mode",
        chart=f"{ALWAYS}; Istio's own chart: {AMBIENT}",
    ),
)
# By what repair does with a broken pod; to repair it in place needs no right of its own.
REPAIR_RIGHTS = {
    Mode.DELETE: Right(
        "delete",
        PODS,
        "repair by deletion",
        Weight.DEGRADES,
        without="broken pods stay as they are, and are told by Event and metric",
        chart=f"{REPAIR} with repair.deletePods=true, repair.repairPods=false",
    ),
    Mode.LABEL: Right(
        "patch",
        PODS,
        "labels at broken pods",
        Weight.DEGRADES,
        subresource="status",
        without="broken pods get no label, and are told by Event and metric",
        chart=f"{REPAIR} with repair.labelPods=true, repair.repairPods=false, repair.deletePods=false",
    ),
}
# What the roles of Istio's chart grant beside these, and this agent never asks for.
UNUSED = ("list nodes", "watch nodes", "patch events", "update pods/status")


def wanted(*, ambient: bool, repair: Mode | None = None) -> tuple[Right, ...]:
    """The rights of an agent in that mode; what asks for each of them is kube.client's caller of the same name."""
    found = [*PODS_RIGHTS, *(AMBIENT_RIGHTS if ambient else ())]
    if repair in REPAIR_RIGHTS and str(REPAIR_RIGHTS[repair]) not in map(str, found):
        found.append(REPAIR_RIGHTS[repair])
    return (*found, EVENTS_RIGHT, *DEPARTURE_RIGHTS)


class Asks(Protocol):
    """What a review needs of KubeApi."""

    async def may(
        self, verb: str, resource: Resource, *, subresource: str, name: str, namespace: str, timeout: float
    ) -> bool:
        """Whether the API server would allow it. Raises ApiError."""


class Answers:
    """What the API server has said of single rights, so that a review goes on where the last one ran out of time.

    A refusal is kept until the review is complete, for the right may be granted any moment; a "yes" for KEEP_SECONDS.
    `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given: dict[Right, tuple[bool, float]] = {}  # whether it is allowed, and when that was said

    def fresh(self) -> dict[Right, bool]:
        """Those that still count: whether each right is allowed."""
        oldest = self._clock() - KEEP_SECONDS
        self._given = {right: given for right, given in self._given.items() if given[1] > oldest}
        return {right: allowed for right, (allowed, _when) in self._given.items()}

    def keep(self, right: Right, *, allowed: bool) -> None:
        """Take in one answer."""
        self._given[right] = (allowed, self._clock())

    def ask_refused_again(self) -> None:
        """The review is complete: what was refused is asked for again by the next one."""
        self._given = {right: given for right, given in self._given.items() if given[0]}

    def forget(self) -> None:
        """Ask for everything again: there is reason to doubt what was said."""
        self._given.clear()


@dataclass(frozen=True, slots=True)
class Review:
    """What the API server says of a list of rights.

    `problem` says why nothing is allowed at all: no token, or one that is refused. `known` is false while not every
    right was answered; `refused` then has those that stop the agent, whatever the others are.
    """

    refused: tuple[Right, ...] = ()
    problem: str = ""
    known: bool = True


UNKNOWN = Review(known=False)


async def review(
    api: Asks,
    rights: Sequence[Right],
    namespace: str,
    refused_lists: frozenset[str],
    answers: Answers,
) -> Review:
    """Ask for each right that `answers` does not tell of, and put what is said there. Raises nothing of the API's.

    `refused_lists`: resources (plural) whose lists the API server refuses right now. They tell where the question
    itself is refused, which every authenticated account may ask unless an administrator has taken that away.
    `namespace` is the agent's, for what is asked for there alone.
    """
    said = answers.fresh()
    try:
        async with asyncio.timeout(REVIEW_SECONDS):
            for right in rights:
                if right not in said:
                    said[right] = await _allowed(api, right, namespace)
                    answers.keep(right, allowed=said[right])
    except TimeoutError:
        return _unfinished(rights, said)
    except KubeError as error:
        if error.status not in (401, 403):
            return _unfinished(rights, said)
        answers.forget()  # who may not even ask has lost what was allowed, too
        if error.status == 401:
            return Review(tuple(rights), str(error))
        return Review(
            tuple(right for right in rights if right.resource.plural in refused_lists and not right.subresource)
        )
    answers.ask_refused_again()
    return Review(_refused(rights, said))


def _refused(rights: Sequence[Right], said: dict[Right, bool]) -> tuple[Right, ...]:
    return tuple(right for right in rights if said.get(right) is False)


def _unfinished(rights: Sequence[Right], said: dict[Right, bool]) -> Review:
    """A refusal that stops the agent does so whatever is not answered yet; of all others nothing is told by halves."""
    return Review(tuple(right for right in _refused(rights, said) if right.weight is Weight.STOPS), known=False)


async def _allowed(api: Asks, right: Right, namespace: str) -> bool:
    return await api.may(
        right.verb,
        right.resource,
        subresource=right.subresource,
        name=right.name,
        namespace=namespace if right.name else "",
        timeout=REVIEW_SECONDS,
    )
