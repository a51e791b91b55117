"""Running sidecar pods that are not captured get their rules; those that are captured stay as they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace

import pytest
from lab import namespaces
from lab.agent import AgentOptions
from lab.apiserver import ApiServer
from lab.mesh import APP_PORT, COUNTERS, Mesh, RunningPod
from lab.node import wait_until
from lab.objects import sidecar_pod, unmeshed_pod
from lab.traffic import address_seen
from tests.kernel.contract_oracle import Contract, contract
from tests.node.ambientworld import remove_pods, start_pods
from tests.node.conftest import BACKENDS, OUTSIDE_PORT, gateway

from meshcni import istio
from meshcni.host.netns import call_in_netns, open_netns
from meshcni.host.rulesmark import take_mark

HEAL_SECONDS = 30.0
ROUNDS = "istio_cni_sidecar_verification_seconds_count"
DRIFT = "istio_cni_sidecar_drift_total"
PODS = "istio_cni_sidecar_pods"
REPAIRED, MISSING = "MeshRedirectionRepaired", "MeshRedirectionMissing"
SELF = {4: "127.0.0.6", 6: "::6"}  # whom an application sees when Envoy leads a connection to it
NO_ROUNDS = {"AMBIENT_VERIFY_SECONDS": "3600"}  # whatever is healed within the test is healed by an event
QUICK_ROUNDS = {"AMBIENT_VERIFY_SECONDS": "1"}


def options(backend: str, **environment: str) -> AgentOptions:
    return replace(BACKENDS[backend], environment=environment)


def start_late(mesh: Mesh, *names: str) -> list[RunningPod]:
    """Start sidecar pods whose sandboxes the runtime makes without calling the plugin."""
    with mesh.chain_without_us():
        pods = start_pods(mesh, [sidecar_pod("shop", name) for name in names])
        for pod in pods:
            assert mesh.rules(pod.netns).count == 0
    return pods


def wait_captured(mesh: Mesh, pods: Sequence[RunningPod]) -> None:
    for pod in pods:
        wait_until(f"{pod.name} has its rules", lambda pod=pod: mesh.rules(pod.netns).count == 1, HEAL_SECONDS)


def assert_captures(mesh: Mesh, pod: RunningPod) -> None:
    """By behaviour: connections into the pod and out of it go through its Envoy, in both families."""
    envoy = pod.envoy or mesh.start_proxy(pod)
    before = envoy.captured()
    for version in (4, 6):
        assert address_seen(mesh.node.netns, pod.address(version), APP_PORT) == SELF[version]
        assert address_seen(pod.netns, gateway(version), OUTSIDE_PORT) == pod.address(version)
    taken = envoy.captured() - before
    assert (taken.inbound, taken.outbound) == (2, 2)


def reasons(mesh: Mesh, pod: RunningPod) -> set[tuple[str, str]]:
    """Type and reason of the Events about a pod."""

    def found(server: ApiServer) -> set[tuple[str, str]]:
        about = [one for one in server.cluster.objects("events") if one["involvedObject"]["uid"] == pod.uid]
        return {(one["type"], one["reason"]) for one in about}

    return mesh.api.do(found)


def state(mesh: Mesh, pod: RunningPod) -> dict[str, object]:
    """The pod in the status document; empty when it is not there."""
    sidecars = mesh.agent.status()["sidecars"]
    return next((one for one in sidecars["pods"] if one["uid"] == pod.uid), {})


def wait_rounds(mesh: Mesh, count: int = 2) -> None:
    """Return when so many whole rounds have begun and ended since."""
    target = mesh.agent.metric(ROUNDS) + count + 1
    wait_until("rounds have passed", lambda: mesh.agent.metric(ROUNDS) >= target, HEAL_SECONDS)


def log_lines(mesh: Mesh, pod: RunningPod, word: str) -> list[str]:
    return [
        line for line in mesh.agent.log_text().splitlines() if f"pod=shop/{pod.name}" in line and f"\t{word}" in line
    ]


# --- pods that nobody captured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pod_that_raced_the_install_is_captured_without_waiting_for_a_round(mesh: Mesh, backend: str) -> None:
    mesh.agent.ensure(options(backend, **NO_ROUNDS))
    healed = mesh.agent.metric(DRIFT, result="healed")
    (pod,) = start_late(mesh, f"late-{backend}")
    wait_captured(mesh, [pod])
    assert_captures(mesh, pod)
    wait_until("it is counted", lambda: mesh.agent.metric(DRIFT, result="healed") == healed + 1, HEAL_SECONDS)
    wait_until("people are told", lambda: reasons(mesh, pod) == {("Normal", REPAIRED)}, HEAL_SECONDS)
    (line,) = log_lines(mesh, pod, "healed")
    assert "no rules at all" in line
    assert "cause=plugin-not-called" in line
    shown = state(mesh, pod)
    assert shown["state"] == "captured"
    assert "without calling the plugin" in str(shown["lastMended"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_pods_of_a_rebooted_node_are_captured_when_the_agent_starts(mesh: Mesh, backend: str) -> None:
    """The primary CNI wrote its conf, the kubelet started everything, and then came the agent."""
    mesh.agent.ensure(options(backend, **NO_ROUNDS))
    mesh.agent.terminate()
    mesh.runtime.write_chain()
    wait_until("containerd has the bare chain", lambda: not mesh.agent.is_in_chain(), HEAL_SECONDS)
    names = [f"reboot-{backend}-{number}" for number in range(10)]
    pods = start_pods(mesh, [sidecar_pod("shop", name) for name in names])
    bystander = mesh.start_pod(unmeshed_pod("shop", f"bystander-{backend}"))
    assert [mesh.rules(pod.netns).count for pod in pods] == [0] * 10
    mesh.agent.start()
    wait_captured(mesh, pods)
    assert_captures(mesh, pods[0])
    wait_until("all are counted", lambda: mesh.agent.metric(PODS, state="captured") == 10, HEAL_SECONDS)
    assert mesh.agent.metric("istio_cni_sidecar_pods_expected") == 10
    assert mesh.agent.metric(DRIFT, cause="early", result="healed") == 10
    assert mesh.rules(bystander.netns).count == 0


def test_a_sandbox_made_anew_without_the_plugin_is_captured(mesh: Mesh) -> None:
    mesh.agent.ensure(options("nftables", **NO_ROUNDS))
    first = mesh.start_pod(sidecar_pod("shop", "anew"))
    assert mesh.rules(first.netns).count == 1
    with mesh.chain_without_us():
        second = mesh.restart_sandbox(first)
        assert mesh.rules(second.netns).count == 0
    wait_captured(mesh, [second])
    assert_captures(mesh, second)


# --- rules that go while the pod runs ---------------------------------------------------------------------------------

NFT = {
    "everything": "nft flush ruleset",
    "the nat table": "nft delete table inet istio-proxy-nat",
    "one chain": "nft flush chain inet istio-proxy-nat istio-output",
    "a pass for one port": "nft insert rule inet istio-proxy-nat istio-output tcp dport 443 counter accept",
    "an exclusion": "nft insert rule inet istio-proxy-nat istio-inbound tcp dport 8080 counter return",
}
IPTABLES = {
    "nat": "{iptables} -t nat -F",
    "nat of IPv6, chains and all": "{ip6tables} -t nat -F && {ip6tables} -t nat -X",
    "a jump": "{iptables} -t nat -D OUTPUT -j ISTIO_OUTPUT",
    "a pass before ours": "{iptables} -t nat -I ISTIO_OUTPUT -j ACCEPT",
}
CASES = [
    *(("nftables", what, command) for what, command in NFT.items()),
    *((backend, what, one) for backend in ("iptables-nft", "iptables-legacy") for what, one in IPTABLES.items()),
]


@pytest.mark.parametrize(("backend", "what", "command"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_what_is_undone_while_a_pod_runs_is_mended(mesh: Mesh, backend: str, what: str, command: str) -> None:
    mesh.agent.ensure(options(backend, **QUICK_ROUNDS))
    pod, other = start_pods(mesh, [sidecar_pod("shop", name) for name in ("victim", "other")])
    envoy = mesh.start_proxy(pod)
    before, others = listing(mesh, pod), listing(mesh, other)
    wait_rounds(mesh)  # now it was seen in order
    with namespaces.connect(mesh.node.netns, pod.address(4), APP_PORT) as held:
        exchange(held)
        kind = "legacy" if backend == "iptables-legacy" else "nft"
        text = command.format(iptables=f"iptables-{kind}", ip6tables=f"ip6tables-{kind}")
        mesh.node.run(["sh", "-ec", text], netns=pod.netns)
        wait_until("people are told", lambda: ("Normal", REPAIRED) in reasons(mesh, pod), HEAL_SECONDS)
        assert sorted(listing(mesh, pod)) == sorted(before)
        exchange(held)  # the proxy's connection goes on
    assert_captures(mesh, pod)
    assert mesh.agent.metric(DRIFT, cause="removed", result="healed") >= 1
    assert "somebody changed its rules while it ran" in log_lines(mesh, pod, "healed")[0]
    assert listing(mesh, other) == others
    assert reasons(mesh, other) == set()
    assert envoy.is_live()


def listing(mesh: Mesh, pod: RunningPod) -> list[str]:
    """What the kernel's own tools list, without the date; the order of tables and chains is that of their making."""
    script = 'test -z "$(cat /proc/net/ip6_tables_names 2>/dev/null)" || ip6tables-legacy-save'
    text = mesh.rules(pod.netns).listing + COUNTERS.sub("", mesh.node.run(["sh", "-c", script], netns=pod.netns))
    return [line for line in text.splitlines() if not line.startswith("#")]


def exchange(connection: socket.socket) -> None:
    """Send something and take it back."""
    connection.settimeout(HEAL_SECONDS)
    connection.sendall(b"still there?")
    assert connection.recv(100) == b"still there?"


# --- the setting ------------------------------------------------------------------------------------------------------


def test_report_says_so_and_changes_nothing(mesh: Mesh) -> None:
    mesh.agent.ensure(options("nftables", **QUICK_ROUNDS, SIDECAR_RECONCILE="report"))
    (pod,) = start_late(mesh, "reported")
    wait_until("people are told", lambda: ("Warning", MISSING) in reasons(mesh, pod), HEAL_SECONDS)
    wait_rounds(mesh)
    assert take(pod) == 1, "nothing was ever programmed"
    assert mesh.agent.metric(DRIFT, result="reported") == 1, "once, not every round"
    assert len(log_lines(mesh, pod, "its connections pass by the mesh")) == 1
    assert mesh.agent.metric(PODS, state="uncaptured") == 1
    assert mesh.agent.is_ready(), "a pod of somebody else is no reason"
    assert "no rules at all" in str(state(mesh, pod)["reason"])
    assert "shop/reported" in mesh.agent.command("status")


def test_off_looks_at_nothing(mesh: Mesh) -> None:
    mesh.agent.ensure(options("nftables", **QUICK_ROUNDS, SIDECAR_RECONCILE="off"))
    (pod,) = start_late(mesh, "left-alone")
    assert mesh.agent.status()["sidecars"] is None
    assert mesh.agent.metric(ROUNDS) == 0
    assert take(pod) == 1
    assert reasons(mesh, pod) == set()


def take(pod: RunningPod) -> int:
    """How often the packet rules of a pod were changed, and one."""
    netns = open_netns(pod.netns)
    try:
        mark = call_in_netns(netns, take_mark)
    finally:
        os.close(netns)
    assert mark is not None
    assert mark.legacy == ()
    return mark.generation


# --- pods that are captured, or none of ours --------------------------------------------------------------------------


def test_a_hundred_unmeshed_pods_are_not_touched(mesh: Mesh) -> None:
    mesh.agent.ensure(options("nftables", **QUICK_ROUNDS))
    pods = start_pods(mesh, [unmeshed_pod("shop", f"plain-{number}") for number in range(100)])
    wait_rounds(mesh)
    assert {take(pod) for pod in pods} == {1}
    assert mesh.agent.metric("istio_cni_sidecar_pods_expected") == 0
    remove_pods(mesh, pods)


ORIGINAL = "-p 15001 -u 1337 -g 1337 -m REDIRECT -i * -b * -d 15020,15021,15090 -o 15020"  # without annotations


def original(pod: RunningPod, *, dual_stack: bool, exclude: str = "") -> Contract:
    """What the original leaves in a pod; `exclude` is one more inbound port that its annotations excluded."""
    words = ORIGINAL.replace("15090", f"15090,{exclude}" if exclude else "15090").split()
    addresses = sorted(pod.sandbox.addresses, key=lambda address: ":" in address)
    return contract([*words, *(["--dual-stack"] if dual_stack else [])], {}, addresses)


@pytest.mark.parametrize("agents", BACKENDS)
@pytest.mark.parametrize("theirs", BACKENDS)
@pytest.mark.parametrize("dual_stack", [True, False], ids=["dual", "first-family-only"])
def test_what_the_original_programmed_stays_byte_for_byte(
    mesh: Mesh, agents: str, theirs: str, dual_stack: bool
) -> None:
    """With either backend on either side, and also where it leaves IPv6 out."""
    mesh.agent.ensure(options(agents, **QUICK_ROUNDS))
    with mesh.chain_without_us():
        pod = mesh.start_pod(sidecar_pod("shop", "originals"))
        load(mesh, pod, original(pod, dual_stack=dual_stack), theirs)
        assert mesh.rules(pod.netns).count == 1
        before = everything(mesh, pod)
    wait_rounds(mesh)
    assert everything(mesh, pod) == before
    assert reasons(mesh, pod) == set()
    assert state(mesh, pod)["state"] == ("captured" if dual_stack else "otherwise"), state(mesh, pod)


def test_other_parameters_stay_and_are_told_once(mesh: Mesh) -> None:
    """The pod has the rules of its first annotations, whatever they were edited to."""
    mesh.agent.ensure(options("nftables", **QUICK_ROUNDS))
    with mesh.chain_without_us():
        pod = mesh.start_pod(sidecar_pod("shop", "older"))
        older = original(pod, dual_stack=True, exclude="8080")
        load(mesh, pod, older, "iptables-nft")
        before = everything(mesh, pod)
    wait_rounds(mesh)
    assert everything(mesh, pod) == before
    assert state(mesh, pod)["state"] == "otherwise"
    assert len(log_lines(mesh, pod, "captured by rules that are left as they are")) == 1


def test_an_edited_annotation_changes_no_rules(mesh: Mesh) -> None:
    mesh.agent.ensure(options("nftables", **QUICK_ROUNDS))
    pod = mesh.start_pod(sidecar_pod("shop", "edited", annotations={istio.INCLUDE_INBOUND_PORTS: ""}))
    wait_rounds(mesh)
    before = everything(mesh, pod)
    mesh.annotate_pod(pod, {istio.INCLUDE_INBOUND_PORTS: "*"})
    wait_until("it is noticed", lambda: state(mesh, pod)["state"] == "otherwise", HEAL_SECONDS)
    wait_rounds(mesh)
    assert everything(mesh, pod) == before
    assert reasons(mesh, pod) == set()


def everything(mesh: Mesh, pod: RunningPod) -> list[str]:
    """All packet rules, policy rules, local routes and addresses of a pod."""
    script = (
        "ip rule; ip -6 rule; ip route show table all type local; ip -6 route show table all type local; ip -o addr"
    )
    return [*listing(mesh, pod), *mesh.node.run(["sh", "-c", script], netns=pod.netns).splitlines()]


def load(mesh: Mesh, pod: RunningPod, rules: Contract, backend: str) -> None:
    """Program a pod with the texts of the original, as it does."""
    kind = "legacy" if backend == "iptables-legacy" else "nft"
    commands = {"nft -f": rules.nft} if backend == "nftables" else {}
    if backend != "nftables":
        texts = {
            f"iptables-{kind}-restore --noflush": rules.iptables,
            f"ip6tables-{kind}-restore --noflush": rules.ip6tables,
        }
        commands = {command: text for command, text in texts.items() if text}
    file = mesh.node.folder / "original-rules"
    for command, text in commands.items():
        file.write_text(text)
        mesh.node.run(["sh", "-ec", f"{command} {file}"], netns=pod.netns)
    mesh.node.run(["sh", "-c", rules.ip], netns=pod.netns)
