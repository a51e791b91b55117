"""ADDs of ambient pods on agent.sock of a real agent, with real netns and the stand-in for ztunnel."""

from __future__ import annotations

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab.ztunnel.client import Program
from tests.agent.ambientscene import (
    API_CONNECTIONS,
    VARIANTS,
    AmbientPod,
    AmbientScene,
    add,
    announced,
    everything_in,
    is_captured,
    lines_of,
    records_of,
    told,
    wait_state,
)
from tests.agent.scene import Agent, request_for, wait_until

from meshcni import istio
from meshcni.protocols.podadd import encode_request


@pytest.fixture
def agent(ambient: AmbientScene, ztunnel: Program) -> Agent:
    return ambient.serving(ztunnel)


# --- what a good one leads to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_pod_is_captured_announced_and_annotated(ambient: AmbientScene, ztunnel: Program, variant: str) -> None:
    agent = ambient.ready(**VARIANTS[variant])
    pod = ambient.new_pod()
    reply = add(agent, pod)
    assert (reply.ok, reply.verdict, reply.reason) == (True, "ambient", "ambient-enabled"), agent.log
    assert is_captured(pod, variant)
    entries = ambient.set_entries() if variant == "nftables" else ambient.ipset_entries()
    assert entries == {pod.address: pod.uid}
    for one in announced(ztunnel, pod):
        assert one["inode"] == pod.inode
        assert one["info"] == {"name": "cart", "namespace": "shop", "serviceAccount": "default"}
    ambient.wait_annotation(pod, "enabled")


def test_answer_comes_after_the_rules_and_the_ack_and_the_annotation_is_last(
    ambient: AmbientScene, agent: Agent, ztunnel: Program
) -> None:
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod = ambient.new_pod()
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(lambda: (add(agent, pod), time.monotonic()))
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
        assert is_captured(pod), "the rules come first: nothing runs in the pod yet"
        assert not reply.done()
        assert ambient.annotation(pod) is None
        answer, answered = reply.result()
    assert answer.ok
    (acked,) = records_of(ztunnel, pod, "add")
    assert acked["received"] < acked["at"] < answered
    ambient.wait_annotation(pod, "enabled")
    (patch,) = ambient.patches(pod)
    assert patch.at > acked["received"]
    assert patch.request.path == f"{pod.api_path}/status"
    assert patch.request.headers["content-type"] == "application/merge-patch+json"
    assert json.loads(patch.request.body) == {
        "metadata": {"uid": pod.uid, "annotations": {istio.AMBIENT_REDIRECTION: "enabled"}}
    }


def test_log_has_one_short_line(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod("checkout-5b8c7f6d9-x2x4z", "online-boutique")
    add(agent, pod)
    ambient.wait_annotation(pod, "enabled")
    (line,) = lines_of(agent, "online-boutique/checkout")
    assert len(line) <= 400
    for part in ("verdict=ambient", "reason=ambient-enabled", "enroll_ms=", "total_ms="):
        assert part in line


def test_ipv6_can_be_off(ambient: AmbientScene, ztunnel: Program) -> None:
    agent = ambient.ready(AMBIENT_IPV6="false")
    pod = ambient.new_pod()
    reply = add(agent, pod, ips=(f"{pod.address}/24", "fd00:1::5/64"))
    assert reply.ok, reply.message
    assert is_captured(pod)
    assert "lookup 100" not in pod.netns.shell("ip", "-6", "rule")
    assert ambient.set_entries() == {pod.address: pod.uid}
    assert "ip6" not in ambient.host_rules()


@pytest.mark.parametrize("setting", ["true", "false"])
def test_pod_with_ipv6_alone(ambient: AmbientScene, ztunnel: Program, setting: str) -> None:
    """With AMBIENT_IPV6=false its traffic passes by, as with the original; but it starts."""
    agent = ambient.ready(AMBIENT_IPV6=setting)
    pod = ambient.new_pod()
    pod.netns.ip(f"addr del {pod.address}/24 dev eth0", "addr add fd00:1::7/64 dev eth0 nodad")
    reply = add(agent, pod, ips=("fd00:1::7/64",))
    assert reply.ok, reply.message
    assert ambient.set_entries() == ({"fd00:1::7": pod.uid} if setting == "true" else {})
    ambient.wait_annotation(pod, "enabled")
    assert ("lookup 100" in pod.netns.shell("ip", "-6", "rule")) is (setting == "true")


def test_dual_stack_pod_has_both_addresses_in_the_sets(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    reply = add(agent, pod, ips=(f"{pod.address}/24", "fd00:1::5/64"))
    assert reply.ok, reply.message
    assert ambient.set_entries() == {pod.address: pod.uid, "fd00:1::5": pod.uid}


def test_overrides_of_a_pod(ambient: AmbientScene, agent: Agent) -> None:
    annotations = {istio.AMBIENT_BYPASS_INBOUND: "true", istio.AMBIENT_DNS_CAPTURE: "F"}
    pod = ambient.new_pod(annotations=annotations | {istio.REROUTE_VIRTUAL_INTERFACES: "tap0, tap1"})
    assert add(agent, pod).ok
    rules = everything_in(pod)
    assert "redirect to :15006" not in rules
    assert ":15053" not in rules
    assert 'iifname "tap0"' in rules
    assert 'iifname "tap1"' in rules


def test_booleans_that_are_none_are_warned_of(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod(annotations={istio.AMBIENT_DNS_CAPTURE: "yes", istio.AMBIENT_BYPASS_INBOUND: ""})
    assert add(agent, pod).ok
    rules = everything_in(pod)
    assert "redirect to :15006" in rules
    assert ":15053" in rules
    assert lines_of(agent, "\twarn\t", istio.AMBIENT_DNS_CAPTURE, "yes")


def test_pod_without_an_address_gets_into_the_set_when_it_has_one(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    assert add(agent, pod, ips=()).ok
    assert is_captured(pod)
    assert ambient.set_entries() == {}
    ambient.report_address(pod)
    wait_until("the set", lambda: ambient.set_entries() == {pod.address: pod.uid})


# --- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_at_once(ambient: AmbientScene, ztunnel: Program, variant: str) -> None:
    agent = ambient.ready(**VARIANTS[variant])
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    pods = ambient.many_pods(50)
    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(lambda pod: add(agent, pod), pods))
    assert [reply.verdict for reply in replies] == ["ambient"] * 50
    assert all(is_captured(pod, variant) for pod in pods)
    entries = ambient.set_entries() if variant == "nftables" else ambient.ipset_entries()
    assert entries == {pod.address: pod.uid for pod in pods}
    for pod in pods:
        (one,) = records_of(ztunnel, pod, "add")
        assert one["inode"] == pod.inode
        ambient.wait_annotation(pod, "enabled")


def test_slow_ack_of_one_pod_keeps_no_other_from_its_rules(
    ambient: AmbientScene, agent: Agent, ztunnel: Program
) -> None:
    """ztunnel takes one pod after the other, so the others may wait for that one's ack, and for nothing else."""
    slow, *others = [ambient.new_pod(f"cart-{number}") for number in range(50)]
    ztunnel.order(do="set", faults=[f"delay:uid/{slow.uid}=3"])
    with ThreadPoolExecutor(50) as threads:
        first = threads.submit(add, agent, slow)
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, slow, "started"))
        replies = [threads.submit(add, agent, pod) for pod in others]
        rules = 'istio_cni_ambient_steps_total{result="ok",step="rules"}'
        wait_until("the others' rules", lambda: agent.metrics().get(rules) == 50)
        assert not first.done()
        assert all(reply.result().ok for reply in (first, *replies))


def test_many_pods_come_and_go_and_leave_nothing(ambient: AmbientScene, agent: Agent) -> None:
    sandboxes = [ambient.new_pod(f"seed-{number}") for number in range(5)]
    flat: tuple[int, int] | None = None
    for turn in range(12):
        pods = []
        for number, sandbox in enumerate(sandboxes):
            known = ambient.scene.add_pod(sandbox.obj | {"metadata": new_metadata(sandbox, f"cart-{turn}-{number}")})
            pods.append(AmbientPod(known, sandbox.path, sandbox.netns, sandbox.address))
        with ThreadPoolExecutor(5) as threads:
            assert all(reply.ok for reply in threads.map(lambda pod: add(agent, pod), pods))
        for pod in pods:
            ambient.delete(pod)
        wait_until("the agent to forget them", lambda: agent.status()["ambient"]["pods"] == [])
        assert ambient.set_entries() == {}
        if turn == 1:
            flat = agent.descriptors(), agent.threads()
    assert flat is not None
    wait_until("descriptors", lambda: agent.descriptors() <= flat[0] + API_CONNECTIONS)
    wait_until("threads", lambda: agent.threads() <= flat[1])


def new_metadata(pod: AmbientPod, name: str) -> dict[str, Any]:
    kept = {key: pod.obj["metadata"][key] for key in ("namespace", "labels")}
    return kept | {"name": name, "annotations": {}}


# --- the same pod again -----------------------------------------------------------------------------------------------


def test_new_sandbox_of_the_same_pod(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    ambient.wait_annotation(pod, "enabled")
    wait_state(agent, pod, "enrolled")
    again = ambient.new_sandbox(pod)
    assert add(agent, again).ok
    assert is_captured(again)
    assert [one["inode"] for one in records_of(ztunnel, pod, "add")] == [pod.inode, again.inode]
    assert ambient.set_entries() == {again.address: pod.uid}, "the old address is nobody's"
    wait_state(agent, pod, "enrolled")
    assert ambient.annotation(pod) == "enabled"
    wait_until("the old netns to be let go", lambda: pod.inode not in netns_of_the_agent(agent))


def test_runtime_that_repeats_itself(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    """The same sandbox again: what is in place counts, and the answer does not wait for anything."""
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    before = everything_in(pod)
    assert add(agent, pod).ok
    assert add(agent, pod).ok
    assert everything_in(pod) == before
    assert len(records_of(ztunnel, pod, "add")) == 1


def test_runtime_that_asks_again_before_the_answer(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    pod = ambient.new_pod()
    ztunnel.order(do="set", faults=["delay:add=1"])
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(add, agent, pod)
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
        second = threads.submit(add, agent, pod)
        replies = first.result(), second.result()
    assert replies[1].ok
    assert replies[0].ok or "another ADD" in replies[0].message
    assert is_captured(pod)


def test_sandbox_that_another_pod_had_is_taken_from_it_first(
    ambient: AmbientScene, agent: Agent, ztunnel: Program
) -> None:
    """ztunnel would open two sets of listeners on the same ports and not notice."""
    first, second = ambient.new_pod("first"), ambient.new_pod("second")
    assert add(agent, first).ok
    second.path, second.address = first.path, first.address
    assert add(agent, second).ok
    assert [(one["event"], one["uid"]) for one in told(ztunnel, "add", "del")] == [
        ("add", first.uid),
        ("del", first.uid),
        ("add", second.uid),
    ]
    assert ztunnel.state()["workloads"].keys() == {second.uid}
    assert ambient.set_entries() == {second.address: second.uid}


# --- pods that are let through ----------------------------------------------------------------------------------------

OPTED_OUT = {istio.DATAPLANE_MODE: "none"}
PASSED = [
    ("kube-system", {}, {}, "namespace-excluded"),
    ("istio-system", {"labels": dict([istio.ZTUNNEL_LABEL])}, {}, "ztunnel-pod"),
    ("shop", {}, {"hostNetwork": True}, "host-network"),
    ("shop", {"labels": OPTED_OUT}, {}, "no-proxy-container"),
]


@pytest.mark.parametrize(("namespace", "fields", "spec", "reason"), PASSED, ids=[row[3] for row in PASSED])
def test_pod_outside_ambient_mode(
    ambient: AmbientScene, ztunnel: Program, namespace: str, fields: dict[str, Any], spec: dict[str, Any], reason: str
) -> None:
    agent = ambient.ready(EXCLUDE_NAMESPACES="kube-system")
    pod = ambient.new_pod("one", namespace, known=False, **fields)
    pod.obj["spec"] |= spec
    ambient.scene.add_pod(pod.obj)
    before = everything_in(pod)
    reply = add(agent, pod)
    assert (reply.ok, reply.verdict, reply.reason) == (True, "skip", reason)
    assert everything_in(pod) == before
    assert records_of(ztunnel, pod, "add") == []
    assert ambient.patches(pod) == []


def test_namespace_decides_for_its_pods(ambient: AmbientScene, agent: Agent) -> None:
    ambient.api.do(lambda server: server.add_namespace("mesh", {istio.DATAPLANE_MODE: "ambient"}))
    inside = ambient.new_pod("in", "mesh", known=False)
    inside.obj["metadata"]["labels"].clear()
    out = ambient.new_pod("out", "mesh", known=False)
    out.obj["metadata"]["labels"] = dict(OPTED_OUT)
    for pod in (inside, out):
        ambient.scene.add_pod(pod.obj)
    assert [add(agent, pod).verdict for pod in (inside, out)] == ["ambient", "skip"]


def test_plugin_that_goes_away(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    """Its ADD ends all the same, and what the pod's next one finds is in order."""
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod = ambient.new_pod()
    descriptor = os.open(pod.path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(ambient.scene.run_dir / istio.AGENT_SOCKET_NAME))
        request = request_for(pod.obj, pod.path, ips=(f"{pod.address}/24",))
        socket.send_fds(connection, [encode_request(request)], [descriptor])
        wait_until("ztunnel to have it", lambda: records_of(ztunnel, pod, "started"))
    os.close(descriptor)
    wait_state(agent, pod, "enrolled")
    again = ambient.new_sandbox(pod)
    assert add(agent, again).ok
    assert ambient.set_entries() == {again.address: pod.uid}
    wait_until("the old netns to be let go", lambda: pod.inode not in netns_of_the_agent(agent))


def netns_of_the_agent(agent: Agent) -> list[int]:
    """The inodes of the namespaces that it has open."""
    folder = f"/proc/{agent.process.pid}/fd"
    return [os.stat(f"{folder}/{number}").st_ino for number in os.listdir(folder)]
