"""Peers on ztunnel's socket that break the protocol, against a real agent: each is counted, none does harm."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from lab.ztunnel.client import Peer, Program
from lab.ztunnel.messages import HELLO, answer
from tests.agent.ambientscene import AmbientScene, add, everything_in, is_captured, wait_metric
from tests.agent.scene import Agent, answer_to_nobody, wait_until

from meshcni.agent.zdsadmission import MAX_SILENT
from meshcni.protocols import zds_pb2 as pb

ACK = answer()
GARBAGE = bytes.fromhex("ff" * 40)


@pytest.fixture
def agent(ambient: AmbientScene) -> Iterator[Agent]:
    """Whatever the peers did: afterwards a good ztunnel is served, and nothing of theirs is left."""
    started = ambient.ready()
    descriptors, threads = started.descriptors(), started.threads()
    yield started
    with ambient.ztunnel(name="good") as good:
        good.wait("its snapshot", lambda state: bool(state["snapshot"]))
        pod = ambient.new_pod("after")
        reply = add(started, pod)
        assert reply.ok, reply.message
        assert is_captured(pod)
        assert good.state()["workloads"][pod.uid]["inode"] == pod.inode
    ambient.delete(pod)
    wait_until("the pod to be forgotten", lambda: started.status()["ambient"]["pods"] == [])
    wait_metric(started, "ztunnel_connected", 0)
    wait_until("descriptors to be closed", lambda: started.descriptors() <= descriptors + 2)
    assert started.threads() <= threads + 8
    assert "Traceback" not in started.log


def closed_for(agent: Agent, cause: str) -> float:
    return agent.metrics().get(f'istio_cni_zds_closed_total{{cause="{cause}"}}', 0.0)


def connect(ambient: AmbientScene, hello: bytes | None = HELLO) -> Peer:
    return Peer(ambient.scene.ztunnel_socket, hello)


def live(ambient: AmbientScene) -> Peer:
    """A peer that has taken its whole snapshot."""
    peer = connect(ambient)
    while request := peer.request():
        peer.ack()
        if request.WhichOneof("payload") == "snapshot_sent":
            return peer
    raise AssertionError("closed before the snapshot")


def send_descriptor(peer: Peer) -> None:
    read, write = os.pipe()
    peer.send(ACK, (read, write))
    os.close(read)
    os.close(write)


# --- what is wrong, and the cause that is counted ---------------------------------------------------------------------

HELLOS = {
    "garbage": (GARBAGE, "malformed"),
    "an ack": (ACK, "malformed"),
    "oversized": (bytes.fromhex("0801") + b"\x12" * 70_000, "oversized"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_hello_that_is_none(ambient: AmbientScene, agent: Agent, name: str) -> None:
    data, cause = HELLOS[name]
    with connect(ambient, None) as peer:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        peer.send(data)
        assert peer.packet().data == b""
    assert closed_for(agent, cause) == 1


def test_hello_with_a_descriptor(ambient: AmbientScene, agent: Agent) -> None:
    with connect(ambient, None) as peer:
        read, write = os.pipe()
        peer.send(HELLO, (read,))
        os.close(read)
        os.close(write)
        assert peer.packet().data == b""
    assert closed_for(agent, "descriptors") == 1


def test_hello_of_an_unknown_version_will_do(ambient: AmbientScene, agent: Agent) -> None:
    """The original logs the version and does not look at it."""
    with connect(ambient, pb.ZdsHello(version=77).SerializeToString()) as peer:  # type: ignore[arg-type]
        request = peer.request()
        assert request is not None
        assert request.WhichOneof("payload") == "snapshot_sent"
        peer.ack()
        wait_until("the version", lambda: agent.status()["ambient"]["ztunnel"][0]["version"] == 77)


LATER: dict[str, tuple[Callable[[Peer], object], str]] = {
    "an ack that nobody asked for": (lambda peer: peer.ack(), "unsolicited"),
    "a refusal that nobody asked for": (lambda peer: peer.ack("no"), "unsolicited"),
    "a second hello": (lambda peer: peer.send(HELLO), "second-hello"),
    "garbage": (lambda peer: peer.send(GARBAGE), "malformed"),
    "oversized": (lambda peer: peer.send(b"\x0a" * 70_000), "oversized"),
    "descriptors": (send_descriptor, "descriptors"),
    "nothing": (lambda peer: peer.send(b""), "eof"),
    "the end": (lambda peer: peer.close(), "eof"),
}


@pytest.mark.parametrize("name", LATER)
def test_message_out_of_turn(ambient: AmbientScene, agent: Agent, name: str) -> None:
    act, cause = LATER[name]
    with live(ambient) as peer:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        act(peer)
        wait_until("its end", lambda: closed_for(agent, cause) == 1)
    assert not agent.status()["ambient"]["ztunnel"]


def test_acks_in_advance_count_for_nothing(ambient: AmbientScene, agent: Agent) -> None:
    with connect(ambient) as peer:
        try:
            for _ in range(20):
                peer.ack()
        except (BrokenPipeError, ConnectionResetError):
            pass
        wait_until("its end", lambda: closed_for(agent, "unsolicited") == 1)
    assert agent.metrics().get('istio_cni_zds_messages_total{result="ack",type="add"}') is None


def test_peer_that_never_answers_the_snapshot(ambient: AmbientScene, agent: Agent) -> None:
    with connect(ambient) as peer:
        assert peer.request() is not None
        wait_until("its end", lambda: closed_for(agent, "ack-timeout") == 1)


def test_peer_that_never_says_hello(ambient: AmbientScene, agent: Agent) -> None:
    with connect(ambient, None) as peer:
        assert peer.packet().data == b""
    assert closed_for(agent, "hello-timeout") == 1


def test_two_hundred_that_never_say_hello(ambient: AmbientScene, agent: Agent) -> None:
    """The ones that were there first have to go, so a good one always finds a place."""
    before = agent.descriptors()
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(ambient, None))
        wait_until("them to be taken", lambda: closed_for(agent, "crowded") >= 200 - MAX_SILENT)
        assert agent.descriptors() <= before + MAX_SILENT + 5
        good = stack.enter_context(ambient.ztunnel(name="among"))
        good.wait("its snapshot", lambda state: bool(state["snapshot"]))
        pod = ambient.new_pod("among")
        assert add(agent, pod).ok
    ambient.delete(pod)


def test_peer_that_is_not_root(ambient: AmbientScene, agent: Agent) -> None:
    for path in (ambient.scene.directory, *ambient.scene.directory.parents[:3]):
        path.chmod(0o755)
    ambient.scene.ztunnel_socket.chmod(0o666)
    assert answer_to_nobody(ambient.scene.ztunnel_socket, socket.SOCK_SEQPACKET, HELLO) == b""
    assert agent.metrics()['istio_cni_requests_refused_total{cause="peer",socket="ztunnel"}'] == 1


def test_socket_is_for_root_alone(ambient: AmbientScene, agent: Agent) -> None:
    assert ambient.scene.ztunnel_socket.stat().st_mode & 0o777 == 0o600


# --- pods in between --------------------------------------------------------------------------------------------------


@pytest.fixture
def good(ambient: AmbientScene, agent: Agent) -> Iterator[Program]:
    with ambient.ztunnel() as program:
        program.wait("its snapshot", lambda state: bool(state["snapshot"]))
        yield program


def test_silent_newcomer_gets_no_pod(ambient: AmbientScene, agent: Agent, good: Program) -> None:
    with connect(ambient, None):
        wait_metric(agent, "ztunnel_connected", 2)
        pod = ambient.new_pod()
        assert add(agent, pod).ok
        assert pod.uid in good.state()["workloads"]
    ambient.delete(pod)


def test_newcomer_that_says_hello_and_nothing_else_costs_one_try(
    ambient: AmbientScene, agent: Agent, good: Program
) -> None:
    """It is the newest until its first answer is late; then the one before it is again."""
    with connect(ambient) as peer:
        assert peer.request() is not None
        wait_until("it to be the newest", lambda: len(agent.status()["ambient"]["ztunnel"]) == 2)
        pod = ambient.new_pod()
        before = everything_in(pod)
        reply = add(agent, pod)
        if not reply.ok:
            wait_until("the netns to be as before", lambda: everything_in(pod) == before)
        wait_until("its end", lambda: closed_for(agent, "ack-timeout") == 1)
        again = ambient.new_sandbox(pod)
        assert add(agent, again).ok
        assert good.state()["workloads"][pod.uid]["inode"] == again.inode
    ambient.delete(pod)


def test_storm_of_connections_leaves_room_for_pods(ambient: AmbientScene, agent: Agent, good: Program) -> None:
    def storm(number: int) -> None:
        with connect(ambient, HELLO if number % 2 else None):
            pass

    pods = ambient.many_pods(20)
    with ThreadPoolExecutor(10) as threads:
        noise = [threads.submit(storm, number) for number in range(300)]
        replies = [add(agent, pod) for pod in pods]
        for one in noise:
            one.result()
    refused = [pod for pod, reply in zip(pods, replies, strict=True) if not reply.ok]
    wait_metric(agent, "ztunnel_connected", 1)
    for pod in refused:  # the newest was gone before it answered; the runtime comes again
        assert add(agent, ambient.new_sandbox(pod)).ok
    assert good.state()["workloads"].keys() == {pod.uid for pod in pods}
    assert good.process.poll() is None, "no message broke the protocol"
    for pod in pods:
        ambient.delete(pod)


def test_random_packets(ambient: AmbientScene, agent: Agent, good: Program) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    pieces = (HELLO, ACK, answer("no"), GARBAGE, b"", b"\x0a\x00\x0a\x00", bytes.fromhex("0a02"))
    for _ in range(150):
        peer = connect(ambient, None)
        try:
            for _ in range(chance.randrange(1, 5)):
                peer.send(chance.choice((*pieces, chance.randbytes(chance.randrange(1, 1500)))))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            peer.close()
    wait_metric(agent, "ztunnel_connected", 1)
    assert good.state()["connections"] == 1, "the good one was never disturbed"
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    assert pod.uid in good.state()["workloads"]
    ambient.delete(pod)
    closed = sum(value for name, value in agent.metrics().items() if name.startswith("istio_cni_zds_closed_total"))
    assert closed == 150
