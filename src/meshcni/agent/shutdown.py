"""Keep what is installed, or clean it up? The decision at the end of the agent's life, as one table, and its evidence.

A rollout, a node going down and an API server out of reach must leave plugin and conf in place, or pods that start in
the gap run outside the mesh. An uninstall must not, or no pod of the node starts any more. Only the API server can tell
them apart, and not every chart lets us ask it the direct question.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

from meshcni import istio
from meshcni.agent.nodeaffinity import excludes_node, pod_spec_excludes_node
from meshcni.errors import KubeError

Object = Mapping[str, Any]

CALL_SECONDS = 4.0
DEADLINE_SECONDS = 15.0  # of the chart's 30 s grace period; the rest is for cleaning up
PERSISTENCE_SECONDS = 3.0  # an API server that has just restarted answers 403 to everybody for about a second
SETTLE_SECONDS = 3.0  # an uninstall marks the pods of a DaemonSet one after the other
PAUSE_SECONDS = 0.5
SILENT_ROUNDS = 3  # without any answer
# The API server takes the token of a deleted account for ten seconds more, and forbids it everything: an agent
# to which nothing else has ever been said waits for the 401 that follows.
REMEMBERED_SECONDS = 11.0


class Outcome(Enum):
    """What happens to binary, conf and kubeconfig."""

    KEEP = "keep"
    CLEAN_UP = "clean up"


class Answer(Enum):
    """What the API server said about our DaemonSet."""

    FOUND = "found"
    EXCLUDES_NODE = "found, but no longer for this node"
    GONE = "gone or being deleted"
    WITHDRAWN = "our account or role was withdrawn"
    FORBIDDEN = "we may not read it, everything else works"
    NONE = "no answer"


@dataclass(frozen=True, slots=True)
class AgentPod:
    """An agent pod as far as the decision needs it; `created` is the API's timestamp, which sorts as text."""

    name: str
    terminating: bool
    revision: str = ""  # label controller-revision-hash
    created: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known when the agent ends. `own` and `siblings` are filled when `answer` is FORBIDDEN."""

    answer: Answer
    ambient: bool = False
    safe_upgrade_disabled: bool = False
    own: AgentPod | None = None
    siblings: tuple[AgentPod, ...] = ()
    refused: bool = False  # everything, and it never was otherwise
    detail: str = ""  # what was seen, for people

    @property
    def newer_sibling(self) -> bool:
        """Whether a sibling of another revision was created after our own pod: a rollout is under way."""
        own = self.own
        return own is not None and any(
            pod.revision and own.revision and pod.revision != own.revision and pod.created > own.created
            for pod in self.siblings
        )


@dataclass(frozen=True, slots=True)
class ShutdownDecision:
    """The outcome, the row of the table that gave it, and why in words."""

    outcome: Outcome
    row: str
    why: str

    @property
    def clean_up(self) -> bool:
        """Whether to call `Installer.uninstall`."""
        return self.outcome is Outcome.CLEAN_UP


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: when it applies, and what follows."""

    name: str
    applies: Callable[[Evidence], bool]
    outcome: Outcome
    why: str


WAY_OUT = (
    f"if no agent is to come back to this node, '{istio.AGENT_NAME} uninstall' there takes everything away, and a file "
    f"'{istio.UNINSTALLED_MARKER_NAME}' in the run directory lets pods pass until then"
)
# The first row that applies decides; docs/shutdown.md explains them to people.
TABLE = (
    Row("0", lambda e: e.safe_upgrade_disabled, Outcome.CLEAN_UP, "DISABLE_SAFE_UPGRADE is set"),
    Row(
        "1", lambda e: e.answer in (Answer.GONE, Answer.EXCLUDES_NODE), Outcome.CLEAN_UP, "the DaemonSet left this node"
    ),
    Row("2", lambda e: e.answer is Answer.FOUND, Outcome.KEEP, "the DaemonSet is still there: an upgrade or a restart"),
    Row("3", lambda e: e.answer is Answer.NONE, Outcome.KEEP, f"the API server gave no usable answer; {WAY_OUT}"),
    Row(
        "4",
        lambda e: e.answer is Answer.WITHDRAWN,
        Outcome.CLEAN_UP,
        "our account was withdrawn: an uninstall",
    ),
    Row("5a", lambda e: e.own is not None and not e.own.terminating, Outcome.KEEP, "our own pod is not being deleted"),
    Row("5b", lambda e: not all(pod.terminating for pod in e.siblings), Outcome.KEEP, "other agent pods stay"),
    Row("5c", lambda e: e.newer_sibling, Outcome.KEEP, "an agent pod of a newer revision exists"),
    Row("5d", lambda e: bool(e.siblings), Outcome.CLEAN_UP, "all agent pods are being deleted"),
    Row("5e", lambda e: e.ambient, Outcome.KEEP, "the only agent pod of the cluster, in ambient mode"),
    Row("5f", lambda e: True, Outcome.CLEAN_UP, "the only agent pod of the cluster, in sidecar mode"),
)


def decide_shutdown(evidence: Evidence) -> ShutdownDecision:
    """The first row of `TABLE` that applies."""
    row = next(row for row in TABLE if row.applies(evidence))
    why = f"{row.why} ({evidence.detail})" if evidence.detail else row.why
    return ShutdownDecision(row.outcome, row.name, why)


class Api(Protocol):
    """The two calls that the evidence needs; kube.client.KubeApi has them. Both raise KubeError."""

    async def get_object(self, group: str, version: str, resource: str, namespace: str | None, name: str, /) -> Object:
        """One object as JSON."""

    async def list_objects(
        self, group: str, version: str, resource: str, namespace: str | None = None, /, *, label_selector: str = ""
    ) -> Sequence[Object]:
        """The objects that match."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are; `worked_before`: the API server has answered a list or get of ours since the start."""

    namespace: str
    pod_name: str
    node_name: str
    worked_before: bool = True


async def gather(
    api: Api | None,
    identity: Identity,
    *,
    ambient: bool,
    safe_upgrade_disabled: bool = False,
    deadline_seconds: float = DEADLINE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Evidence:
    """Ask the API server until its answer is certain, at most `deadline_seconds`; never raises but on cancellation."""
    start = Evidence(Answer.NONE, ambient=ambient, safe_upgrade_disabled=safe_upgrade_disabled)
    if safe_upgrade_disabled:
        return start
    if api is None:
        return replace(start, detail="no API server is configured")
    if not identity.namespace:  # a question without one gets a 404, whatever there is
        return replace(start, detail="POD_NAMESPACE is not set, so our DaemonSet cannot be asked for")
    try:
        async with asyncio.timeout(deadline_seconds):  # a look of its own may take longer than what is left
            return await _ask_until_certain(api, identity, start, clock() + deadline_seconds, clock, sleep)
    except TimeoutError:
        return replace(start, detail=f"no answer within {deadline_seconds:g} s")


async def _ask_until_certain(
    api: Api,
    identity: Identity,
    start: Evidence,
    end: float,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
) -> Evidence:
    same_kind: Uncertain | None = None
    since, rounds = clock(), 0
    while True:
        seen = await _look(api, identity, start)
        now = clock()
        kind = _uncertain_kind(seen)
        if kind is not same_kind:
            same_kind, since, rounds = kind, now, 0
        rounds += 1
        if kind is None or now - since >= kind.seconds or rounds >= kind.rounds:
            return seen
        if now + PAUSE_SECONDS >= end:
            if seen.answer is Answer.WITHDRAWN:
                return replace(seen, answer=Answer.NONE, detail=f"{seen.detail}, but not for long enough")
            return seen
        await sleep(PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class Uncertain:
    """An answer that has to stay the same for `seconds`, or come `rounds` times, before it is believed."""

    seconds: float
    rounds: float = float("inf")


WITHDRAWN = Uncertain(PERSISTENCE_SECONDS)
UNSETTLED = Uncertain(SETTLE_SECONDS)
SILENT = Uncertain(float("inf"), SILENT_ROUNDS)
# A starting API server can refuse the first question of a look and answer the second: one more look tells.
REFUSED_ONCE = Uncertain(float("inf"), 2)
REFUSED_ALWAYS = Uncertain(REMEMBERED_SECONDS)


def _uncertain_kind(seen: Evidence) -> Uncertain | None:
    """None when the answer can be believed at once."""
    if seen.answer is Answer.FORBIDDEN:
        return UNSETTLED if decide_shutdown(seen).row == "5b" else REFUSED_ONCE
    if seen.answer is Answer.NONE and seen.refused:
        return REFUSED_ALWAYS
    return {Answer.WITHDRAWN: WITHDRAWN, Answer.NONE: SILENT}.get(seen.answer)


async def _look(api: Api, identity: Identity, start: Evidence) -> Evidence:
    """One round of questions."""
    try:
        async with asyncio.timeout(CALL_SECONDS):
            daemonset = await api.get_object("apps", "v1", "daemonsets", identity.namespace, istio.DAEMONSET_NAME)
    except (KubeError, TimeoutError) as error:
        return await _without_daemonset(api, identity, start, error)
    if daemonset.get("metadata", {}).get("deletionTimestamp"):
        return replace(start, answer=Answer.GONE, detail="its deletionTimestamp is set")
    try:
        async with asyncio.timeout(CALL_SECONDS):
            node = await api.get_object("", "v1", "nodes", None, identity.node_name)
    except (KubeError, TimeoutError) as error:
        return replace(start, answer=Answer.FOUND, detail=f"the node could not be read: {_words(error)}")
    if excludes_node(daemonset, node):
        return replace(start, answer=Answer.EXCLUDES_NODE, detail=f"node {identity.node_name} is no longer selected")
    return replace(start, answer=Answer.FOUND)


async def _without_daemonset(api: Api, identity: Identity, start: Evidence, error: Exception) -> Evidence:
    """What an error on the DaemonSet means, asking for the sibling pods where that can tell."""
    status, detail = _status(error), _words(error)
    if status == 404:
        return replace(start, answer=Answer.GONE, detail=detail)
    if status == 401:  # the client has read its token again before it says so
        return replace(start, answer=Answer.WITHDRAWN, detail=detail)
    if status != 403:
        return replace(start, answer=Answer.NONE, detail=detail)
    label, value = istio.AGENT_POD_LABEL
    try:
        async with asyncio.timeout(CALL_SECONDS):
            found = await api.list_objects("", "v1", "pods", identity.namespace, label_selector=f"{label}={value}")
    except (KubeError, TimeoutError) as list_error:
        refused = _status(list_error) in (401, 403)
        answer = Answer.WITHDRAWN if refused and identity.worked_before else Answer.NONE
        return replace(start, answer=answer, refused=refused, detail=_words(list_error))
    pods = [_agent_pod(item) for item in found if item.get("status", {}).get("phase") not in ("Succeeded", "Failed")]
    own = next((pod for pod in pods if pod.name == identity.pod_name), None)
    siblings = tuple(pod for pod in pods if pod.name != identity.pod_name)
    seen = replace(
        start,
        answer=Answer.FORBIDDEN,
        own=own,
        siblings=siblings,
        detail=f"the DaemonSet may not be read; {len(siblings)} other agent pods, "
        f"{sum(pod.terminating for pod in siblings)} of them being deleted",
    )
    spec = next((item.get("spec") or {} for item in found if own and item["metadata"]["name"] == own.name), {})
    if decide_shutdown(seen).row == "5b" and await _lost_its_node(api, identity, spec):
        return replace(start, answer=Answer.EXCLUDES_NODE, detail=f"node {identity.node_name} has other labels now")
    return seen


async def _lost_its_node(api: Api, identity: Identity, own_spec: Object) -> bool:
    """Whether the node's labels no longer fit our own pod: no successor comes, although other agent pods stay."""
    if not own_spec:
        return False
    try:
        async with asyncio.timeout(CALL_SECONDS):
            node = await api.get_object("", "v1", "nodes", None, identity.node_name)
    except (KubeError, TimeoutError):
        return False
    return pod_spec_excludes_node(own_spec, node)


def _agent_pod(item: Object) -> AgentPod:
    metadata = item.get("metadata", {})
    return AgentPod(
        name=str(metadata.get("name", "")),
        terminating=bool(metadata.get("deletionTimestamp")),
        revision=str((metadata.get("labels") or {}).get("controller-revision-hash", "")),
        created=str(metadata.get("creationTimestamp") or ""),
    )


def _status(error: Exception) -> int:
    return error.status if isinstance(error, KubeError) else 0


def _words(error: Exception) -> str:
    return error.message if isinstance(error, KubeError) else f"no answer within {CALL_SECONDS:g} s"
