"""What an agent in ambient mode tells of itself: metrics, readiness, status, log lines, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab.objects import unmeshed_pod
from lab.ztunnel.client import Peer, Program
from tests.agent.ambientscene import (
    AmbientScene,
    add,
    is_captured,
    lines_of,
    push,
    row_of,
    wait_metric,
    wait_state,
)
from tests.agent.scene import Agent, wait_until

from meshcni import istio

TYPES = {  # spec: upstream's own
    "ztunnel_connected": "gauge",
    "nodeagent_reconcile_events_total": "counter",
    "istio_cni_plugin_requests_total": "counter",
    "istio_cni_install_ready": "gauge",
    "istio_cni_installs_total": "counter",
}
ROW = {
    "pod", "uid", "state", "annotation", "netnsInode", "rules", "wantedRules", "ztunnelAcked", "addresses", "inSet",
    "source", "attempts", "lastError", "lastMended",
}  # fmt: skip
LINK = {"number", "pid", "since", "state", "version", "newest", "acked", "pending", "last_error"}


def events(agent: Agent) -> Mapping[str, float]:
    """The counts by type."""
    metrics = agent.metrics()
    types = ("add", "update", "delete")
    return {name: metrics.get(f'nodeagent_reconcile_events_total{{type="{name}"}}', 0) for name in types}


def wait_events(agent: Agent, **wanted: float) -> None:
    wait_until(f"events {wanted}", lambda: {name: events(agent)[name] for name in wanted} == wanted)


def state_count(agent: Agent, state: str) -> float:
    return agent.metrics()[f'istio_cni_ambient_pods{{state="{state}"}}']


@pytest.fixture
def agent(ambient: AmbientScene, ztunnel: Program) -> Agent:
    return ambient.serving(ztunnel)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_names_and_types_are_those_of_the_original(ambient: AmbientScene) -> None:
    agent = ambient.ready()
    _, text = agent.get("/metrics", istio.METRICS_PORT)
    for name, kind in TYPES.items():
        assert f"# TYPE {name} {kind}\n" in text


def test_connections_are_counted_from_their_first_moment(ambient: AmbientScene) -> None:
    """Before the hello too, as the original counts them."""
    agent = ambient.ready()
    assert agent.metrics()["ztunnel_connected"] == 0
    with Peer(ambient.scene.ztunnel_socket, hello=None):
        wait_metric(agent, "ztunnel_connected", 1)
        with Peer(ambient.scene.ztunnel_socket):
            wait_metric(agent, "ztunnel_connected", 2)
        wait_metric(agent, "ztunnel_connected", 1)
    wait_metric(agent, "ztunnel_connected", 0)


def test_events_are_counted_as_upstream_counts_them(ambient: AmbientScene, ztunnel: Program) -> None:
    """The start is two adds and, for the pod of the namespace, an update; a label is an update of each."""
    ambient.api.do(lambda server: server.add_namespace("shop"))
    pod = ambient.running_pod("one", labelled=False)
    agent = ambient.ready()
    wait_events(agent, add=2, update=1, delete=0)
    labels = {"metadata": {"labels": {istio.DATAPLANE_MODE: "ambient"}}}
    ambient.api.do(lambda server: server.patch("namespaces", "", "shop", labels))
    ambient.wait_annotation(pod, "enabled")
    patches = len(ambient.patches(pod))  # ours has the annotation say pending first, which is an update more
    wait_events(agent, add=2, update=1 + 2 + patches, delete=0)
    ambient.delete(pod)
    wait_events(agent, add=2, update=1 + 2 + patches, delete=1)


def test_events_of_a_pod_that_is_not_enrolled(ambient: AmbientScene, ztunnel: Program) -> None:
    ambient.api.do(lambda server: server.add_namespace("shop"))
    ambient.scene.add_pod(unmeshed_pod("shop", "no-address-yet"))
    agent = ambient.ready()
    wait_events(agent, add=2, update=1)
    labels = {"metadata": {"labels": {istio.DATAPLANE_MODE: "ambient"}}}
    ambient.api.do(lambda server: server.patch("namespaces", "", "shop", labels))
    wait_events(agent, add=2, update=3)


def test_states_steps_and_messages_of_a_pods_life(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    wait_state(agent, pod, "enrolled")
    metrics = agent.metrics()
    assert metrics['istio_cni_adds_total{reason="ambient-enabled",verdict="ambient"}'] == 1
    assert metrics['istio_cni_add_duration_seconds_count{phase="enroll",verdict="ambient"}'] == 1
    for step in ("rules", "ztunnel-add", "addresses"):
        assert metrics[f'istio_cni_ambient_steps_total{{result="ok",step="{step}"}}'] == 1
        assert metrics[f'istio_cni_ambient_step_duration_seconds_count{{step="{step}"}}'] == 1
    assert metrics['istio_cni_zds_messages_total{result="ack",type="add"}'] == 1
    assert metrics['istio_cni_zds_messages_total{result="ack",type="snapshot-sent"}'] == 1
    assert metrics["istio_cni_zds_ack_seconds_count"] == 2
    assert metrics["istio_cni_ambient_set_entries"] == 1
    assert metrics["istio_cni_ambient_not_desired"] == 0
    assert state_count(agent, "enrolled") == 1
    ambient.delete(pod)
    wait_state(agent, pod, "")
    metrics = agent.metrics()
    assert metrics['istio_cni_zds_messages_total{result="ack",type="del"}'] == 1
    assert metrics["istio_cni_ambient_set_entries"] == 0
    assert [state_count(agent, state) for state in ("enrolled", "pending", "leaving", "unknown")] == [0] * 4


def test_pods_that_wait_are_counted(ambient: AmbientScene) -> None:
    agent = ambient.ready()
    pod = ambient.running_pod()
    wait_state(agent, pod, "pending")
    wait_metric(agent, "istio_cni_ambient_not_desired", 1)
    assert state_count(agent, "pending") == 1
    wait_until("an error", lambda: "no ztunnel" in row_of(agent, pod)["lastError"])
    wait_until("an attempt to be counted", lambda: row_of(agent, pod)["attempts"] >= 1)
    ambient.ztunnel()
    wait_state(agent, pod, "enrolled")
    assert row_of(agent, pod)["lastError"] == ""
    assert row_of(agent, pod)["attempts"] == 0


def test_refusals_count_as_errors_by_class(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=no"])
    assert not add(agent, ambient.new_pod()).ok
    assert push(ambient.scene, ambient.new_pod("unknown", known=False)).status == 500
    metrics = agent.metrics()
    assert metrics['istio_cni_errors_total{error="ZtunnelError"}'] == 1
    assert metrics['istio_cni_errors_total{error="KubeError"}'] == 1
    assert metrics['istio_cni_zds_messages_total{result="nack",type="add"}'] == 1


# --- readiness --------------------------------------------------------------------------------------------------------


def test_readiness_does_not_wait_for_ztunnel(ambient: AmbientScene) -> None:
    """It may wait for us."""
    agent = ambient.ready()
    ztunnel = ambient.connected()
    ztunnel.terminate()
    wait_metric(agent, "ztunnel_connected", 0)
    assert agent.get(istio.READY_PATH) == (200, "")
    assert agent.status()["ambient"]["ztunnel"] == []


@pytest.mark.parametrize("resource", ["pods", "namespaces"])
def test_list_that_may_not_be_read_is_the_reason(ambient: AmbientScene, resource: str) -> None:
    ambient.api.do(lambda server: server.fault("status", prefix=f"/api/v1/{resource}", status=403, count=-1))
    agent = ambient.start()

    def reasons() -> list[str]:
        status, body = agent.get(istio.READY_PATH)
        return json.loads(body)["reasons"] if status == 503 else []

    def named() -> bool:
        return any(resource in reason and "403" in reason for reason in reasons())

    wait_until("the reason", named)
    assert agent.get(istio.LIVE_PATH)[0] == 200
    ambient.api.do(lambda server: server.clear_faults())
    agent.wait_ready()


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_document(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    row = wait_state(agent, pod, "enrolled")
    assert row.keys() == ROW
    assert (row["annotation"], row["netnsInode"], row["source"]) == ("enabled", pod.inode, "add")
    assert (row["addresses"], row["inSet"]) == ([pod.address], [pod.address])
    assert row["ztunnelAcked"] is True
    assert row["rules"] == row["wantedRules"] != ""
    ambient_part = agent.status()["ambient"]
    assert (ambient_part["hostRules"], ambient_part["setEntries"]) == ("in place", 1)
    (link,) = ambient_part["ztunnel"]
    assert link.keys() == LINK
    assert (link["pid"], link["version"], link["newest"], link["acked"]) == (ztunnel.process.pid, 1, True, 1)


def test_status_for_people(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    good, bad = ambient.new_pod("good"), ambient.new_pod("bad")
    assert add(agent, good).ok
    ztunnel.order(do="set", faults=["nack:add=Bind AddrInUse"])
    assert not add(agent, bad).ok
    done = ambient.scene.run("status", ambient=True)
    for part in ("ztunnel", "host rules", "shop/bad", "AddrInUse"):
        assert part in done.stdout, done.stdout


def test_last_refusal_of_a_pod_stays_to_be_seen(ambient: AmbientScene, agent: Agent, ztunnel: Program) -> None:
    ztunnel.order(do="set", faults=["nack:add=Bind AddrInUse"])
    pod = ambient.new_pod()
    assert not add(agent, pod).ok
    assert "AddrInUse" in row_of(agent, pod)["lastError"]


# --- log lines --------------------------------------------------------------------------------------------------------


def test_running_pod_has_one_line_when_it_enters_and_one_when_it_leaves(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.running_pod("checkout-5b8c7f6d9-x2x4z", "online-boutique")
    wait_state(agent, pod, "enrolled")
    ambient.wait_annotation(pod, "enabled")
    lines = lines_of(agent, "online-boutique/checkout")
    assert len(lines) == 1, lines
    line = lines[0]
    assert len(line) <= 400
    for part in ("enrolled", "source=informer", "rules_ms=", "ztunnel-add_ms="):
        assert part in line
    ambient.label(pod, mode=None)
    wait_state(agent, pod, "")
    line, left = lines_of(agent, "online-boutique/checkout")
    assert "left the mesh" in left
    assert len(left) <= 400


def test_restart_says_one_line_however_many_pods_there_are(ambient: AmbientScene, agent: Agent) -> None:
    pods = [ambient.running_pod(f"cart-{number}") for number in range(5)]
    for pod in pods:
        wait_state(agent, pod, "enrolled")
        ambient.wait_annotation(pod, "enabled")
    agent.kill()
    second = ambient.ready()
    for pod in pods:
        wait_state(second, pod, "enrolled")
    assert lines_of(second, "shop/cart") == []
    (line,) = lines_of(second, "adopted 5 enrolled pods")
    assert "5 with their netns" in line


def test_trouble_of_a_pod_is_said_once_not_with_every_try(ambient: AmbientScene) -> None:
    agent = ambient.ready()
    pod = ambient.running_pod()
    wait_until("five tries", lambda: row_of(agent, pod).get("attempts", 0) >= 5)
    assert len(lines_of(agent, "\twarn\t", "shop/cart")) == 1
    assert len([one for one in ambient.events() if one["involvedObject"]["name"] == "cart"]) == 1


# --- costs ------------------------------------------------------------------------------------------------------------


def test_node_full_of_ambient_pods(ambient: AmbientScene, agent: Agent) -> None:
    """A descriptor a pod, no thread that stays; the memory is printed."""
    pods = ambient.many_pods(250)
    wait_until("the informer", lambda: agent.status()["watches"][0]["objects"] == 250)
    descriptors, threads, memory = agent.descriptors(), agent.threads(), agent.rss_mib()
    with ThreadPoolExecutor(25) as pool:
        assert all(reply.ok for reply in pool.map(lambda pod: add(agent, pod), pods))
    wait_until("annotations", lambda: all(row["annotation"] == "enabled" for row in agent.status()["ambient"]["pods"]))
    assert len(agent.status()["ambient"]["pods"]) == 250
    assert all(is_captured(pod) for pod in pods[::25])
    after = agent.rss_mib()
    wait_until("descriptors", lambda: agent.descriptors() <= descriptors + 250 + 20)
    wait_until("threads", lambda: agent.threads() <= threads + 8)
    print(f"250 ambient pods: RSS {memory:.1f} -> {after:.1f} MiB, {agent.threads()} threads")
    with ThreadPoolExecutor(25) as pool:
        list(pool.map(ambient.delete, pods))
    wait_until("the agent to forget them", lambda: agent.status()["ambient"]["pods"] == [])
    assert ambient.set_entries() == {}
    wait_until("descriptors", lambda: agent.descriptors() <= descriptors + 20)
    print(f"and gone: RSS {agent.rss_mib():.1f} MiB")
