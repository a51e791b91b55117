"""containerd as a Kubernetes node has it: with the default folders, and its answers about what runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cluster.nodeconfig import BIN_DIR, CONF_DIR
from lab.container import Container
from lab.containerd import Containerd
from lab.cri import CriError, Sandbox
from lab.node import LabError

if TYPE_CHECKING:
    from lab.node import Node

AGENT_CONTAINER = "install-cni"
CONTAINER_LABEL = "io.kubernetes.container.name"
POD_LABEL, NAMESPACE_LABEL = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"


class RunningContainer(Container):
    """A container that a kubelet started."""

    def __init__(self, runtime: Containerd, identifier: str, pod: str, namespace: str, name: str) -> None:
        super().__init__(runtime, identifier)
        self.pod, self.namespace, self.name = pod, namespace, name

    @property
    def is_running(self) -> bool:
        """Whether its process 1 runs; a kubelet also removes containers that have ended."""
        try:
            return super().is_running
        except CriError as error:
            if "not found" in str(error):
                return False
            raise


class NodeRuntime(Containerd):
    """The runtime of a Kubernetes node; its folders are those of the node's disk, its data lie in the node's folder."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.conf_dir, self.bin_dir = Path(CONF_DIR), Path(BIN_DIR)  # as seen inside

    def command(self) -> list[str]:
        """Write containerd's configuration and return the command that starts it."""
        config = self.node.folder / "containerd.toml"
        # an overlay cannot lie on an overlay, which is what a container's root usually is
        on_overlay = self.node.run(["stat", "-f", "-c", "%T", str(self.node.folder)]).strip() == "overlayfs"
        config.write_text(self.configuration("native" if on_overlay else "overlayfs"))
        return ["containerd", "--config", str(config)]

    def running(self, name: str, pod: str = "", namespace: str = "") -> list[RunningContainer]:
        """Return the running containers of a name, the newest first; of one pod only, if one is named."""
        pb = self.cri.messages
        labels = {CONTAINER_LABEL: name, POD_LABEL: pod, NAMESPACE_LABEL: namespace}
        wanted = pb.ContainerFilter(
            state=pb.ContainerStateValue(state=pb.ContainerState.Value("CONTAINER_RUNNING")),
            label_selector={key: value for key, value in labels.items() if value},
        )
        found = sorted(self.cri.call("ListContainers", filter=wanted).containers, key=lambda each: -each.created_at)
        return [
            RunningContainer(self, each.id, each.labels[POD_LABEL], each.labels[NAMESPACE_LABEL], each.metadata.name)
            for each in found
        ]

    def running_ids(self) -> set[str]:
        """Return the ids of all running containers."""
        pb = self.cri.messages
        state = pb.ContainerStateValue(state=pb.ContainerState.Value("CONTAINER_RUNNING"))
        found = self.cri.call("ListContainers", filter=pb.ContainerFilter(state=state)).containers
        return {each.id for each in found}

    def container(self, namespace: str, pod: str, name: str) -> RunningContainer:
        """Return a pod's running container; LabError when there is none."""
        for found in self.running(name, pod, namespace):
            return found
        raise LabError(f"no running container {name} in pod {namespace}/{pod}")

    def sandbox_of(self, namespace: str, name: str) -> Sandbox:
        """Return the ready sandbox of a pod; LabError when there is none."""
        for identifier, metadata in self._ready_sandboxes():
            if (metadata.namespace, metadata.name) == (namespace, name):
                return self.cri.sandbox(identifier)
        raise LabError(f"no running sandbox of pod {namespace}/{name}")

    def sandbox_by_uid(self, uid: str) -> Sandbox:
        """Return the ready sandbox of the pod with this uid; LabError when there is none."""
        for identifier, metadata in self._ready_sandboxes():
            if metadata.uid == uid:
                return self.cri.sandbox(identifier)
        raise LabError(f"no running sandbox of pod uid {uid}")

    def _ready_sandboxes(self) -> list[tuple[str, Any]]:
        is_ready = self.cri.messages.PodSandboxState.Value("SANDBOX_READY")
        return [(item.id, item.metadata) for item in self.cri.call("ListPodSandbox").items if item.state == is_ready]
