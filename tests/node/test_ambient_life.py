"""What becomes of ambient pods over their life, and of a node that the agent leaves."""

from __future__ import annotations

import http.client
import json
import socket
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
from lab.agent import AGENT_NAMESPACE
from lab.apiserver.objects import BY_PLURAL
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import wait_until
from lab.objects import ambient_pod, daemonset_object, unmeshed_pod
from lab.traffic import address_seen
from tests.node.ambientworld import (
    BACKENDS,
    ENROL_SECONDS,
    OURS,
    disagreements,
    host_set,
    inode,
    kernel,
    remove_pods,
    start_ambient,
    start_pods,
    traces,
    wait_agreement,
    wait_enrolled,
    wait_left,
)
from tests.node.conftest import gateway

from meshcni import istio

MANY = 50


@pytest.fixture
def running(ambient: Mesh) -> Mesh:
    ambient.agent.ensure(BACKENDS["nftables"])
    ambient.start_ztunnel()
    return ambient


def test_a_completed_pod_is_let_go(running: Mesh) -> None:
    mesh = running
    stays, job = start_ambient(mesh, "beside-a-job", "job")
    reference = kernel(mesh, stays.netns)
    mesh.report(job, "Succeeded")
    mesh.stop_sandbox(job)
    wait_left(mesh, [job])
    wait_agreement(mesh, reference)


def test_a_deleted_pod_is_served_until_it_is_gone(running: Mesh) -> None:
    """From its deletion to the end of its processes it talks as before: only its end takes it out."""
    mesh = running
    stays, going = start_ambient(mesh, "witness", "going")
    reference = kernel(mesh, stays.netns)
    mesh.api.do(lambda server: server.cluster.delete(BY_PLURAL["pods"], "shop", "going"))  # graceful: it is only marked
    wait_until("it is marked", lambda: "deletionTimestamp" in mesh.api_object(going)["metadata"], ENROL_SECONDS)
    start_ambient(mesh, "later")  # the agent has seen the mark
    before = mesh.ztunnels["ztunnel"].connections(going.uid)["inbound"]
    assert address_seen(stays.netns, going.address(4), APP_PORT) == stays.address(4)
    assert mesh.ztunnels["ztunnel"].connections(going.uid)["inbound"] == before + 1
    mesh.remove_pod(going)
    wait_left(mesh, [going])
    assert disagreements(mesh, reference) == []


def test_a_pod_under_the_name_of_an_earlier_one(running: Mesh) -> None:
    """As a StatefulSet makes them: the same name at once, another UID, perhaps the same address."""
    mesh = running
    (first,) = start_ambient(mesh, "db-0")
    reference = kernel(mesh, first.netns)
    for _ in range(3):
        mesh.remove_pod(first)
        (second,) = start_ambient(mesh, "db-0")
        assert second.uid != first.uid
        first = second
    wait_agreement(mesh, reference)


def test_an_address_that_goes_to_another_pod_at_once(running: Mesh) -> None:
    """The old pod's removal must not take the new one's entry from the set."""
    mesh = running
    old = start_ambient(mesh, *(f"old-{number}" for number in range(4)))
    reference = kernel(mesh, old[0].netns)
    addresses = {address for pod in old for address in pod.sandbox.addresses}
    # the runtime frees the addresses, and hands them out again before the API server hears of the end of the old pods
    for pod in old:
        mesh.stop_sandbox(pod)
    mesh.runtime.hand_out_again(old[0].address(4), old[0].address(6))
    new = start_ambient(mesh, *(f"new-{number}" for number in range(4)))
    assert addresses & {address for pod in new for address in pod.sandbox.addresses}
    for pod in old:
        mesh.api.do(lambda server, pod=pod: server.delete_pod("shop", pod.name))
    wait_left(mesh, old)
    wait_agreement(mesh, reference)


def test_many_pods_at_once(running: Mesh) -> None:
    mesh = running
    (first,) = start_ambient(mesh, "first-of-many")
    reference = kernel(mesh, first.netns)
    pods = start_pods(mesh, [ambient_pod("crowd", f"one-of-many-{number}") for number in range(MANY)])
    wait_enrolled(mesh, pods)
    assert disagreements(mesh, reference) == []
    assert mesh.agent.metric("istio_cni_ambient_pods", state="enrolled") == MANY + 1
    assert address_seen(pods[0].netns, pods[-1].address(6), APP_PORT) == pods[0].address(6)
    remove_pods(mesh, pods)
    wait_left(mesh, pods)
    assert disagreements(mesh, reference) == []


# --- the original's plugin --------------------------------------------------------------------------------------------


def post_event(mesh: Mesh, pod: RunningPod) -> tuple[int, str]:
    """What the original's plugin posts about a sandbox, and the answer."""
    ips = []
    for address, mask in zip(pod.sandbox.addresses, (b"\xff\xff\0\0", b"\xff" * 8 + b"\0" * 8), strict=True):
        value = {"IP": address, "Mask": b64encode(mask).decode()}
        ips.append({"Interface": 2, "Address": value, "Gateway": gateway(6 if ":" in address else 4)})
    body = {"Netns": pod.sandbox.netns, "PodName": pod.name, "PodNamespace": pod.sandbox.namespace, "IPs": ips}
    connection = http.client.HTTPConnection("unix")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(mesh.node.path(f"/run/istio-cni/{istio.EVENT_SOCKET_NAME}")))
    try:
        connection.request("POST", istio.EVENT_PATH, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_originals_plugin_has_pods_enrolled(running: Mesh) -> None:
    """Its request comes before the API server knows an address, and is answered when the pod may start."""
    mesh = running
    (first,) = start_ambient(mesh, "by-our-plugin")
    with mesh.chain_without_us():
        pod = mesh.start_pod(ambient_pod("shop", "by-the-other"), report=False)
        other = mesh.start_pod(unmeshed_pod("shop", "of-no-mesh"), report=False)
    assert not traces(mesh, pod)
    assert post_event(mesh, pod) == (200, "")
    assert kernel(mesh, pod.netns) == kernel(mesh, first.netns)
    assert mesh.ztunnels["ztunnel"].workloads()[pod.uid]["inode"] == inode(pod)
    assert set(host_set(mesh).values()) == {first.uid, pod.uid}
    mesh.report(pod)
    wait_agreement(mesh, kernel(mesh, first.netns))
    status, text = post_event(mesh, other)
    assert status == 500
    assert "unexpectedly not eligible for ambient enrollment" in text
    assert not traces(mesh, other)


def test_the_originals_plugin_hears_why_not(running: Mesh) -> None:
    mesh = running
    mesh.ztunnels["ztunnel"].terminate()
    with mesh.chain_without_us():
        pod = mesh.start_pod(ambient_pod("shop", "refused-to-the-other"), report=False)
    status, text = post_event(mesh, pod)
    assert status == 500
    assert "ztunnel" in text
    wait_until("nothing of it stays", lambda: not traces(mesh, pod), ENROL_SECONDS)  # undone after the answer
    mesh.start_ztunnel()
    assert post_event(mesh, pod) == (200, "")
    mesh.report(pod)
    wait_enrolled(mesh, [pod])


# --- the agent's end --------------------------------------------------------------------------------------------------


@pytest.fixture
def leaving(running: Mesh) -> Iterator[Mesh]:
    """Afterwards the DaemonSet is there again, and the next test starts the agent anew."""
    mesh = running
    yield mesh
    mesh.agent.kill()
    mesh.api.do(restore_daemonset)


def restore_daemonset(server: Any) -> None:
    if not server.cluster.has("daemonsets", AGENT_NAMESPACE, istio.DAEMONSET_NAME):
        server.add("daemonsets", daemonset_object(AGENT_NAMESPACE))


def delete_daemonset(server: Any) -> None:
    server.cluster.delete(BY_PLURAL["daemonsets"], AGENT_NAMESPACE, istio.DAEMONSET_NAME)


def assert_host_is_clean(mesh: Mesh) -> None:
    assert host_set(mesh) == {}
    assert not any(OURS.search(line) for line in kernel(mesh, mesh.node.netns))
    assert mesh.node.run(["ipset", "-n", "list"]).strip() == ""


def test_an_upgrade_keeps_everything(leaving: Mesh) -> None:
    mesh = leaving
    pods = start_ambient(mesh, "kept-a", "kept-b")
    rules, host, entries = kernel(mesh, pods[0].netns), kernel(mesh, mesh.node.netns), host_set(mesh)
    chain = (mesh.runtime.conf_dir / "10-lab.conflist").read_bytes()
    assert mesh.agent.terminate() == 0
    assert [kernel(mesh, pod.netns) for pod in pods] == [rules, rules]
    assert (kernel(mesh, mesh.node.netns), host_set(mesh)) == (host, entries)
    assert [mesh.redirection(pod) for pod in pods] == ["enabled", "enabled"]
    assert (mesh.runtime.conf_dir / "10-lab.conflist").read_bytes() == chain
    assert address_seen(pods[0].netns, pods[1].address(4), APP_PORT) == pods[0].address(4)
    assert mesh.ztunnels["ztunnel"].connections(pods[1].uid)["inbound"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_uninstall_takes_every_pod_out(leaving: Mesh, backend: str) -> None:
    mesh = leaving
    mesh.agent.ensure(BACKENDS[backend])
    mesh.start_ztunnel()
    pods = start_ambient(mesh, f"freed-a-{backend}", f"freed-b-{backend}")
    said = mesh.agent.command("uninstall")
    for pod in pods:
        assert f"un-enrolled pod shop/{pod.name}" in said
        assert traces(mesh, pod) == []
    assert_host_is_clean(mesh)
    conf = json.loads((mesh.runtime.conf_dir / "10-lab.conflist").read_text())
    assert [plugin["type"] for plugin in conf["plugins"]] == ["bridge", "portmap"]
    for version in (4, 6):
        assert address_seen(pods[0].netns, pods[1].address(version), APP_PORT) == pods[0].address(version)
        assert address_seen(mesh.node.netns, pods[1].address(version), APP_PORT) == gateway(version)
    assert mesh.ztunnels["ztunnel"].workloads() == {}


@pytest.mark.parametrize("unenroll", ["false", "true"])
def test_the_end_of_the_daemonset(leaving: Mesh, unenroll: str) -> None:
    """As the original, pods stay captured unless the setting says otherwise; conf and host's rules go either way."""
    mesh = leaving
    options = BACKENDS["nftables"]
    environment = {**options.environment, "AMBIENT_UNENROLL_ON_UNINSTALL": unenroll}
    mesh.agent.ensure(type(options)(ambient=True, environment=environment))
    mesh.start_ztunnel()
    (pod,) = start_ambient(mesh, f"left-behind-{unenroll}")
    mesh.api.do(delete_daemonset)
    assert mesh.agent.terminate() == 0
    assert_host_is_clean(mesh)
    captured = any("15001" in line for line in kernel(mesh, pod.netns))
    assert captured == (unenroll == "false")
    assert (traces(mesh, pod) == []) == (unenroll == "true")
