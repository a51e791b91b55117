"""ADDs of ambient pods that a real agent refuses or finishes later: ztunnel, netns, annotations, API server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab.ztunnel.client import Program
from tests.agent.ambientscene import (
    VARIANTS,
    ZTUNNEL_WAIT,
    AmbientPod,
    AmbientScene,
    add,
    announced,
    everything_in,
    is_captured,
    lines_of,
    records_of,
    row_of,
    wait_state,
    wait_unchanged,
)
from tests.agent.scene import Agent, wait_until

from meshcni import istio
from meshcni.errors import AgentUnavailableError
from meshcni.protocols.podadd import AddReply

HALF_DONE_AT_MOST = (None, "pending")
BAD_INTERFACES = ["eth0;drop", "a b", "x" * 16, "../../etc", "e/0", "eth0\naccept", '"']


@pytest.fixture
def agent(ambient: AmbientScene, ztunnel: Program) -> Agent:
    return ambient.serving(ztunnel)


def refused_without_a_trace(ambient: AmbientScene, pod: AmbientPod, reply: AddReply, before: str) -> None:
    """The pod is told to come again, and nothing of ours is left of this attempt."""
    assert (reply.ok, reply.code) == (False, 11), reply.message
    wait_unchanged(pod, before)
    assert ambient.annotation(pod) in HALF_DONE_AT_MOST
    assert pod.address not in ambient.set_entries()


# --- ztunnel is away, refuses, is slow --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_ztunnel_it_is_refused_after_a_while(ambient: AmbientScene, variant: str) -> None:
    agent = ambient.ready(**VARIANTS[variant], **ZTUNNEL_WAIT)
    pod = ambient.new_pod()
    before = everything_in(pod)
    reply = add(agent, pod)
    refused_without_a_trace(ambient, pod, reply, before)
    assert "no ztunnel is connected" in reply.message
    assert "shop/cart" in reply.message
    assert reply.details
    assert ambient.ipset_entries() == {}
    wait_until("an Event", lambda: [one for one in ambient.events() if "no ztunnel" in one.get("message", "")])
    assert agent.metrics()['istio_cni_ambient_steps_total{result="failed",step="ztunnel-add"}'] == 1
    assert agent.metrics()['istio_cni_adds_total{reason="not-programmed",verdict="error"}'] == 1


def test_ztunnel_may_come_while_the_pod_waits(ambient: AmbientScene) -> None:
    agent = ambient.ready()
    pod = ambient.new_pod()
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(add, agent, pod)
        wait_until("its rules", lambda: is_captured(pod))
        ambient.ztunnel()
        assert reply.result().ok
    ambient.wait_annotation(pod, "enabled")


def test_refusal_of_ztunnel_is_passed_on(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=Bind(127.0.0.1:15053 AddrInUse)"])
    pod = ambient.new_pod()
    before = everything_in(pod)
    reply = add(agent, pod)
    refused_without_a_trace(ambient, pod, reply, before)
    assert "Bind(127.0.0.1:15053 AddrInUse)" in reply.message
    assert "15053" in reply.details, "what to do about it"
    assert [one["event"] for one in records_of(ztunnel, pod, "add", "del")] == ["add", "del"]
    ztunnel.order(do="set", faults=[])
    again = ambient.new_sandbox(pod)
    assert add(agent, again).ok
    ambient.wait_annotation(pod, "enabled")
    assert is_captured(again)
    assert ambient.set_entries() == {again.address: pod.uid}
    assert row_of(agent, pod)["lastError"] == ""


def test_long_refusal_does_not_break_the_connection(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=@1500"])
    reply = add(agent, ambient.new_pod())
    assert (reply.ok, reply.code) == (False, 11)
    assert "x" * 1000 in reply.message
    assert ztunnel.state()["connections"] == 1


def test_ack_that_is_late_ends_the_connection_and_counts_for_nobody(
    ambient: AmbientScene, agent: Agent, ztunnel: Program
) -> None:
    pod, other = ambient.new_pod(), ambient.new_pod("other")
    ztunnel.order(do="set", faults=[f"delay:uid/{pod.uid}=5.5"])
    before = everything_in(pod)
    with ThreadPoolExecutor(2) as threads:
        reply = threads.submit(add, agent, pod)
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
        behind = threads.submit(add, agent, other)
        refused_without_a_trace(ambient, pod, reply.result(), before)
        behind.result()  # it was queued behind: refused with the connection, or taken to the next one
    assert "did not answer" in reply.result().message
    metrics = agent.metrics()
    assert metrics['istio_cni_zds_closed_total{cause="ack-timeout"}'] == 1
    assert metrics['istio_cni_zds_messages_total{result="timeout",type="add"}'] == 1
    ztunnel.wait("another connection", lambda state: state["connections"] == 2 and state["snapshot"])
    ztunnel.order(do="set", faults=[])
    assert add(agent, ambient.new_sandbox(pod)).ok
    assert add(agent, ambient.new_sandbox(other)).ok


@pytest.mark.parametrize("fault", ["close", "malformed", "descriptor", "hello"])
def test_ztunnel_that_breaks_off_in_an_add(ambient: AmbientScene, agent: Agent, ztunnel: Program, fault: str) -> None:
    ztunnel.order(do="set", faults=[f"{fault}:add"])
    pod = ambient.new_pod()
    before = everything_in(pod)
    refused_without_a_trace(ambient, pod, add(agent, pod), before)
    ztunnel.order(do="set", faults=[])
    wait_until("another connection", lambda: ztunnel.state()["connections"] > 1 and ztunnel.state()["snapshot"])
    again = ambient.new_sandbox(pod)
    assert add(agent, again).ok
    ambient.wait_annotation(pod, "enabled")


# --- not this pod, not this netns -------------------------------------------------------------------------------------


def test_netns_without_the_pods_address_is_refused(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    pod = ambient.new_pod()
    before = everything_in(pod)
    reply = add(agent, pod, ips=("10.99.0.9/24",))
    assert (reply.ok, reply.code) == (False, 4)
    assert "10.99.0.9" in reply.message
    assert pod.address in reply.message
    assert everything_in(pod) == before
    assert records_of(ztunnel, pod, "add") == []
    assert ambient.set_entries() == {}


def test_netns_of_the_node_is_refused(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    pod = ambient.new_pod()
    pod.path = ambient.scene.netns
    reply = add(agent, pod)
    assert (reply.ok, reply.code) == (False, 4)
    assert "15001" not in ambient.host_rules()
    assert records_of(ztunnel, pod, "add") == []


def test_sandboxed_runtime_is_refused(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod(runtime_class="kata-qemu")
    before = everything_in(pod)
    reply = add(agent, pod)
    assert (reply.ok, reply.code) == (False, 7)
    assert "kata-qemu" in reply.message
    assert "AMBIENT_SANDBOXED_RUNTIMES" in reply.details
    assert everything_in(pod) == before


@pytest.mark.parametrize(
    "options", [{"runtime_class": "gvisor"}, {"annotations": {istio.REROUTE_VIRTUAL_INTERFACES: "a b"}}]
)
def test_pod_that_was_refused_is_forgotten_with_its_end(
    ambient: AmbientScene, agent: Agent, options: dict[str, Any]
) -> None:
    pod = ambient.new_pod(**options)
    assert not add(agent, pod).ok
    wait_state(agent, pod, "unknown")
    ambient.delete(pod)
    wait_state(agent, pod, "")


def test_sandboxed_runtime_can_be_let_in(ambient: AmbientScene, ztunnel: Program) -> None:
    agent = ambient.ready(AMBIENT_SANDBOXED_RUNTIMES="none")
    assert add(agent, ambient.new_pod(runtime_class="kata-qemu")).ok


@pytest.mark.parametrize("value", BAD_INTERFACES)
def test_interface_name_that_is_none_is_refused(ambient: AmbientScene, agent: Agent, value: str) -> None:
    pod = ambient.new_pod(annotations={istio.REROUTE_VIRTUAL_INTERFACES: value})
    before = everything_in(pod)
    reply = add(agent, pod)
    assert (reply.ok, reply.code) == (False, 7), reply.message
    assert istio.REROUTE_VIRTUAL_INTERFACES in reply.message
    assert everything_in(pod) == before
    wait_until("an Event", lambda: [one for one in ambient.events() if istio.REROUTE_VIRTUAL_INTERFACES in str(one)])
    assert wait_state(agent, pod, "unknown")["lastError"]


def test_corrected_annotation_lets_the_pod_in(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod(annotations={istio.REROUTE_VIRTUAL_INTERFACES: "a b"})
    assert not add(agent, pod).ok
    patch = {"metadata": {"annotations": {istio.REROUTE_VIRTUAL_INTERFACES: "tap0"}}}
    ambient.api.do(lambda server: server.patch("pods", pod.namespace, pod.name, patch))
    wait_state(agent, pod, "pending")
    assert add(agent, ambient.new_sandbox(pod)).ok


# --- too few descriptors ----------------------------------------------------------------------------------------------


def with_descriptors(ambient: AmbientScene, soft: int, hard: int) -> None:
    """Let agents of the scene have that many open files."""
    ambient.scene.program = ("prlimit", f"--nofile={soft}:{hard}", *ambient.scene.program)


def test_agent_takes_all_the_descriptors_it_may_have(ambient: AmbientScene, ztunnel: Program) -> None:
    """Container runtimes give 1,024 at first, and a node may have 250 pods."""
    with_descriptors(ambient, 64, 4096)
    agent = ambient.serving(ztunnel)
    with ThreadPoolExecutor(40) as threads:
        replies = list(threads.map(lambda pod: add(agent, pod), ambient.many_pods(80)))
    assert all(reply.ok for reply in replies)


def test_pods_are_refused_when_there_are_none_left(ambient: AmbientScene, ztunnel: Program) -> None:
    """libnftables would end the whole process."""
    with_descriptors(ambient, 100, 100)
    agent = ambient.serving(ztunnel)
    assert lines_of(agent, "\twarn\t", "at most 100 files")
    pods = ambient.many_pods(100)
    with ThreadPoolExecutor(40) as threads:
        replies = list(threads.map(lambda pod: add(agent, pod), pods))
    refused = [reply for reply in replies if not reply.ok]
    assert refused
    assert agent.process.poll() is None
    assert "Traceback" not in agent.log
    for pod in pods:
        ambient.delete(pod)

    def forgotten() -> bool:
        try:
            return agent.status()["ambient"]["pods"] == []
        except AgentUnavailableError:  # no descriptor for us either
            return False

    wait_until("the agent to forget them", forgotten)
    assert add(agent, ambient.new_pod("next")).ok


# --- what the API server knows ----------------------------------------------------------------------------------------


def test_pod_that_the_informer_does_not_know_yet(ambient: AmbientScene, agent: Agent) -> None:
    ambient.api.do(lambda server: server.freeze_watches())
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    ambient.wait_annotation(pod, "enabled")


def test_api_away_refuses_a_pod_that_is_not_known(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod(known=False)
    before = everything_in(pod)
    ambient.api.crash()
    reply = add(agent, pod)
    assert (reply.ok, reply.code) == (False, 11)
    assert everything_in(pod) == before


def test_api_away_delays_only_the_annotation(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    wait_until("the informer", lambda: agent.status()["watches"][0]["objects"] == 1)
    ambient.api.crash()
    assert add(agent, pod).ok
    assert is_captured(pod)
    assert ambient.set_entries() == {pod.address: pod.uid}
    ambient.api.restart()
    ambient.wait_annotation(pod, "enabled")


def test_slow_api_server_delays_no_pod(ambient: AmbientScene, agent: Agent) -> None:
    ambient.api.do(lambda server: server.fault("hang", method="PATCH"))
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    assert ambient.annotation(pod) is None
    ambient.wait_annotation(pod, "enabled")  # with the next try


def test_static_pod_has_two_uids(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    """The runtime knows it by the kubelet's hash; ztunnel and the API server by the mirror's UID."""
    digest = "0123456789abcdef" * 2
    pod = ambient.new_pod(annotations={"kubernetes.io/config.hash": digest, "kubernetes.io/config.mirror": digest})
    assert add(agent, pod, pod_uid=digest).ok
    assert announced(ztunnel, pod)
    ambient.wait_annotation(pod, "enabled")


def test_runtime_that_tells_no_uid(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    assert add(agent, pod, pod_uid="").ok
    ambient.wait_annotation(pod, "enabled")


def test_names_of_the_greatest_length_fit(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    """ztunnel takes 1,024 bytes in a message."""
    pod = ambient.new_pod("p" * 253, "n" * 63, known=False)
    pod.obj["spec"]["serviceAccountName"] = "s" * 253
    ambient.scene.add_pod(pod.obj)
    reply = add(agent, pod)
    assert reply.ok, reply.message
    assert records_of(ztunnel, pod, "add")[0]["info"]["serviceAccount"] == "s" * 253


@pytest.mark.parametrize("status", [403, 409, 500])
def test_patch_that_is_refused_is_tried_again(ambient: AmbientScene, agent: Agent, status: int) -> None:
    ambient.api.do(lambda server: server.fault("status", method="PATCH", status=status, count=3))
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    ambient.wait_annotation(pod, "enabled")
    assert is_captured(pod)


def test_successor_of_the_same_name_is_never_annotated(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    """A StatefulSet's next pod has the name already when the first one's enrolment ends."""
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod = ambient.new_pod("db-0")
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(add, agent, pod)
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
        ambient.api.do(lambda server: server.freeze_watches())
        ambient.delete(pod)
        successor = ambient.new_pod("db-0")
        reply.result()
    wait_until("a patch", lambda: ambient.patches(pod))
    assert ambient.annotation(successor) is None


def test_pod_that_is_deleted_while_it_starts(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod = ambient.new_pod()
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(add, agent, pod)
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
        ambient.delete(pod)
        reply.result()
    wait_state(agent, pod, "")
    assert ambient.set_entries() == {}
    wait_until("the Del", lambda: records_of(ztunnel, pod, "del"))
    assert pod.uid not in ztunnel.state()["workloads"]


def test_pod_that_stops_belonging_while_it_starts(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod = ambient.new_pod()
    before = everything_in(pod)
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(add, agent, pod)
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
        ambient.label(pod, mode=None)
        reply.result()
    wait_state(agent, pod, "")
    assert everything_in(pod) == before
    assert ambient.annotation(pod) is None
    assert ambient.set_entries() == {}
