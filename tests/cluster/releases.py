"""A release of the chart by real Helm, from its installation to nodes that hold no trace of it."""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.cluster import Cluster, KubeNode, workloads
from lab.cluster.agent import cluster_image
from lab.cluster.nodeconfig import BIN_DIR, CONF_DIR, CONF_NAME
from lab.imagelayout import Image

from meshcni import istio
from meshcni.errors import MeshCniError

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "istio-cni"
NAMESPACE, NAME = "istio-system", "istio-cni"
AGENTS = "k8s-app=istio-cni-node"
DAEMONSET = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{istio.DAEMONSET_NAME}"
RUN_DIR, ZTUNNEL_DIR = "/run/istio-cni", "/run/ztunnel"
ROLES = ("istio-cni", "istio-cni-repair-role", "istio-cni-ambient")
CONF = f"{CONF_DIR}/{CONF_NAME}"
PLUGIN = f"{BIN_DIR}/{istio.PLUGIN_NAME}"


_numbers = itertools.count(1)


def release_on(cluster: Cluster) -> Iterator[Release]:
    """For a fixture: nothing is installed yet, and at the end nothing is left."""
    release = Release(cluster)
    try:
        yield release
    finally:
        release.remove()


class Release:
    """The agent on a cluster; `remove` takes it away, whatever installed it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespaces: list[str] = []
        image = cluster_image()
        self.tagged = image.name
        self.by_digest = f"{image.name.rpartition(':')[0]}@{image.descriptor['digest']}"
        self._import(image)

    def _import(self, image: Image) -> None:
        """Have the image in every node, by its tag and, as a pull would leave it, by its digest."""
        for node in self.cluster.nodes.values():
            names = node.run([*CTR, "images", "ls", "-q"]).split()
            if self.by_digest not in names:
                node.import_archive(self._archive(image))
                node.run([*CTR, "images", "tag", "--force", self.tagged, self.by_digest])

    def _archive(self, image: Image) -> Path:
        archive = self.cluster.control.folder / f"image-{image.descriptor['digest'][-12:]}.tar"
        return archive if archive.exists() else image.write_archive(archive)

    # --- Helm ---------------------------------------------------------------------------------------------------------

    def install(self, *settings: str, image: str = "", wait: bool = True, check: bool = True) -> str:
        """`helm upgrade --install` with `--set` of each of the settings; returns what Helm prints."""
        sets = [f"image={image or self.tagged}", "global.imagePullPolicy=Never", *settings]
        output = self.cluster.helm(
            *("upgrade", "--install", NAME, str(CHART), "--namespace", NAMESPACE, "--create-namespace"),
            *(part for setting in sets for part in ("--set", setting)),
            check=check,
        )
        if wait:
            self.wait_rollout()
        return output

    def uninstall(self) -> None:
        """`helm uninstall`, and wait until no agent is left."""
        self.cluster.helm("uninstall", NAME, "--namespace", NAMESPACE)
        self.cluster.wait("the agents are gone", lambda: not self.cluster.pods(NAMESPACE, AGENTS))

    def remove(self) -> None:
        """Take away pods, release, manifests and what stays on the nodes: the next test finds no mesh."""
        for name in self.namespaces:
            self.cluster.api.delete(f"/api/v1/namespaces/{name}/pods", grace_seconds=0)
            self.cluster.api.delete(f"/api/v1/namespaces/{name}")
        left = set(self.namespaces)
        self.cluster.wait("pods are gone", lambda: not left & {namespace_of(pod) for pod in self.cluster.pods()})
        # first, so that the agents see why they end; without rights they would wait
        self.cluster.api.delete(f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets")
        self.cluster.wait("the agents are gone", lambda: not self.cluster.pods(NAMESPACE))
        if NAME in self.cluster.helm("list", "--namespace", NAMESPACE, "--short").split():
            self.cluster.helm("uninstall", NAME, "--namespace", NAMESPACE)
        for role in ROLES:
            for kind in ("clusterroles", "clusterrolebindings"):
                self.cluster.api.delete(f"/apis/rbac.authorization.k8s.io/v1/{kind}/{role}")
        for kind, name in (("serviceaccounts", "istio-cni"), ("configmaps", "istio-cni-config")):
            self.cluster.api.delete(f"/api/v1/namespaces/{NAMESPACE}/{kind}/{name}")
        for node in self.cluster.nodes.values():
            clean(node)

    def add_namespace(self, name: str, *, ambient: bool = False) -> str:
        """Make a namespace whose name begins with `name` and is nobody else's; returns the name."""
        made = f"{name}-{next(_numbers)}"
        self.namespaces.append(made)
        self.cluster.apply(workloads.namespace(made, ambient=ambient))
        self.cluster.wait_service_account(made)
        return made

    # --- what runs ----------------------------------------------------------------------------------------------------

    def wait_rollout(self, timeout_seconds: float = 90) -> None:
        """Return as soon as all agents' pods are of the newest revision and ready."""
        self.cluster.wait_rollout(DAEMONSET, AGENTS, timeout_seconds)

    def agents(self) -> dict[str, dict[str, Any]]:
        """The agents' pods that stay, by the name of their node."""
        pods = self.cluster.pods(NAMESPACE, AGENTS)
        staying = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and "nodeName" in pod["spec"]]
        return {pod["spec"]["nodeName"]: pod for pod in staying}

    def status(self, node: str) -> dict[str, Any]:
        """The document of `install-cni status` of a node."""
        return self.cluster.nodes[node].agent_status()

    def wait_serving(self, node: str) -> None:
        """Return when the agent of a node says that it is ready; it may not even have begun."""

        def is_ready() -> bool:
            try:
                return bool(self.status(node)["ready"])
            except MeshCniError:  # no agent answers
                return False

        self.cluster.wait(f"the agent of {node} is ready", is_ready)

    def log(self, node: str) -> str:
        """The agent's log of a node."""
        return self.cluster.log(NAMESPACE, self.agents()[node]["metadata"]["name"])


HOST_RULES = """
for command in iptables-nft ip6tables-nft; do
    $command -w -t nat -D POSTROUTING -j ISTIO_POSTRT
    $command -w -t nat -F ISTIO_POSTRT
    $command -w -t nat -X ISTIO_POSTRT
done
ipset destroy istio-inpod-probes-v4
ipset destroy istio-inpod-probes-v6
nft delete table inet istio-ambient-nat
true
"""
CTR = ("ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io")


def clean(node: KubeNode) -> None:
    """Remove what an agent, ours or the original, leaves on a node; its conflist is as from the factory."""
    for folder in (RUN_DIR, ZTUNNEL_DIR):
        shutil.rmtree(node.path(folder), ignore_errors=True)
    node.path(PLUGIN).unlink(missing_ok=True)
    node.run(["sh", "-c", f"exec 2>/dev/null {HOST_RULES}"])
    node.write_conflist()
    for found in node.path(CONF_DIR).iterdir():
        if found.name != CONF_NAME:
            found.unlink()


def entry(node: KubeNode, path: str = CONF) -> dict[str, Any] | None:
    """The mesh's entry in a conflist of a node; None when it has none."""
    plugins = json.loads(node.path(path).read_text())["plugins"]
    return next((plugin for plugin in plugins if plugin["type"] == istio.PLUGIN_NAME), None)


def moment(text: str) -> datetime.datetime:
    """The moment that a timestamp of the API or of a log line names."""
    return datetime.datetime.fromisoformat(text)


def ready_since(pod: Mapping[str, Any]) -> datetime.datetime:
    """When a pod became ready, to the second."""
    found = next(each for each in pod["status"]["conditions"] if each["type"] == "Ready")
    return moment(found["lastTransitionTime"])


def status_written(obj: Mapping[str, Any]) -> datetime.datetime:
    """When a controller last wrote the object's status, to the second."""
    fields = obj["metadata"]["managedFields"]
    return max(moment(each["time"]) for each in fields if each.get("subresource") == "status")


def namespace_of(pod: Mapping[str, Any]) -> str:
    """The namespace of a pod."""
    return str(pod["metadata"]["namespace"])


def is_enrolled(pod: Mapping[str, Any]) -> bool:
    """Whether the API says that the ambient agent has captured the pod."""
    return bool(pod["metadata"].get("annotations", {}).get(istio.AMBIENT_REDIRECTION) == "enabled")


def restarts(pod: Mapping[str, Any]) -> int:
    """How often a kubelet has started a container of the pod again."""
    status = pod["status"]
    return sum(each["restartCount"] for each in status["containerStatuses"] + status.get("initContainerStatuses", []))
