"""Pods that containerd started without our plugin, told as broken by the API: the agent repairs them in their netns."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab.agent import Agent, AgentOptions
from lab.mesh import APP_PORT, Mesh, RunningPod, patch_pod
from lab.node import wait_until
from lab.objects import sidecar_pod
from lab.traffic import address_seen
from tests.node.conftest import BACKENDS

PATIENCE_SECONDS = 30.0
REPAIR = {"REPAIR_ENABLED": "true", "REPAIR_REPAIR_PODS": "true", "SIDECAR_RECONCILE": "off"}  # repair is all there is
WITH_BOUND = {"HOST_NETNS_DIR": "/run/netns"}  # the lab's agent runs on the node itself
REPAIRED = "istio_cni_repair_pods_repaired_total"


def options(backend: str = "nftables", **environment: str) -> AgentOptions:
    return replace(BACKENDS[backend], environment={**REPAIR, **WITH_BOUND, **environment})


@pytest.fixture
def agent(mesh: Mesh) -> Agent:
    mesh.agent.ensure(options())
    return mesh.agent


def broken(code: int = 126, restarts: int = 1) -> dict[str, Any]:
    """What a kubelet tells of the init container that finds no rules."""
    end = {"terminated": {"exitCode": code, "reason": "Error"}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    status = {"name": "istio-validation", "state": waiting, "lastState": end, "restartCount": restarts}
    return {"initContainerStatuses": [status]}


def tell(mesh: Mesh, pod: RunningPod, status: Mapping[str, Any]) -> None:
    mesh.api.do(lambda server: patch_pod(server, pod, {"status": dict(status)}, "status"))


def start_without_us(mesh: Mesh, name: str, pod: dict[str, Any] | None = None) -> RunningPod:
    with mesh.chain_without_us():
        running = mesh.start_pod(pod or sidecar_pod("shop", name))
    assert mesh.rules(running.netns).count == 0
    return running


def events(mesh: Mesh, pod: RunningPod) -> list[tuple[str, str]]:
    """Reason and message of the Events at a pod."""
    found = mesh.api.do(lambda server: server.cluster.objects("events"))
    return [(one["reason"], one["message"]) for one in found if one["involvedObject"]["uid"] == pod.uid]


def wait_for_event(mesh: Mesh, pod: RunningPod, reason: str) -> str:
    """Return the message of the first Event with that reason."""

    def message() -> str:
        return next((text for kind, text in events(mesh, pod) if kind == reason), "")

    wait_until(f"an Event {reason} at {pod.name}", lambda: bool(message()), PATIENCE_SECONDS)
    return message()


def end_processes(pod: RunningPod) -> None:
    """End the sandbox's own process; the runtime keeps the netns, as CRI-O does without an infra container."""
    inode = os.stat(pod.netns).st_ino
    (pause,) = [pid for pid in _pids() if _is_in(pid, inode)]
    assert Path(f"/proc/{pause}/comm").read_text() == "pause\n"
    os.kill(int(pause), signal.SIGKILL)
    wait_until("the sandbox has no process", lambda: not any(_is_in(one, inode) for one in _pids()), PATIENCE_SECONDS)


def _pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdecimal()]


def _is_in(pid: str, inode: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == inode
    except OSError:
        return False


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_broken_pod_is_repaired_and_its_traffic_goes_through_its_proxy(mesh: Mesh, backend: str) -> None:
    mesh.agent.ensure(options(backend))
    pod = start_without_us(mesh, f"broken-{backend}")
    before = mesh.agent.metric(REPAIRED, type="repair", result="success")

    tell(mesh, pod, broken())
    message = wait_for_event(mesh, pod, "MeshRedirectionRepaired")

    held = mesh.rules(pod.netns)
    assert held.count == 1, held.listing
    assert {"nftables": held.nftables, "iptables-nft": held.iptables_nft, "iptables-legacy": held.iptables_legacy}[
        backend
    ]
    assert "istio-validation last ended with status 126" in message
    assert mesh.agent.metric(REPAIRED, type="repair", result="success") == before + 1
    envoy = mesh.start_proxy(pod)
    captured = envoy.captured()
    assert address_seen(mesh.node.netns, pod.address(4), APP_PORT) == "127.0.0.6"
    assert (envoy.captured() - captured).inbound == 1


def test_it_is_what_an_add_would_have_made(mesh: Mesh, agent: Agent) -> None:
    right = mesh.start_pod(sidecar_pod("shop", "right"))
    pod = start_without_us(mesh, "like-right")
    tell(mesh, pod, broken())
    wait_for_event(mesh, pod, "MeshRedirectionRepaired")
    assert mesh.rules(pod.netns).listing == mesh.rules(right.netns).listing


def test_a_pod_without_a_process_is_repaired_in_its_bound_netns(mesh: Mesh, agent: Agent) -> None:
    pod = start_without_us(mesh, "no-process")
    other = start_without_us(mesh, "neighbour")
    end_processes(pod)

    tell(mesh, pod, broken())
    wait_for_event(mesh, pod, "MeshRedirectionRepaired")

    assert mesh.rules(pod.netns).count == 1
    assert mesh.rules(other.netns).count == 0


def test_without_a_process_a_pod_whose_address_another_claims_is_refused(mesh: Mesh, agent: Agent) -> None:
    pod = start_without_us(mesh, "claimed")
    end_processes(pod)
    rival = sidecar_pod("shop", "rival")
    rival["status"] = {"phase": "Running", "podIP": pod.address(4), "podIPs": [{"ip": pod.address(4)}]}
    mesh.add_object(rival)
    try:
        mesh.wait_until_known()
        tell(mesh, pod, broken())
        message = wait_for_event(mesh, pod, "MeshRepairFailed")
        assert "shop/rival has the same address" in message
        assert mesh.rules(pod.netns).count == 0
    finally:
        mesh.api.do(lambda server: server.delete_pod("shop", "rival"))
    wait_for_event(mesh, pod, "MeshRedirectionRepaired")  # seconds later, with nobody's help
    assert mesh.rules(pod.netns).count == 1


def test_a_successor_of_the_same_name_is_repaired_too(mesh: Mesh, agent: Agent) -> None:
    first = start_without_us(mesh, "web-0")
    tell(mesh, first, broken())
    wait_for_event(mesh, first, "MeshRedirectionRepaired")
    mesh.remove_pod(first)

    second = start_without_us(mesh, "web-0")
    assert second.uid != first.uid
    tell(mesh, second, broken())
    wait_for_event(mesh, second, "MeshRedirectionRepaired")
    assert mesh.rules(second.netns).count == 1


def test_a_pod_on_the_hosts_network_is_left_alone(mesh: Mesh, agent: Agent) -> None:
    on_host = sidecar_pod("shop", "on-host")
    on_host["spec"]["hostNetwork"] = True
    node_before = mesh.rules(mesh.node.netns).listing
    with mesh.chain_without_us():
        pod = mesh.start_pod(on_host)
    tell(mesh, pod, broken() | {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]})
    witness = start_without_us(mesh, "witness")
    tell(mesh, witness, broken())
    wait_for_event(mesh, witness, "MeshRedirectionRepaired")
    assert events(mesh, pod) == []
    assert mesh.rules(mesh.node.netns).listing == node_before


def test_an_agent_that_starts_repairs_what_it_finds(mesh: Mesh, agent: Agent) -> None:
    pod = start_without_us(mesh, "before-the-agent")
    agent.terminate()
    tell(mesh, pod, broken(restarts=5))
    agent.start(options())
    wait_for_event(mesh, pod, "MeshRedirectionRepaired")
    assert mesh.rules(pod.netns).count == 1


def test_an_unmeshed_neighbour_and_a_pod_of_another_cause_are_not_touched(mesh: Mesh, agent: Agent) -> None:
    other_cause = start_without_us(mesh, "other-cause")
    tell(mesh, other_cause, broken(code=1))
    witness = start_without_us(mesh, "witness-2")
    tell(mesh, witness, broken())
    wait_for_event(mesh, witness, "MeshRedirectionRepaired")
    assert mesh.rules(other_cause.netns).count == 0
    assert events(mesh, other_cause) == []


def test_broken_pods_are_deleted(mesh: Mesh) -> None:
    mesh.agent.ensure(options(REPAIR_REPAIR_PODS="false", REPAIR_DELETE_PODS="true"))
    pod = start_without_us(mesh, "to-delete")
    tell(mesh, pod, broken())
    assert wait_for_event(mesh, pod, "DeleteBrokenPod") == "pod detected as broken, deleted"
    assert "deletionTimestamp" in mesh.api_object(pod)["metadata"]
    assert mesh.rules(pod.netns).count == 0
    assert mesh.agent.metric(REPAIRED, type="delete", result="success") >= 1
