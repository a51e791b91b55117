"""The agent goes away and comes back while pods start: none is lost, none runs uncaptured, none waits in vain."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab.agent import Agent
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.objects import sidecar_pod, unmeshed_pod
from lab.traffic import address_seen
from tests.node.conftest import BACKENDS, gateway

from meshcni import istio

KUBELET_SECONDS = 60.0  # for so long a refused sandbox is tried again
SEED = 20260101


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8, "kubelet") as pool:
        yield pool


def pods_of_both_kinds(prefix: str, count: int) -> list[dict[str, Any]]:
    """Three of four in the mesh."""
    makers = (sidecar_pod, unmeshed_pod)
    return [makers[number % 4 == 3]("shop", f"{prefix}-{number}") for number in range(count)]


def is_meshed(pod: RunningPod) -> bool:
    return istio.SIDECAR_STATUS in pod.object["metadata"]["annotations"]


def assert_right(mesh: Mesh, pod: RunningPod) -> None:
    held = mesh.rules(pod.netns)
    assert held.count == (1 if is_meshed(pod) else 0), f"{pod.name}: {held.listing}"


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_twenty_pods_start_while_the_agent_restarts(mesh: Mesh, workers: ThreadPoolExecutor, backend: str) -> None:
    mesh.agent.ensure(BACKENDS[backend])
    objects = pods_of_both_kinds(f"load-{backend}", 20)
    starting = [workers.submit(mesh.start_pod, one, retry_seconds=KUBELET_SECONDS) for one in objects]
    for end in (mesh.agent.terminate, mesh.agent.kill, mesh.agent.terminate):
        time.sleep(0.3)
        end()
        mesh.agent.start(wait=False)
    pods = [start.result() for start in starting]
    assert len(pods) == len(objects)
    for pod in pods:
        assert_right(mesh, pod)
    envoy = mesh.start_proxy(pods[0])
    before = envoy.captured()
    assert address_seen(mesh.node.netns, pods[0].address(6), APP_PORT) == "::6"
    assert (envoy.captured() - before).inbound == 1
    mesh.agent.wait_ready()


def test_the_agent_is_killed_during_adds(mesh: Mesh, agent: Agent, workers: ThreadPoolExecutor) -> None:
    chance = random.Random(SEED)
    for round_number in range(12):
        pod = sidecar_pod("shop", f"killed-{round_number}")
        starting = workers.submit(mesh.start_pod, pod, retry_seconds=KUBELET_SECONDS)
        time.sleep(chance.uniform(0.05, 0.2))  # the ADD comes about 0.1 s after the runtime is asked
        agent.kill()
        agent.start(wait=False)
        running = starting.result()
        assert_right(mesh, running)
        mesh.remove_pod(running)
    agent.wait_ready()


def test_a_stop_leaves_conf_and_plugin_and_pods_wait_for_the_next_agent(
    mesh: Mesh, agent: Agent, workers: ThreadPoolExecutor
) -> None:
    chain = (mesh.runtime.conf_dir / "10-lab.conflist").read_bytes()
    plugin = (mesh.runtime.bin_dir / istio.PLUGIN_NAME).read_bytes()
    assert agent.terminate() == 0
    assert (mesh.runtime.conf_dir / "10-lab.conflist").read_bytes() == chain
    assert (mesh.runtime.bin_dir / istio.PLUGIN_NAME).read_bytes() == plugin

    begun = threading.Event()

    def start_one() -> RunningPod:
        begun.set()
        return mesh.start_pod(sidecar_pod("shop", "patient"))  # one attempt: the plugin itself waits

    starting = workers.submit(start_one)
    begun.wait()
    time.sleep(1.0)
    assert not starting.done()
    agent.start(wait=False)
    assert_right(mesh, starting.result())
    agent.wait_ready()


def test_running_pods_stay_as_they_are_over_a_restart(mesh: Mesh, agent: Agent) -> None:
    pod = mesh.start_pod(sidecar_pod("shop", "stays"))
    envoy = mesh.start_proxy(pod)
    before = mesh.rules(pod.netns).listing
    agent.terminate()
    assert mesh.rules(pod.netns).listing == before
    agent.start()
    assert mesh.rules(pod.netns).listing == before
    taken = envoy.captured()
    assert address_seen(mesh.node.netns, pod.address(4), APP_PORT) == "127.0.0.6"
    assert (envoy.captured() - taken).inbound == 1


def test_the_entry_comes_back_when_the_primary_cni_rewrites_its_conf(mesh: Mesh, agent: Agent) -> None:
    for _ in range(5):
        mesh.runtime.write_chain()
        agent.wait_in_chain()
    pod = mesh.start_pod(sidecar_pod("shop", "after-rewrite"))
    assert_right(mesh, pod)


def test_uninstalling_leaves_a_node_that_works(mesh: Mesh, agent: Agent) -> None:
    meshed = mesh.start_pod(sidecar_pod("shop", "leftover"))
    agent.command("uninstall")
    conf = json.loads((mesh.runtime.conf_dir / "10-lab.conflist").read_text())
    assert [plugin["type"] for plugin in conf["plugins"]] == ["bridge", "portmap"]
    agent.terminate()

    mesh.remove_pod(meshed)  # two DELs, one of them without a netns; the runtime still knows the old chain of this pod
    pod = mesh.start_pod(unmeshed_pod("shop", "afterwards"))
    assert_right(mesh, pod)
    assert address_seen(mesh.node.netns, pod.address(4), APP_PORT) == gateway(4)
    agent.start()
    assert_right(mesh, mesh.start_pod(sidecar_pod("shop", "again")))
