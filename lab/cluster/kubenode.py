"""A Kubernetes node: containerd, kubelet, kube-proxy in namespaces of its own, on a disk that survives a power loss."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from lab.cluster import addresses, nodeconfig
from lab.cluster.addresses import NodeAddresses
from lab.cluster.binaries import ROOT, hyperkube
from lab.cluster.controlplane import ControlPlane, run_ip
from lab.cluster.daemon import Daemon
from lab.cluster.runtime import AGENT_CONTAINER, NodeRuntime, RunningContainer
from lab.containerd import SOCKET, START_SECONDS, SYSTEM_PLUGINS
from lab.cri import CriError, Sandbox
from lab.node import CGROUP_ROOT, LabError, Node, remove_cgroups, wait_until
from meshcni import istio
from meshcni.cli.control import STATUS_PATH, ask

HERE = Path(__file__).parent
DAEMONS_INSIDE = "/run/lab"
CHECKOUT_INSIDE = "/run/lab/checkout"  # for hostPath volumes, read only
ORDER = ("containerd", "kubelet")
IMPORT_TRIES = 2  # an import has been seen to do nothing, once in 13 starts

# A node's processes end when the thread ends that started it, so that one has to live as long as this process.
launcher = ThreadPoolExecutor(1, "cluster-launcher")


class KubeNode(Node):
    """Made by `Cluster`. `power_loss` and `start` may alternate; in between nothing of it runs.

    `kube_name` is the Kubernetes node's name, `name` that of its cgroups and its folder. `disk` is the folder with what
    covers /etc, /opt and /var.
    """

    def __init__(
        self, name: str, kube_name: str, number: int, control: ControlPlane, *, proxy_mode: str, keep_conflist: bool
    ) -> None:
        super().__init__(name)
        self.kube_name, self.addresses = kube_name, NodeAddresses(number)
        self.boots = 0
        self._imported: set[Path] = set()
        self._control, self._proxy_mode = control, proxy_mode
        self.keep_conflist = keep_conflist  # at the next start
        self._daemons: dict[str, Daemon] = {}
        self._runtime: NodeRuntime | None = None

    @property
    def disk(self) -> Path:
        """The folder that holds its /etc, /opt and /var."""
        return self.folder / "disk"

    @property
    def runtime(self) -> NodeRuntime:
        """Its container runtime, since the last start."""
        if self._runtime is None:
            raise LabError(f"{self.kube_name} is not running")
        return self._runtime

    @property
    def is_running(self) -> bool:
        """Whether it has power."""
        return self._runtime is not None

    @property
    def boot_id(self) -> str:
        """What the kubelet tells the API server, and what is another one after each start."""
        return self.path("/run/lab/boot_id").read_text().strip()

    def init_arguments(self) -> list[str]:
        """Return the script that covers the host's folders with the disk."""
        return [str(HERE / "node.sh"), str(self.disk), str(hyperkube()), str(ROOT)]

    def __enter__(self) -> Self:
        self.prepare()  # `start` starts it
        return self

    # --- start and power loss -----------------------------------------------------------------------------------------

    def start(self, order: Sequence[str] = ORDER, *, images: Sequence[Path] = ()) -> None:
        """Switch it on after `power_loss` and start its daemons in the order; those left out stay out (but kube-proxy).

        The disk is as it was, /run is empty, the conflist is written anew unless `keep_conflist`.
        """
        if not self.is_running:
            launcher.submit(self._start).result()
        for name in order:
            if name == "containerd":
                self.start_containerd(images)
            else:
                self.daemon(name).start()
        self.daemon("kube-proxy").start()

    def power_loss(self) -> None:
        """End everything at once, as a power loss: no process, mount, netns or rule remains; only the disk does."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        self._daemons = {}
        self.end_processes()
        self._control.unplug_node(self.kube_name, self.boots)
        # the kubelet asks containerd for every cgroup that it finds, for minutes
        wait_until(f"the cgroups of {self.name} are empty", lambda: remove_cgroups(self.name), START_SECONDS)

    def close(self) -> None:
        """End it and remove its folder and cgroups."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        super().close()

    def _start(self) -> None:
        first = not self.disk.exists()
        if first:
            nodeconfig.make_disk(self.disk, SYSTEM_PLUGINS)
        # addresses of the pods before the power loss would never be given back
        shutil.rmtree(self.disk / "var" / "lib" / "cni" / "networks", ignore_errors=True)
        super()._start()
        self.boots += 1
        self._connect()
        self._make_cgroups()
        if first or not self.keep_conflist:
            self.write_conflist()
        self._runtime = NodeRuntime(self)
        self._configure()

    def _connect(self) -> None:
        me, number = self.addresses, self.addresses.number
        self._control.connect_node(self.kube_name, self.pid, number, self.boots)
        # without a route to both ranges of services, a process on the node's network would not even send
        run_ip(
            self.netns,
            [
                f"addr add {me.v4}/24 dev eth0",
                f"addr add {me.v6}/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add {addresses.SERVICES_V4} dev eth0",
                f"route add {addresses.SERVICES_V6} dev eth0",
                *(f"route add {other.pods_v4} via {other.v4}" for other in self.neighbours),
                *(f"route add {other.pods_v6} via {other.v6}" for other in self.neighbours),
            ],
        )

    neighbours: Sequence[NodeAddresses] = ()  # set by the cluster: the other nodes

    def _make_cgroups(self) -> None:
        for hierarchy in (entry for entry in CGROUP_ROOT.iterdir() if entry.is_dir()):
            (hierarchy / self.name).mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            source = CGROUP_ROOT / "cpuset" / name
            if source.exists():
                (CGROUP_ROOT / "cpuset" / self.name / name).write_text(source.read_text())

    def _configure(self) -> None:
        pki = self._control.pki
        kubelet = nodeconfig.kubelet(ca=pki.ca, cgroup_root=f"/{self.name}", socket=SOCKET)
        proxy = nodeconfig.kube_proxy(node=self.kube_name, kubeconfig=pki.kubeconfig("proxy"), mode=self._proxy_mode)
        nodeconfig.write_json(self.disk / nodeconfig.KUBELET_CONFIG, kubelet)
        nodeconfig.write_json(self.disk / nodeconfig.PROXY_CONFIG, proxy)
        kubelet_command = [
            *(f"{DAEMONS_INSIDE}/kubelet", "kubelet", "--config", f"/{nodeconfig.KUBELET_CONFIG}"),
            *("--kubeconfig", str(pki.kubeconfig(f"kubelet-{self.kube_name}"))),
            *("--node-ip", f"{self.addresses.v4},{self.addresses.v6}", "--hostname-override", self.kube_name, "--v=2"),
        ]
        proxy_command = [f"{DAEMONS_INSIDE}/kube-proxy", "kube-proxy", "--config", f"/{nodeconfig.PROXY_CONFIG}"]
        self._daemons = {
            "containerd": Daemon(self, "containerd", self.runtime.command()),
            "kubelet": Daemon(self, "kubelet", kubelet_command, supervised=True),
            "kube-proxy": Daemon(self, "kube-proxy", proxy_command, supervised=True),
        }

    # --- daemons ------------------------------------------------------------------------------------------------------

    def daemon(self, name: str) -> Daemon:
        """Return containerd, kubelet or kube-proxy."""
        if name not in self._daemons:
            raise LabError(f"{self.kube_name} is switched off or has no daemon {name!r}")
        return self._daemons[name]

    def start_containerd(self, images: Sequence[Path] = ()) -> None:
        """Start containerd, return when it answers, import `images`."""
        daemon = self.daemon("containerd")
        daemon.start()
        try:
            self.runtime.cri.wait_ready(START_SECONDS)
        except CriError as error:
            daemon.check()
            raise LabError(f"containerd of {self.kube_name} does not answer: {error}; {daemon.log_tail()}") from None
        for archive in images:
            self.import_archive(archive)

    def stop_containerd(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop containerd; the containers run on."""
        self.daemon("containerd").stop(number)

    def start_kubelet(self) -> None:
        """Start the kubelet."""
        self.daemon("kubelet").start()

    def stop_kubelet(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the kubelet; the containers run on."""
        self.daemon("kubelet").stop(number)

    def write_conflist(self) -> None:
        """(Re)write the primary CNI's conflist, as one does that installs itself: without our plugin, by rename."""
        nodeconfig.write_json(
            self.disk / nodeconfig.CONF_DIR.lstrip("/") / nodeconfig.CONF_NAME, nodeconfig.conflist(self.addresses)
        )

    def import_archive(self, archive: Path) -> None:
        """Have the runtime import an OCI archive, which it keeps on the disk; nothing when it has done so before."""
        if archive in self._imported:
            return
        command = ["ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import", str(archive)]
        for left in reversed(range(IMPORT_TRIES)):
            try:
                if "unpacking" in self.run(command):
                    self._imported.add(archive)
                    return
            except LabError:
                if not left:
                    raise
        raise LabError(f"{self.kube_name}: importing {archive} imported nothing")

    # --- pods and the agent -------------------------------------------------------------------------------------------

    def sandbox(self, namespace: str, name: str) -> Sandbox:
        """Return the running sandbox of a pod; LabError when there is none."""
        return self.runtime.sandbox_of(namespace, name)

    def pod_netns(self, pod: str | tuple[str, str]) -> str:
        """Return the path from outside of the netns of a pod, given by uid or by (namespace, name)."""
        found = self.runtime.sandbox_by_uid(pod) if isinstance(pod, str) else self.sandbox(*pod)
        return self.runtime.netns_path(found)

    def agent_container(self) -> RunningContainer | None:
        """Return the running container of the node agent, as the runtime knows it; None when there is none."""
        return next(iter(self.runtime.running(AGENT_CONTAINER)), None)

    def agent_alive(self) -> bool:
        """Tell whether the node agent's container runs; the runtime is asked, because the API lags behind."""
        return self.agent_container() is not None

    def kill_agent(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the node agent's process a signal and return when its container has ended; LabError without one."""
        container = self.agent_container()
        if container is None:
            raise LabError(f"no agent runs on {self.kube_name}")
        container.signal(number)
        wait_until("the agent's container ends", lambda: not container.is_running, START_SECONDS)

    def agent(self, *command: str) -> str:
        """Run a command in the node agent's container, as `kubectl exec` does; returns its output."""
        container = self.agent_container()
        if container is None:
            raise LabError(f"no agent runs on {self.kube_name}")
        return container.check(*command)

    def agent_status(self) -> dict[str, Any]:
        """Return what `install-cni status -o json` says here, asked as it asks; MeshCniError when nobody answers."""
        return ask(str(self.path(os.path.realpath(istio.RUN_DIR))), "GET", STATUS_PATH)

    def wait_agent(self, timeout_seconds: float) -> None:
        """Return when an agent's container runs."""
        wait_until(f"an agent runs on {self.kube_name}", self.agent_alive, timeout_seconds)

    def log_since(self, name: str, begin: int = 0) -> str:
        """Return what a daemon has logged from byte `begin` on."""
        return self.log_path(name).read_bytes()[begin:].decode(errors="replace")
