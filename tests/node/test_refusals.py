"""Input that must be refused, through the runtime or the plugin, and what the answer says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from lab.agent import Agent
from lab.cri import CriError
from lab.mesh import Mesh
from lab.node import wait_until
from lab.objects import sidecar_pod
from lab.plugin import PodNetns, call, finish_call, start_call

from meshcni import istio
from meshcni.errors import CNI_INVALID_ENVIRONMENT, CNI_TRY_AGAIN_LATER

numbers = itertools.count(1)
EVENT_SECONDS = 10.0

BAD_ANNOTATIONS = {
    istio.INCLUDE_INBOUND_PORTS: "80,http",
    istio.EXCLUDE_INBOUND_PORTS: "99999",
    istio.EXCLUDE_OUTBOUND_PORTS: "80,,443",
    istio.INCLUDE_OUTBOUND_CIDRS: "10.0.0.0/33",
    istio.EXCLUDE_OUTBOUND_CIDRS: "*",
    istio.EXCLUDE_INTERFACES: "eth0,an-interface-name-too-long",
    istio.INTERCEPTION_MODE: "SOMETIMES",
}


@pytest.fixture
def netns(mesh: Mesh) -> Iterator[PodNetns]:
    number = next(numbers)
    with PodNetns(mesh.node, f"refused-{number}", number) as made:
        yield made


def events_about(mesh: Mesh, name: str) -> list[dict[str, Any]]:
    events = mesh.api.do(lambda server: list(server.cluster.objects("events")))
    return [event for event in events if event["involvedObject"]["name"] == name]


@pytest.mark.parametrize(("annotation", "value"), BAD_ANNOTATIONS.items(), ids=[*BAD_ANNOTATIONS])
def test_a_bad_annotation_is_named_in_error_and_event(mesh: Mesh, agent: Agent, annotation: str, value: str) -> None:
    name = f"wrong-{next(numbers)}"
    with pytest.raises(CriError) as refused:
        mesh.start_pod(sidecar_pod("shop", name, annotations={annotation: value}))
    text = str(refused.value)
    assert annotation in text
    assert value in text or any(item and item in text for item in value.split(","))

    wait_until("an Event on the pod", lambda: events_about(mesh, name), EVENT_SECONDS)
    event = events_about(mesh, name)[0]
    assert event["type"] == "Warning"
    assert event["involvedObject"]["kind"] == "Pod"
    assert annotation in event["message"]
    mesh.api.do(lambda server: server.delete_pod("shop", name))


def test_the_nodes_own_netns_is_refused(mesh: Mesh, agent: Agent, netns: PodNetns) -> None:
    pod = sidecar_pod("shop", f"host-{next(numbers)}")
    mesh.add_object(pod)
    mesh.node.run(["sh", "-ec", f"ip netns del {netns.name}; touch {netns.path_inside}"])
    mesh.node.run(["mount", "--bind", "/proc/1/ns/net", netns.path_inside])
    before = mesh.rules(mesh.node.netns)
    answer = call(agent, "ADD", pod, netns)
    assert (answer.status, answer.code) == (1, CNI_INVALID_ENVIRONMENT)
    assert mesh.rules(mesh.node.netns).count == before.count == 0
    mesh.api.do(lambda server: server.delete_pod("shop", pod["metadata"]["name"]))


def test_another_pods_netns_is_refused(mesh: Mesh, agent: Agent, netns: PodNetns) -> None:
    pod = sidecar_pod("shop", f"stray-{next(numbers)}")
    mesh.add_object(pod)
    result = {"cniVersion": "1.0.0", "ips": [{"address": "10.99.9.9/16"}]}
    answer = call(agent, "ADD", pod, netns, prevResult=result)
    assert (answer.status, answer.code) == (1, CNI_INVALID_ENVIRONMENT)
    assert "10.99.9.9" in answer.text
    assert mesh.rules(netns.path).count == 0
    mesh.api.do(lambda server: server.delete_pod("shop", pod["metadata"]["name"]))


def test_a_file_that_is_no_netns_is_refused(mesh: Mesh, agent: Agent, netns: PodNetns) -> None:
    pod = sidecar_pod("shop", f"nofile-{next(numbers)}")
    mesh.add_object(pod)
    mesh.node.run(["sh", "-ec", f"ip netns del {netns.name}; echo hello > {netns.path_inside}"])
    answer = call(agent, "ADD", pod, netns)
    assert (answer.status, answer.code) == (1, CNI_INVALID_ENVIRONMENT)
    mesh.api.do(lambda server: server.delete_pod("shop", pod["metadata"]["name"]))


def test_a_netns_that_vanishes_during_the_add_harms_nobody(mesh: Mesh, agent: Agent, netns: PodNetns) -> None:
    mesh.stop_watch_events()
    pod = sidecar_pod("shop", f"vanishing-{next(numbers)}")
    mesh.add_object(pod)
    path = f"/api/v1/namespaces/shop/pods/{pod['metadata']['name']}"
    mesh.api.do(lambda server: server.fault("delay", prefix=path, seconds=1.0))
    adding = start_call(agent, "ADD", pod, netns)
    asked = lambda: mesh.api.do(lambda server: any(one.request.path == path for one in server.requests))  # noqa: E731
    wait_until("the agent asks for the pod", asked, EVENT_SECONDS)
    mesh.node.run(["ip", "netns", "del", netns.name])
    answer = finish_call(adding)
    # the descriptor keeps the netns alive until the agent is done with it, so either outcome is honest
    assert answer.status == 0 or answer.code in (CNI_INVALID_ENVIRONMENT, CNI_TRY_AGAIN_LATER), answer
    assert call(agent, "DEL", pod, netns).status == 0
    assert agent.is_ready()
    mesh.api.do(lambda server: server.delete_pod("shop", pod["metadata"]["name"]))
    mesh.resume_watch_events()
