"""The directories of the host that the agent's container must have mounted, and which of them it lacks.

Names, paths and options are those of the chart: manifests/charts/istio-cni/templates/daemonset.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import meshcni
from meshcni import istio
from meshcni.agent.needs import Weight
from meshcni.agent.settings import Settings
from meshcni.host.hostpaths import is_procfs
from meshcni.host.mounts import MountPoint, mount_points, why_not_of_host

BIN, CONF, RUN, PROC, NETNS, ZTUNNEL = (
    "cni-bin-dir",
    "cni-net-dir",
    "cni-socket-dir",
    "cni-host-procfs",
    "cni-netns-dir",
    "cni-ztunnel-sock-dir",
)
IMAGE_CODE_DIR = "/usr/lib/meshcni"  # where our image has the code, and nobody else
CREATED = "DirectoryOrCreate"
HOST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of include/linux/proc_ns.h


@dataclass(frozen=True, slots=True)
class Mount:
    """A hostPath volume and where it belongs; `why` says what is wrong there, empty while nothing is known."""

    volume: str
    path: str
    host_path: str
    needed_for: str
    weight: Weight = Weight.STOPS
    kind: str = CREATED
    read_only: bool = False
    propagation: str = ""
    why: str = ""


def wanted(settings: Settings) -> tuple[Mount, ...]:
    """What the configured mode needs, in the chart's order."""
    found = [
        Mount(BIN, settings.cni_binary_target_dir, _on_host(settings.cni_binary_target_dir, istio.BINARY_SOURCE_DIR),
              "the container runtime finds the plugin there"),
        Mount(PROC, settings.host_proc_dir or istio.HOST_PROC, "/proc",
              "finding the network namespaces of running pods and of the host" if settings.ambient_enabled
              else "looking at the host's own iptables rules, and at running sidecar pods that are not captured",
              Weight.STOPS if settings.ambient_enabled else Weight.DEGRADES, kind="Directory", read_only=True),
        Mount(CONF, settings.mounted_cni_net_dir, _on_host(settings.mounted_cni_net_dir, "/etc/cni/net.d"),
              "the container runtime reads there that it is to call the plugin"),
        Mount(RUN, settings.cni_agent_run_dir, settings.cni_agent_run_dir,
              "the plugin, which runs on the host, finds the agent's socket there"),
    ]  # fmt: skip
    if settings.ambient_enabled:
        socket_dir = os.path.dirname(settings.ztunnel_uds_address)
        found += [
            Mount(NETNS, f"{istio.HOST_ROOT}/var/run/netns", "/var/run/netns",
                  "pods that the original's plugin announces, by the path of their network namespace",
                  Weight.DEGRADES, propagation="HostToContainer"),
            Mount(ZTUNNEL, socket_dir, socket_dir, "ztunnel finds the agent's socket there"),
        ]  # fmt: skip
    return tuple(found)


def missing(settings: Settings, mounts: Sequence[MountPoint] | None = None) -> tuple[Mount, ...]:
    """Those of `wanted` that are not the host's; none outside of a container, where a directory is what it seems."""
    if not in_container(settings):
        return ()
    mounts = mount_points() if mounts is None else mounts
    return tuple(replace(mount, why=why) for mount in wanted(settings) if (why := _why(mount, mounts)))


def in_container(settings: Settings, code: str = meshcni.__file__) -> bool:
    """Whether this agent runs in a container: from our image, or told to look for the host below /host.

    That is where the chart mounts the host's directories and where the settings look unless they say otherwise. An
    agent beside the runtime, as on a laboratory's node, has been given the directories themselves.
    """
    directories = (settings.cni_binary_target_dir, settings.mounted_cni_net_dir)
    return code.startswith(f"{IMAGE_CODE_DIR}/") or any(_below_host_root(path) for path in directories)


def _why(mount: Mount, mounts: Iterable[MountPoint]) -> str:
    if mount.volume != PROC:
        return why_not_of_host(mount.path, mounts)
    if is_procfs(mount.path) or _shares_pids_with_host():
        return ""
    return f"{mount.path} is no procfs"


def _shares_pids_with_host() -> bool:
    """Whether our own /proc shows the host's processes (hostPID: true)."""
    try:
        return os.readlink("/proc/self/ns/pid") == HOST_PID_NAMESPACE
    except OSError:
        return False


def _below_host_root(path: str) -> bool:
    return path.startswith(f"{istio.HOST_ROOT}/")


def _on_host(path: str, otherwise: str) -> str:
    """Where the host has what the agent sees at `path`; a path of another scheme does not tell."""
    return path.removeprefix(istio.HOST_ROOT) if _below_host_root(path) else otherwise
