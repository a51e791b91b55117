"""The cluster as a whole: started, asked, changed and taken away."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.cluster import agent, hostpods, verdict, workloads
from lab.cluster.binaries import helm, hyperkube, missing_binaries
from lab.cluster.capture import Captured, capture
from lab.cluster.client import ApiClient, ApiError, objects_in, ready
from lab.cluster.controlplane import TOLERATION_SECONDS, ControlPlane
from lab.cluster.kubenode import ORDER, KubeNode, launcher
from lab.cri import CriError
from lab.imagelayout import Image
from lab.images import pause_archive
from lab.node import CLEAN_ENVIRONMENT, LabError, LabUnavailableError, made_up_name, wait_until
from meshcni import istio

READY_SECONDS = 120.0  # of a machine that does other things too
COMMAND_SECONDS = 120.0
POLL_SECONDS = 0.1
MAKERS = {  # collections of what has pods, by the path of their group
    "/apis/apps/v1": ("deployments", "statefulsets", "daemonsets", "replicasets"),
    "/apis/batch/v1": ("jobs",),
    "/api/v1": ("pods",),
}
PROXY_MODES = ("iptables", "nftables")


class Cluster:
    """Context manager; inside the `with` the nodes n1, n2, … are Ready.

    `proxy_mode`: iptables or nftables. `keep_conflist`: nodes keep the conflist over a power loss instead of writing
    it anew. `toleration_seconds`: how long pods stay on a node that is not ready. `start_nodes`: false leaves the nodes
    off, for tests that start them in an order of their own.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        proxy_mode: str = "iptables",
        keep_conflist: bool = False,
        toleration_seconds: int = TOLERATION_SECONDS,
        start_nodes: bool = True,
    ) -> None:
        if proxy_mode not in PROXY_MODES:
            raise LabError(f"proxy_mode={proxy_mode!r}: there are {', '.join(PROXY_MODES)}")
        self.name = made_up_name()
        self.control = ControlPlane(f"{self.name}-cp", toleration_seconds=toleration_seconds)
        self.nodes = {
            f"n{number}": KubeNode(
                f"{self.name}-n{number}",
                f"n{number}",
                number,
                self.control,
                proxy_mode=proxy_mode,
                keep_conflist=keep_conflist,
            )
            for number in range(1, nodes + 1)
        }
        for node in self.nodes.values():
            node.neighbours = [other.addresses for other in self.nodes.values() if other is not node]
        self._start_nodes = start_nodes
        self._numbers = itertools.count(1)
        self._entered: list[ControlPlane | KubeNode] = []
        self._api: ApiClient | None = None

    def __enter__(self) -> Self:
        reason = missing_binaries()
        if reason:
            raise LabUnavailableError(reason)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything away; safe to call twice."""
        with ThreadPoolExecutor(len(self._entered) or 1) as pool:
            list(pool.map(lambda each: each.close(), self._entered))
        self._entered = []
        self._api = None

    @property
    def api(self) -> ApiClient:
        """A client with an administrator's rights."""
        if self._api is None:
            raise LabError("the cluster is not running")
        return self._api

    # --- commands -----------------------------------------------------------------------------------------------------

    def kubectl(self, *arguments: str, input: str = "", check: bool = True) -> str:
        """Run kubectl as administrator, with `input` on its stdin; returns its stdout.

        LabError when it fails, or, with `check` false, its output and errors together.
        """
        return self._command([str(hyperkube()), "kubectl", *arguments], input, check)

    def helm(self, *arguments: str, input: str = "", check: bool = True) -> str:
        """Run helm as administrator, as `kubectl` does."""
        return self._command([str(helm()), *arguments], input, check)

    def _command(self, command: Sequence[str], text: str, check: bool) -> str:
        if not check:
            command = ["sh", "-c", '"$@" 2>&1 || true', "sh", *command]
        return self.control.run(
            command, text=text, timeout_seconds=COMMAND_SECONDS, environment=self.command_environment()
        )

    def command_environment(self) -> dict[str, str]:
        """Return the environment in which kubectl and helm find this cluster and keep their caches in its folder."""
        home = self.control.folder / "home"
        folders = {f"HELM_{kind}_HOME": str(home / "helm" / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        config = str(self.control.pki.kubeconfig("admin"))
        return {**CLEAN_ENVIRONMENT, "HOME": str(home), "KUBECONFIG": config, **folders}

    # --- objects ------------------------------------------------------------------------------------------------------

    def apply(self, objects: str | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Create or change objects, given as YAML, as one object or several; returns them as the API has them."""
        if isinstance(objects, str):
            objects = objects_in(objects)
        elif isinstance(objects, Mapping):
            objects = [objects]
        return [self.api.apply(each) for each in objects]

    def pod(self, namespace: str, name: str) -> dict[str, Any]:
        """Return a pod as the API has it; ApiError when there is none."""
        return self.api.get(pod_path(namespace, name))

    def pods(self, namespace: str = "", labels: str = "") -> list[dict[str, Any]]:
        """Return pods, of all namespaces unless one is named."""
        where = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
        return self.api.list(where, labels=labels)

    def delete_pod(self, namespace: str, name: str, *, grace_seconds: int | None = None, wait: bool = True) -> None:
        """Delete a pod and, with `wait`, return when it is gone."""
        self.api.delete(pod_path(namespace, name), grace_seconds=grace_seconds)
        if wait:
            self.wait(f"pod {namespace}/{name} is gone", lambda: self.api.find(pod_path(namespace, name)) is None)

    def new_namespace(self, prefix: str = "test", **options: Any) -> str:  # noqa: ANN401
        """Make a namespace with a name of its own, ready for pods; `options` are those of workloads.namespace."""
        name = f"{prefix}-{next(self._numbers)}"
        self.apply(workloads.namespace(name, **options))
        self.wait_service_account(name)
        return name

    def delete_namespace(self, name: str, *, wait: bool = False) -> None:
        """Delete a namespace, return when its pods are gone; with `wait`, seconds later, when it is gone itself."""
        path = f"/api/v1/namespaces/{name}"
        for group, kinds in MAKERS.items():  # pods last, or they would be made again
            for kind in kinds:
                self.api.delete(f"{group}/namespaces/{name}/{kind}")
        self.wait(f"pods of {name} are gone", lambda: not self.pods(name))
        self.api.delete(path)
        if wait:
            self.wait(f"namespace {name} is gone", lambda: self.api.find(path) is None)

    def restore(self) -> None:
        """Start whatever is off: API server, nodes, their daemons; return when all nodes are Ready."""
        self.start_api_server()
        for node in self.nodes.values():
            node.start()
        self.wait_nodes()

    def node_of(self, pod: Mapping[str, Any]) -> KubeNode:
        """Return the node that a pod runs on."""
        return self.nodes[pod["spec"]["nodeName"]]

    def pod_netns(self, pod: Mapping[str, Any]) -> str:
        """Return the path from outside of a pod's netns."""
        return self.node_of(pod).pod_netns(pod["metadata"]["uid"])

    def exec(self, namespace: str, name: str, *command: str, container: str = "") -> str:
        """Run a command in a container of a pod, through the runtime; LabError when it fails."""
        pod = self.pod(namespace, name)
        chosen = container or pod["spec"]["containers"][0]["name"]
        return self.node_of(pod).runtime.container(namespace, name, chosen).check(*command)

    def log(self, namespace: str, name: str, container: str = "", *, previous: bool = False) -> str:
        """Return a container's log."""
        query = {"container": container} if container else {}
        return self.api.text(f"{pod_path(namespace, name)}/log", **query, **({"previous": "true"} if previous else {}))

    def events(self, namespace: str, about: str = "") -> list[dict[str, Any]]:
        """Return the events of a namespace, of one object only when its name is given, oldest first."""
        fields = f"involvedObject.name={about}" if about else ""
        found = self.api.list(f"/api/v1/namespaces/{namespace}/events", fields=fields)
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, what: str, check: Callable[[], object], timeout_seconds: float = READY_SECONDS) -> None:
        """Return as soon as `check` gives something true; LabError saying `what`. An API that is away is waited for."""

        def safely() -> object:
            try:
                return check()
            except (ApiError, CriError, OSError):
                return False

        wait_until(what, safely, timeout_seconds, POLL_SECONDS)

    def wait_ready(
        self, namespace: str, labels: str = "", count: int = 1, timeout_seconds: float = READY_SECONDS
    ) -> list[dict[str, Any]]:
        """Return the pods as soon as exactly `count` are there and all are ready, not only in the API's memory."""
        found: list[dict[str, Any]] = []

        def check() -> bool:
            found[:] = self.pods(namespace, labels)
            return len(found) == count and all(ready(pod) for pod in found) and self.are_current(found)

        try:
            self.wait(f"{count} pods {labels} of {namespace} are ready", check, timeout_seconds)
        except LabError as error:
            raise LabError(f"{error}\n{self._describe(found)}") from None
        return found

    def are_current(self, pods: Iterable[Mapping[str, Any]]) -> bool:
        """Tell whether the containers that the API says pods have are those that run: it is late after a power loss."""
        running = {name: node.runtime.running_ids() for name, node in self.nodes.items() if node.is_running}
        return all(container_ids(pod) <= running.get(pod["spec"]["nodeName"], set()) for pod in pods)

    def wait_pod(
        self,
        namespace: str,
        name: str,
        check: Callable[[dict[str, Any]], object] = ready,
        *,
        timeout_seconds: float = READY_SECONDS,
    ) -> dict[str, Any]:
        """Return a pod as soon as `check` of it is true: ready, by default."""
        found: list[dict[str, Any]] = []

        def look() -> object:
            found[:] = [self.pod(namespace, name)]
            return check(found[0])

        try:
            self.wait(f"pod {namespace}/{name}", look, timeout_seconds)
        except LabError as error:
            raise LabError(f"{error}\n{self._describe(found)}") from None
        return found[0]

    def wait_nodes(
        self, names: Iterable[str] = (), *, ready: bool = True, timeout_seconds: float = READY_SECONDS
    ) -> None:
        """Return when the nodes, all by default, are Ready, or with `ready` false when they are not."""
        wanted = set(names or self.nodes)

        def check() -> bool:
            found = self.api.list("/api/v1/nodes")
            are = {each["metadata"]["name"] for each in found if self._is_ready(each)}
            return wanted <= are if ready else not wanted & are

        self.wait(f"nodes {', '.join(sorted(wanted))} are {'' if ready else 'not '}Ready", check, timeout_seconds)

    def _is_ready(self, obj: Mapping[str, Any]) -> bool:
        """Tell whether a node is Ready since its last start."""
        node = self.nodes[obj["metadata"]["name"]]
        is_of_this_boot = not node.is_running or obj["status"]["nodeInfo"]["bootID"] == node.boot_id
        return is_of_this_boot and condition(obj, "Ready") == "True"

    def reboot(self, name: str, order: Sequence[str] = ORDER, *, timeout_seconds: float = READY_SECONDS) -> None:
        """Have a node lose its power, start it and return when it is Ready again; its pods may not be yet."""
        self.nodes[name].power_loss()
        self.nodes[name].start(order)
        self.wait_nodes([name], timeout_seconds=timeout_seconds)

    def wait_rollout(self, path: str, labels: str, timeout_seconds: float = READY_SECONDS) -> None:
        """Return when a DaemonSet's newest pods, which have `labels`, are ready on all nodes."""
        where = path.split("/namespaces/")[1].partition("/")[0]

        def check() -> bool:
            found = self.api.get(path)
            status, wanted = found["status"], found["status"].get("desiredNumberScheduled", 0)
            is_seen = status.get("observedGeneration") == found["metadata"]["generation"]
            counts = (status.get("updatedNumberScheduled"), status.get("numberReady"))
            return is_seen and wanted > 0 and counts == (wanted, wanted) and self.are_current(self.pods(where, labels))

        try:
            self.wait(f"{path} is rolled out", check, timeout_seconds)
        except LabError as error:
            raise LabError(f"{error}\n{self._describe(self.pods(where, labels))}") from None

    def wait_service_account(self, namespace: str) -> None:
        """Return when a namespace has its default service account, without which no pod can be made in it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        self.wait(f"the default service account of {namespace}", lambda: self.api.find(path))

    def _describe(self, pods: Iterable[Mapping[str, Any]]) -> str:
        lines = []
        for pod in pods:
            meta, status = pod["metadata"], pod.get("status", {})
            states = [
                f"{each['name']}={json.dumps(each['state'])}"
                for each in (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or [])
            ]
            lines.append(f"{meta['namespace']}/{meta['name']}: {status.get('phase')} {' '.join(states)}")
            try:
                events = self.events(meta["namespace"], meta["name"])
            except (ApiError, OSError):
                continue
            lines += [f"  {event['reason']}: {event.get('message', '')}" for event in events[-5:]]
        return "\n".join(lines)

    def capture(self, pod: Mapping[str, Any]) -> Captured:
        """Look into a running pod's netns: is its traffic redirected?"""
        return capture(self.pod_netns(pod))

    def verdict(self) -> list[str]:
        """Return where kernel, API and agents contradict each other about running pods; empty when they agree."""
        return verdict.contradictions(self)

    def wait_agreed(self, timeout_seconds: float = READY_SECONDS) -> None:
        """Return when `verdict` has nothing to say; LabError with what it last said."""
        last: list[str] = []

        def check() -> bool:
            last[:] = ["not asked"]
            last[:] = self.verdict()
            return not last

        try:
            self.wait("kernel, API and agents agree", check, timeout_seconds)
        except LabError as error:
            raise LabError("\n".join([str(error), *last])) from None

    # --- the API server -----------------------------------------------------------------------------------------------

    def stop_api_server(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the API server; nodes and pods are left to themselves."""
        self.control.stop_api_server(number)

    def start_api_server(self) -> None:
        """Start it if it is off, return when it is ready. For about a second service accounts still get 403."""
        self.control.start_api_server()

    # --- images -------------------------------------------------------------------------------------------------------

    def import_image(self, image: Image | Path) -> str:
        """Import an image, or an OCI archive, into all nodes that run; returns the image's name, "" of an archive."""
        if isinstance(image, Image):
            digest = str(image.descriptor["digest"]).rpartition(":")[2]
            archive = self.control.folder / f"image-{image.tag}-{digest}.tar"
            if not archive.exists():
                image.write_archive(archive)
        else:
            archive = image
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            running = [node for node in self.nodes.values() if node.is_running]
            list(pool.map(lambda node: node.import_archive(archive), running))
        return image.name if isinstance(image, Image) else ""

    # --- the node agent -----------------------------------------------------------------------------------------------

    def install_agent(
        self,
        values: Mapping[str, Any] | None = None,
        *,
        wait: bool = True,
        image: Image | None = None,
        namespace: str = istio.SYSTEM_NAMESPACE,
        chart: Path = agent.CHART,
    ) -> str:
        """Install or upgrade the agent by our chart; with `wait`, return when it is ready on all nodes.

        The image is build/image's, or that of the layout which MESHCNI_CLUSTER_IMAGE names. Returns what helm says.
        """
        return agent.install_chart(self, values or {}, image or agent.cluster_image(), namespace, chart, wait=wait)

    def install_manifest(self, path: Path, image: Image | None = None, *, wait: bool = True) -> list[dict[str, Any]]:
        """Install the agent by a manifest of its DaemonSet; returns the objects, which `apply` would take again."""
        return agent.install_manifest(self, path, image or agent.cluster_image(), wait=wait)

    def wait_agent(self, namespace: str = istio.SYSTEM_NAMESPACE, timeout_seconds: float = agent.READY_SECONDS) -> None:
        """Return when the agent's newest pods are ready on all nodes."""
        agent.wait_agent(self, namespace, timeout_seconds)

    def uninstall_agent(self, namespace: str = istio.SYSTEM_NAMESPACE) -> None:
        """Uninstall the chart's release and return when the agent's pods are gone."""
        self.helm("uninstall", agent.RELEASE, "--namespace", namespace, "--ignore-not-found")
        labels = f"k8s-app={istio.DAEMONSET_NAME}"
        self.wait("the agent's pods are gone", lambda: not self.pods(namespace, labels))

    def install_ztunnel(self, **options: Any) -> None:  # noqa: ANN401
        """Start ztunnel's stand-in on all nodes; options are those of hostpods.ztunnel_daemon_set."""
        self.apply(workloads.namespace(istio.SYSTEM_NAMESPACE))
        made = self.apply(hostpods.ztunnel_daemon_set(**options))[0]
        self.wait_rollout(self.api.path_of(made), f"{workloads.NAME_LABEL}={hostpods.ZTUNNEL}")

    # --- start --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._enter(self.control)
        self.control.start(self.nodes)
        self._api = self.control.client()
        for node in self.nodes.values():
            self._enter(node)
        images = self.first_images()
        with ThreadPoolExecutor(len(self.nodes) + 1) as pool:
            pending = [pool.submit(self.control.wait_ready)]
            if self._start_nodes:
                pending += [pool.submit(node.start, ["containerd"], images=images) for node in self.nodes.values()]
            for each in pending:
                each.result()
        if self._start_nodes:
            for node in self.nodes.values():
                node.start_kubelet()
            self.wait_nodes()
        self.wait_service_account("default")

    def first_images(self) -> list[Path]:
        """Return the archives that every node has from its first start on."""
        return [pause_archive(), workloads.archive()]

    def _enter(self, node: ControlPlane | KubeNode) -> None:
        self._entered.append(node)
        launcher.submit(node.__enter__).result()


def pod_path(namespace: str, name: str) -> str:
    """Return the path of a pod in the API."""
    return f"/api/v1/namespaces/{namespace}/pods/{name}"


def condition(obj: Mapping[str, Any], kind: str) -> str:
    """Return the status of a condition of an object: True, False, Unknown; empty when it has none."""
    found = obj.get("status", {}).get("conditions") or ()
    return next((each["status"] for each in found if each["type"] == kind), "")


def container_ids(pod: Mapping[str, Any]) -> set[str]:
    """Return the ids of a pod's containers, by the API."""
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    return {each.get("containerID", "").rpartition("/")[2] for each in statuses}
