"""kill -9 of plugin and agent at random points of an ADD, hundreds of times: never let through, well in the end."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
from lab.agent import Agent
from lab.mesh import Mesh
from lab.objects import sidecar_pod
from lab.plugin import PodNetns, call, finish_call, start_call
from tests.node.conftest import BACKENDS

PLUGIN_ROUNDS = 100  # for each backend
AGENT_ROUNDS = 15  # for each backend
RETRIES = 10
SEED = 20260102
numbers = itertools.count(1)


def known_pods(mesh: Mesh, prefix: str, count: int) -> list[dict[str, Any]]:
    pods = [sidecar_pod("shop", f"{prefix}-{number}", mode="TPROXY") for number in range(count)]
    for pod in pods:
        mesh.add_object(pod)
    mesh.wait_until_known()
    return pods


def forget(mesh: Mesh, pods: list[dict[str, Any]]) -> None:
    for pod in pods:
        name = pod["metadata"]["name"]
        mesh.api.do(lambda server, name=name: server.delete_pod("shop", name))


def state(mesh: Mesh, netns: PodNetns) -> tuple[str, str, str]:
    """All that an ADD programs: rules, policy rules, routes and addresses."""
    routing = "ip rule; ip -6 rule; ip route show table 133 2>/dev/null; ip -6 route show table 133 2>/dev/null; true"
    loopback = mesh.node.run(["ip", "-o", "addr", "show", "dev", "lo"], netns=netns.path)
    return mesh.rules(netns.path).listing, mesh.node.run(["sh", "-c", routing], netns=netns.path), loopback


def add_until_done(agent: Agent, pod: dict[str, Any], netns: PodNetns) -> None:
    """As a kubelet does; here in the same netns, which makes it harder."""
    for _ in range(RETRIES):
        answer = call(agent, "ADD", pod, netns)
        if answer.status == 0:
            return
    pytest.fail(f"refused {RETRIES} times: {answer}")


def reference_state(mesh: Mesh, agent: Agent, pod: dict[str, Any]) -> tuple[str, str, str]:
    number = next(numbers)
    with PodNetns(mesh.node, f"chaos-{number}", number) as netns:
        assert call(agent, "ADD", pod, netns).status == 0
        return state(mesh, netns)


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_killing_the_plugin(mesh: Mesh, backend: str) -> None:
    agent, chance = mesh.agent, random.Random(SEED)
    agent.ensure(BACKENDS[backend])
    pods = known_pods(mesh, f"plugin-{backend}", PLUGIN_ROUNDS)
    wanted = reference_state(mesh, agent, pods[0])
    killed = 0
    for pod in pods:
        number = next(numbers)
        with PodNetns(mesh.node, f"chaos-{number}", number) as netns:
            adding = start_call(agent, "ADD", pod, netns)
            time.sleep(chance.uniform(0, 0.02))
            adding.kill()
            answer = finish_call(adding)
            killed += answer.status < 0
            if answer.status == 0:
                assert state(mesh, netns) == wanted
            add_until_done(agent, pod, netns)
            assert state(mesh, netns) == wanted
            assert call(agent, "DEL", pod, netns).status == 0
    assert killed > PLUGIN_ROUNDS // 10, "the kill hit too few plugins to mean anything"
    forget(mesh, pods)


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_killing_the_agent(mesh: Mesh, backend: str) -> None:
    agent, chance = mesh.agent, random.Random(SEED)
    agent.ensure(BACKENDS[backend])
    pods = known_pods(mesh, f"agent-{backend}", AGENT_ROUNDS)
    wanted = reference_state(mesh, agent, pods[0])
    for pod in pods:
        number = next(numbers)
        with PodNetns(mesh.node, f"chaos-{number}", number) as netns:
            adding = start_call(agent, "ADD", pod, netns)
            time.sleep(chance.uniform(0, 0.03))
            agent.kill()
            agent.start(wait=False)
            answer = finish_call(adding)
            if answer.status != 0:
                add_until_done(agent, pod, netns)
            assert state(mesh, netns) == wanted
    agent.wait_ready()
    forget(mesh, pods)
