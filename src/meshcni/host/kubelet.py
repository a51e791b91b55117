"""The user the kubelet runs as, which nftables rules need to tell its probes from other connections of the host.

Upstream: cni/pkg/nftables/kubeletuid_linux.go, which takes the first process that is named like a kubelet.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshcni import istio
from meshcni.errors import CgroupError, KubeletNotFoundError
from meshcni.host import processes
from meshcni.pods.cgrouppath import parse_cgroup


@dataclass(frozen=True, slots=True)
class _Kind:
    """Programs that are or contain a kubelet, by /proc/PID/comm; with `argument`, one of theirs must contain it."""

    comms: tuple[str, ...]
    argument: str = ""


_PREFERRED_FIRST = (
    _Kind(("kubelet",), "kubelet"),
    _Kind(("kubelite",), "kubelet"),  # MicroK8s, all of Kubernetes in one process
    _Kind(("k3s", "k3s-server", "k3s-agent")),  # likewise; newer releases name the process after the role
)
_RANKS = {comm: rank for rank, kind in enumerate(_PREFERRED_FIRST) for comm in kind.comms}


def kubelet_uid(proc_root: str) -> int:
    """Return the real user id of the kubelet among the processes under `proc_root`.

    Anybody can name a process like that, so one on the host's network outside of every pod is preferred; then count the
    kind of program and the lower number. A zombie, which has no arguments, is none. Raises KubeletNotFoundError.
    """
    try:
        candidates = [found for pid in processes.pids(proc_root) if (found := _candidate(proc_root, pid))]
        uid = _uid(f"{proc_root}/{min(candidates)[-1]}") if candidates else None
    except (OSError, ValueError) as error:
        raise _not_found(f"the kubelet's user cannot be read under {proc_root}: {error}") from None
    if uid is None:
        names = ", ".join(_RANKS)
        raise _not_found(f"no process under {proc_root} is a kubelet (looked for the names {names})")
    return uid


def _candidate(proc_root: str, pid: int) -> tuple[bool, bool, int, int] | None:
    """Return the sort key of a process that may be the kubelet, its number last."""
    folder = f"{proc_root}/{pid}"
    try:
        rank = _RANKS.get(processes.read_comm(folder))
        if rank is None:
            return None
        argument = _PREFERRED_FIRST[rank].argument
        if not any(argument in one.lower() for one in processes.read_arguments(folder)):
            return None
        return not _is_on_host_network(proc_root, folder), _is_in_pod(folder), rank, pid
    except OSError:
        return None  # it ended meanwhile


def _is_on_host_network(proc_root: str, folder: str) -> bool:
    try:
        return processes.namespace_of(folder) == processes.namespace_of(f"{proc_root}/1")
    except OSError:
        return False


def _is_in_pod(folder: str) -> bool:
    try:
        return parse_cgroup(processes.read(f"{folder}/cgroup").decode("utf-8", "replace")) is not None
    except (OSError, CgroupError):
        return False


def _uid(folder: str) -> int:
    for line in processes.read(f"{folder}/status").splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    raise ValueError(f"{folder}/status has no line Uid:")


def _not_found(message: str) -> KubeletNotFoundError:
    return KubeletNotFoundError(
        message,
        f"mount the host's /proc at {istio.HOST_PROC}, or set KUBELET_UID to the user id that the kubelet runs as",
    )
