"""kill -9 of plugin and agent at random points of an ADD, hundreds of times: never let through, well in the end."""

from __future__ import annotations

import difflib
import itertools
import random
import time
from typing import Any

import pytest
from lab.agent import Agent
from lab.mesh import COUNTERS, Mesh
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


LISTINGS = (  # the save tools sort chains by name, whatever order they were made in
    "iptables-nft-save",
    "ip6tables-nft-save",
    "nft list tables",
    "nft list table inet istio-proxy-nat",
    "nft list table inet istio-proxy-mangle",
    "ip rule",
    "ip -6 rule",
    "ip route show table 133",
    "ip -6 route show table 133",
    "ip -o addr show dev lo",
)


def state(mesh: Mesh, netns: PodNetns) -> list[str]:
    """All that an ADD programs: rules, policy rules, routes and addresses."""
    script = "\n".join(f"{command} 2>/dev/null" for command in LISTINGS) + "\ntrue"
    text = COUNTERS.sub("", mesh.node.run(["sh", "-c", script], netns=netns.path))
    return [line for line in text.splitlines() if not line.startswith("#")]


def assert_state(mesh: Mesh, netns: PodNetns, wanted: list[str]) -> None:
    difference = "\n".join(difflib.unified_diff(wanted, state(mesh, netns), "wanted", "found", lineterm="", n=0))
    assert not difference, difference


def add_until_done(agent: Agent, pod: dict[str, Any], netns: PodNetns) -> None:
    """As a kubelet does; here in the same netns, which makes it harder."""
    for _ in range(RETRIES):
        answer = call(agent, "ADD", pod, netns)
        if answer.status == 0:
            return
    pytest.fail(f"refused {RETRIES} times: {answer}")


def reference_state(mesh: Mesh, agent: Agent, pod: dict[str, Any]) -> list[str]:
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
                assert_state(mesh, netns, wanted)
            add_until_done(agent, pod, netns)
            assert_state(mesh, netns, wanted)
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
            assert_state(mesh, netns, wanted)
    agent.wait_ready()
    forget(mesh, pods)


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_several_adds_for_the_same_netns_at_once(mesh: Mesh, backend: str) -> None:
    """A runtime that gives up waiting asks again while the first ADD is still under way."""
    agent = mesh.agent
    agent.ensure(BACKENDS[backend])
    pods = known_pods(mesh, f"twice-{backend}", 1)
    wanted = reference_state(mesh, agent, pods[0])
    for _ in range(10):
        number = next(numbers)
        with PodNetns(mesh.node, f"chaos-{number}", number) as netns:
            adding = [start_call(agent, "ADD", pods[0], netns) for _ in range(4)]
            answers = [finish_call(one) for one in adding]
            assert [answer.status for answer in answers] == [0, 0, 0, 0], answers
            assert_state(mesh, netns, wanted)
    forget(mesh, pods)
