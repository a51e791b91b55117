"""Real packets of ambient pods through the stand-in for ztunnel, and past it where they should go past it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from lab import namespaces
from lab.agent import EXCLUDED_NAMESPACE
from lab.envoy import Captured
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.objects import ambient_namespace, ambient_pod, sidecar_pod, unmeshed_pod
from lab.standin import DNS_NAMES, StandIn
from lab.traffic import address_seen
from lab.ztunnel import dns
from tests.node.ambientworld import (
    BACKENDS,
    MODE,
    PROBE,
    host_network_pod,
    host_set,
    kernel,
    start_ambient,
    start_pods,
    traces,
    wait_enrolled,
    wait_left,
)
from tests.node.conftest import OUTSIDE_PORT, gateway

from meshcni import istio

VERSIONS = (4, 6)
DNS_SECONDS = 0.5


@pytest.fixture(params=BACKENDS, scope="module")  # so that the tests of one backend follow each other
def backend(request: pytest.FixtureRequest, ambient_node: Mesh) -> str:
    ambient_node.agent.ensure(BACKENDS[request.param])
    ambient_node.start_ztunnel()
    return str(request.param)


@pytest.fixture
def running(ambient: Mesh) -> Mesh:
    """With agent (nftables) and stand-in."""
    ambient.agent.ensure(BACKENDS["nftables"])
    ambient.start_ztunnel()
    return ambient


class Counted:
    """Counts what the stand-in takes of a pod's connections."""

    def __init__(self, ztunnel: StandIn) -> None:
        self.ztunnel = ztunnel

    def connect(self, client: RunningPod | str, server: RunningPod | str, version: int, port: int = APP_PORT) -> Any:
        """One connection: what the server saw, and what was taken of the client and of the server, as (in, out)."""
        parties = [one for one in (client, server) if not isinstance(one, str)]
        before = {one.name: self._taken(one) for one in parties}
        netns = client if isinstance(client, str) else client.netns
        address = server if isinstance(server, str) else server.address(version)
        seen = address_seen(netns, address, port)
        taken = {
            one.name: tuple(now - then for now, then in zip(self._taken(one), before[one.name], strict=True))
            for one in parties
        }
        return seen, taken

    def _taken(self, pod: RunningPod) -> tuple[int, int]:
        found = self.ztunnel.connections(pod.uid)
        return found.get("inbound", 0), found.get("outbound", 0)


def test_ambient_pods_talk_through_ztunnel(ambient: Mesh, backend: str) -> None:
    first, second, third = start_ambient(ambient, *(f"{name}-{backend}" for name in ("first", "second", "third")))
    plain = ambient.start_pod(unmeshed_pod("shop", f"plain-{backend}"))
    outside, counted = ambient.node.netns, Counted(ambient.ztunnels["ztunnel"])
    for version in VERSIONS:
        for client, server in ((first, second), (second, third), (third, first)):
            seen, taken = counted.connect(client, server, version)
            assert seen == client.address(version)
            assert taken == {client.name: (0, 1), server.name: (1, 0)}
        # to and from a pod that is in no mesh, and out of the node
        assert counted.connect(plain, first, version) == (
            plain.address(version),
            {plain.name: (0, 0), first.name: (1, 0)},
        )
        assert counted.connect(first, plain, version) == (
            first.address(version),
            {first.name: (0, 1), plain.name: (0, 0)},
        )
        seen, taken = counted.connect(first, gateway(version), version, OUTSIDE_PORT)
        assert (seen, taken) == (first.address(version), {first.name: (0, 1)})
        # a pod's own addresses and its loopback are no traffic of the mesh
        assert counted.connect(first, first, version) == (first.address(version), {first.name: (0, 0)})
        loopback = "127.0.0.1" if version == 4 else "::1"
        assert counted.connect(first, loopback, version) == (loopback, {first.name: (0, 0)})
        # the kubelet's probes come from the node, and are known by their address
        assert counted.connect(outside, first, version) == (PROBE[version], {first.name: (0, 0)})
        assert address_seen(outside, plain.address(version), APP_PORT) == gateway(version)
    assert not traces(ambient, plain)


def test_every_enrolled_pod_is_everywhere(ambient: Mesh, backend: str) -> None:
    pods = start_ambient(ambient, *(f"everywhere-{number}-{backend}" for number in range(3)))
    assert kernel(ambient, pods[0].netns) == kernel(ambient, pods[1].netns) == kernel(ambient, pods[2].netns)
    assert host_set(ambient) == {address: pod.uid for pod in pods for address in pod.sandbox.addresses}
    status = ambient.agent.status()
    shown = {pod["uid"]: pod for pod in status["ambient"]["pods"]}
    table = ambient.ztunnels["ztunnel"].workloads()
    for pod in pods:
        assert shown[pod.uid]["state"] == "enrolled"
        assert shown[pod.uid]["ztunnelAcked"]
        assert table[pod.uid]["state"] == "Up"
        assert table[pod.uid]["info"] == {"name": pod.name, "namespace": "shop", "serviceAccount": "default"}
    assert status["ready"], status["notReady"]


def resolve(pod: RunningPod, server: str, name: str, kind: int) -> list[str]:
    """The answers to a query that a process of the pod sends to `server`; OSError when there is none."""

    def work() -> list[str]:
        with namespaces.datagram(server, 53, DNS_SECONDS) as client:
            client.send(dns.ask(name, kind))
            return dns.answers(client.recv(512))

    return namespaces.call_in_netns(pod.netns, work)


def test_queries_are_answered_by_ztunnel(ambient: Mesh, backend: str) -> None:
    quiet = ambient_pod("shop", f"quiet-{backend}", annotations={istio.AMBIENT_DNS_CAPTURE: "false"})
    asking, silent = start_pods(ambient, [ambient_pod("shop", f"asking-{backend}"), quiet])
    wait_enrolled(ambient, [asking, silent])
    for version in VERSIONS:  # nobody listens at port 53 of the gateway
        assert resolve(asking, gateway(version), "mesh.test", dns.A) == [DNS_NAMES["mesh.test"]]
        assert resolve(asking, gateway(version), "mesh6.test", dns.AAAA) == [DNS_NAMES["mesh6.test"]]
        with pytest.raises(OSError):
            resolve(silent, gateway(version), "mesh.test", dns.A)
    ztunnel = ambient.ztunnels["ztunnel"]
    assert ztunnel.connections(asking.uid)["dns"] == 4
    assert ztunnel.connections(silent.uid)["dns"] == 0


def test_the_ingress_annotation_leaves_inbound_alone(ambient: Mesh, backend: str) -> None:
    annotations = {istio.AMBIENT_BYPASS_INBOUND: "true"}
    pods = start_pods(ambient, [ambient_pod("shop", f"gateway-{backend}", annotations=annotations)])
    wait_enrolled(ambient, pods)
    ingress = pods[0]
    plain = ambient.start_pod(unmeshed_pod("shop", f"visitor-{backend}"))
    counted = Counted(ambient.ztunnels["ztunnel"])
    for version in VERSIONS:
        seen, taken = counted.connect(plain, ingress, version)
        assert (seen, taken[ingress.name]) == (plain.address(version), (0, 0))
        seen, taken = counted.connect(ingress, plain, version)
        assert (seen, taken[ingress.name]) == (ingress.address(version), (0, 1))
        assert address_seen(ambient.node.netns, ingress.address(version), APP_PORT) == PROBE[version]


def test_a_sidecar_pod_keeps_its_envoy_beside_ambient_pods(ambient: Mesh, backend: str) -> None:
    ambient.add_namespace(f"mixed-{backend}", {MODE: "ambient"})
    beside = ambient.start_pod(sidecar_pod(f"mixed-{backend}", "sidecar"))
    envoy = ambient.start_proxy(beside)
    (pod,) = start_ambient(ambient, "neighbour", namespace=f"mixed-{backend}")
    counted = Counted(ambient.ztunnels["ztunnel"])
    for version in VERSIONS:
        begin = envoy.captured()
        seen, taken = counted.connect(pod, beside, version)
        assert seen == ("127.0.0.6" if version == 4 else "::6")
        assert taken == {pod.name: (0, 1), beside.name: (0, 0)}
        assert envoy.captured() - begin == Captured(inbound=1, outbound=0)
        begin = envoy.captured()
        seen, taken = counted.connect(beside, pod, version)
        assert seen == beside.address(version)
        assert taken == {pod.name: (1, 0), beside.name: (0, 0)}
        assert envoy.captured() - begin == Captured(inbound=0, outbound=1)
    assert ambient.rules(beside.netns).count == 1
    assert not ambient.redirection(beside)


def test_pods_of_a_labelled_namespace_are_in_unless_they_opt_out(running: Mesh) -> None:
    running.api.do(lambda server: server.add("namespaces", ambient_namespace("everybody")))
    member, outsider = start_pods(
        running, [unmeshed_pod("everybody", "member"), unmeshed_pod("everybody", "outsider", labels={MODE: "none"})]
    )
    wait_enrolled(running, [member])
    counted = Counted(running.ztunnels["ztunnel"])
    assert counted.connect(outsider, member, 4) == (
        outsider.address(4),
        {outsider.name: (0, 0), member.name: (1, 0)},
    )
    assert not traces(running, outsider)


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_ipv6_passes_by_where_it_is_switched_off(ambient: Mesh, backend: str) -> None:
    """Pods have two addresses all the same; that of IPv6 is in no set and is not redirected to where nobody listens."""
    mesh, options = ambient, BACKENDS[backend]
    mesh.agent.ensure(replace(options, environment={**options.environment, "AMBIENT_IPV6": "false"}))
    if "ztunnel" in mesh.ztunnels:
        mesh.ztunnels["ztunnel"].terminate()
    ztunnel = mesh.start_ztunnel("ztunnel-v4", "--ipv4-only")
    first, second = start_ambient(mesh, f"old-first-{backend}", f"old-second-{backend}")
    counted = Counted(ztunnel)
    assert counted.connect(first, second, 4) == (first.address(4), {first.name: (0, 1), second.name: (1, 0)})
    assert counted.connect(first, second, 6) == (first.address(6), {first.name: (0, 0), second.name: (0, 0)})
    assert address_seen(mesh.node.netns, first.address(4), APP_PORT) == PROBE[4]
    assert address_seen(mesh.node.netns, first.address(6), APP_PORT) == gateway(6)
    there = {address for address, uid in host_set(mesh).items() if uid in (first.uid, second.uid)}
    assert there == {first.address(4), second.address(4)}
    assert mesh.agent.status()["ambient"]["pods"][0]["state"] == "enrolled"
    mesh.remove_pod(first)
    mesh.label_pod(second, {MODE: None})
    wait_left(mesh, [first, second])


def test_the_hosts_network_is_left_alone(running: Mesh) -> None:
    before = kernel(running, running.node.netns)
    pod = running.start_pod(host_network_pod("shop", "on-the-host"))
    (other,) = start_ambient(running, "off-the-host")  # the agent has seen everything up to here
    assert not running.redirection(pod)
    assert pod.uid not in running.ztunnels["ztunnel"].workloads()
    assert pod.uid not in host_set(running).values()
    running.remove_pod(other)
    wait_left(running, [other])
    assert kernel(running, running.node.netns) == before
    assert address_seen(running.node.netns, gateway(4), OUTSIDE_PORT) == gateway(4)


def test_an_excluded_namespace_is_left_alone(running: Mesh) -> None:
    running.add_namespace(EXCLUDED_NAMESPACE, {MODE: "ambient"})
    pod = running.start_pod(ambient_pod(EXCLUDED_NAMESPACE, "resolver"))
    start_ambient(running, "afterwards")  # the agent has seen everything up to here
    assert not traces(running, pod)
    assert address_seen(running.node.netns, pod.address(4), APP_PORT) == gateway(4)


@pytest.mark.parametrize("labels", [{"app": "ztunnel"}, {"app": "ztunnel", MODE: "none"}], ids=["by-name", "by-chart"])
def test_ztunnels_own_pod_starts_while_there_is_no_ztunnel(running: Mesh, labels: dict[str, str]) -> None:
    running.label_namespace(istio.SYSTEM_NAMESPACE, {MODE: "ambient"})
    running.ztunnels["ztunnel"].terminate()
    try:
        pod = running.start_pod(unmeshed_pod(istio.SYSTEM_NAMESPACE, "ztunnel-abcde", labels=labels))
        running.start_ztunnel()
        (other,) = start_ambient(running, "waits-for-it")
        assert not traces(running, pod)
        assert traces(running, other)
    finally:
        running.label_namespace(istio.SYSTEM_NAMESPACE, {MODE: None})
