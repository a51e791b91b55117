"""The files of a Kubernetes node: its disk as it comes from the factory, and what its daemons are configured with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lab.cluster import addresses
from lab.cluster.addresses import NodeAddresses
from lab.containerd import CHAIN_PLUGINS

# Of /etc only what programs of the host's /usr need: no accounts, no keys, nothing that other CNI software left there.
FROM_ETC = (
    "alternatives",
    "ethertypes",
    "group",
    "host.conf",
    "iproute2",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "os-release",
    "passwd",
    "protocols",
    "services",
)
FOLDERS = (
    "etc/cni/net.d",
    "etc/kubernetes",
    "opt/cni/bin",
    "var/cache",
    "var/lib/cni",
    "var/lib/kubelet",
    "var/log",
    "var/tmp",
)
CONF_NAME = "10-lab.conflist"
CONF_DIR, BIN_DIR = "/etc/cni/net.d", "/opt/cni/bin"
KUBELET_CONFIG, PROXY_CONFIG = "etc/kubernetes/kubelet.json", "etc/kubernetes/proxy.json"


def make_disk(disk: Path, plugins: Path) -> None:
    """Make the folders that cover /etc, /opt and /var; of `plugins` the chain's go into /opt/cni/bin."""
    for folder in FOLDERS:
        (disk / folder).mkdir(parents=True)
    for name in FROM_ETC:
        source, target = Path("/etc") / name, disk / "etc" / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        elif source.exists():
            shutil.copy2(source, target, follow_symlinks=source.is_symlink() and not source.readlink().is_absolute())
    (disk / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (disk / "etc" / "resolv.conf").touch()
    (disk / "var" / "run").symlink_to("/run")
    (disk / "var" / "lock").symlink_to("/run/lock")
    for plugin in CHAIN_PLUGINS:
        shutil.copy2(plugins / plugin, disk / BIN_DIR.lstrip("/") / plugin)  # follows links, which pods could not


def conflist(node: NodeAddresses) -> dict[str, Any]:
    """Return the primary CNI's chain: a bridge with both families, addresses of the node, and portmap."""
    ranges = [[{"subnet": node.pods_v4}], [{"subnet": node.pods_v6}]]
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": ranges},
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "lab", "plugins": [bridge, portmap]}


def kubelet(*, ca: Path, cgroup_root: str, socket: str) -> dict[str, Any]:
    """Return the kubelet's configuration: patient with a small machine, quick to report."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(ca)},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{socket}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup_root,
        "cgroupsPerQOS": True,
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "resolvConf": "",
        "clusterDomain": "cluster.local",
        "clusterDNS": [addresses.CLUSTER_DNS],
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "localStorageCapacityIsolation": False,
        "nodeStatusUpdateFrequency": "2s",
        "syncFrequency": "10s",
        "volumeStatsAggPeriod": "0s",
        "registryPullQPS": 0,
        "serializeImagePulls": False,
        "maxPods": 250,
    }


def kube_proxy(*, node: str, kubeconfig: Path, mode: str) -> dict[str, Any]:
    """Return kube-proxy's configuration; what only the machine's first netns can set is left alone."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "mode": mode,
        "clusterCIDR": addresses.PODS,
        "hostnameOverride": node,
        "oomScoreAdj": 0,
        "nodePortAddresses": [addresses.LAN_V4, addresses.LAN_V6],
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def write_json(path: Path, value: object) -> None:
    """Write a file by rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.rename(path)
