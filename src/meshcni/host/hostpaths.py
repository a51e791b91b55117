"""Where parts of the host are inside the agent's container: its processes, its network namespace, its netns files."""

from __future__ import annotations

import os
from dataclasses import dataclass

from meshcni import istio
from meshcni.errors import NetnsError
from meshcni.host.netns import open_netns

OWN_PROC = "/proc"
# One folder of the host under two names: /var/run has been a link to /run for long, but a container that mounts either
# has it under that name only.
_SAME_FOLDERS = (("/var/run/", "/run/"), ("/run/", "/var/run/"))


@dataclass(frozen=True, slots=True)
class ProcRoot:
    """A procfs root to look for the host's processes in, and what to warn of (empty when it is the host's for sure)."""

    path: str
    warning: str = ""


def find_proc_root(mounted: str = istio.HOST_PROC, own: str = OWN_PROC) -> ProcRoot:
    """Return the host's procfs at `mounted` when there is one, otherwise our own with a warning."""
    if is_procfs(mounted):
        return ProcRoot(mounted)
    return ProcRoot(
        own,
        f"no /proc of the host at {mounted}, so running pods are looked for in {own}, where they are only if "
        "the agent shares the PID namespace of the host; add the hostPath volume /proc, as Istio's chart does",
    )


def is_procfs(path: str) -> bool:
    """Whether there is a procfs, told by process 1, which each has and an empty mount point has not."""
    return os.path.exists(f"{path}/1/stat")


def host_netns_path(proc_root: str, allow_switch_to_host_ns: bool) -> str:
    """Return the path of the netns that host rules belong into: process 1's, or our own when switching is not allowed.

    Our own is the host's when the pod has hostNetwork, which is when Istio's chart does not allow switching.
    """
    return f"{proc_root}/1/ns/net" if allow_switch_to_host_ns else istio.OWN_NETNS


def open_plugin_netns(path: str, host_root: str = istio.HOST_ROOT) -> int:
    """Open a netns by the path that a plugin, on the host, has for it; return the descriptor, which the caller owns.

    Raises NetnsError, which names every place that was looked at.
    """
    if not path.startswith("/"):
        raise NetnsError(f"the path {path!r} of the pod's network namespace is not absolute", "see CNI_NETNS")
    places = _places(path, host_root)
    for place in places:
        if _exists(place):
            return open_netns(place)
    raise NetnsError(
        f"there is no network namespace {path!r}, looked for as {', '.join(places)}",
        f"is the pod still there, and is the host's folder {os.path.dirname(path)} mounted below {host_root}?",
    )


def _places(path: str, host_root: str) -> list[str]:
    """Return where a file of the host may be: below `host_root`, or at its own path if the container has that."""
    names = [path]
    names += [other + path.removeprefix(one) for one, other in _SAME_FOLDERS if path.startswith(one)]
    places = [host_root + name for name in names]
    if path.startswith(OWN_PROC + "/") and is_procfs(host_root + OWN_PROC):
        return places  # our own /proc would give the number to another process
    return places + names


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True  # opening it tells what is wrong
    return True
