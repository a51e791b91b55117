"""Agent and ztunnel go away and come back, at the same time or while the API server is away: enrolled pods stay so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from lab.cri import CriError
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import wait_until
from lab.objects import ambient_pod, unmeshed_pod
from lab.standin import StandIn
from lab.streams import Held, Proxied, Stream
from tests.node.ambientworld import (
    BACKENDS,
    ENROL_SECONDS,
    MODE,
    SETTINGS,
    disagreements,
    host_set,
    inode,
    kernel,
    start_ambient,
    start_pods,
    traces,
    wait_agreement,
    wait_enrolled,
    wait_left,
)

SETTLED = 15
KUBELET_SECONDS = 60.0


@pytest.fixture
def running(ambient: Mesh) -> Mesh:
    ambient.agent.ensure(BACKENDS["nftables"])
    ambient.start_ztunnel()
    return ambient


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4, "kubelet") as pool:
        yield pool


@dataclass(slots=True)
class Watched:
    """Connections between two enrolled pods that are looked at for as long as the block lasts."""

    mesh: Mesh
    client: RunningPod
    server: RunningPod
    streams: tuple[Stream, Stream]
    held: Held

    def wait(self, count: int = SETTLED) -> None:
        """Let some more connections come and go."""
        for stream in self.streams:
            stream.wait(count)

    def assert_nothing_happened(self) -> None:
        """No connection failed, the held one is the first one, and everything went through."""
        assert self.held.breaks == []
        assert [failed for stream in self.streams for failed in stream.failures()] == []
        self.assert_nothing_bypassed()

    def assert_nothing_bypassed(self) -> None:
        attempts = [attempt for stream in self.streams for attempt in stream.attempts]  # before the records are read
        proxied = Proxied.of(record for one in self.mesh.ztunnels.values() for record in one.records("connection"))
        assert proxied.bypassed(attempts, self.server.uid, self.client.uid) == []


@contextmanager
def watching(mesh: Mesh, client: RunningPod, server: RunningPod) -> Iterator[Watched]:
    with (
        Stream(client.netns, server.address(4), APP_PORT) as old,
        Stream(client.netns, server.address(6), APP_PORT) as new,
        Held(client.netns, server.address(4), APP_PORT) as held,
    ):
        assert held.is_up.wait(ENROL_SECONDS)
        watched = Watched(mesh, client, server, (old, new), held)
        watched.wait()
        yield watched
        watched.wait()


def told(ztunnel: StandIn, since: float) -> list[tuple[str, str]]:
    """What the agent has told since then, as (kind, UID)."""
    kinds = ("add", "keep", "del", "snapshot-sent")
    return [(one["event"], one["uid"]) for one in ztunnel.records() if one["at"] > since and one["event"] in kinds]


def versions(mesh: Mesh, pods: list[RunningPod]) -> list[str]:
    return [mesh.api_object(pod)["metadata"]["resourceVersion"] for pod in pods]


# --- the agent --------------------------------------------------------------------------------------------------------


RESTARTS = (
    ("nftables", "terminate"),
    ("nftables", "kill"),
    ("iptables-nft", "terminate"),
    ("iptables-legacy", "kill"),
)


@pytest.mark.parametrize(("backend", "end"), RESTARTS)
def test_a_restart_of_the_agent_changes_nothing(ambient: Mesh, backend: str, end: str) -> None:
    mesh = ambient
    mesh.agent.ensure(BACKENDS[backend])
    ztunnel = mesh.start_ztunnel()
    pods = start_ambient(mesh, *(f"{name}-{backend}-{end}" for name in ("client", "server", "idle")))
    rules = [kernel(mesh, pod.netns) for pod in pods]
    host, entries, known = kernel(mesh, mesh.node.netns), host_set(mesh), versions(mesh, pods)
    state = ztunnel.state()
    with watching(mesh, pods[0], pods[1]) as watched:
        begin = time.monotonic()
        getattr(mesh.agent, end)()
        watched.wait()
        assert (kernel(mesh, mesh.node.netns), host_set(mesh)) == (host, entries)
        mesh.agent.start()
        ztunnel.wait("it has a snapshot again", lambda now: now["ready"] and now["connections"] > state["connections"])
        watched.wait()
        watched.assert_nothing_happened()
    assert [kernel(mesh, pod.netns) for pod in pods] == rules
    assert (kernel(mesh, mesh.node.netns), host_set(mesh)) == (host, entries)
    assert versions(mesh, pods) == known, "no annotation was written again"
    after = ztunnel.state()
    assert (after["started"], after["stopped"]) == (state["started"], state["stopped"])
    assert sorted(told(ztunnel, begin)) == sorted([*(("add", pod.uid) for pod in pods), ("snapshot-sent", "")])
    assert disagreements(mesh, rules[0]) == []


def test_nothing_is_taken_from_pods_while_the_api_server_is_away(running: Mesh) -> None:
    mesh, ztunnel = running, running.ztunnels["ztunnel"]
    pods = start_ambient(mesh, "client-offline", "server-offline")
    rules, state = [kernel(mesh, pod.netns) for pod in pods], ztunnel.state()
    with watching(mesh, *pods) as watched:
        mesh.api.crash()
        try:
            assert mesh.agent.terminate() == 0  # whom it cannot ask it takes for a restart's victim
            mesh.agent.start(wait=False)
            begin = time.monotonic()
            ztunnel.wait("it is connected", lambda now: now["connections"] > state["connections"] and now["connected"])
            watched.wait(10 * SETTLED)
            assert told(ztunnel, begin) == [], "an agent that has not read the cluster tells nothing"
            assert ztunnel.state()["stopped"] == state["stopped"]
            assert not mesh.agent.is_ready()
        finally:
            mesh.api.restart()
        mesh.agent.wait_ready()
        ztunnel.wait_ready()
        watched.assert_nothing_happened()
    assert ztunnel.state()["started"] == state["started"]
    assert [kernel(mesh, pod.netns) for pod in pods] == rules
    assert disagreements(mesh, rules[0]) == []


def test_an_add_waits_for_the_agent(running: Mesh, workers: ThreadPoolExecutor) -> None:
    mesh = running
    mesh.agent.kill()
    begun = threading.Event()

    def start_one() -> RunningPod:
        begun.set()
        return mesh.start_pod(ambient_pod("shop", "patient"))  # one attempt: the plugin itself waits

    starting = workers.submit(start_one)
    begun.wait()
    time.sleep(1.0)
    assert not starting.done()
    mesh.agent.start(wait=False)
    pod = starting.result()
    assert any("15001" in line for line in kernel(mesh, pod.netns)), "the rules are there when the ADD is answered"
    wait_enrolled(mesh, [pod])


def test_what_happened_while_the_agent_was_away(running: Mesh) -> None:
    """Pods deleted, completed, unlabelled, labelled, made anew under the same name."""
    mesh = running
    names = ("stays", "deleted", "completed", "unlabelled", "again-0")
    stays, deleted, completed, unlabelled, old = start_ambient(mesh, *names)
    (labelled,) = start_pods(mesh, [unmeshed_pod("shop", "labelled")])
    reference = kernel(mesh, stays.netns)
    mesh.agent.kill()
    mesh.remove_pod(deleted)
    mesh.report(completed, "Succeeded")
    mesh.stop_sandbox(completed)
    mesh.label_pod(unlabelled, {MODE: None})
    mesh.label_pod(labelled, {MODE: "ambient"})
    mesh.remove_pod(old)
    with mesh.chain_without_us():  # a plugin that is there would wait for the agent
        new = mesh.start_pod(ambient_pod("shop", "again-0"))
    mesh.agent.start()
    wait_enrolled(mesh, [stays, labelled, new])
    wait_left(mesh, [deleted, completed, unlabelled, old])
    wait_agreement(mesh, reference)


def test_pods_that_started_past_the_plugin_are_found(running: Mesh) -> None:
    """The primary CNI has rewritten its conf, and pods start before the entry is back: the agent runs all the time."""
    mesh = running
    (first,) = start_ambient(mesh, "orderly")
    with mesh.chain_without_us():
        pods = start_pods(mesh, [ambient_pod("shop", f"rushed-{number}") for number in range(3)])
        assert not any(traces(mesh, pod) for pod in pods)
    wait_enrolled(mesh, pods)
    wait_agreement(mesh, kernel(mesh, first.netns))


@pytest.mark.parametrize("agent", ["running", "away"])
def test_a_sandbox_that_was_made_anew_without_us_is_noticed(running: Mesh, agent: str) -> None:
    mesh = running
    first, second = start_ambient(mesh, f"steady-{agent}", f"renewed-{agent}")
    reference, before = kernel(mesh, first.netns), inode(second)
    if agent == "away":
        mesh.agent.kill()
    with mesh.chain_without_us():
        renewed = mesh.restart_sandbox(second)
    if agent == "away":
        mesh.agent.start()
    assert inode(renewed) != before
    wait_agreement(mesh, reference)
    with watching(mesh, first, renewed) as watched:
        watched.wait()
        watched.assert_nothing_happened()


def test_a_new_sandbox_by_the_plugin(running: Mesh) -> None:
    mesh = running
    first, second = start_ambient(mesh, "first-of-two", "second-of-two")
    reference = kernel(mesh, first.netns)
    renewed = mesh.restart_sandbox(second)
    wait_agreement(mesh, reference)
    with watching(mesh, first, renewed) as watched:
        watched.wait()
        watched.assert_nothing_happened()


# --- ztunnel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_a_new_ztunnel_gets_every_pod(running: Mesh, end: str) -> None:
    mesh, ztunnel = running, running.ztunnels["ztunnel"]
    pods = start_ambient(mesh, f"client-{end}", f"server-{end}")
    reference = kernel(mesh, pods[0].netns)
    with watching(mesh, *pods) as watched:
        getattr(ztunnel, end)()
        watched.wait(5)
        ztunnel.start()
        watched.wait(5)
        watched.assert_nothing_bypassed()
        assert watched.streams[0].failures(), "without ztunnel nothing gets through"
    wait_agreement(mesh, reference)


def test_a_rolling_update_of_ztunnel(running: Mesh) -> None:
    """The new one takes over while the old one still serves; what is enrolled meanwhile is the new one's."""
    mesh, old = running, running.ztunnels["ztunnel"]
    pods = start_ambient(mesh, "client-rolling", "server-rolling", "leaves-rolling")
    reference = kernel(mesh, pods[0].netns)
    for pod in pods:  # what waits at the old listeners is the new ones': with a real ztunnel a connection can be lost
        mesh.node.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/tcp_migrate_req"], netns=pod.netns)
    with watching(mesh, pods[0], pods[1]) as watched:
        new = mesh.start_ztunnel("ztunnel-next")
        assert set(new.workloads()) == {pod.uid for pod in pods}
        begin = time.monotonic()
        (added,) = start_ambient(mesh, "added-rolling")
        mesh.remove_pod(pods[2])
        wait_left(mesh, [pods[2]])
        assert told(new, begin) == [("add", added.uid), ("del", pods[2].uid)]
        assert told(old, begin) == [("del", pods[2].uid)], "an Add is the newest's, a Del is everybody's"
        watched.wait()
        assert old.terminate() == 0
        watched.wait()
        assert [failed for stream in watched.streams for failed in stream.failures()] == []
        watched.assert_nothing_bypassed()
    assert disagreements(mesh, reference) == []
    old.start()  # for the next test: the first one is the newest again
    new.terminate()
    wait_agreement(mesh, reference)


def test_an_add_without_ztunnel_is_refused_and_succeeds_afterwards(ambient: Mesh) -> None:
    mesh = ambient
    impatient = {**SETTINGS, "AMBIENT_ZTUNNEL_WAIT_SECONDS": "1"}
    mesh.agent.ensure(replace(BACKENDS["nftables"], environment=impatient))
    ztunnel = mesh.start_ztunnel()
    (first,) = start_ambient(mesh, "in-time")
    ztunnel.terminate()
    late = ambient_pod("shop", "too-early")
    with pytest.raises(CriError, match="ztunnel"):
        mesh.start_pod(late)
    assert mesh.pods == [first]
    assert late["metadata"]["uid"] not in host_set(mesh).values()
    adds: list[dict[str, Any]] = mesh.agent.status()["adds"]
    assert "ztunnel" in adds[-1]["message"] + adds[0]["message"]
    ztunnel.start()
    pod = mesh.start_pod(late, in_api=False)
    wait_enrolled(mesh, [pod])
    wait_agreement(mesh, kernel(mesh, first.netns))


def test_an_add_waits_for_ztunnel(running: Mesh, workers: ThreadPoolExecutor) -> None:
    mesh, ztunnel = running, running.ztunnels["ztunnel"]
    ztunnel.kill()
    starting = workers.submit(mesh.start_pod, ambient_pod("shop", "waiting"))  # one attempt
    waits = lambda: any(pod["pod"] == "shop/waiting" for pod in mesh.agent.status()["ambient"]["pods"])  # noqa: E731
    wait_until("the agent works on it", waits, ENROL_SECONDS)
    assert not starting.done()
    ztunnel.start()
    wait_enrolled(mesh, [starting.result()])


# --- both -------------------------------------------------------------------------------------------------------------


def test_both_are_killed_and_come_back(running: Mesh) -> None:
    mesh, ztunnel = running, running.ztunnels["ztunnel"]
    pods = start_ambient(mesh, "client-both", "server-both")
    reference = kernel(mesh, pods[0].netns)
    with watching(mesh, *pods) as watched:
        mesh.agent.kill()
        ztunnel.kill()
        ztunnel.start(wait=False)
        watched.wait(5)
        mesh.agent.start()
        ztunnel.wait_ready()
        watched.wait(5)
        watched.assert_nothing_bypassed()
    wait_agreement(mesh, reference)
