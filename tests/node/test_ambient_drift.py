"""What others undo in pods and on the host is noticed, said and mended; and a change of backend leaves one behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from lab.apiserver import ApiServer
from lab.mesh import Mesh, RunningPod
from lab.node import wait_until
from lab.traffic import address_seen
from tests.node.ambientworld import (
    BACKENDS,
    ENROL_SECONDS,
    OURS,
    PROBE,
    disagreements,
    host_set,
    kernel,
    remove_pods,
    start_ambient,
    wait_agreement,
)
from tests.node.conftest import gateway
from tests.node.test_ambient_restarts import watching

from meshcni import istio

APP_PORT = 8080
HEALED = "AmbientRedirectionHealed"
DRIFT = "istio_cni_ambient_drift_total"

# What another tool does to a pod, by backend. With iptables each family has its own rules.
NFT = {
    "everything": "nft flush ruleset",
    "the nat table": "nft delete table inet istio-ambient-nat",
    "one chain": "nft flush chain inet istio-ambient-mangle istio-output",
    "a rule before ours": "nft insert rule inet istio-ambient-nat istio-output counter accept",
}
IPTABLES = {
    "a flush of nat": "{iptables} -t nat -F",
    "a flush of mangle for IPv6": "{ip6tables} -t mangle -F",
    "a jump": "{iptables} -t nat -D OUTPUT -j ISTIO_OUTPUT",
    "a rule before ours": "{iptables} -t nat -I ISTIO_OUTPUT -j ACCEPT",
}
ROUTING = {
    "the policy rule": "ip rule del pref 32764",
    "the policy rule for IPv6": "ip -6 rule del pref 32764",
    "the route": "ip route flush table 100",
    "the route for IPv6": "ip -6 route flush table 100",
}
# pytest keeps this order: all of one backend follow each other in each test.
POD_CASES = [
    *(("nftables", what, command) for what, command in {**NFT, **ROUTING}.items()),
    *(
        (backend, what, command)
        for backend in ("iptables-nft", "iptables-legacy")
        for what, command in IPTABLES.items()
    ),
]

HOST_NFT = {
    "everything, as firewalld does": "nft flush ruleset",
    "the chain": "nft delete table inet istio-ambient-nat",
    "the rules": "nft flush chain inet istio-ambient-nat postrouting",
    "a set": "nft flush set inet istio-ambient-nat istio-inpod-probes-v4",
    "an entry": "nft delete element inet istio-ambient-nat istio-inpod-probes-v4 {{ {address} }}",
}
HOST_IPTABLES = {
    "the jump": "{iptables} -t nat -D POSTROUTING -j ISTIO_POSTRT",
    "everything, as firewalld does": "{iptables} -t nat -F",
    "its place": "{iptables} -t nat -I POSTROUTING 1 -p tcp -d 10.77.0.0/16 -j RETURN",
    "an entry": "ipset del istio-inpod-probes-v4 {address}",
    "a set": "ipset flush istio-inpod-probes-v4",
}
HOST_CASES = [
    *(("nftables", what, command) for what, command in HOST_NFT.items()),
    *(
        (backend, what, command)
        for backend in ("iptables-nft", "iptables-legacy")
        for what, command in HOST_IPTABLES.items()
    ),
]


def ids(cases: Sequence[tuple[str, str, str]]) -> list[str]:
    return [f"{backend}-{what}" for backend, what, _ in cases]


@dataclass(slots=True)
class Scene:
    """Two enrolled pods and what their netns hold."""

    mesh: Mesh
    backend: str
    pods: list[RunningPod]
    reference: list[str]


@pytest.fixture(scope="module")
def scenes(ambient_node: Mesh) -> Iterator[Callable[[str], Scene]]:
    """One scene for all tests of a backend that follow each other: each leaves it as it was, or has failed."""
    made: list[Scene] = []

    def scene(backend: str) -> Scene:
        if not made or made[-1].backend != backend:
            drop()
            ambient_node.agent.ensure(BACKENDS[backend])
            ambient_node.start_ztunnel()
            pods = start_ambient(ambient_node, f"victim-{backend}", f"other-{backend}")
            made.append(Scene(ambient_node, backend, pods, kernel(ambient_node, pods[0].netns)))
        return made[-1]

    def drop() -> None:
        if made:
            remove_pods(ambient_node, [pod for pod in made[-1].pods if pod in ambient_node.pods])

    yield scene
    drop()


def tool(command: str, backend: str, **values: str) -> list[str]:
    kind = "legacy" if backend == "iptables-legacy" else "nft"
    text = command.format(iptables=f"iptables-{kind}", ip6tables=f"ip6tables-{kind}", **values)
    return ["sh", "-ec", text]


def events(mesh: Mesh, pod: RunningPod) -> set[str]:
    """The reasons of the Events about a pod in the API server."""

    def found(server: ApiServer) -> set[str]:
        everything = server.cluster.objects("events")
        return {one["reason"] for one in everything if one.get("involvedObject", {}).get("uid") == pod.uid}

    return mesh.api.do(found)


@pytest.mark.parametrize(("backend", "what", "command"), POD_CASES, ids=ids(POD_CASES))
def test_what_is_undone_in_a_pod_is_mended(
    scenes: Callable[[str], Scene], backend: str, what: str, command: str
) -> None:
    scene = scenes(backend)
    mesh, (victim, other) = scene.mesh, scene.pods
    counted, said = mesh.agent.metric(DRIFT, what="rules"), len(sayings(mesh, victim))
    mesh.node.run(tool(command, backend), netns=victim.netns)
    assert kernel(mesh, victim.netns) != scene.reference
    wait_until("it is mended", lambda: kernel(mesh, victim.netns) == scene.reference, ENROL_SECONDS)
    wait_until("it is counted", lambda: mesh.agent.metric(DRIFT, what="rules") > counted, ENROL_SECONDS)
    assert len(sayings(mesh, victim)) > said
    assert sayings(mesh, other) == [], "only the pod that was tampered with"
    wait_until("people are told", lambda: HEALED in events(mesh, victim), ENROL_SECONDS)
    assert address_seen(other.netns, victim.address(4), APP_PORT) == other.address(4)
    assert disagreements(mesh, scene.reference) == []


def sayings(mesh: Mesh, pod: RunningPod) -> list[str]:
    """What the agent's log says about mending the pod."""
    return [line for line in mesh.agent.log_text().splitlines() if "mended" in line and f"pod=shop/{pod.name}" in line]


@pytest.mark.parametrize(("backend", "what", "command"), HOST_CASES, ids=ids(HOST_CASES))
def test_what_is_undone_on_the_host_is_mended(
    scenes: Callable[[str], Scene], backend: str, what: str, command: str
) -> None:
    scene = scenes(backend)
    mesh, pod, outside = scene.mesh, scene.pods[0], scene.mesh.node.netns
    counted = mesh.agent.metric(DRIFT, what="host-rules")
    assert address_seen(outside, pod.address(4), APP_PORT) == PROBE[4]
    mesh.node.run(tool(command, backend, address=pod.address(4)))
    wait_until("it is counted", lambda: mesh.agent.metric(DRIFT, what="host-rules") > counted, ENROL_SECONDS)
    wait_agreement(mesh, scene.reference)
    taken = mesh.ztunnels["ztunnel"].connections(pod.uid)["inbound"]
    for version in (4, 6):
        assert address_seen(outside, pod.address(version), APP_PORT) == PROBE[version]
    assert mesh.ztunnels["ztunnel"].connections(pod.uid)["inbound"] == taken
    assert any("mended on the host" in line for line in mesh.agent.log_text().splitlines())
    if "POSTROUTING 1" in command:
        mesh.node.run(tool(command.replace("-I POSTROUTING 1", "-D POSTROUTING"), backend))


def test_other_peoples_rules_stay(scenes: Callable[[str], Scene]) -> None:
    """Of another tool's table and chains nothing is touched by what mends ours."""
    scene = scenes("nftables")
    mesh, pod = scene.mesh, scene.pods[0]
    foreign = "add table inet foreign; add chain inet foreign output { type filter hook output priority 0; }; "
    foreign += "add rule inet foreign output tcp dport 9999 drop"
    places = (pod.netns, mesh.node.netns)

    def listings() -> list[str]:
        return [mesh.node.run(["nft", "list", "table", "inet", "foreign"], netns=netns) for netns in places]

    for netns in places:
        mesh.node.run(["nft", foreign], netns=netns)
    before, entries = listings(), host_set(mesh)
    for netns in places:
        mesh.node.run(["nft", "delete table inet istio-ambient-nat"], netns=netns)
    wait_until("ours are back", lambda: kernel(mesh, pod.netns) == scene.reference, ENROL_SECONDS)
    wait_until("the host's are back", lambda: host_set(mesh) == entries, ENROL_SECONDS)
    assert listings() == before
    for netns in places:
        mesh.node.run(["nft", "delete table inet foreign"], netns=netns)


SWITCHES = [
    ("nftables", "iptables-nft"),
    ("iptables-nft", "nftables"),
    ("nftables", "iptables-legacy"),
    ("iptables-legacy", "nftables"),
    ("iptables-legacy", "iptables-nft"),
]


@pytest.mark.parametrize(("old", "new"), SWITCHES, ids=[f"{old}-to-{new}" for old, new in SWITCHES])
def test_another_backend_takes_over_running_pods(ambient: Mesh, old: str, new: str) -> None:
    """By a restart of the agent, under connections: nothing fails, nothing goes past, one backend is left."""
    mesh = ambient
    mesh.agent.ensure(BACKENDS[old])
    mesh.start_ztunnel()
    pods = start_ambient(mesh, "switch-client", "switch-server")
    entries = host_set(mesh)
    with watching(mesh, *pods) as watched:
        mesh.agent.terminate()
        mesh.agent.start(BACKENDS[new])
        wait_until(
            "the old rules are gone",
            lambda: all(holders(mesh, pod.netns) == {new} for pod in pods),
            ENROL_SECONDS,
        )
        watched.wait()
        watched.assert_nothing_happened()
    (fresh,) = start_ambient(mesh, "switch-fresh")
    wait_agreement(mesh, kernel(mesh, fresh.netns))
    assert holders(mesh, mesh.node.netns) == {new}
    assert {address: host_set(mesh)[address] for address in entries} == entries
    for version in (4, 6):
        assert address_seen(mesh.node.netns, pods[0].address(version), APP_PORT) == PROBE[version]
        assert address_seen(pods[0].netns, gateway(version), 9090) == pods[0].address(version)


def holders(mesh: Mesh, netns: str) -> set[str]:
    """Which backends hold rules of ours in a netns."""
    text = "\n".join(kernel(mesh, netns))
    nft, _, legacy = text.partition("*")
    found = set()
    if istio.AMBIENT_NFT_TABLE_PREFIX in nft:
        found.add("nftables")
    if "chain ISTIO_" in nft:
        found.add("iptables-nft")
    if "ISTIO_" in legacy and OURS.search(legacy):
        found.add("iptables-legacy")
    return found
