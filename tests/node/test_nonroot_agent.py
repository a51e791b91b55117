"""A node whose agent is user 65532 with the chart's five capabilities: pods in both modes, and hand-overs to root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from lab.agent import AgentOptions
from lab.mesh import APP_PORT, Mesh
from lab.objects import sidecar_pod
from lab.traffic import address_seen
from tests.node import ambientworld, conftest
from tests.node.ambientworld import disagreements, kernel, start_ambient, wait_agreement

NONROOT = 65532


def nonroot(options: AgentOptions) -> AgentOptions:
    return replace(options, user=NONROOT)


@pytest.fixture
def own(mesh: Mesh) -> Iterator[Mesh]:
    """The node of the sidecar tests, which later tests get back with root's agent."""
    yield mesh
    mesh.agent.terminate()


@pytest.mark.parametrize("backend", conftest.BACKENDS)
def test_sidecar_pods(own: Mesh, backend: str) -> None:
    own.agent.ensure(nonroot(conftest.BACKENDS[backend]))
    pod = own.start_pod(sidecar_pod("shop", f"nonroot-{backend}"))
    own.start_proxy(pod)
    assert own.rules(pod.netns).count == 1
    assert address_seen(own.node.netns, pod.address(4), APP_PORT) == "127.0.0.6"
    assert own.agent.status()["ready"]


@pytest.mark.parametrize("backend", ambientworld.BACKENDS)
def test_ambient_pods_and_an_upgrade_to_root_and_back(ambient: Mesh, backend: str) -> None:
    mesh, options = ambient, ambientworld.BACKENDS[backend]
    mesh.agent.ensure(nonroot(options))
    mesh.start_ztunnel()
    pods = start_ambient(mesh, f"first-{backend}", f"second-{backend}")
    reference = kernel(mesh, pods[0].netns)
    wait_agreement(mesh, reference)
    for successor in (options, nonroot(options)):
        mesh.agent.kill()
        mesh.agent.start(successor)
        pods += start_ambient(mesh, f"after-{successor.user}-{backend}")
        wait_agreement(mesh, reference)
        assert address_seen(pods[0].netns, pods[-1].address(4), APP_PORT) == pods[0].address(4)
    assert disagreements(mesh, reference) == []
    mesh.agent.terminate()
