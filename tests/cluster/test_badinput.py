"""Values that cannot work, directories of another platform, and a second agent that fights for the conf."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from lab.cluster import Cluster, workloads
from lab.cluster.hostpods import add_volume, host_volumes, python_container
from tests.cluster.releases import CONF, NAME, NAMESPACE, PLUGIN, Release, entry, release_on

from meshcni.errors import MeshCniError

NODE = "n1"
ONLY_NODE = "nodeSelector.kubernetes\\.io/hostname=n1"
FIGHTER = "fighter"
FIGHT = f"""
import os, time
text = open("/confs/{CONF.rpartition("/")[2]}.plain").read()
while True:
    with open("/confs/.partial", "w") as file:
        file.write(text)
    os.rename("/confs/.partial", "/confs/{CONF.rpartition("/")[2]}")
    time.sleep(1)
"""


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


# --- Helm refuses -----------------------------------------------------------------------------------------------------

REFUSED = {
    "ambient.enable=true": "additional properties 'enable' not allowed",
    "ambient.enabled=perhaps": "got string, want null or boolean",
    "excludeNamespaces=closed": "got string, want null or array",
    "repair.deletePods=true": "repair.repairPods and repair.deletePods are true, but the agent does one of them",
    "platform=k4s": 'unknown platform "k4s"; there are: gke, k3d, k3s, microk8s, minikube, openshift',
    "defaults.ambient.enabled=true": "Drop the prefix",
    "sidecarReconcile=always": "value must be one of 'heal', 'report', 'off'",
}


def test_helm_refuses(cluster: Cluster, release: Release) -> None:
    """Each with what is wrong with which value; nothing gets to the cluster."""
    for setting, message in REFUSED.items():
        told = release.install(setting, wait=False, check=False)
        assert message in told, told
    assert "which image?" in release.install("image=", wait=False, check=False)
    assert NAME not in cluster.helm("list", "--namespace", NAMESPACE, "--short").split()
    assert not cluster.pods(NAMESPACE)


# --- directories of another platform ----------------------------------------------------------------------------------


def test_directories_of_another_platform(cluster: Cluster, release: Release) -> None:
    """A value that does not fit the node: the agent says so with the value that would, and pods start all the same."""
    shop, node = release.add_namespace("shop"), cluster.nodes[NODE]
    cluster.apply(workloads.plain_pod(shop, "running", node=NODE))
    cluster.wait_ready(shop)
    fake = node.path("/var/lib/rancher/k3s/agent/etc/cni/net.d")
    fake.mkdir(parents=True)
    try:
        shutil.copy2(node.path(CONF), fake / "10-flannel.conflist")
        release.install("cniConfDir=/etc/elsewhere", ONLY_NODE, wait=False)
        told = wait_for_trouble(release, "there is no usable conf in /host/etc/cni/net.d")
        assert "global.platform=k3s" in told, told
        assert "cniConfDir=/etc/cni/net.d, its default" in told, told
        assert not release.status(NODE)["ready"]
        start_plain(cluster, shop, "plain-1")
    finally:
        shutil.rmtree(node.path("/var/lib/rancher"))
    release.install("cniBinDir=/opt/elsewhere", ONLY_NODE, wait=False)
    told = wait_for_trouble(release, "names bridge, portmap, not found in /host/opt/cni/bin")
    assert "cniBinDir=/opt/cni/bin, its default" in told, told
    assert told in release.log(NODE)
    assert wait_for_trouble(release, "so the conf is not touched")
    assert entry(node) is None
    node.path(PLUGIN).unlink()  # of the agent before
    start_plain(cluster, shop, "plain-2")
    release.install(ONLY_NODE, wait=False)  # the remedy, which the runtime must let start
    cluster.wait("our entry is in the conf", lambda: entry(node))
    release.wait_serving(NODE)
    start_plain(cluster, shop, "plain-3")


def wait_for_trouble(release: Release, words: str) -> str:
    """The sentence of the status with these words, as soon as there is one."""

    def trouble() -> str:
        try:
            install = release.status(NODE)["install"]
        except MeshCniError:  # not there yet
            return ""
        return next((text for text in (*install["reasons"], *install["notes"]) if words in text), "")

    release.cluster.wait(f"the agent says {words!r}", trouble)
    return trouble()


def start_plain(cluster: Cluster, namespace: str, name: str) -> None:
    cluster.apply(workloads.plain_pod(namespace, name, node=NODE))
    cluster.wait_pod(namespace, name)
    assert cluster.capture(cluster.pod(namespace, name)).is_untouched


# --- a second agent ---------------------------------------------------------------------------------------------------


def test_fight_for_the_conf(cluster: Cluster, release: Release) -> None:
    """Another DaemonSet puts the conf back every second: Event, metric and status say so, until it ends."""
    shop, node = release.add_namespace("shop"), cluster.nodes[NODE]
    shutil.copy2(node.path(CONF), node.path(f"{CONF}.plain"))
    release.install(ONLY_NODE, wait=False)
    release.wait_serving(NODE)
    cluster.apply(fighter())
    agent = release.agents()[NODE]["metadata"]["name"]
    cluster.wait("the agent has put it back", lambda: release.status(NODE)["install"]["conf_fights"] >= 3)
    cluster.wait("an Event tells of it", lambda: "CNIConfigContested" in reasons(cluster, agent))
    assert CONF.rpartition("/")[2] in release.status(NODE)["install"]["contested"]
    assert metric(cluster, agent, "istio_cni_conf_drift_total") >= 3
    cluster.api.delete(f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{FIGHTER}")
    cluster.wait("it has ended", lambda: len(cluster.pods(NAMESPACE)) == 1)
    cluster.wait("the entry is there", lambda: entry(node) is not None)
    cluster.apply(workloads.sidecar_pod(shop, "new", node=NODE))
    assert cluster.capture(cluster.wait_pod(shop, "new")).both
    assert entry(node) is not None
    assert release.agents()[NODE]["metadata"]["name"] == agent
    assert release.agents()[NODE]["status"]["containerStatuses"][0]["restartCount"] == 0


def fighter() -> dict[str, Any]:
    pod = workloads.plain_pod(NAMESPACE, FIGHTER, node=NODE, host_network=True, readiness=False, grace_seconds=0)
    pod["spec"]["containers"] = [python_container(FIGHTER, ["/usr/bin/python3", "-c", FIGHT])]
    pod["spec"]["volumes"] = host_volumes()
    add_volume(pod, "confs", CONF.rpartition("/")[0], "/confs", "Directory", read_only=False)
    return workloads.daemon_set(pod)


def reasons(cluster: Cluster, about: str) -> set[str]:
    return {event["reason"] for event in cluster.events(NAMESPACE, about)}


def metric(cluster: Cluster, agent: str, name: str) -> float:
    """The sum of a metric, scraped at the agent's pod."""
    text = cluster.api.text(f"/api/v1/namespaces/{NAMESPACE}/pods/{agent}:15014/proxy/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))
