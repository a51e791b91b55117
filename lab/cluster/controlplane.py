"""The control plane: etcd, API server, controllers, scheduler, in a node of their own, which has the LAN's bridge too.

It is no Kubernetes node, so that one of those can lose its power completely. Its netns has the way to the pods.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from lab import namespaces
from lab.cluster import addresses
from lab.cluster.addresses import API_PORT, API_SERVER, API_SERVER_V6, NodeAddresses
from lab.cluster.binaries import hyperkube
from lab.cluster.client import ApiClient, ApiError
from lab.cluster.daemon import Daemon
from lab.cluster.pki import Pki
from lab.node import LabError, Node, wait_until

ETCD = "http://127.0.0.1:2379"
ETCD_PEER = "http://127.0.0.1:2380"
BRIDGE = "lan"
START_SECONDS = 150.0
GRACE_SECONDS = 6  # without a word from a node, after which it is not ready; Kubernetes' own default is 50
NOT_NEEDED = (  # controllers of what no test has: volumes of a cloud, certificates, autoscaling, quotas
    "bootstrap-signer-controller",
    "certificatesigningrequest-approving-controller",
    "certificatesigningrequest-cleaner-controller",
    "certificatesigningrequest-signing-controller",
    "cronjob-controller",
    "device-taint-eviction-controller",
    "ephemeral-volume-controller",
    "horizontal-pod-autoscaler-controller",
    "persistentvolume-attach-detach-controller",
    "persistentvolume-binder-controller",
    "persistentvolume-expander-controller",
    "persistentvolume-protection-controller",
    "persistentvolumeclaim-protection-controller",
    "resourceclaim-controller",
    "resourcequota-controller",
    "token-cleaner-controller",
    "volumeattributesclass-protection-controller",
)
CLIENTS = ("kube-controller-manager", "kube-scheduler")
COLLECT_SELDOM = {"GOGC": "400"}  # they make most of their garbage at their start, which should not take long
TOLERATION_SECONDS = 300  # for which a pod stays on a node that is not ready; Kubernetes' own default


class ControlPlane(Node):
    """`start` begins, `wait_ready` ends its start; the API server can be stopped and started again meanwhile."""

    def __init__(self, name: str, *, toleration_seconds: int = TOLERATION_SECONDS) -> None:
        super().__init__(name)
        self._toleration = toleration_seconds
        self._pki: Pki | None = None
        self._daemons: dict[str, Daemon] = {}

    @property
    def pki(self) -> Pki:
        """The cluster's keys."""
        if self._pki is None:
            raise LabError("the control plane has not been started")
        return self._pki

    def start(self, nodes: Iterable[str]) -> None:
        """Make the keys and the LAN, start etcd and the API server; `nodes` are those that will be let in."""
        self._pki = Pki(self.folder / "pki", list(nodes))
        self._make_lan()
        commands = {
            "etcd": self._etcd(),
            "kube-apiserver": self._api_server(),
            "kube-controller-manager": self._controllers(),
            "kube-scheduler": self._scheduler(),
        }
        for name, command in commands.items():
            is_client = name in CLIENTS
            self._daemons[name] = Daemon(self, name, command, supervised=is_client, environment=COLLECT_SELDOM)
        self._daemons["etcd"].start()
        self._daemons["kube-apiserver"].start()

    def client(self) -> ApiClient:
        """Return a client with an administrator's rights."""
        return ApiClient(self.netns, "127.0.0.1", API_PORT, self.pki.ca, self.pki.tokens["admin"])

    def wait_ready(self) -> None:
        """Return when the API server is ready, and start what must not be started before."""
        client = self.client()

        def is_ready() -> bool:
            self._daemons["etcd"].check()
            self._daemons["kube-apiserver"].check()
            try:
                return client.text("/readyz") == "ok"
            except (OSError, ApiError):
                return False

        wait_until("the API server is ready", is_ready, START_SECONDS, 0.05)
        for name in CLIENTS:  # earlier they would back off for seconds
            self._daemons[name].start()

    def daemon(self, name: str) -> Daemon:
        """Return etcd, kube-apiserver, kube-controller-manager or kube-scheduler."""
        return self._daemons[name]

    def stop_api_server(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the API server; etcd keeps what it knows."""
        self._daemons["kube-apiserver"].stop(number)

    def start_api_server(self) -> None:
        """Start the API server again and return when it is ready."""
        self._daemons["kube-apiserver"].start()
        self.wait_ready()

    def connect_node(self, name: str, pid: int, number: int, boot: int) -> None:
        """Lay a cable from the bridge to the netns of process `pid`, where its end is `eth0`."""
        node, port = NodeAddresses(number), f"{name}-{boot}"
        self.ip(
            f"link add {port} type veth peer name eth0 address {node.link} netns {pid}",
            f"link set {port} master {BRIDGE} up",
            f"route replace {node.pods_v4} via {node.v4}",
            f"route replace {node.pods_v6} via {node.v6}",
        )

    def unplug_node(self, name: str, boot: int) -> None:
        """Take away the cable; nothing when the kernel has done so."""
        self.ip(f"link del {name}-{boot}", check=False)

    def ip(self, *lines: str, check: bool = True) -> None:
        """Run lines of `ip` in the LAN's netns, though as a process of the host, which knows pids from outside."""
        run_ip(self.netns, lines, check=check)

    def _make_lan(self) -> None:
        self.ip(
            f"link add {BRIDGE} type bridge",
            f"addr add {API_SERVER}/24 dev {BRIDGE}",
            f"addr add {API_SERVER_V6}/64 dev {BRIDGE} nodad",
            f"link set {BRIDGE} up",
        )

    def _etcd(self) -> list[str]:
        # in the private tmpfs: a control plane has no second start
        return [
            *(str(hyperkube()), "etcd", "--data-dir", "/run/etcd", "--unsafe-no-fsync", "--log-level", "warn"),
            *("--listen-client-urls", ETCD, "--advertise-client-urls", ETCD),
            *("--listen-peer-urls", ETCD_PEER, "--initial-advertise-peer-urls", ETCD_PEER),
            *("--initial-cluster", f"default={ETCD_PEER}"),
        ]

    def _api_server(self) -> list[str]:
        pki = self.pki.folder
        return [
            *(str(hyperkube()), "kube-apiserver", f"--etcd-servers={ETCD}"),
            *(f"--advertise-address={API_SERVER}", "--bind-address=0.0.0.0", f"--secure-port={API_PORT}"),
            *(f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key"),
            *(f"--client-ca-file={pki}/ca.crt", f"--token-auth-file={pki}/tokens.csv"),
            f"--kubelet-client-certificate={pki}/kubelet-client.crt",
            f"--kubelet-client-key={pki}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki}/sa.pub",
            f"--service-account-signing-key-file={pki}/sa.key",
            f"--service-cluster-ip-range={addresses.SERVICES_V4},{addresses.SERVICES_V6}",
            *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
            f"--default-not-ready-toleration-seconds={self._toleration}",
            f"--default-unreachable-toleration-seconds={self._toleration}",
            *("--allow-privileged=true", "--profiling=false", "--v=1"),
        ]

    def _controllers(self) -> list[str]:
        pki = self.pki
        return [
            *(str(hyperkube()), "kube-controller-manager", f"--kubeconfig={pki.kubeconfig('kcm')}"),
            *("--use-service-account-credentials", f"--service-account-private-key-file={pki.folder}/sa.key"),
            *(f"--root-ca-file={pki.ca}", "--leader-elect=false", "--bind-address=127.0.0.1"),
            *(f"--node-monitor-grace-period={GRACE_SECONDS}s", "--node-monitor-period=1s"),
            f"--controllers=*,{','.join(f'-{name}' for name in NOT_NEEDED)}",
        ]

    def _scheduler(self) -> list[str]:
        config = self.pki.kubeconfig("scheduler")
        return [
            *(str(hyperkube()), "kube-scheduler", f"--kubeconfig={config}"),
            *(f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}"),
            *("--leader-elect=false", "--bind-address=127.0.0.1"),
        ]


def run_ip(netns: str, lines: Iterable[str], *, check: bool = True) -> None:
    """Run lines of `ip` in the netns at a path; LabError with its words when one fails and `check` is set."""
    text = "".join(f"{line}\n" for line in lines)
    command = ["ip", "-batch", "-"]

    def work() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    done = namespaces.call_in_netns(netns, work)
    if check and done.returncode != 0:
        raise LabError(f"ip in {Path(netns)}: {done.stderr.strip()} of:\n{text}")
