"""What stays on the node when the agent ends: the table row by row, and the evidence asked of an API server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from lab.apiserver import ApiServer
from tests.kube.worlds import double_and_api

from meshcni.agent import nodeaffinity
from meshcni.agent.shutdown import (
    PAUSE_SECONDS,
    PERSISTENCE_SECONDS,
    TABLE,
    AgentPod,
    Answer,
    Evidence,
    Identity,
    Outcome,
    decide_shutdown,
    gather,
)
from meshcni.errors import KubeError

KEEP, CLEAN_UP = Outcome.KEEP, Outcome.CLEAN_UP
OWN_ENDING = AgentPod("own", True, "rev-1", "2026-01-01T00:00:00Z")
OWN_STAYING = AgentPod("own", False, "rev-1", "2026-01-01T00:00:00Z")
ENDING = AgentPod("other", True, "rev-1", "2026-01-01T00:00:00Z")
STAYING = AgentPod("other", False, "rev-1", "2026-01-01T00:00:00Z")
NEWER_ENDING = AgentPod("newer", True, "rev-2", "2026-01-02T00:00:00Z")
OLDER_ENDING = AgentPod("older", True, "rev-0", "2025-01-01T00:00:00Z")

# Row, what is known but for the mode, outcome in sidecar mode, outcome in ambient mode.
CELLS: list[tuple[str, dict[str, Any], Outcome, Outcome]] = [
    ("0", {"answer": Answer.FOUND, "safe_upgrade_disabled": True}, CLEAN_UP, CLEAN_UP),
    ("0", {"answer": Answer.NONE, "safe_upgrade_disabled": True}, CLEAN_UP, CLEAN_UP),
    ("1", {"answer": Answer.GONE}, CLEAN_UP, CLEAN_UP),
    ("1", {"answer": Answer.EXCLUDES_NODE}, CLEAN_UP, CLEAN_UP),
    ("2", {"answer": Answer.FOUND}, KEEP, KEEP),
    ("3", {"answer": Answer.NONE}, KEEP, KEEP),
    ("4", {"answer": Answer.WITHDRAWN}, CLEAN_UP, CLEAN_UP),
    ("5a", {"own": OWN_STAYING, "siblings": (ENDING, ENDING)}, KEEP, KEEP),
    ("5a", {"own": OWN_STAYING}, KEEP, KEEP),
    ("5b", {"own": OWN_ENDING, "siblings": (ENDING, STAYING)}, KEEP, KEEP),
    ("5b", {"siblings": (STAYING,)}, KEEP, KEEP),
    ("5c", {"own": OWN_ENDING, "siblings": (ENDING, NEWER_ENDING)}, KEEP, KEEP),
    ("5d", {"own": OWN_ENDING, "siblings": (ENDING,)}, CLEAN_UP, CLEAN_UP),
    ("5d", {"own": OWN_ENDING, "siblings": (ENDING, OLDER_ENDING)}, CLEAN_UP, CLEAN_UP),
    ("5d", {"siblings": (ENDING, ENDING)}, CLEAN_UP, CLEAN_UP),
    ("5e", {"own": OWN_ENDING}, CLEAN_UP, KEEP),
    ("5e", {}, CLEAN_UP, KEEP),
]


@pytest.mark.parametrize("ambient", [False, True], ids=["sidecar", "ambient"])
@pytest.mark.parametrize("cell", CELLS, ids=[f"{row}-{index}" for index, (row, *_) in enumerate(CELLS)])
def test_cell(cell: tuple[str, dict[str, Any], Outcome, Outcome], ambient: bool) -> None:
    row, known, sidecar_outcome, ambient_outcome = cell
    decision = decide_shutdown(Evidence(**{"answer": Answer.FORBIDDEN, **known}, ambient=ambient))
    assert decision.outcome is (ambient_outcome if ambient else sidecar_outcome)
    assert decision.row == ("5f" if row == "5e" and not ambient else row)
    assert decision.clean_up == (decision.outcome is CLEAN_UP)
    assert decision.why


def test_every_row_has_a_cell() -> None:
    assert {row.name for row in TABLE} == {row for row, *_ in CELLS} | {"5f"}


def test_the_reason_carries_what_was_seen() -> None:
    assert decide_shutdown(Evidence(Answer.GONE, detail="HTTP 404")).why.endswith(" (HTTP 404)")


# --- evidence ---------------------------------------------------------------------------------------------------------

DAEMONSET = {"metadata": {"name": "istio-cni-node"}}
NODE = {"metadata": {"name": "node-1", "labels": {"kubernetes.io/os": "linux"}}}


def pod(name: str, *, ending: bool = True, revision: str = "rev-1", phase: str = "Running") -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "labels": {"controller-revision-hash": revision},
        "creationTimestamp": f"2026-01-0{revision[-1]}T00:00:00Z",
    }
    if ending:
        metadata["deletionTimestamp"] = "2026-02-01T00:00:00Z"
    return {"metadata": metadata, "status": {"phase": phase}}


def placed(pod: dict[str, Any]) -> dict[str, Any]:
    """As the DaemonSet controller makes it: for one node by name, and for nodes that run Linux."""
    name = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [name]}}
    return {**pod, "spec": {"nodeSelector": {"kubernetes.io/os": "linux"}, "affinity": {"nodeAffinity": required}}}


OTHER_NODE = {"metadata": {"name": "node-1", "labels": {}}}


Reply = int | Mapping[str, Any] | Sequence[Any]


class ScriptedApi:
    """Answers each kind of call from its own list of replies, the last one for ever; an int is an HTTP status."""

    def __init__(self, **replies: list[Reply]) -> None:
        self.replies = replies
        self.calls: list[str] = []

    def _reply(self, resource: str) -> Any:
        self.calls.append(resource)
        script = self.replies[resource]
        reply = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(reply, int):
            raise KubeError(reply, f"HTTP {reply}")
        return reply

    async def get_object(self, group: str, version: str, resource: str, namespace: str | None, name: str, /) -> Any:
        assert (group, version, namespace, name) in {
            ("apps", "v1", "mesh", "istio-cni-node"),
            ("", "v1", None, "node-1"),
        }
        return self._reply(resource)

    async def list_objects(
        self, group: str, version: str, resource: str, namespace: str | None = None, /, *, label_selector: str = ""
    ) -> Any:
        assert (group, version, namespace, label_selector) == ("", "v1", "mesh", "k8s-app=istio-cni-node")
        return self._reply(resource)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def ask(
    api: ScriptedApi | None, *, namespace: str = "mesh", worked_before: bool = True, **options: Any
) -> tuple[Evidence, float]:
    clock = Clock()
    evidence = await gather(
        api,
        Identity(namespace, "own", "node-1", worked_before),
        **{"ambient": False, "clock": clock, "sleep": clock.sleep, **options},
    )
    return evidence, clock.now


AFFINITY = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
EXCLUDING = {"spec": {"template": {"spec": {"affinity": {"nodeAffinity": AFFINITY}}}}}

# What the server says; the answer understood; the row that decides in sidecar mode.
ANSWERS: dict[str, tuple[Callable[[], ScriptedApi], Answer, str]] = {
    "found": (lambda: ScriptedApi(daemonsets=[DAEMONSET], nodes=[NODE]), Answer.FOUND, "2"),
    "found, node unreadable": (lambda: ScriptedApi(daemonsets=[DAEMONSET], nodes=[403]), Answer.FOUND, "2"),
    "found, not for this node": (
        lambda: ScriptedApi(daemonsets=[{**DAEMONSET, **EXCLUDING}], nodes=[NODE]),
        Answer.EXCLUDES_NODE,
        "1",
    ),
    "not found": (lambda: ScriptedApi(daemonsets=[404]), Answer.GONE, "1"),
    "being deleted": (
        lambda: ScriptedApi(daemonsets=[{"metadata": {"deletionTimestamp": "2026-02-01T00:00:00Z"}}]),
        Answer.GONE,
        "1",
    ),
    "server error": (lambda: ScriptedApi(daemonsets=[500]), Answer.NONE, "3"),
    "no connection": (lambda: ScriptedApi(daemonsets=[0]), Answer.NONE, "3"),
    "one server error, then found": (lambda: ScriptedApi(daemonsets=[503, DAEMONSET], nodes=[NODE]), Answer.FOUND, "2"),
    "one server error, then not found": (lambda: ScriptedApi(daemonsets=[503, 404]), Answer.GONE, "1"),
    "throttled, then found": (lambda: ScriptedApi(daemonsets=[429, DAEMONSET], nodes=[NODE]), Answer.FOUND, "2"),
    "unauthorized for good": (lambda: ScriptedApi(daemonsets=[401]), Answer.WITHDRAWN, "4"),
    "unauthorized for a moment": (
        lambda: ScriptedApi(daemonsets=[401, 401, DAEMONSET], nodes=[NODE]),
        Answer.FOUND,
        "2",
    ),
    "role withdrawn": (lambda: ScriptedApi(daemonsets=[403], pods=[403]), Answer.WITHDRAWN, "4"),
    "account withdrawn while we ask": (lambda: ScriptedApi(daemonsets=[403, 401], pods=[403]), Answer.WITHDRAWN, "4"),
    "server restarted: forbids everything for a second": (
        lambda: ScriptedApi(daemonsets=[403, 403, DAEMONSET], pods=[403], nodes=[NODE]),
        Answer.FOUND,
        "2",
    ),
    "may not read, siblings unknown": (lambda: ScriptedApi(daemonsets=[403], pods=[500]), Answer.NONE, "3"),
    "may not read, siblings stay": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[pod("own"), pod("b", ending=False)]]),
        Answer.FORBIDDEN,
        "5b",
    ),
    "may not read, the node's labels no longer fit our pod": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[placed(pod("own")), pod("b", ending=False)]], nodes=[OTHER_NODE]),
        Answer.EXCLUDES_NODE,
        "1",
    ),
    "may not read, the node's labels still fit": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[placed(pod("own")), pod("b", ending=False)]], nodes=[NODE]),
        Answer.FORBIDDEN,
        "5b",
    ),
    "may not read, nor the node": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[placed(pod("own")), pod("b", ending=False)]], nodes=[403]),
        Answer.FORBIDDEN,
        "5b",
    ),
    "may not read, siblings end one after the other": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[pod("own"), pod("b", ending=False)], [pod("own"), pod("b")]]),
        Answer.FORBIDDEN,
        "5d",
    ),
    "may not read, newer sibling": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[pod("own"), pod("b", revision="rev-2")]]),
        Answer.FORBIDDEN,
        "5c",
    ),
    "may not read, own pod stays": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[pod("own", ending=False)]]),
        Answer.FORBIDDEN,
        "5a",
    ),
    "may not read, alone": (lambda: ScriptedApi(daemonsets=[403], pods=[[pod("own")]]), Answer.FORBIDDEN, "5f"),
    "may not read, evicted siblings do not count": (
        lambda: ScriptedApi(daemonsets=[403], pods=[[pod("own"), pod("b", ending=False, phase="Failed")]]),
        Answer.FORBIDDEN,
        "5f",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_what_the_servers_answers_mean(name: str) -> None:
    make, answer, row = ANSWERS[name]
    evidence, took = await ask(make())
    assert evidence.answer is answer
    assert decide_shutdown(evidence).row == row
    assert took <= 10  # of 30 s of grace


async def test_refusals_must_persist_before_they_count_as_an_uninstall() -> None:
    _, took = await ask(ScriptedApi(daemonsets=[403], pods=[403]))
    assert PERSISTENCE_SECONDS <= took <= PERSISTENCE_SECONDS + PAUSE_SECONDS


async def test_refusals_that_do_not_persist_until_the_deadline_keep() -> None:
    evidence, took = await ask(ScriptedApi(daemonsets=[401]), deadline_seconds=2.0)
    assert decide_shutdown(evidence).row == "3"
    assert took <= 2


async def test_being_forbidden_everything_says_nothing_when_nothing_ever_worked() -> None:
    evidence, _ = await ask(ScriptedApi(daemonsets=[403], pods=[403]), worked_before=False)
    assert decide_shutdown(evidence).row == "3"


async def test_without_a_namespace_nobody_is_asked_and_everything_is_kept() -> None:
    api = ScriptedApi(daemonsets=[404])  # the answer to a question without namespace, whatever there is
    evidence, _ = await ask(api, namespace="")
    assert decide_shutdown(evidence).row == "3"
    assert "POD_NAMESPACE is not set" in decide_shutdown(evidence).why
    assert api.calls == []


async def test_without_an_api_server_everything_is_kept() -> None:
    evidence, took = await ask(None)
    assert decide_shutdown(evidence).row == "3"
    assert "no API server is configured" in decide_shutdown(evidence).why
    assert took == 0


async def test_the_switch_needs_no_evidence() -> None:
    api = ScriptedApi()
    evidence, _ = await ask(api, safe_upgrade_disabled=True)
    assert decide_shutdown(evidence).row == "0"
    assert api.calls == []


class SilentApi(ScriptedApi):
    """Takes the connection and never answers."""

    async def get_object(self, *_: object) -> Any:
        await asyncio.get_running_loop().create_future()


async def test_a_server_that_never_answers_does_not_use_up_the_grace_period() -> None:
    evidence = await gather(SilentApi(), Identity("mesh", "own", "node-1"), ambient=True, deadline_seconds=0.2)
    assert decide_shutdown(evidence).row == "3"


# The same questions through the real client, to the double of the API server: what is there, faults, the row.
WORLDS: dict[str, tuple[Callable[[ApiServer], object], str]] = {
    "found": (lambda server: server.add("daemonsets", daemonset()), "2"),
    "not found": (lambda server: None, "1"),
    "may not read": (lambda server: server.fault("status", prefix=DAEMONSETS, count=-1, status=403), "5f"),
    "role withdrawn": (lambda server: server.fault("status", count=-1, status=403), "4"),
    "account withdrawn": (lambda server: server.fault("status", count=-1, status=401), "4"),
    "server error": (lambda server: server.fault("status", count=-1, status=500), "3"),
}
DAEMONSETS = "/apis/apps/v1/namespaces/mesh/daemonsets"


def daemonset() -> dict[str, Any]:
    return {"metadata": {"name": "istio-cni-node", "namespace": "mesh"}, "spec": {"template": {"spec": {}}}}


@pytest.mark.parametrize("name", WORLDS)
async def test_through_the_real_client(tmp_path: Path, name: str) -> None:
    prepare, row = WORLDS[name]
    async with double_and_api(tmp_path) as (server, api):
        server.add("nodes", NODE)
        server.add("pods", {**pod("own"), "metadata": {**pod("own")["metadata"], "namespace": "mesh", "labels": LABEL}})
        prepare(server)
        clock = Clock()
        evidence = await gather(api, Identity("mesh", "own", "node-1"), ambient=False, clock=clock, sleep=clock.sleep)
    assert decide_shutdown(evidence).row == row


LABEL = {"k8s-app": "istio-cni-node"}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, "values": list(values)}


LABELS = {"zone": "a", "cores": "8"}
REQUIREMENTS = [  # matchExpressions of one term, whether a node with LABELS is excluded
    ([expression("zone", "In", "a", "b")], False),
    ([expression("zone", "In", "b")], True),
    ([expression("rack", "In", "b")], True),
    ([expression("zone", "NotIn", "b")], False),
    ([expression("zone", "NotIn", "a")], True),
    ([expression("rack", "NotIn", "a")], False),
    ([expression("zone", "Exists")], False),
    ([expression("rack", "Exists")], True),
    ([expression("rack", "DoesNotExist")], False),
    ([expression("zone", "DoesNotExist")], True),
    ([expression("cores", "Gt", "4")], False),
    ([expression("cores", "Gt", "8")], True),
    ([expression("cores", "Lt", "16")], False),
    ([expression("zone", "Lt", "16")], True),
    ([expression("zone", "In", "a"), expression("cores", "Lt", "4")], True),
    ([], True),  # a term without requirements matches nothing
    ([expression("zone", "Unknown", "a")], True),
]


@pytest.mark.parametrize(("expressions", "excluded"), REQUIREMENTS)
def test_required_affinity(expressions: list[dict[str, Any]], excluded: bool) -> None:
    node = {"metadata": {"name": "node-1", "labels": LABELS}}
    terms = [{"matchExpressions": expressions}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    daemonset = {"spec": {"template": {"spec": {"affinity": {"nodeAffinity": required}}}}}
    assert nodeaffinity.excludes_node(daemonset, node) is excluded
    terms.append({"matchFields": [expression("metadata.name", "In", "node-1")]})
    assert not nodeaffinity.excludes_node(daemonset, node)  # one term that matches is enough


@pytest.mark.parametrize(
    ("selector", "excluded"), [({"zone": "a"}, False), ({"zone": "b"}, True), ({"rack": "a"}, True)]
)
def test_node_selector(selector: dict[str, str], excluded: bool) -> None:
    daemonset = {"spec": {"template": {"spec": {"nodeSelector": selector}}}}
    assert nodeaffinity.excludes_node(daemonset, {"metadata": {"labels": LABELS}}) is excluded
