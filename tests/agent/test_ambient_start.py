"""The start of an agent in ambient mode: what is served from the first moment, what is adopted, when it is ready."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from lab.namespaces import call_in_netns
from lab.ztunnel.client import Peer, Program
from tests.agent.ambientscene import (
    AmbientPod,
    AmbientScene,
    add,
    everything_in,
    is_captured,
    lines_of,
    row_of,
    shell_in,
    wait_state,
)
from tests.agent.scene import Agent, wait_until

from meshcni import istio

LISTS = ["/api/v1/pods", "/api/v1/namespaces"]
SOCKETS = (istio.AGENT_SOCKET_NAME, istio.EVENT_SOCKET_NAME, istio.LOG_SOCKET_NAME, istio.CONTROL_SOCKET_NAME)


def reasons(agent: Agent) -> str:
    """Why it is not ready; empty when it is."""
    status, body = agent.get(istio.READY_PATH)
    assert status in (200, 503), body
    return "; ".join(json.loads(body)["reasons"]) if status == 503 else ""


def wait_reason(agent: Agent, part: str) -> None:
    def has_it() -> bool:
        status, body = agent.get(istio.READY_PATH)
        return status == 503 and part in body

    wait_until(f"the reason {part!r}", has_it)


def kill(agent: Agent) -> None:
    agent.process.kill()
    agent.process.wait()


def enrolled_pods(ambient: AmbientScene, count: int, ztunnel: Program) -> list[AmbientPod]:
    """Pods that an agent enrolled before it was killed."""
    first = ambient.ready()
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    pods = [ambient.running_pod(f"cart-{number}") for number in range(count)]
    for pod in pods:
        wait_state(first, pod, "enrolled")
        ambient.wait_annotation(pod, "enabled")
    kill(first)
    return pods


def snapshot_for(ztunnel: Program, agent: Agent) -> list[dict[str, Any]]:
    """What the stand-in was told by this agent up to the end of the snapshot."""
    pid = agent.process.pid
    ztunnel.wait("its snapshot", lambda state: state["agent"] == pid and state["snapshot"])
    records = ztunnel.records()
    begin = max(place for place, one in enumerate(records) if one.get("agent") == pid)
    told = [one for one in records[begin:] if one["event"] in ("add", "keep", "del", "snapshot-sent")]
    end = next(place for place, one in enumerate(told) if one["event"] == "snapshot-sent")
    return told[: end + 1]


# --- before the cluster was read --------------------------------------------------------------------------------------


@contextmanager
def lists_refused(ambient: AmbientScene, *paths: str) -> Iterator[None]:
    """Lists fail, everything else is answered."""
    for path in paths:
        for watch in (False, True):
            ambient.api.do(
                lambda server, path=path, watch=watch: server.fault(
                    "status", prefix=path, method="GET", watch=watch, status=500, count=-1
                )
            )
    yield
    ambient.api.do(lambda server: server.clear_faults())


@pytest.mark.parametrize("path", LISTS)
def test_nothing_is_said_to_ztunnel_before_both_lists_are_read(ambient: AmbientScene, path: str) -> None:
    enrolled = ambient.running_pod()
    ambient.annotate(enrolled, "enabled")
    with lists_refused(ambient, path):
        agent = ambient.start()
        wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
        for name in SOCKETS:
            assert (ambient.scene.run_dir / name).exists()
        wait_reason(agent, path.rpartition("/")[2])
        with Peer(ambient.scene.ztunnel_socket) as peer:
            wait_until("the hello", lambda: agent.status()["ambient"]["ztunnel"])
            peer.socket.settimeout(1)
            with pytest.raises(TimeoutError):
                peer.packet()
    agent.wait_ready()
    told = snapshot_for(ambient.ztunnel(), agent)
    assert [(one["event"], one["uid"]) for one in told] == [("add", enrolled.uid), ("snapshot-sent", "")]


def test_adds_are_served_before_the_lists_are_read(ambient: AmbientScene) -> None:
    ztunnel, pod = ambient.ztunnel(), ambient.new_pod()
    with lists_refused(ambient, "/api/v1/pods"):
        agent = ambient.start()
        wait_reason(agent, "pods")
        assert add(agent, pod).ok
        assert is_captured(pod)
        ambient.wait_annotation(pod, "enabled")
        assert not ztunnel.state()["snapshot"]
    agent.wait_ready()
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    assert pod.uid in ztunnel.state()["workloads"]
    wait_state(agent, pod, "enrolled")


def test_cluster_away_at_the_start(ambient: AmbientScene) -> None:
    ztunnel = ambient.ztunnel()
    pods = enrolled_pods(ambient, 2, ztunnel)
    before = [everything_in(pod) for pod in pods]
    entries = ambient.set_entries()
    ambient.api.crash()
    agent = ambient.start()
    wait_reason(agent, "not read yet")
    ztunnel.wait("another connection", lambda state: state["agent"] == agent.process.pid)
    assert not ztunnel.state()["snapshot"]
    assert ztunnel.state()["workloads"].keys() == {pod.uid for pod in pods}
    ambient.api.restart()
    agent.wait_ready()
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    for pod in pods:
        wait_state(agent, pod, "enrolled")
    assert [everything_in(pod) for pod in pods] == before
    assert ambient.set_entries() == entries


# --- what earlier agents left -----------------------------------------------------------------------------------------


def test_restart_changes_nothing(ambient: AmbientScene) -> None:
    ztunnel = ambient.ztunnel()
    pods = enrolled_pods(ambient, 3, ztunnel)
    listing = ("nft", "-a", "list", "ruleset")  # a rule that is made anew has another handle
    before = [pod.netns.shell(*listing) for pod in pods]
    entries, started = ambient.set_entries(), ztunnel.state()["started"]
    patches = [len(ambient.patches(pod)) for pod in pods]
    agent = ambient.ready()
    told = snapshot_for(ztunnel, agent)
    for pod in pods:
        row = wait_state(agent, pod, "enrolled")
        assert (row["source"], row["ztunnelAcked"], row["netnsInode"]) == ("start", True, pod.inode)
    assert {(one["event"], one["uid"], one.get("inode")) for one in told[:-1]} == {
        ("add", pod.uid, pod.inode) for pod in pods
    }
    assert ztunnel.state()["started"] == started, "no proxy was begun anew"
    assert [pod.netns.shell(*listing) for pod in pods] == before
    assert ambient.set_entries() == entries
    assert [len(ambient.patches(pod)) for pod in pods] == patches


@pytest.mark.parametrize("annotation", ["enabled", "pending"])
@pytest.mark.parametrize("found", [True, False], ids=["found", "not found"])
def test_every_annotated_pod_is_named_in_the_snapshot(ambient: AmbientScene, annotation: str, found: bool) -> None:
    """A pod that was not named would lose its listeners while its rules lead there."""
    ztunnel = ambient.ztunnel()
    (pod,) = enrolled_pods(ambient, 1, ztunnel)
    ambient.annotate(pod, annotation)
    if not found:
        ambient.procfs.end(2)
    (told, _end) = snapshot_for(ztunnel, ambient.ready())
    assert (told["event"], told["uid"]) == ("add" if found else "keep", pod.uid)
    assert told.get("inode") == (pod.inode if found else None)


def test_pending_pod_without_rules_is_taken_up_when_there_is_a_ztunnel(ambient: AmbientScene) -> None:
    pod = ambient.running_pod()
    ambient.annotate(pod, "pending")
    agent = ambient.ready()
    ambient.ztunnel()
    wait_state(agent, pod, "enrolled")
    assert is_captured(pod)


def test_pod_whose_process_is_found_later_is_added_then(ambient: AmbientScene) -> None:
    pod = ambient.running_pod()
    ambient.annotate(pod, "enabled")
    ambient.procfs.end(2)
    agent = ambient.ready(AMBIENT_VERIFY_SECONDS="1")
    ztunnel = ambient.connected()
    ambient.run_process(pod)
    wait_state(agent, pod, "enrolled")
    assert ztunnel.state()["workloads"][pod.uid]["inode"] == pod.inode
    assert is_captured(pod)


def test_work_of_an_agent_that_died_is_ended(ambient: AmbientScene) -> None:
    """It was killed between rules and annotation."""
    ztunnel = ambient.ztunnel()
    first = ambient.ready()
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    ambient.api.do(lambda server: server.fault("hang", method="PATCH", count=-1))
    pod = ambient.new_pod()
    assert add(first, pod).ok
    kill(first)
    ambient.api.do(lambda server: server.clear_faults())
    assert ambient.annotation(pod) is None
    ambient.report_address(pod)
    ambient.run_process(pod)
    before = everything_in(pod)
    agent = ambient.ready()
    wait_state(agent, pod, "enrolled")
    ambient.wait_annotation(pod, "enabled")
    assert everything_in(pod) == before


def test_pod_that_stopped_belonging_meanwhile_leaves(ambient: AmbientScene) -> None:
    ztunnel = ambient.ztunnel()
    pod, stays = enrolled_pods(ambient, 2, ztunnel)
    ambient.label(pod, mode=None)
    agent = ambient.ready()
    wait_state(agent, pod, "")
    assert not is_captured(pod)
    assert "istio" not in everything_in(pod)
    assert "lookup 100" not in everything_in(pod)
    assert ambient.annotation(pod) is None
    assert ambient.set_entries() == {stays.address: stays.uid}
    wait_until("ztunnel to let go", lambda: ztunnel.state()["workloads"].keys() == {stays.uid})
    wait_state(agent, stays, "enrolled")


def test_pod_that_was_deleted_meanwhile_leaves_the_set_and_ztunnel(ambient: AmbientScene) -> None:
    ztunnel = ambient.ztunnel()
    pod, stays = enrolled_pods(ambient, 2, ztunnel)
    ambient.delete(pod)
    ambient.ready()
    wait_until("the set", lambda: ambient.set_entries() == {stays.address: stays.uid})
    wait_until("ztunnel to let go", lambda: ztunnel.state()["workloads"].keys() == {stays.uid})


def test_pod_that_began_to_belong_meanwhile_enters(ambient: AmbientScene) -> None:
    pod = ambient.running_pod()
    ambient.ztunnel()
    agent = ambient.ready()
    wait_state(agent, pod, "enrolled")
    ambient.wait_annotation(pod, "enabled")
    assert is_captured(pod)
    assert ambient.set_entries() == {pod.address: pod.uid}


def test_rules_that_went_meanwhile_are_made_again_and_said(ambient: AmbientScene) -> None:
    ztunnel = ambient.ztunnel()
    (pod,) = enrolled_pods(ambient, 1, ztunnel)
    pod.netns.shell("nft", "flush", "chain", "inet", "istio-ambient-nat", "istio-output")
    agent = ambient.ready()
    wait_until("its rules", lambda: is_captured(pod))
    wait_until("the metric", lambda: agent.metrics().get('istio_cni_ambient_drift_total{what="rules"}') == 1)
    wait_until("an Event", lambda: [one for one in ambient.events() if one["reason"] == "AmbientRedirectionHealed"])
    assert row_of(agent, pod)["lastMended"]


def test_snapshot_that_ztunnel_refuses_in_part_is_made_good(ambient: AmbientScene) -> None:
    first = ambient.ztunnel()
    pods = enrolled_pods(ambient, 2, first)
    first.terminate()
    agent = ambient.ready()
    second = ambient.ztunnel("--fault", f"nack:uid/{pods[0].uid}=AddrInUse", name="second")
    second.wait("its snapshot", lambda state: bool(state["snapshot"]))
    wait_state(agent, pods[1], "enrolled")
    wait_until("the reason", lambda: "AddrInUse" in row_of(agent, pods[0])["lastError"])
    assert row_of(agent, pods[0])["ztunnelAcked"] is False
    assert is_captured(pods[0]), "it stays captured, or its traffic would leave in the clear"
    assert ambient.annotation(pods[0]) == "enabled"
    second.order(do="set", faults=[])
    wait_state(agent, pods[0], "enrolled")


def test_excluded_namespace_lets_its_pods_go(ambient: AmbientScene) -> None:
    pod, *_ = enrolled_pods(ambient, 1, ambient.ztunnel())
    agent = ambient.ready(EXCLUDE_NAMESPACES="shop")
    wait_state(agent, pod, "")
    assert not is_captured(pod)
    assert ambient.annotation(pod) is None
    assert ambient.set_entries() == {}


def test_finished_pod_takes_no_address_from_its_successor(ambient: AmbientScene) -> None:
    """Its address was given to another pod before an agent could take it out."""
    ztunnel = ambient.ztunnel()
    (finished,) = enrolled_pods(ambient, 1, ztunnel)
    ambient.api.do(
        lambda server: server.patch("pods", "shop", finished.name, {"status": {"phase": "Succeeded"}}, "status")
    )
    ambient.procfs.end(2)
    successor = ambient.new_pod("successor")
    successor.address = finished.address
    successor.netns.ip(f"addr add {finished.address}/24 dev eth0")
    ambient.run_process(successor)
    ambient.report_address(successor)
    agent = ambient.ready()
    wait_state(agent, successor, "enrolled")
    wait_state(agent, finished, "")
    assert ambient.set_entries() == {successor.address: successor.uid}
    assert ztunnel.state()["workloads"].keys() == {successor.uid}


def test_pod_of_the_host_network_and_of_no_address_are_left_alone(ambient: AmbientScene) -> None:
    waiting = ambient.new_pod("waiting")
    host = ambient.new_pod("host", known=False)
    host.obj["spec"]["hostNetwork"] = True
    ambient.scene.add_pod(host.obj)
    ambient.report_address(host)
    ambient.run_process(host)
    agent = ambient.ready()
    ambient.connected()
    assert agent.status()["ambient"]["pods"] == []
    assert not is_captured(host)
    assert not is_captured(waiting)


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
    pods = enrolled_pods(ambient, 2, ztunnel)
    entries = {pod.address: pod.uid for pod in pods}
    with lists_refused(ambient, *LISTS):
        agent = ambient.start()
        wait_reason(agent, "not read yet")
        wait_until("the host's rules", lambda: agent.status()["ambient"]["hostRules"] == "in place")
        assert ambient.set_entries() == entries
    agent.wait_ready()
    assert ambient.set_entries() == entries


@pytest.mark.parametrize("to", ["nftables", "nft"])
def test_set_is_taken_over_when_the_backend_changes(ambient: AmbientScene, to: str) -> None:
    iptables = {"NATIVE_NFTABLES": "false", "FORCE_IPTABLES_BINARY": "nft"}
    ambient.ztunnel()
    first = ambient.ready(**({} if to == "nft" else iptables))
    pod = ambient.running_pod()
    wait_state(first, pod, "enrolled")
    kill(first)
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
    wait_until("the netns to be as before", lambda: everything_in(pod) == before)
    wait_until("ztunnel to let go", lambda: ztunnel.state()["workloads"] == {})


def test_iptables_need_no_kubelet(ambient: AmbientScene) -> None:
    ambient.ready(KUBELET_UID="", NATIVE_NFTABLES="false", FORCE_IPTABLES_BINARY="nft")
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
    wait_state_of(new, pod)


def wait_state_of(agent: Agent, pod: AmbientPod) -> None:
    """Wait until ztunnel has it and all else is in place."""
    wait_until(f"{pod.name} to be enrolled", lambda: row_of(agent, pod).get("state") == "enrolled")


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
