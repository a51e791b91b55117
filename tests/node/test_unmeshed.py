"""Pods that have nothing to do with the mesh: untouched, and waiting for nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.agent import AGENT_NAMESPACE, EXCLUDED_NAMESPACE, Agent, AgentOptions
from lab.apiserver.wire import Request
from lab.cri import CriError
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.objects import sidecar_pod, unmeshed_pod
from lab.traffic import address_seen
from tests.node.conftest import BACKENDS, OUTSIDE_PORT, gateway

from meshcni import istio


def assert_untouched(mesh: Mesh, pod: RunningPod) -> None:
    assert mesh.rules(pod.netns).count == 0
    for version in (4, 6):
        assert address_seen(mesh.node.netns, pod.address(version), APP_PORT) == gateway(version)
        assert address_seen(pod.netns, gateway(version), OUTSIDE_PORT) == pod.address(version)


def is_pod_get(request: Request) -> bool:
    return request.method == "GET" and "/pods/" in request.path


def pod_requests(mesh: Mesh) -> int:
    """How many requests for single pods the API server has had."""
    return mesh.api.do(lambda server: sum(is_pod_get(one.request) for one in server.requests))


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
def test_an_unmeshed_pod_is_untouched(mesh: Mesh, options: AgentOptions) -> None:
    mesh.agent.ensure(options)
    assert_untouched(mesh, mesh.start_pod(unmeshed_pod("shop", "batch")))


def test_a_pod_that_the_agent_knows_needs_no_request(mesh: Mesh, agent: Agent) -> None:
    known = unmeshed_pod("shop", "known")
    mesh.add_object(known)
    mesh.wait_until_known()
    before = pod_requests(mesh)
    assert_untouched(mesh, mesh.start_pod(known, in_api=False))
    assert pod_requests(mesh) == before


def test_an_unmeshed_pod_starts_without_the_api_server(mesh: Mesh, agent: Agent) -> None:
    known = unmeshed_pod("shop", "offline")
    mesh.add_object(known)
    mesh.wait_until_known()
    mesh.api.crash()
    try:
        assert_untouched(mesh, mesh.start_pod(known, in_api=False))
    finally:
        mesh.api.restart()


@pytest.fixture
def no_agent(mesh: Mesh, agent: Agent) -> Agent:
    agent.kill()
    return agent


def test_an_excluded_namespace_needs_no_agent(mesh: Mesh, no_agent: Agent) -> None:
    assert_untouched(mesh, mesh.start_pod(sidecar_pod(EXCLUDED_NAMESPACE, "dns")))


def test_the_agents_own_pod_needs_no_agent(mesh: Mesh, no_agent: Agent) -> None:
    assert_untouched(mesh, mesh.start_pod(unmeshed_pod(AGENT_NAMESPACE, f"{istio.AGENT_POD_PREFIX}abcde")))


def test_a_mesh_pod_does_not_start_without_the_agent(mesh: Mesh) -> None:
    mesh.agent.ensure(replace(BACKENDS["nftables"], wait_seconds=1.0))
    mesh.agent.kill()
    with pytest.raises(CriError, match="istio-cni"):
        mesh.start_pod(sidecar_pod("shop", "early"))
    assert mesh.pods == []
