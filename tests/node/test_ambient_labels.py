"""Running pods come into the mesh and leave it by labels, while connections between them go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from lab.apiserver import ApiServer
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import wait_until
from lab.objects import unmeshed_pod
from lab.streams import Attempt, Held, Proxied, Stream
from lab.traffic import address_seen
from tests.node.ambientworld import (
    BACKENDS,
    ENROL_SECONDS,
    MODE,
    kernel,
    start_ambient,
    start_pods,
    traces,
    wait_enrolled,
    wait_left,
)

from meshcni import istio

ROUNDS = 4
SETTLED = 15  # connections of each stream between two changes

Flip = Callable[[str | None], None]


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest, ambient_node: Mesh) -> str:
    ambient_node.agent.ensure(BACKENDS[request.param])
    ambient_node.start_ztunnel()
    return str(request.param)


@dataclass(slots=True)
class Round:
    """When pods were labelled, said to be enrolled, unlabelled, and had left (time.monotonic)."""

    labelled: float = 0.0
    enabled: float = 0.0
    unlabelled: float = 0.0
    left: float = 0.0
    streams: list[Attempt] = field(default_factory=list)


def flip(mesh: Mesh, pods: Sequence[RunningPod], label: Flip, streams: Sequence[Stream]) -> Round:
    """Into the mesh and out of it again."""
    seen = Round(labelled=time.monotonic())
    label("ambient")
    wait_enrolled(mesh, pods)
    seen.enabled = time.monotonic()
    for stream in streams:
        stream.wait(SETTLED)
    seen.unlabelled = time.monotonic()
    label(None)
    wait_left(mesh, pods)
    seen.left = time.monotonic()
    for stream in streams:
        stream.wait(SETTLED)
    return seen


@pytest.mark.parametrize("by", ["pod", "namespace"])
def test_connections_go_on_while_pods_come_and_go(ambient: Mesh, backend: str, by: str) -> None:
    mesh, namespace = ambient, f"live-{by}-{backend}"
    mesh.add_namespace(namespace)
    client, server = start_pods(mesh, [unmeshed_pod(namespace, "client"), unmeshed_pod(namespace, "server")])

    def label(value: str | None) -> None:
        if by == "namespace":
            mesh.label_namespace(namespace, {MODE: value})
            return
        for pod in (client, server):
            mesh.label_pod(pod, {MODE: value})

    with (
        Stream(client.netns, server.address(4), APP_PORT) as old,
        Stream(client.netns, server.address(6), APP_PORT) as new,
        Held(client.netns, server.address(4), APP_PORT) as held,
    ):
        streams = (old, new)
        for stream in streams:
            stream.wait(SETTLED)
        rounds = [flip(mesh, (client, server), label, streams) for _ in range(ROUNDS)]
    proxied = Proxied.of(mesh.ztunnels["ztunnel"].records())
    for stream in streams:
        assert_only_cut_by_enrolment(stream, rounds)
        for one in rounds:
            within = [a for a in stream.attempts if one.enabled < a.begin and a.end < one.unlabelled]
            assert len(within) >= SETTLED - 2
            assert proxied.bypassed(within, server.uid, client.uid) == []
            outside = [
                a for a in stream.attempts if one.left < a.begin < one.left + 1 and a.end < next_label(rounds, one)
            ]
            assert proxied.bypassed(outside, server.uid) == outside
    assert_told_of_its_end(held, rounds)
    assert not traces(mesh, client)
    assert not traces(mesh, server)


def assert_told_of_its_end(held: Held, rounds: Sequence[Round]) -> None:
    """A connection that ztunnel had when the pods left is ended by it, and its client hears of that."""
    for at, words in held.breaks:
        if any(one.unlabelled < at < one.left + held.timeout_seconds + 1 for one in rounds):
            assert "timed out" not in words, held.breaks


def next_label(rounds: Sequence[Round], one: Round) -> float:
    return min((other.labelled for other in rounds if other.labelled > one.left), default=float("inf"))


def assert_only_cut_by_enrolment(stream: Stream, rounds: Sequence[Round]) -> None:
    """What is open while a pod's rules come is cut by conntrack; whatever else is, and whatever begins later, is not.

    A connection that nothing tracked is picked up in the middle, redirected, and reset by who does not know it.
    """
    for failed in stream.failures():
        assert any(one.labelled < failed.end and failed.begin < one.enabled for one in rounds), failed
    assert len(stream.failures()) <= 2 * len(rounds)  # each of the two pods cuts what is open in one moment


def test_order_of_what_is_told(ambient: Mesh, backend: str) -> None:
    """Peers believe the annotation, so it comes last and goes before ztunnel forgets the pod."""
    mesh = ambient
    pod = mesh.start_pod(unmeshed_pod("shop", f"told-{backend}"))
    begin = time.monotonic()
    mesh.label_pod(pod, {MODE: "ambient"})
    wait_enrolled(mesh, [pod])
    assert any("15001" in line for line in kernel(mesh, pod.netns))
    mesh.label_pod(pod, {MODE: None})
    wait_left(mesh, [pod])
    path = f"/api/v1/namespaces/shop/pods/{pod.name}/status"

    def patched(server: ApiServer) -> list[tuple[float, str]]:
        found = [one for one in server.requests if one.request.path == path and one.at > begin]
        return [(one.at, one.request.body.decode()) for one in found]

    patches = [(at, value(body), pod.uid in body) for at, body in mesh.api.do(patched)]
    assert [value for _, value, _ in patches] == ["pending", "enabled", "pending", ""]
    assert all(names_uid for _, _, names_uid in patches)
    entering, enabled, leaving, gone = (at for at, _, _ in patches)
    told = {one["event"]: one["at"] for one in mesh.ztunnels["ztunnel"].records() if one.get("uid") == pod.uid}
    assert entering < told["started"] < enabled < leaving < told["del"] < gone


def value(body: str) -> str:
    return next((word for word in ("enabled", "pending") if f'"{word}"' in body), "")


def test_an_opt_out_beats_the_namespace(ambient: Mesh, backend: str) -> None:
    mesh, namespace = ambient, f"opting-{backend}"
    mesh.add_namespace(namespace, {MODE: "ambient"})
    first, second = start_pods(mesh, [unmeshed_pod(namespace, "first"), unmeshed_pod(namespace, "second")])
    wait_enrolled(mesh, [first, second])
    mesh.label_pod(first, {MODE: "none"})
    wait_left(mesh, [first])
    assert traces(mesh, second)
    assert address_seen(first.netns, second.address(4), APP_PORT) == first.address(4)
    mesh.label_pod(first, {MODE: None})
    wait_enrolled(mesh, [first])


def test_an_annotation_is_followed_while_the_pod_runs(ambient: Mesh, backend: str) -> None:
    mesh = ambient
    (pod,) = start_ambient(mesh, f"edited-{backend}")
    before = kernel(mesh, pod.netns)
    mesh.annotate_pod(pod, {istio.AMBIENT_DNS_CAPTURE: "false"})
    wait_until("queries are captured no more", lambda: "15053" not in "".join(kernel(mesh, pod.netns)), ENROL_SECONDS)
    assert address_seen(pod.netns, pod.address(4), APP_PORT) == pod.address(4)
    mesh.annotate_pod(pod, {istio.AMBIENT_DNS_CAPTURE: None})
    wait_until("queries are captured again", lambda: kernel(mesh, pod.netns) == before, ENROL_SECONDS)
