"""The agent is killed: pods outside of the mesh start all the same, pods of the mesh wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from lab.agent import AgentOptions
from lab.cri import CriError
from lab.mesh import Mesh
from lab.objects import ambient_pod, sidecar_pod, unmeshed_pod
from tests.node.ambientworld import BACKENDS as AMBIENT
from tests.node.ambientworld import traces, wait_enrolled
from tests.node.conftest import BACKENDS
from tests.node.test_unmeshed import assert_untouched, pod_requests

FOREVER = 600.0  # an ADD that waits fails for another reason, and much later, than one that gives up
SHORT = 2.0


@pytest.fixture(params=BACKENDS)
def options(request: pytest.FixtureRequest) -> AgentOptions:
    return BACKENDS[request.param]


def kill_with(mesh: Mesh, options: AgentOptions, wait_seconds: float) -> None:
    """Have the agent write a conf with this patience, and kill it."""
    mesh.agent.ensure(replace(options, wait_seconds=wait_seconds))
    mesh.agent.kill()


@pytest.fixture
def mesh(mesh: Mesh) -> Iterator[Mesh]:
    yield mesh
    mesh.agent.ensure(BACKENDS["nftables"])


def test_an_unmeshed_pod_does_not_wait(mesh: Mesh, options: AgentOptions) -> None:
    kill_with(mesh, options, FOREVER)
    before = pod_requests(mesh)
    assert_untouched(mesh, mesh.start_pod(unmeshed_pod("shop", "batch")))
    assert pod_requests(mesh) == before + 1


def test_a_mesh_pod_waits(mesh: Mesh, options: AgentOptions, request: pytest.FixtureRequest) -> None:
    kill_with(mesh, options, SHORT)
    pod = sidecar_pod("shop", f"waits-{request.node.callspec.id}")  # no other test's: a pod refused once stays known
    with pytest.raises(CriError, match="the API server, asked instead, says that the pod is for the mesh") as refused:
        mesh.start_pod(pod)
    assert "the node agent did not answer within 2 s" in str(refused.value)
    mesh.agent.start()
    assert mesh.rules(mesh.start_pod(pod, in_api=False).netns).count == 1


def test_nobody_passes_without_the_api_server(mesh: Mesh) -> None:
    kill_with(mesh, BACKENDS["nftables"], SHORT)
    pod = unmeshed_pod("shop", "nobody")
    mesh.add_object(pod)
    mesh.api.crash()
    try:
        with pytest.raises(CriError, match="Connection refused"):
            mesh.start_pod(pod, in_api=False)
    finally:
        mesh.api.restart()
    assert_untouched(mesh, mesh.start_pod(pod, in_api=False))


def test_an_api_server_that_refuses_everybody_for_a_moment(mesh: Mesh) -> None:
    kill_with(mesh, BACKENDS["nftables"], FOREVER)
    mesh.api.do(lambda server: server.fault("status", status=403, count=2))
    assert_untouched(mesh, mesh.start_pod(unmeshed_pod("shop", "patient")))


@pytest.mark.parametrize("backend", AMBIENT)
def test_ambient_mode(ambient: Mesh, backend: str) -> None:
    """Pods of a namespace in the mesh wait, those that opted out do not; and those of other namespaces do not."""
    bazaar = f"bazaar-{backend}"
    ambient.add_namespace(bazaar, {"istio.io/dataplane-mode": "ambient"})
    kill_with(ambient, AMBIENT[backend], SHORT)
    out = unmeshed_pod(bazaar, "out", labels={"istio.io/dataplane-mode": "none"})
    inside = unmeshed_pod(bazaar, "inside")
    labelled = ambient_pod("shop", "labelled")
    for pod in (labelled, inside):
        with pytest.raises(CriError, match="An enablement selector takes it into ambient mode"):
            ambient.start_pod(pod)
    for pod in (out, unmeshed_pod("shop", "outside")):
        assert not traces(ambient, ambient.start_pod(pod))
    ambient.agent.start()
    ambient.start_ztunnel()
    wait_enrolled(ambient, [ambient.start_pod(pod, in_api=False, retry_seconds=30) for pod in (labelled, inside)])
