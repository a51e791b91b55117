"""The start of an agent in ambient mode: what is served from the first moment, what is adopted, when it is ready."""

from __future__ import annotations

from typing import Any

import pytest
from lab.ztunnel.client import Peer, Program
from tests.agent.ambientscene import (
    LISTS,
    AmbientScene,
    add,
    everything_in,
    is_captured,
    row_of,
    wait_reason,
    wait_state,
)
from tests.agent.scene import Agent, wait_until

from meshcni import istio

SOCKETS = (istio.AGENT_SOCKET_NAME, istio.EVENT_SOCKET_NAME, istio.LOG_SOCKET_NAME, istio.CONTROL_SOCKET_NAME)


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


@pytest.mark.parametrize("path", LISTS)
def test_nothing_is_said_to_ztunnel_before_both_lists_are_read(ambient: AmbientScene, path: str) -> None:
    enrolled = ambient.running_pod()
    ambient.annotate(enrolled, "enabled")
    with ambient.lists_refused(path):
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
    with ambient.lists_refused("/api/v1/pods"):
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
    pods = ambient.enrolled_pods(2, ztunnel)
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
    pods = ambient.enrolled_pods(3, ztunnel)
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
    (pod,) = ambient.enrolled_pods(1, ztunnel)
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
    first.kill()
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
    pod, stays = ambient.enrolled_pods(2, ztunnel)
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
    pod, stays = ambient.enrolled_pods(2, ztunnel)
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
    (pod,) = ambient.enrolled_pods(1, ztunnel)
    pod.netns.shell("nft", "flush", "chain", "inet", "istio-ambient-nat", "istio-output")
    agent = ambient.ready()
    wait_until("its rules", lambda: is_captured(pod))
    wait_until("the metric", lambda: agent.metrics().get('istio_cni_ambient_drift_total{what="rules"}') == 1)
    wait_until("an Event", lambda: [one for one in ambient.events() if one["reason"] == "AmbientRedirectionHealed"])
    assert row_of(agent, pod)["lastMended"]


def test_snapshot_that_ztunnel_refuses_in_part_is_made_good(ambient: AmbientScene) -> None:
    first = ambient.ztunnel()
    pods = ambient.enrolled_pods(2, first)
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
    pod, *_ = ambient.enrolled_pods(1, ambient.ztunnel())
    agent = ambient.ready(EXCLUDE_NAMESPACES="shop")
    wait_state(agent, pod, "")
    assert not is_captured(pod)
    assert ambient.annotation(pod) is None
    assert ambient.set_entries() == {}


def test_finished_pod_takes_no_address_from_its_successor(ambient: AmbientScene) -> None:
    """Its address was given to another pod before an agent could take it out."""
    ztunnel = ambient.ztunnel()
    (finished,) = ambient.enrolled_pods(1, ztunnel)
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
