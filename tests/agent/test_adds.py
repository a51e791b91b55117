"""ADDs on agent.sock of a real agent: real netns, real nftables, an API server double."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab.namespaces import call_in_netns
from lab.objects import sidecar_pod, unmeshed_pod
from tests.agent.scene import Agent, Scene, answer_to_nobody, request_for, wait_until

from meshcni import istio
from meshcni.protocols.podadd import MAX_REQUEST_BYTES, decode_reply, encode_request


def rules_in(netns: str) -> str:
    listing = ("nft", "list", "ruleset")
    return call_in_netns(netns, lambda: subprocess.run(listing, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def agent(scene: Scene) -> Iterator[Agent]:
    started = scene.start()
    started.wait_watching()
    return started


def test_sidecar_pod_gets_rules(scene: Scene, agent: Agent) -> None:
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    netns = scene.pod_netns("10.1.0.5/24")
    reply = agent.add(pod, netns, ips=("10.1.0.5/24",))
    assert (reply.ok, reply.verdict, reply.reason) == (True, "sidecar", "sidecar-injected"), agent.log
    assert "redirect to :15001" in rules_in(netns)
    metrics = agent.metrics()
    assert metrics['istio_cni_adds_total{reason="sidecar-injected",verdict="sidecar"}'] == 1
    assert metrics['istio_cni_add_duration_seconds_count{phase="program",verdict="sidecar"}'] == 1
    lines = [line for line in agent.log.splitlines() if "\tADD " in line]
    assert len(lines) == 1
    assert len(lines[0]) <= 400
    for part in ("pod=shop/cart", "verdict=sidecar", "backend=nftables", "total_ms=", "program_ms="):
        assert part in lines[0]


def test_status_shows_the_last_adds(scene: Scene, agent: Agent) -> None:
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    agent.add(pod, scene.pod_netns("10.1.0.5/24"))
    (add,) = agent.status()["adds"]
    assert (add["pod"], add["verdict"], add["variant"]) == ("shop/cart", "sidecar", "nftables")
    done = scene.run("status")
    assert "shop/cart" in done.stdout
    assert "nftables" in done.stdout


def test_pod_outside_the_mesh_gets_none(scene: Scene, agent: Agent) -> None:
    netns = scene.pod_netns("10.1.0.5/24")
    reply = agent.add(scene.add_pod(unmeshed_pod("shop", "job")), netns)
    assert (reply.ok, reply.verdict) == (True, "skip")
    assert rules_in(netns) == ""


def test_excluded_namespace_needs_no_api(scene: Scene) -> None:
    agent = scene.start(EXCLUDE_NAMESPACES="kube-system")
    agent.wait_watching()
    scene.api.crash()
    reply = agent.add(unmeshed_pod("kube-system", "dns"), scene.pod_netns("10.1.0.5/24"))
    assert (reply.ok, reply.reason) == (True, "namespace-excluded")


def test_pod_that_the_informer_lost_is_asked_for(scene: Scene, agent: Agent) -> None:
    scene.api.do(lambda server: server.freeze_watches())
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    assert agent.add(pod, scene.pod_netns("10.1.0.5/24")).verdict == "sidecar"
    assert agent.metrics()['istio_cni_pod_lookups_total{source="api"}'] == 1


def test_successor_of_the_same_name_is_not_mistaken(scene: Scene, agent: Agent) -> None:
    scene.add_pod(unmeshed_pod("shop", "cart-0"))
    wait_until("the informer to hold it", lambda: agent.status()["watches"][0]["objects"] == 1)
    reply = agent.add(sidecar_pod("shop", "cart-0"), scene.pod_netns("10.1.0.5/24"), pod_uid="another")
    assert (reply.ok, reply.code) == (False, 11)
    assert "another" in reply.message


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_api_refusal_fails_closed(scene: Scene, agent: Agent, status: int) -> None:
    path = "/api/v1/namespaces/shop/pods/cart"
    scene.api.do(lambda server: server.fault("status", prefix=path, status=status, count=-1))
    netns = scene.pod_netns("10.1.0.5/24")
    reply = agent.add(sidecar_pod("shop", "cart"), netns)
    assert (reply.ok, reply.code) == (False, 11)
    assert "shop/cart" in reply.message
    assert str(status) in reply.message
    assert reply.details
    assert rules_in(netns) == ""


def test_api_away_fails_closed(scene: Scene, agent: Agent) -> None:
    scene.api.crash()
    reply = agent.add(sidecar_pod("shop", "cart"), scene.pod_netns("10.1.0.5/24"))
    assert (reply.ok, reply.code) == (False, 11)
    assert agent.metrics()['istio_cni_errors_total{error="KubeError"}'] == 1


def test_bad_annotation_fails_with_code_7_and_an_event(scene: Scene, agent: Agent) -> None:
    pod = scene.add_pod(sidecar_pod("shop", "cart", annotations={istio.EXCLUDE_INBOUND_PORTS: "http"}))
    netns = scene.pod_netns("10.1.0.5/24")
    reply = agent.add(pod, netns)
    assert (reply.ok, reply.code) == (False, 7)
    for part in (istio.EXCLUDE_INBOUND_PORTS, "http"):
        assert part in reply.message
    assert rules_in(netns) == ""

    def posted() -> list[dict[str, Any]]:
        requests = scene.api.do(lambda server: list(server.requests))
        return [one for one in requests if one.request.method == "POST" and "events" in one.request.path]

    assert wait_until("an Event", posted)


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_iptables_variant_is_honoured_and_shown(scene: Scene, backend: str) -> None:
    agent = scene.start(NATIVE_NFTABLES="false", FORCE_IPTABLES_BINARY=backend)
    agent.wait_watching()
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    netns = scene.pod_netns("10.1.0.5/24")
    assert agent.add(pod, netns).verdict == "sidecar"
    saved = call_in_netns(
        netns, lambda: subprocess.run((f"iptables-{backend}-save",), capture_output=True, text=True, check=True).stdout
    )
    assert "-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001" in saved
    assert agent.status()["backend"]["variant"] == backend
    assert agent.metrics()[f'istio_cni_backend_info{{backend="iptables",variant="{backend}"}}'] == 1


def test_choice_of_the_variant_is_remembered_for_this_boot(scene: Scene) -> None:
    agent = scene.start(NATIVE_NFTABLES="false")
    remembered = scene.run_dir / "backend.json"
    wait_until("the choice", remembered.exists)
    agent.stop()
    remembered.write_text(remembered.read_text().replace('"reason": "', '"reason": "remembered: '))
    again = scene.start(NATIVE_NFTABLES="false")
    wait_until("the choice", lambda: "remembered: " in again.log)


# --- netns that are not the pod's -------------------------------------------------------------------------------------


def test_netns_of_the_agent_is_refused(scene: Scene, agent: Agent) -> None:
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    reply = agent.add(pod, scene.netns)
    assert (reply.ok, reply.code) == (False, 4)
    assert "the agent's own" in reply.message


def test_descriptor_that_is_no_netns_is_refused(scene: Scene, agent: Agent) -> None:
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    for path in ("/etc/hostname", "/proc/self/ns/mnt"):
        reply = agent.add(pod, path)
        assert (reply.ok, reply.code) == (False, 4), path


def test_netns_without_the_pods_address_is_refused(scene: Scene, agent: Agent) -> None:
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    netns = scene.pod_netns("10.1.0.6/24")
    reply = agent.add(pod, netns, ips=("10.1.0.5/24",))
    assert (reply.ok, reply.code) == (False, 4)
    assert "10.1.0.5" in reply.message
    assert "10.1.0.6" in reply.message
    assert rules_in(netns) == ""


# --- peers and requests that break the protocol -----------------------------------------------------------------------


def refused(agent: Agent, cause: str) -> float:
    return agent.metrics().get(f'istio_cni_requests_refused_total{{cause="{cause}",socket="agent"}}', 0.0)


def test_socket_is_private(scene: Scene, agent: Agent) -> None:
    for name in (istio.AGENT_SOCKET_NAME, istio.LOG_SOCKET_NAME, istio.EVENT_SOCKET_NAME, "control.sock"):
        assert (scene.run_dir / name).stat().st_mode & 0o777 == 0o600
    assert scene.run_dir.stat().st_mode & 0o777 == 0o750


def test_peer_that_is_not_root_is_refused(scene: Scene, agent: Agent) -> None:
    scene.open_to_everybody()
    assert answer_to_nobody(scene.run_dir / istio.AGENT_SOCKET_NAME, socket.SOCK_SEQPACKET) == b""
    assert refused(agent, "peer") == 1


BROKEN = [
    (b"x" * (MAX_REQUEST_BYTES + 1), "oversized"),
    (b"not json", "malformed"),
    (b"[]", "malformed"),
    (b'{"version": 1, "operation": "add"}', "malformed"),
    (b'{"version": 2, "operation": "add"}', "version"),
]


@pytest.mark.parametrize(("data", "cause"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_broken_request_is_refused_and_counted(scene: Scene, agent: Agent, data: bytes, cause: str) -> None:
    before = agent.settled_descriptors()
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    answer = agent.exchange(data, (netns,))
    os.close(netns)
    assert answer is not None
    assert decode_reply(answer).ok is False
    assert refused(agent, cause) == 1
    wait_until("descriptors to be closed", lambda: agent.descriptors() <= before)


@pytest.mark.parametrize("count", [0, 2, 9])
def test_request_needs_exactly_one_descriptor(scene: Scene, agent: Agent, count: int) -> None:
    before = agent.settled_descriptors()
    opened = [os.open("/proc/self/ns/net", os.O_RDONLY) for _ in range(count)]
    answer = agent.exchange(encode_request(request_for(sidecar_pod("shop", "cart"), "/x")), opened)
    for descriptor in opened:
        os.close(descriptor)
    assert answer is not None
    assert decode_reply(answer).ok is False
    assert refused(agent, "descriptors") == 1
    wait_until("descriptors to be closed", lambda: agent.descriptors() <= before)


# --- many -------------------------------------------------------------------------------------------------------------


def test_fifty_adds_at_once_all_succeed(scene: Scene, agent: Agent) -> None:
    pods = [scene.add_pod(sidecar_pod("shop", f"cart-{number}")) for number in range(50)]
    netns = [scene.pod_netns(f"10.1.0.{number + 1}/24") for number in range(50)]
    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(agent.add, pods, netns))
    assert [reply.verdict for reply in replies] == ["sidecar"] * 50
    assert all("redirect to :15001" in rules_in(path) for path in netns)


def test_thousand_adds_leave_threads_and_descriptors_flat(scene: Scene, agent: Agent) -> None:
    """Two pods of different rules take turns in ten netns, so that every ADD programs."""
    pods = [
        scene.add_pod(sidecar_pod("shop", name, annotations={istio.EXCLUDE_OUTBOUND_PORTS: port}))
        for name, port in (("a", "81"), ("b", "82"))
    ]
    netns = [scene.pod_netns(f"10.1.0.{number + 1}/24") for number in range(10)]
    for path in netns:  # what is opened once and kept does not count
        assert agent.add(pods[1], path).ok
    descriptors, threads, memory = agent.settled_descriptors(), agent.threads(), agent.rss_mib()
    for number in range(1000):
        assert agent.add(pods[number // 10 % 2], netns[number % 10]).verdict == "sidecar"
    wait_until("descriptors and threads to be as before", lambda: agent.descriptors() <= descriptors)
    wait_until("threads to be as before", lambda: agent.threads() <= threads)
    print(f"1,000 ADDs: RSS {memory:.1f} -> {agent.rss_mib():.1f} MiB, {threads} threads, {descriptors} descriptors")
