"""The agent from the image: the container that a kubelet would make of the DaemonSet, in a pod of the lab node.

Instead of the folders that the manifest names, the container sees those of the lab node's runtime.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lab import daemonset
from lab.agent import AGENT_NAMESPACE, POD_NAME, ROOT, Agent
from lab.container import Container, ContainerSpec, Mount, Pod
from lab.containerd import SOCKET, Containerd
from lab.daemonset import DaemonSet, Volume
from lab.forward import Forwarder
from lab.imagelayout import Image, find_image
from lab.node import LabError, Node
from lab.objects import NODE_NAME
from meshcni import istio

MANIFEST = ROOT / "docs" / "manifests" / "istio-cni-node.yaml"
VARIABLE = "MESHCNI_NODE_AGENT"  # which agent a lab node has: one of AGENTS
POD_UID = "00000000-0000-4000-9000-000000000001"
IMPORT_SECONDS = 30.0
NFT = "/usr/sbin/nft"
HOST_BINARIES, HOST_CONFS = "/opt/cni/bin", "/etc/cni/net.d"
ROOT_USER = {"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}  # as Istio's own chart
PRIVILEGED = {"privileged": True, "runAsUser": None, "runAsGroup": None, "capabilities": {}}  # nothing else said


class ImageAgent(Agent):
    """Drop-in for `lab.agent.Agent`; `security` replaces fields of the manifest's securityContext.

    The manifest decides whether it is on the node's network, unless `host_network` does: the chart has it both ways.
    With `verbatim` its environment is that of the manifest and what a kubelet adds, and no option has an effect.
    """

    def __init__(
        self,
        node: Node,
        runtime: Containerd,
        api_environment: Mapping[str, str],
        service_account: Path,
        *,
        image: Image | None = None,
        manifest: DaemonSet | None = None,
        security: Mapping[str, object] | None = None,
        host_network: bool | None = None,
        verbatim: bool = False,
    ) -> None:
        super().__init__(node, runtime, api_environment, service_account)
        self._from, self._manifest, self._security = image, manifest, dict(security or {})
        self._host_network, self._verbatim = host_network, verbatim
        self._to_api: Forwarder | None = None
        self.container: Container | None = None
        self._pod: Pod | None = None

    @property
    def is_running(self) -> bool:
        """Whether its container runs."""
        return self.container is not None and self.container.is_running

    @property
    def pid(self) -> int:
        """The pid of its process, as seen from outside the node; LabError when there is none."""
        return self.node.outer_pid(self._running().pid)

    @property
    def netns(self) -> str:
        """The path of its netns from outside."""
        return self.pod.netns

    def command(self, *arguments: str) -> str:
        """Run a sub-command of `install-cni` as `kubectl exec` does; returns its output."""
        return self._running().check(istio.AGENT_NAME, *arguments)

    def log_text(self) -> str:
        """Return all it has logged, over all its containers."""
        return self._pod.log_text(istio.AGENT_NAME) if self._pod else ""

    @property
    def ztunnel_socket(self) -> Path:
        """The socket that a ztunnel of this node connects to, as the node sees it."""
        return Path(istio.ZTUNNEL_SOCKET)

    def spec(self) -> ContainerSpec:
        """Return the container that the manifest describes, with the lab's settings."""
        fields = {
            "spec.nodeName": NODE_NAME,
            "metadata.name": POD_NAME,
            "metadata.namespace": AGENT_NAMESPACE,
        }
        made = self.manifest.container(self.image.name, fields, self._place, **self._security)
        account = Mount(str(self._service_account), istio.SERVICE_ACCOUNT_DIR, read_only=True)
        settings = self._api_environment if self._verbatim else self._settings()
        environment = {**made.environment, **settings}
        return replace(made, environment=environment, mounts=(*made.mounts, account))

    @property
    def image(self) -> Image:
        """The image it runs from."""
        self._from = self._from or find_image()
        return self._from

    @property
    def manifest(self) -> DaemonSet:
        """The DaemonSet it is a pod of."""
        self._manifest = self._manifest or daemonset.read(MANIFEST)
        return self._manifest

    @property
    def pod(self) -> Pod:
        """Its pod, which its containers share one after the other."""
        if self._pod is None:
            import_image(self.runtime, self.image)
            use_nft_of(self.node, self.image)
            privileged = bool(self._security.get("privileged", self.manifest.is_privileged))
            on_node = self.manifest.is_on_host_network if self._host_network is None else self._host_network
            pod = Pod(self.runtime, AGENT_NAMESPACE, POD_NAME, POD_UID, privileged=privileged, host_network=on_node)
            pod.start()
            self._pod = pod
            if not on_node:
                port = int(self._api_environment["KUBERNETES_SERVICE_PORT"])
                self._to_api = Forwarder(pod.netns, self.node.netns, port)
        return self._pod

    def close(self) -> None:
        """Stop it and remove its pod."""
        self.terminate()
        if self._to_api is not None:
            self._to_api.close()
            self._to_api = None
        if self._pod is not None:
            self._pod.close()
            self._pod = None

    def _launch(self) -> None:
        self.container = self.pod.run(self.spec())

    def _running(self) -> Container:
        if self.container is None:
            raise LabError("the agent does not run")
        return self.container

    def _signal(self, number: signal.Signals) -> None:
        self._running().signal(number)

    def _end(self, number: signal.Signals) -> int:
        if self.container is None:
            return 0
        if number != signal.SIGTERM:
            self._signal(number)
        status = self.container.stop() if number == signal.SIGTERM else self.container.wait()
        self.container = None
        return status

    def _place(self, name: str, volume: Volume) -> str:
        """Return where a volume of the manifest is on the lab node; what is not there is made, as by a kubelet."""
        if not volume.path:
            empty = self.node.folder / "empty" / name
            empty.mkdir(parents=True, exist_ok=True)
            return str(empty)
        runtimes_own = {HOST_BINARIES: self.runtime.bin_dir, HOST_CONFS: self.runtime.conf_dir}
        if volume.path in runtimes_own:
            return str(runtimes_own[volume.path])
        make = "touch" if volume.type == "FileOrCreate" else "mkdir -p"
        self.node.run(["sh", "-c", f"test -e {volume.path} || {make} {volume.path}"])
        return volume.path


def import_image(runtime: Containerd, image: Image) -> None:
    """Have the runtime know an image, unless it does."""
    images = ["ctr", "--address", SOCKET, "--namespace", "k8s.io", "images"]
    if image.name in runtime.node.run([*images, "ls", "-q"]).split():
        return
    archive = image.write_archive(runtime.node.folder / "image.tar")
    runtime.node.run([*images, "import", "--no-unpack", str(archive)], timeout_seconds=IMPORT_SECONDS)
    archive.unlink()


def use_nft_of(node: Node, image: Image) -> None:
    """Have the node's `nft` be that of the image: an older one ends in SIGSEGV over sets of a newer one.

    Debian 12's 1.0.6 does over any named set that 1.1.3 declared with `type`.
    """
    root, program = image.unpack(node.folder / "image-root"), node.folder / "nft"
    program.write_text(f'#!/bin/sh\nexec chroot {root} nft "$@"\n')
    program.chmod(0o755)
    node.run(["mount", "--bind", str(program), NFT])


def make_agent(
    node: Node, runtime: Containerd, api_environment: Mapping[str, str], service_account: Path, which: str = ""
) -> Agent:
    """Return the agent that `which`, or else the environment, asks for: from the checkout, if neither does."""
    chosen = which or os.environ.get(VARIABLE, "checkout")
    if chosen not in AGENTS:
        raise LabError(f"{VARIABLE}={chosen}: there are {', '.join(AGENTS)}")
    return AGENTS[chosen](node, runtime, api_environment, service_account)


AGENTS = {
    "checkout": Agent,
    # as docs/manifests has it: the image's own user, capabilities from the launcher's file
    "image": partial(ImageAgent, host_network=True),
    "image-pod-network": ImageAgent,
    "image-root": partial(ImageAgent, host_network=True, security=ROOT_USER),
    "image-privileged": partial(ImageAgent, host_network=True, security=PRIVILEGED),
}
