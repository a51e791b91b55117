"""An API server that fails during an ADD: the pod is refused with code 11 or redirected, never let through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from lab.agent import Agent
from lab.apiserver.faults import FOREVER
from lab.mesh import Mesh
from lab.objects import sidecar_pod
from lab.plugin import Answer, PodNetns, call

from meshcni.errors import CNI_TRY_AGAIN_LATER

numbers = itertools.count(1)

FAULTS: dict[str, dict[str, Any]] = {
    "401": {"kind": "status", "status": 401},
    "403": {"kind": "status", "status": 403},
    "404": {"kind": "status", "status": 404},
    "410": {"kind": "status", "status": 410},
    "429": {"kind": "status", "status": 429, "retry_after_seconds": 1},
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
    "no answer": {"kind": "hang"},
    "connection closed": {"kind": "drop"},
    "half an answer": {"kind": "truncate"},
    "no JSON": {"kind": "garbage"},
}


@pytest.fixture
def unknown_pod(mesh: Mesh, agent: Agent) -> Iterator[dict[str, Any]]:
    """A sidecar pod that the API server has and the agent's informer does not, so that the agent has to ask."""
    mesh.stop_watch_events()
    pod = sidecar_pod("shop", f"asked-{next(numbers)}")
    mesh.add_object(pod)
    yield pod
    mesh.api.do(lambda server: server.clear_faults())
    mesh.api.do(lambda server: server.delete_pod("shop", pod["metadata"]["name"]))
    mesh.resume_watch_events()


@pytest.fixture
def netns(mesh: Mesh) -> Iterator[PodNetns]:
    number = next(numbers)
    with PodNetns(mesh.node, f"fault-{number}", number) as made:
        yield made


def order(mesh: Mesh, fault: dict[str, Any], pod: dict[str, Any], count: int) -> None:
    prefix = f"/api/v1/namespaces/shop/pods/{pod['metadata']['name']}"
    mesh.api.do(lambda server: server.fault(**fault, prefix=prefix, count=count))


def assert_not_let_through(mesh: Mesh, netns: PodNetns, answer: Answer) -> None:
    """A mesh pod is redirected when the ADD succeeded, and nothing of ours is left when it did not."""
    assert mesh.rules(netns.path).count == (1 if answer.status == 0 else 0), answer


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_lasting_fault_refuses_the_pod(
    mesh: Mesh, agent: Agent, unknown_pod: dict[str, Any], netns: PodNetns, fault: dict[str, Any]
) -> None:
    order(mesh, fault, unknown_pod, FOREVER)
    answer = call(agent, "ADD", unknown_pod, netns)
    assert answer.status == 1
    assert answer.code == CNI_TRY_AGAIN_LATER
    assert unknown_pod["metadata"]["name"] in answer.text
    assert_not_let_through(mesh, netns, answer)
    # the kubelet tries again, and all is well by then
    mesh.api.do(lambda server: server.clear_faults())
    answer = call(agent, "ADD", unknown_pod, netns)
    assert answer.status == 0, answer
    assert_not_let_through(mesh, netns, answer)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_passing_fault_never_lets_the_pod_through(
    mesh: Mesh, agent: Agent, unknown_pod: dict[str, Any], netns: PodNetns, fault: dict[str, Any]
) -> None:
    order(mesh, fault, unknown_pod, 1)
    answer = call(agent, "ADD", unknown_pod, netns)
    assert answer.status == 0 or answer.code == CNI_TRY_AGAIN_LATER, answer
    assert_not_let_through(mesh, netns, answer)


def test_an_api_server_that_is_away_refuses_an_unknown_pod(
    mesh: Mesh, agent: Agent, unknown_pod: dict[str, Any], netns: PodNetns
) -> None:
    mesh.api.crash()
    try:
        answer = call(agent, "ADD", unknown_pod, netns)
        assert (answer.status, answer.code) == (1, CNI_TRY_AGAIN_LATER)
        assert_not_let_through(mesh, netns, answer)
    finally:
        mesh.api.restart()
    answer = call(agent, "ADD", unknown_pod, netns)
    assert answer.status == 0, answer
    assert_not_let_through(mesh, netns, answer)


def test_another_pod_of_the_same_name_is_not_taken_for_this_one(mesh: Mesh, agent: Agent, netns: PodNetns) -> None:
    """A StatefulSet's new pod has the old one's name; only the uid tells them apart."""
    old = sidecar_pod("shop", "db-0")
    mesh.add_object(old)
    mesh.wait_until_known()
    new = sidecar_pod("shop", "db-0", mode="TPROXY")
    answer = call(agent, "ADD", new, netns)
    assert (answer.status, answer.code) == (1, CNI_TRY_AGAIN_LATER)
    assert_not_let_through(mesh, netns, answer)
    mesh.api.do(lambda server: server.delete_pod("shop", "db-0"))
    mesh.add_object(new)
    answer = call(agent, "ADD", new, netns)
    assert answer.status == 0, answer
    assert "tproxy" in mesh.rules(netns.path).listing
    mesh.api.do(lambda server: server.delete_pod("shop", "db-0"))
