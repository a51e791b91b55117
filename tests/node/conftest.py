"""One node for sidecars and one for ambient mode; each test starts its own pods there and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.agent import Agent, AgentOptions
from lab.apiserver import ApiServer
from lab.containerd import GATEWAY_V4, GATEWAY_V6
from lab.mesh import Mesh
from lab.node import LabUnavailableError
from tests.node.ambientworld import remove_pods

OUTSIDE_PORT = 9090
OTHER_OUTSIDE_PORT = 9091
FAR_V4, FAR_V6 = "198.51.100.7", "2001:db8::7"  # addresses of the node beside its gateways

BACKENDS = {
    "nftables": AgentOptions(nftables=True),
    "iptables-nft": AgentOptions(nftables=False, force_iptables="nft"),
    "iptables-legacy": AgentOptions(nftables=False, force_iptables="legacy"),
}


@pytest.fixture(scope="session")
def node_mesh() -> Iterator[Mesh]:
    yield from running_mesh()


@pytest.fixture(scope="session")
def ambient_node() -> Iterator[Mesh]:
    yield from running_mesh()


def running_mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    try:
        mesh.__enter__()
    except LabUnavailableError as error:
        pytest.skip(f"THE NODE TIER CANNOT RUN HERE: {error}")
    try:
        mesh.runtime.start()
        for address in (f"{FAR_V4}/32", f"{FAR_V6}/128"):
            mesh.node.run(["ip", "addr", "add", address, "dev", "lo"])
        mesh.servers.serve(mesh.node.netns, OUTSIDE_PORT, OTHER_OUTSIDE_PORT)
        yield mesh
    finally:
        mesh.close()


@pytest.fixture
def mesh(node_mesh: Mesh) -> Iterator[Mesh]:
    yield node_mesh
    node_mesh.api.do(lambda server: server.clear_faults())
    for pod in list(node_mesh.pods):
        node_mesh.remove_pod(pod)


@pytest.fixture
def ambient(ambient_node: Mesh) -> Iterator[Mesh]:
    """A node for ambient mode; agent and stand-in are as the test before left them."""
    mesh = ambient_node
    yield mesh
    mesh.api.do(lambda server: server.clear_faults())
    remove_pods(mesh, list(mesh.pods))
    mesh.api.do(forget_all_pods)
    for name, ztunnel in mesh.ztunnels.items():
        if name != "ztunnel":
            ztunnel.kill()


def forget_all_pods(server: ApiServer) -> None:
    """Also those that a failed test has left."""
    for pod in list(server.cluster.objects("pods")):
        server.delete_pod(pod["metadata"]["namespace"], pod["metadata"]["name"])


@pytest.fixture
def agent(mesh: Mesh) -> Agent:
    """The agent, running with nftables."""
    mesh.agent.ensure(BACKENDS["nftables"])
    return mesh.agent


def gateway(version: int) -> str:
    return GATEWAY_V4 if version == 4 else GATEWAY_V6


def far(version: int) -> str:
    return FAR_V4 if version == 4 else FAR_V6
