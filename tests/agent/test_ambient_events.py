"""`POST /cmdadd` on pluginevent.sock of a real agent in ambient mode, as the original's plugin uses it."""

from __future__ import annotations

import json
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab.objects import sidecar_pod, unmeshed_pod
from lab.ztunnel.client import Program
from tests.agent.ambientscene import (
    AmbientPod,
    AmbientScene,
    UnixHttp,
    event_of,
    everything_in,
    is_captured,
    lines_of,
    post,
    push,
    wait_metric,
    wait_state,
)
from tests.agent.eventbodies import bodies
from tests.agent.scene import Agent, wait_until

from meshcni import istio
from meshcni.agent.podevents import ANSWER_SECONDS
from meshcni.protocols.cmdadd import MAX_BODY_BYTES

PLAIN = "text/plain; charset=utf-8"
NOT_ELIGIBLE = "unexpectedly not eligible for ambient enrollment"


def requests_answered(status: int) -> str:
    return f'istio_cni_plugin_requests_total{{response_code="{status}"}}'


@pytest.fixture
def agent(ambient: AmbientScene, ztunnel: Program) -> Agent:
    return ambient.serving(ztunnel)


def send(ambient: AmbientScene, body: bytes, **options: Any) -> Any:
    return post(ambient.scene.run_dir / istio.EVENT_SOCKET_NAME, body, **options)


def enrolled(ambient: AmbientScene, pod: AmbientPod) -> None:
    assert is_captured(pod)
    assert ambient.set_entries() == {pod.address: pod.uid}
    ambient.wait_annotation(pod, "enabled")


# --- 200 --------------------------------------------------------------------------------------------------------------


def test_pod_is_enrolled(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    answer = push(ambient.scene, pod)
    assert (answer.status, answer.text) == (200, ""), agent.log
    enrolled(ambient, pod)
    assert agent.metrics()[requests_answered(200)] == 1
    (line,) = lines_of(agent, "shop/cart")
    assert len(line) <= 400


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_any_method_will_do(ambient: AmbientScene, agent: Agent, method: str) -> None:
    pod = ambient.new_pod()
    assert send(ambient, json.dumps(event_of(pod)).encode(), method=method).status == 200
    enrolled(ambient, pod)


def test_keys_in_any_letter_case_and_keys_of_later_releases(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    address = {"ip": pod.address, "MASK": "////AA==", "zone": ""}
    body = {
        "NETNS": pod.path,
        "podname": pod.name,
        "podNamespace": pod.namespace,
        "ips": [{"interface": None, "ADDRESS": address, "gateway": ""}],
        "Revision": {"of": ["a", "later", "release"]},
    }
    assert send(ambient, json.dumps(body).encode()).status == 200
    enrolled(ambient, pod)


def test_addresses_may_be_null(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    assert push(ambient.scene, pod, IPs=None).status == 200
    assert is_captured(pod)
    assert ambient.set_entries() == {}
    ambient.report_address(pod)
    wait_until("the set", lambda: ambient.set_entries() == {pod.address: pod.uid})


def test_mapped_addresses_are_ipv4(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    mapped = [{"Address": {"IP": f"::ffff:{pod.address}", "Mask": "////////////////////AA=="}}]
    assert push(ambient.scene, pod, IPs=mapped).status == 200
    enrolled(ambient, pod)


def test_connection_is_kept_for_the_next_event(ambient: AmbientScene, agent: Agent) -> None:
    connection = UnixHttp(ambient.scene.run_dir / istio.EVENT_SOCKET_NAME)
    for number in range(3):
        pod = ambient.new_pod(f"cart-{number}")
        connection.request("POST", istio.EVENT_PATH, json.dumps(event_of(pod)))
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
    connection.close()


def test_fifty_at_once(ambient: AmbientScene, agent: Agent) -> None:
    pods = [ambient.new_pod(f"cart-{number}") for number in range(50)]
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda pod: push(ambient.scene, pod), pods))
    assert [answer.status for answer in answers] == [200] * 50, agent.log
    assert ambient.set_entries() == {pod.address: pod.uid for pod in pods}
    assert all(is_captured(pod) for pod in pods)
    assert agent.metrics()[requests_answered(200)] == 50


def test_a_node_full_of_pods_at_once(ambient: AmbientScene, agent: Agent) -> None:
    """After a reboot every pod of a node asks in the same moment; the answer may be no, but there is one."""
    pods = [unmeshed_pod("shop", f"job-{number}") for number in range(250)]
    body = [json.dumps({"Netns": "/x", "PodName": pod["metadata"]["name"], "PodNamespace": "shop"}) for pod in pods]
    with ThreadPoolExecutor(250) as threads:
        answers = list(threads.map(lambda text: send(ambient, text.encode()), body))
    assert [answer.status for answer in answers] == [500] * 250
    assert agent.metrics()[requests_answered(500)] == 250


# --- 400 --------------------------------------------------------------------------------------------------------------

BROKEN = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b"null",
    b'"text"',
    b'{"Netns":"/x","PodName":"a","PodNamespace":"b"} trailing',
    b'{"Netns":"/x","PodName":"a","PodNamespace":"b"}{}',
    b'{"PodName":1}',
    b'{"Netns":{}}',
    b'{"IPs":"10.0.0.1"}',
    b'{"IPs":[{"Address":{"IP":"10.0.0.300"}}]}',
    b'{"IPs":[{"Address":{"IP":"10.0.0.3","Mask":"not base64!"}}]}',
    b'{"IPs":[7]}',
    b'{"PodName":"\xff\xfe"}',
    b"[" * 50_000,
]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_body_that_cannot_be_read(ambient: AmbientScene, agent: Agent, body: bytes) -> None:
    answer = send(ambient, body)
    assert answer.status == 400
    assert answer.content_type == PLAIN
    assert answer.text.endswith("\n")
    assert len(answer.text.strip()) > 5
    assert agent.metrics()[requests_answered(400)] == 1


def test_body_has_a_limit(ambient: AmbientScene, agent: Agent) -> None:
    assert send(ambient, b'{"PodName":"' + b"x" * 70_000 + b'"}').status == 413
    assert agent.metrics()['istio_cni_requests_refused_total{cause="oversized",socket="event"}'] == 1


# --- 500 --------------------------------------------------------------------------------------------------------------


def refused(ambient: AmbientScene, agent: Agent, pod: AmbientPod, *parts: str, **changes: Any) -> None:
    before = everything_in(pod)
    answer = push(ambient.scene, pod, **changes)
    assert answer.status == 500
    assert answer.content_type == PLAIN
    assert answer.text.endswith("\n")
    for part in (f"{pod.namespace}/{pod.name}", *parts):
        assert part in answer.text
    wait_until("the netns to be as before", lambda: everything_in(pod) == before)
    assert ambient.set_entries() == {}
    assert agent.metrics()[requests_answered(500)] == 1


def test_pod_that_nobody_knows(ambient: AmbientScene, agent: Agent) -> None:
    refused(ambient, agent, ambient.new_pod(known=False), "404")


def test_pod_of_a_cluster_that_does_not_answer(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    ambient.api.crash()
    refused(ambient, agent, pod)


@pytest.mark.parametrize("kind", ["unmeshed", "sidecar", "opted out", "host network", "ztunnel"])
def test_pod_that_is_not_eligible(ambient: AmbientScene, agent: Agent, kind: str) -> None:
    pod = ambient.new_pod("one", "istio-system" if kind == "ztunnel" else "shop", known=False)
    labels = pod.obj["metadata"]["labels"]
    match kind:
        case "unmeshed":
            labels.clear()
        case "sidecar":
            pod.obj["metadata"]["annotations"] = sidecar_pod("shop", "one")["metadata"]["annotations"]
        case "opted out":
            labels[istio.DATAPLANE_MODE] = "none"
        case "host network":
            pod.obj["spec"]["hostNetwork"] = True
        case "ztunnel":
            labels |= dict([istio.ZTUNNEL_LABEL])
    ambient.scene.add_pod(pod.obj)
    refused(ambient, agent, pod, NOT_ELIGIBLE)


def test_excluded_namespaces_are_the_plugins_business(ambient: AmbientScene, ztunnel: Program) -> None:
    ambient.ready(EXCLUDE_NAMESPACES="shop")
    assert push(ambient.scene, ambient.new_pod()).status == 200


def test_netns_that_is_none(ambient: AmbientScene, agent: Agent) -> None:
    refused(ambient, agent, ambient.new_pod(), "/var/run/netns/cni-none", Netns="/var/run/netns/cni-none")


@pytest.mark.parametrize("path", ["", "relative/path", "/etc/hostname", "/", "/run/netns/\0x", "/proc/self/ns/mnt"])
def test_path_that_is_no_netns(ambient: AmbientScene, agent: Agent, path: str) -> None:
    refused(ambient, agent, ambient.new_pod(), Netns=path)


def test_netns_of_the_node(ambient: AmbientScene, agent: Agent) -> None:
    refused(ambient, agent, ambient.new_pod(), "the agent's own", Netns=ambient.scene.netns)
    assert "15001" not in ambient.host_rules()


def test_netns_of_another_pod(ambient: AmbientScene, agent: Agent) -> None:
    other = ambient.new_pod("other")
    before = everything_in(other)
    refused(ambient, agent, ambient.new_pod(), other.address, Netns=other.path)
    assert everything_in(other) == before


def test_without_a_ztunnel_the_answer_comes_before_the_plugin_gives_up(ambient: AmbientScene) -> None:
    """Its client waits 5 s and then says that it waited 5 s; we know more."""
    assert ANSWER_SECONDS < 5
    agent = ambient.ready(AMBIENT_ZTUNNEL_WAIT_SECONDS="300")
    pod = ambient.new_pod()
    before = everything_in(pod)
    answer = push(ambient.scene, pod)
    assert answer.status == 500
    assert "ztunnel-add" in answer.text, "the step that it waited for"
    wait_until("the netns to be as before: nobody waits any more", lambda: everything_in(pod) == before)
    assert ambient.annotation(pod) in (None, "pending")
    wait_metric(agent, requests_answered(500), 1)


def test_refusal_of_ztunnel_is_passed_on(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=AddrInUse: 15053"])
    refused(ambient, agent, ambient.new_pod(), "AddrInUse: 15053")


def test_bad_annotation_is_named(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod(annotations={istio.REROUTE_VIRTUAL_INTERFACES: "a b"})
    refused(ambient, agent, pod, istio.REROUTE_VIRTUAL_INTERFACES)


def test_long_reason_is_cut(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=@60000"])
    answer = push(ambient.scene, ambient.new_pod())
    assert answer.status == 500
    assert len(answer.text) < 4096
    assert answer.text.endswith("\n")


# --- both plugins at once, clients that go away -----------------------------------------------------------------------


def test_sandbox_that_failed_is_let_go_for_the_next_one(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=no"])
    pod = ambient.new_pod()
    assert push(ambient.scene, pod).status == 500
    ztunnel.order(do="set", faults=[])
    again = ambient.new_sandbox(pod)
    assert push(ambient.scene, again).status == 200
    enrolled(ambient, again)
    assert not is_captured(pod)


def test_client_that_goes_away(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    """The pod's next ADD finds everything in order, whatever became of this one."""
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod = ambient.new_pod()
    body = json.dumps(event_of(pod)).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(ambient.scene.run_dir / istio.EVENT_SOCKET_NAME))
        head = f"POST {istio.EVENT_PATH} HTTP/1.1\r\nHost: unix\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until("ztunnel to have it", lambda: ztunnel.records("started"))
    again = ambient.new_sandbox(pod)
    assert push(ambient.scene, again).status == 200
    enrolled(ambient, again)
    wait_state(agent, pod, "enrolled")


def test_clients_that_say_nothing_keep_nobody_out(ambient: AmbientScene, agent: Agent) -> None:
    path = str(ambient.scene.run_dir / istio.EVENT_SOCKET_NAME)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(300)]
    try:
        for client in silent:
            client.connect(path)
        assert push(ambient.scene, ambient.new_pod()).status == 200
    finally:
        for client in silent:
            client.close()


def test_socket_is_for_root_alone(ambient: AmbientScene, agent: Agent) -> None:
    """0600, not the original's 0666: whoever may write to it may have any pod programmed (docs/compatibility.md)."""
    assert stat.S_IMODE((ambient.scene.run_dir / istio.EVENT_SOCKET_NAME).stat().st_mode) == 0o600


def test_random_bodies_are_all_answered_and_leave_nothing(ambient: AmbientScene, agent: Agent) -> None:
    """Some thousands through the real socket; test_event_fuzz.py has more of them."""
    pod = ambient.new_pod()
    assert push(ambient.scene, pod).status == 200
    ambient.delete(pod)
    wait_state(agent, pod, "")
    descriptors, threads = agent.descriptors(), agent.threads()
    counted = sum(agent.metrics().get(requests_answered(status), 0) for status in (200, 400, 500))
    connection, answers = UnixHttp(ambient.scene.run_dir / istio.EVENT_SOCKET_NAME), 0
    memory = agent.rss_mib()
    for body in bodies(3000, seed=time.time_ns() % 1000):
        connection.request("POST", istio.EVENT_PATH, body)
        answer = connection.getresponse()
        answer.read()
        if answer.status == 413:  # counted elsewhere, and the connection is closed
            assert len(body) > MAX_BODY_BYTES
            connection.close()
            continue
        assert answer.status in (400, 500), body
        answers += 1
    connection.close()
    metrics = agent.metrics()
    assert sum(metrics.get(requests_answered(status), 0) for status in (200, 400, 500)) == counted + answers
    assert agent.status()["ambient"]["pods"] == []
    assert "Traceback" not in agent.log
    wait_until("descriptors", lambda: agent.descriptors() <= descriptors + 8)  # connections to the API server
    wait_until("threads", lambda: agent.threads() <= threads)
    print(f"3,000 random events: RSS {memory:.1f} -> {agent.rss_mib():.1f} MiB")
