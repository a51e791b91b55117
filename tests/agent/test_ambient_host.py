"""The host's part of ambient mode: sets and rules, the kubelet, procfs; and one agent after the other."""

from __future__ import annotations

import json

import pytest
from lab.namespaces import call_in_netns
from lab.ztunnel.client import Peer
from tests.agent.ambientscene import (
    LISTS,
    VARIANTS,
    AmbientScene,
    add,
    everything_in,
    is_captured,
    lines_of,
    row_of,
    shell_in,
    wait_reason,
    wait_state,
    wait_unchanged,
)
from tests.agent.scene import Agent, wait_until

from meshcni import istio


def reasons(agent: Agent) -> str:
    """Why it is not ready; empty when it is."""
    status, body = agent.get(istio.READY_PATH)
    assert status in (200, 503), body
    return "; ".join(json.loads(body)["reasons"]) if status == 503 else ""


# --- the host's side --------------------------------------------------------------------------------------------------


def fill_set(ambient: AmbientScene, elements: dict[str, str]) -> None:
    name = "inet istio-ambient-nat istio-inpod-probes-v4"
    text = ", ".join(f'{address} comment "{uid}"' for address, uid in elements.items())
    for command in (
        "table inet istio-ambient-nat",
        f"set {name} {{ type ipv4_addr; }}",
        f"element {name} {{ {text} }}",
    ):
        shell_in(ambient.scene.netns, "nft", f"add {command}")


def test_set_is_adopted_and_only_entries_of_unknown_pods_go(ambient: AmbientScene) -> None:
    enrolled = ambient.running_pod("enrolled")
    ambient.annotate(enrolled, "enabled")
    after_reboot = ambient.new_pod("after-reboot")  # its address is not in the API any more, or not yet
    ambient.annotate(after_reboot, "enabled")
    foreign = "00000000-0000-4000-8000-00000000dead"
    fill_set(ambient, {enrolled.address: enrolled.uid, after_reboot.address: after_reboot.uid, "10.9.9.9": foreign})
    ambient.ready()
    ambient.connected()
    kept = {enrolled.address: enrolled.uid, after_reboot.address: after_reboot.uid}
    wait_until("the foreign entry to go", lambda: "10.9.9.9" not in ambient.set_entries())
    assert ambient.set_entries() == kept


def test_set_is_never_empty_in_a_restart(ambient: AmbientScene) -> None:
    """The kubelet's probes go on while nothing is known of the cluster yet."""
    ztunnel = ambient.ztunnel()
    pods = ambient.enrolled_pods(2, ztunnel)
    entries = {pod.address: pod.uid for pod in pods}
    with ambient.lists_refused(*LISTS):
        agent = ambient.start()
        wait_reason(agent, "not read yet")
        wait_until("the host's rules", lambda: agent.status()["ambient"]["hostRules"] == "in place")
        assert ambient.set_entries() == entries
    agent.wait_ready()
    assert ambient.set_entries() == entries


@pytest.mark.parametrize("to", ["nftables", "nft"])
def test_set_is_taken_over_when_the_backend_changes(ambient: AmbientScene, to: str) -> None:
    iptables = VARIANTS["nft"]
    ambient.ztunnel()
    first = ambient.ready(**({} if to == "nft" else iptables))
    pod = ambient.running_pod()
    wait_state(first, pod, "enrolled")
    first.kill()
    second = ambient.ready(**(iptables if to == "nft" else {}))
    wait_state(second, pod, "enrolled")
    assert is_captured(pod, to)
    other = "nft" if to == "nftables" else "nftables"
    wait_until("the other backend's rules to go", lambda: not is_captured(pod, other))
    ours, others = ambient.set_entries(), ambient.ipset_entries()
    assert (ours, others) == (({pod.address: pod.uid}, {}) if to == "nftables" else ({}, {pod.address: pod.uid}))


def test_host_rules_are_made_and_made_again(ambient: AmbientScene) -> None:
    agent = ambient.ready(AMBIENT_VERIFY_SECONDS="1")
    assert "snat ip to 169.254.7.127" in ambient.host_rules()
    shell_in(ambient.scene.netns, "nft", "flush", "ruleset")
    wait_until("them to be back", lambda: "snat ip to 169.254.7.127" in ambient.host_rules())
    wait_until("the metric", lambda: agent.metrics().get('istio_cni_ambient_drift_total{what="host-rules"}', 0.0) >= 1)


def test_set_comes_back_with_its_entries(ambient: AmbientScene) -> None:
    ambient.ztunnel()
    agent = ambient.ready(AMBIENT_VERIFY_SECONDS="1")
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    shell_in(ambient.scene.netns, "nft", "flush", "ruleset")
    wait_until("them to be back", lambda: ambient.set_entries() == {pod.address: pod.uid})


def test_address_of_the_node_as_source_of_probes(ambient: AmbientScene) -> None:
    link = "link add up0 type veth peer name down0\nlink set up0 up\naddr add 10.250.0.7/24 dev up0\n"
    batch = ambient.scene.directory / "batch"
    batch.write_text(link)
    shell_in(ambient.scene.netns, "ip", "-batch", str(batch))
    agent = ambient.ready(HOST_PROBE_SNAT_IP="hostIP")
    assert "snat ip to 10.250.0.7" in ambient.host_rules()
    ambient.ztunnel()
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    assert "saddr 10.250.0.7" in everything_in(pod)


def test_node_without_an_address_cannot_lend_it(ambient: AmbientScene) -> None:
    done = ambient.scene.run(ambient=True, HOST_PROBE_SNAT_IP="hostIP", HOST_PROC_DIR=ambient.procfs.root)
    assert done.returncode == 1
    assert "HOST_PROBE_SNAT_IP" in done.stderr
    assert "Traceback" not in done.stderr


def test_kubelet_is_looked_for_until_it_is_there(ambient: AmbientScene) -> None:
    agent = ambient.start(KUBELET_UID="")
    wait_reason(agent, "kubelet")
    assert "KUBELET_UID" in reasons(agent)
    assert agent.status()["ambient"]["hostRules"] != "in place"
    assert len(lines_of(agent, "\terror\t", "kubelet")) == 1, "said once, not every time"
    ambient.procfs.start("/system.slice/kubelet.service", comm="kubelet", arguments="kubelet --config x", uid=4711)
    agent.wait_ready()
    assert "meta skuid 4711" in ambient.host_rules()


def test_pods_are_refused_while_the_host_has_no_rules(ambient: AmbientScene) -> None:
    agent = ambient.start(KUBELET_UID="")
    wait_reason(agent, "kubelet")
    ztunnel = ambient.connected()
    pod = ambient.new_pod()
    before = everything_in(pod)
    reply = add(agent, pod)
    assert (reply.ok, reply.code) == (False, 11)
    assert "kubelet" in reply.message
    wait_unchanged(pod, before)
    wait_until("ztunnel to let go", lambda: ztunnel.state()["workloads"] == {})


def test_iptables_need_no_kubelet(ambient: AmbientScene) -> None:
    ambient.ready(KUBELET_UID="", **VARIANTS["nft"])
    saved = shell_in(ambient.scene.netns, "iptables-nft-save", "-t", "nat")
    assert "-A POSTROUTING -j ISTIO_POSTRT" in saved
    assert "--match-set istio-inpod-probes-v4 dst" in saved


def test_host_is_another_netns_when_switching_is_allowed(ambient: AmbientScene) -> None:
    """As in the chart: the agent has a netns of its own, and rules and sets belong into that of process 1."""
    agent = ambient.ready(ALLOW_SWITCH_TO_HOST_NS="true")
    ambient.connected()
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    assert ambient.host_rules() == ""
    host = ambient.procfs.host.shell("nft", "list", "ruleset")
    assert "snat ip to 169.254.7.127" in host
    assert f'{pod.address} comment "{pod.uid}"' in host


def test_procfs_that_is_none_is_said_and_survived(ambient: AmbientScene) -> None:
    """Running pods cannot be found, new ones can be enrolled."""
    empty = ambient.scene.directory / "empty"
    empty.mkdir()
    agent = ambient.start(HOST_PROC_DIR=str(empty))
    ambient.connected()
    agent.wait_ready()
    running = ambient.running_pod("running")
    assert add(agent, ambient.new_pod()).ok
    wait_until("an error", lambda: row_of(agent, running).get("lastError"))


# --- one agent after the other ----------------------------------------------------------------------------------------


def second_ports(number: int) -> dict[str, str]:
    return {"HEALTH_PORT": str(18000 + number), "MONITORING_PORT": str(19014 + number)}


def test_ztunnel_comes_over_to_the_next_agent_without_a_pause(ambient: AmbientScene) -> None:
    """The path is the new agent's before the old one closes, so ztunnel's next connect finds somebody."""
    ztunnel = ambient.ztunnel()
    old = ambient.ready()
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    new = ambient.start(**second_ports(1))
    wait_until("the new one to be ready", lambda: new.get(istio.READY_PATH, 18001)[0] == 200)
    failures = len(ztunnel.records("connect-failed"))
    assert ztunnel.state()["agent"] == old.process.pid, "it keeps what it has"
    old.stop()
    ztunnel.wait("the new agent", lambda state: state["agent"] == new.process.pid and state["snapshot"])
    assert len(ztunnel.records("connect-failed")) == failures
    assert ambient.scene.ztunnel_socket.exists(), "the old one leaves the new one's socket alone"
    pod = ambient.new_pod()
    assert add(new, pod).ok


def test_next_agent_serves_while_the_old_one_is_still_there(ambient: AmbientScene) -> None:
    """A rollout with maxSurge: pods come to the new agent, so ztunnel has to come too, and the old one must rest."""
    ztunnel = ambient.ztunnel()
    old = ambient.ready(AMBIENT_VERIFY_SECONDS="1")
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    running = ambient.running_pod("running")
    wait_state(old, running, "enrolled")
    new = ambient.start(**second_ports(1))
    wait_until("the new one to be ready", lambda: new.get(istio.READY_PATH, 18001)[0] == 200)
    pod = ambient.new_pod()
    assert add(new, pod).ok, old.log
    assert ztunnel.state()["agent"] == new.process.pid
    assert is_captured(pod)
    rounds = old.metrics()["istio_cni_ambient_verification_seconds_count"]
    entries = {running.address: running.uid, pod.address: pod.uid}
    for _ in range(3):
        assert ambient.set_entries() == entries, "the old one does not know this pod's address"
        shell_in(ambient.scene.netns, "sleep", "1")
    assert old.metrics()["istio_cni_ambient_verification_seconds_count"] <= rounds + 1
    assert "another process serves" in old.get(istio.READY_PATH)[1]
    assert old.stop() == 0
    assert ambient.set_entries() == entries
    assert ztunnel.state()["agent"] == new.process.pid
    wait_state(new, pod, "enrolled")


def test_socket_goes_with_the_last_agent(ambient: AmbientScene) -> None:
    agent = ambient.ready()
    assert ambient.scene.ztunnel_socket.exists()
    agent.stop()
    assert not ambient.scene.ztunnel_socket.exists()


def test_socket_path_that_cannot_be_made_ends_the_start(ambient: AmbientScene) -> None:
    done = ambient.scene.run(ambient=True, ZTUNNEL_UDS_ADDRESS="/proc/none/ztunnel.sock")
    assert done.returncode == 1
    assert "/proc/none/ztunnel.sock" in done.stderr
    assert "Traceback" not in done.stderr


def test_agent_outlives_a_ztunnel_socket_in_a_folder_that_is_not_there_yet(ambient: AmbientScene) -> None:
    path = ambient.scene.directory / "later" / "ztunnel.sock"
    agent = ambient.ready(ZTUNNEL_UDS_ADDRESS=str(path))
    with Peer(path):
        wait_until("the hello", lambda: agent.status()["ambient"]["ztunnel"])
    assert call_in_netns(ambient.scene.netns, lambda: path.exists())
