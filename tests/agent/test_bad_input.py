"""What is wrong with cluster, node or neighbours: in the log, at the agent's own pod and in `install-cni status`."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from lab.objects import sidecar_pod, unmeshed_pod
from tests.agent.scene import Agent, Scene, wait_until

from meshcni import istio
from meshcni.agent import ownpod, prerequisites, rights
from meshcni.agent.needs import Weight
from meshcni.agent.rights import Right
from meshcni.pods.repair import Mode

OWN = "istio-cni-node-abcde"
ROLES: dict[str, tuple[dict[str, str], bool, tuple[Right, ...]]] = {
    "sidecar": ({"REPAIR_ENABLED": "false"}, False, rights.wanted(ambient=False)),
    "ambient": ({}, True, rights.AMBIENT_RIGHTS),
    "delete": (
        {"REPAIR_ENABLED": "true", "REPAIR_REPAIR_PODS": "false", "REPAIR_DELETE_PODS": "true"},
        False,
        (rights.REPAIR_RIGHTS[Mode.DELETE],),
    ),
    "label": (
        {"REPAIR_ENABLED": "true", "REPAIR_REPAIR_PODS": "false", "REPAIR_LABEL_PODS": "true"},
        False,
        (rights.REPAIR_RIGHTS[Mode.LABEL],),
    ),
}
EACH = [(role, right) for role, (_settings, _ambient, table) in ROLES.items() for right in table]


def events(scene: Scene, reason: str) -> list[dict[str, Any]]:
    """The Events of that reason at the agent's own pod."""
    found = scene.api.do(lambda server: list(server.cluster.objects("events")))
    return [one for one in found if one["reason"] == reason and one["involvedObject"]["name"] == OWN]


@pytest.fixture
def own(scene: Scene) -> dict[str, Any]:
    """The agent's own pod, as the API server has it."""
    return scene.add_pod(unmeshed_pod("istio-system", OWN))


def printed_status(scene: Scene) -> str:
    return scene.run("status").stdout


@pytest.mark.parametrize(("role", "right"), EACH, ids=[f"{role}-{right}" for role, right in EACH])
def test_each_right_removed_in_turn(scene: Scene, own: dict[str, Any], role: str, right: Right) -> None:
    settings, ambient, _table = ROLES[role]
    scene.api.do(lambda server: server.denied.deny(str(right)))
    before = scene.conf.read_text()
    agent = scene.start(ambient=ambient, **settings)
    wait_until("what is missing", lambda: right.without in agent.log)
    wait_until("the status", lambda: right.without in printed_status(scene))
    shown = agent.status()["missing"]
    assert right.as_object() in shown["rights"]
    assert right.chart in (printed_status(scene) if right.weight is Weight.HELPS else agent.log)
    if right.weight is Weight.STOPS:
        assert scene.conf.read_text() == before
        assert right.chart in agent.get(istio.READY_PATH)[1]
    else:
        wait_until("the conf", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
        assert right.target not in agent.get(istio.READY_PATH)[1]
    if right.weight is Weight.HELPS or right.target == "events" or str(right) in ("list pods", "watch pods"):
        return  # nobody to tell, nothing to tell, or told later, because our own pod's UID is not known
    (event,) = wait_until("an Event", lambda: events(scene, prerequisites.EVENT_REASON))
    assert str(right) in event["message"]
    assert event["involvedObject"]["uid"] == own["metadata"]["uid"]


def test_a_fight_over_the_conf(scene: Scene, own: dict[str, Any]) -> None:
    """Cilium, when it is exclusive, takes our entry out again and again."""
    agent = scene.start()
    agent.wait_ready()
    theirs = json.dumps({"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "cilium-cni"}]})
    beside = scene.directory / "theirs"

    def fought() -> bool:
        if istio.PLUGIN_NAME in scene.conf.read_text():
            beside.write_text(theirs)
            os.replace(beside, scene.conf)
        return bool(events(scene, ownpod.CONTESTED))

    wait_until("an Event of the fight", fought)
    (event,) = events(scene, ownpod.CONTESTED)
    for text in (event["message"], agent.log, printed_status(scene)):
        assert str(scene.conf) in text
        assert "cni.exclusive=false" in text
    assert agent.metrics()["istio_cni_conf_drift_total"] >= 1
    wait_until("our entry is back", lambda: istio.PLUGIN_NAME in scene.conf.read_text())


def test_the_runtime_reads_another_directory(scene: Scene, own: dict[str, Any]) -> None:
    scene.conf.unlink()
    pod = unmeshed_pod("shop", "plain")
    pod["status"] = {"phase": "Running", "podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.9"}]}
    scene.add_pod(pod)
    agent = scene.start(INSTALL_RESYNC_SECONDS="1")
    wait_until("the note", lambda: "1 pods of this node have a network" in agent.log)
    assert "global.platform=k3s" in printed_status(scene)
    assert list(scene.conf_dir.iterdir()) == []


def test_a_sidecar_pod_of_a_sandboxed_runtime(scene: Scene) -> None:
    """Its traffic would pass by the rules: it must not start and look captured."""
    pod = sidecar_pod("shop", "cart")
    pod["spec"]["runtimeClassName"] = "gvisor"
    stored = scene.add_pod(pod)
    agent = scene.start()
    agent.wait_watching()
    netns = scene.pod_netns("10.0.0.2/24")
    reply = agent.add(stored, netns, ips=("10.0.0.2/24",))
    assert not reply.ok
    assert "runtime class gvisor" in reply.message
    assert "AMBIENT_SANDBOXED_RUNTIMES" in reply.details
    found = wait_until("an Event", lambda: scene.api.do(lambda server: list(server.cluster.objects("events"))))
    assert [one["involvedObject"]["name"] for one in found] == ["cart"]
    agent.stop()
    agent = scene.start(AMBIENT_SANDBOXED_RUNTIMES="none")
    agent.wait_watching()
    assert agent.add(stored, netns, ips=("10.0.0.2/24",)).ok


NO_IPV6 = 'mount --make-rprivate / && mount -t tmpfs none /proc/sys/net && exec "$@"'


def test_a_kernel_without_ipv6_goes_on_with_ipv4(scene: Scene) -> None:
    """P22: ipv6.disable=1 leaves no /proc/sys/net/ipv6, and whoever asks for IPv6 rules then gets an error."""
    scene.program = ("unshare", "--mount", "sh", "-c", NO_IPV6, "sh", *scene.program)
    agent = scene.start(ambient=True)
    wait_until("the note", lambda: "the kernel has no IPv6" in agent.log)
    assert "the kernel has no IPv6" in printed(agent)
    assert "\terror\t" not in agent.log


def printed(agent: Agent) -> str:
    end = time.monotonic() + 10
    while not (found := agent.status().get("kernel")) and time.monotonic() < end:
        time.sleep(0.05)
    return " ".join(found or ())
