"""What a stop leaves on the node, seen from outside."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from typing import Any

import pytest
from lab.objects import daemonset_object, unmeshed_pod
from tests.agent.contract import BRIDGE, SINGLE, Node
from tests.agent.scene import NODE, Agent, wait_until

from meshcni import istio

ALWAYS = {"DISABLE_SAFE_UPGRADE": "true"}
PURGE = {**ALWAYS, "UNINSTALL_REMOVES_BINARY": "true"}
OWNED = "02-istio-cni.conflist"


def with_daemonset(node: Node, **metadata: Any) -> None:
    daemonset = daemonset_object("istio-system")
    daemonset["metadata"] |= metadata
    worker = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {"kubernetes.io/os": "linux"}}}
    node.scene.api.do(lambda server: (server.add("daemonsets", daemonset), server.add("nodes", worker)))


def stop(agent: Agent, number: signal.Signals = signal.SIGTERM) -> None:
    assert agent.stop(number) == 0, agent.log


def cleaned(node: Node, before: Mapping[str, str]) -> None:
    """Conf as before we came, no kubeconfig, no temporary file, sockets aside nothing of ours but the pass-through."""
    assert {name: node.text(name) for name in node.listing()} == before
    assert not node.kubeconfig.exists()
    assert node.leftovers() == []


# --- kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ambient", ["false", "true"])
def test_everything_stays_while_the_daemonset_is_there(node: Node, number: signal.Signals, ambient: str) -> None:
    node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    agent = node.ready(AMBIENT_ENABLED=ambient)
    before = node.snapshot()
    stop(agent, number)
    assert f"Exit signal received: {number.name}" in agent.log
    assert node.snapshot() == before
    assert node.types("10-a.conflist") == ["bridge", "istio-cni"]


def test_everything_stays_when_the_api_server_cannot_be_reached(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready()
    before = node.snapshot()
    node.scene.api.crash()
    stop(agent)
    assert node.snapshot() == before


def test_second_signal_ends_it_at_once_and_everything_stays(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready()
    before = node.snapshot()
    node.scene.api.do(lambda server: server.fault("hang", count=-1, prefix="/apis/apps/v1"))
    agent.process.send_signal(signal.SIGTERM)
    wait_until("the first signal", lambda: "Exit signal received: SIGTERM" in agent.log)
    assert agent.stop() != 0
    assert node.snapshot() == before


def test_an_upgrade_takes_over_without_a_change(node: Node) -> None:
    """The next agent of the same settings finds everything in place: not one file is written again."""
    path = node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    stop(node.ready())
    inodes = [(one.stat().st_ino, one.stat().st_mtime_ns) for one in (path, node.plugin, node.kubeconfig)]
    node.ready()
    assert [(one.stat().st_ino, one.stat().st_mtime_ns) for one in (path, node.plugin, node.kubeconfig)] == inodes


# --- cleaned up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambient", ["false", "true"])
@pytest.mark.parametrize("deleted", [False, True], ids=["no DaemonSet", "DaemonSet being deleted"])
def test_uninstall_cleans_up_the_conf_first(node: Node, deleted: bool, ambient: str) -> None:
    path = node.write("10-a.conflist", BRIDGE, 0o640)
    if deleted:
        with_daemonset(node, deletionTimestamp="2026-01-01T00:00:00Z", finalizers=["a/b"])
    agent = node.ready(AMBIENT_ENABLED=ambient)
    stop(agent)
    cleaned(node, {"10-a.conflist": BRIDGE})
    assert node.mode("10-a.conflist") == 0o640
    assert node.plugin.exists(), "it stays to let pods pass"
    marker = node.run / istio.UNINSTALLED_MARKER_NAME
    assert path.stat().st_ctime_ns < marker.stat().st_ctime_ns
    assert agent.log.index(f"wrote {path}") < agent.log.index(f"removed {node.kubeconfig}")


def test_switch_cleans_up_without_asking(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    agent = node.ready(**ALWAYS)
    stop(agent)
    cleaned(node, {"10-a.conflist": BRIDGE})


def test_ambient_switch_cleans_up_in_ambient_mode_only(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    stop(node.ready(AMBIENT_DISABLE_SAFE_UPGRADE="true"))
    assert node.types("10-a.conflist") == ["bridge", "istio-cni"]
    stop(node.ready(AMBIENT_DISABLE_SAFE_UPGRADE="true", AMBIENT_ENABLED="true"))
    cleaned(node, {"10-a.conflist": BRIDGE})


def test_as_the_original_the_binary_is_gone_and_other_files_stay(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    (node.source / "other").write_text("two")
    (node.bin / "bridge").write_text("of another plugin")
    agent = node.ready(**PURGE)
    stop(agent)
    cleaned(node, {"10-a.conflist": BRIDGE})
    assert sorted(path.name for path in node.bin.iterdir()) == ["bridge", "other"]
    assert not (node.run / istio.UNINSTALLED_MARKER_NAME).exists()


@pytest.mark.parametrize(
    ("before", "settings"),
    [
        ({"10-a.conf": SINGLE}, {}),
        ({"10-a.json": SINGLE}, {}),
        ({"10-a.conflist": BRIDGE}, {"CHAINED_CNI_PLUGIN": "false"}),
        ({"10-a.conflist": BRIDGE}, {"CHAINED_CNI_PLUGIN": "false", "ISTIO_OWNED_CNI_CONFIG": "true"}),
        ({"10-a.conflist": BRIDGE}, {"ISTIO_OWNED_CNI_CONFIG": "true"}),
        ({"10-a.conflist": BRIDGE}, {"ISTIO_OWNED_CNI_CONFIG": "true", "AMBIENT_ENABLED": "true"}),
        ({"10-a.conf": SINGLE}, {"ISTIO_OWNED_CNI_CONFIG": "true"}),
        ({"undetectable.file": BRIDGE}, {"CNI_CONF_NAME": "undetectable.file"}),
    ],
)
def test_the_directory_is_as_before(node: Node, before: dict[str, str], settings: dict[str, str]) -> None:
    """W-03 among them: whatever the combination of switches, the primary's file is never removed."""
    for name, text in before.items():
        node.write(name, text, 0o604)
    stop(node.ready(**PURGE, **settings))
    cleaned(node, before)
    assert {node.mode(name) for name in before} == {0o604}


def test_with_the_original_conversion_the_list_stays_as_with_the_original(node: Node) -> None:
    node.write("10-a.conf", '{"cniVersion": "0.4.0", "name": "mynet", "type": "bridge"}')
    stop(node.ready(CNI_CONF_ORIGINAL_CONVERSION="true", **PURGE))
    assert node.listing() == ["10-a.conflist"]
    assert node.text("10-a.conflist") == (
        '{\n  "cniVersion": "0.3.1",\n  "name": "k8s-pod-network",\n  "plugins": [\n'
        '    {\n      "name": "mynet",\n      "type": "bridge"\n    }\n  ]\n}\n'
    )


def test_every_entry_of_ours_goes(node: Node) -> None:
    path = node.write("10-a.conflist", BRIDGE)
    agent = node.ready(**PURGE, INSTALL_RESYNC_SECONDS="86400")
    agent.process.send_signal(signal.SIGSTOP)
    document = json.loads(path.read_text())
    document["plugins"].insert(0, document["plugins"][-1])
    path.write_text(json.dumps(document))
    agent.process.send_signal(signal.SIGTERM)
    agent.process.send_signal(signal.SIGCONT)
    assert agent.process.wait(30) == 0, agent.log
    assert node.types("10-a.conflist") == ["bridge"]


def test_a_primary_that_broke_stays_as_it_is(node: Node) -> None:
    path = node.write("10-a.conflist", BRIDGE)
    agent = node.ready(**PURGE)
    path.write_text("{ broken")
    wait_until("not ready", lambda: agent.get(istio.READY_PATH)[0] == 503)
    stop(agent)
    cleaned(node, {"10-a.conflist": "{ broken"})


@pytest.mark.parametrize("settings", [{}, {"CHAINED_CNI_PLUGIN": "false"}, {"ISTIO_OWNED_CNI_CONFIG": "true"}])
def test_stop_before_anything_was_installed(node: Node, settings: dict[str, str]) -> None:
    (node.source / istio.PLUGIN_NAME).unlink()
    agent = node.start(**PURGE, **settings)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    stop(agent)
    cleaned(node, {})
    assert OWNED not in node.listing()


# --- what the API server's refusals mean (W-05) -----------------------------------------------------------------------

DAEMONSETS, EVERYTHING = "/apis/apps/v1", "/"
KEPT, CLEANED = ["bridge", "istio-cni"], ["bridge"]


def agent_pod(name: str, *, terminating: bool, revision: str = "1") -> dict[str, Any]:
    """A pod of the DaemonSet as the API shows it; the name of the agent's own is that of the scene."""
    pod = unmeshed_pod("istio-system", name, labels={"k8s-app": "istio-cni-node", "controller-revision-hash": revision})
    if terminating:
        pod["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["a/b"]}
    return pod


OWN = "istio-cni-node-abcde"


@pytest.mark.parametrize(
    ("status", "prefix", "pods", "settings", "types"),
    [
        (500, DAEMONSETS, {}, {}, KEPT),
        (503, EVERYTHING, {}, {"AMBIENT_ENABLED": "true"}, KEPT),
        (401, EVERYTHING, {}, {}, CLEANED),
        (401, EVERYTHING, {}, {"AMBIENT_ENABLED": "true"}, CLEANED),
        (403, EVERYTHING, {}, {}, CLEANED),
        (403, DAEMONSETS, {OWN: True}, {}, CLEANED),
        (403, DAEMONSETS, {OWN: True}, {"AMBIENT_ENABLED": "true"}, KEPT),
        (403, DAEMONSETS, {OWN: False}, {}, KEPT),
        (403, DAEMONSETS, {OWN: True, "istio-cni-node-other": False}, {}, KEPT),
        (403, DAEMONSETS, {OWN: True, "istio-cni-node-other": True}, {}, CLEANED),
    ],
)
def test_refusals(
    node: Node, status: int, prefix: str, pods: dict[str, bool], settings: dict[str, str], types: list[str]
) -> None:
    node.write("10-a.conflist", BRIDGE)
    for name, terminating in pods.items():
        pod = agent_pod(name, terminating=terminating)
        node.scene.api.do(lambda server, pod=pod: server.add_pod(pod))
    agent = node.ready(**settings)
    node.scene.api.do(lambda server: server.fault("status", status=status, count=-1, prefix=prefix))
    stop(agent)
    assert node.types("10-a.conflist") == types, agent.log


@pytest.mark.parametrize("kind", ["hang", "drop", "garbage"])
def test_no_answer_keeps(node: Node, kind: str) -> None:
    node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    agent = node.ready(SHUTDOWN_GRACE_SECONDS="5")
    node.scene.api.do(lambda server: server.fault(kind, count=-1))
    stop(agent)
    assert node.types("10-a.conflist") == KEPT, agent.log


def test_a_short_refusal_is_not_believed(node: Node) -> None:
    """An API server that has just restarted answers 403 to everybody for about a second."""
    node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    agent = node.ready()
    node.scene.api.do(lambda server: server.fault("status", status=403, count=3))
    stop(agent)
    assert node.types("10-a.conflist") == KEPT, agent.log


def test_node_that_the_daemonset_leaves(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    with_daemonset(node)
    agent = node.ready()
    terms = [{"matchExpressions": [{"key": "kubernetes.io/os", "operator": "In", "values": ["windows"]}]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    patch = {"spec": {"template": {"spec": {"affinity": affinity}}}}
    node.scene.api.do(lambda server: server.patch("daemonsets", "istio-system", istio.DAEMONSET_NAME, patch))
    stop(agent)
    assert node.types("10-a.conflist") == CLEANED
