"""Which directories of this process are another file system's, such as the host's, and not its container's own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from meshcni import istio
from meshcni.host.procfs import read_text

MOUNTINFO = "/proc/thread-self/mountinfo"
# How the kubelet names the folder of an emptyDir: pkg/volume/emptydir of Kubernetes.
_EMPTY_DIR = "/kubernetes.io~empty-dir/"
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo: where it is, which directory of its file system is shown there, and that one's type."""

    path: str
    root: str
    kind: str


def mount_points(text: str | None = None) -> tuple[MountPoint, ...]:
    """Return the mounts of this process, or those that `text` (man 5 proc_pid_mountinfo) lists."""
    text = read_text(MOUNTINFO) or "" if text is None else text
    return tuple(found for line in text.splitlines() if (found := _parsed(line)) is not None)


def why_not_of_host(directory: str, mounts: Iterable[MountPoint]) -> str:
    """Say why `directory` cannot be a directory of the host; empty when it is mounted into this container.

    What lies on the container's root is the container's own, whatever the root's file system is (an overlay, or a plain
    directory of the host with other snapshotters). So is what lies on a tmpfs further up, as podman makes one of /run;
    not below /host, where that is the root of a host that runs from memory.
    """
    place = os.path.realpath(directory)
    above = [mount for mount in mounts if _holds(mount.path, place)]
    if not above:
        return ""  # no procfs, so nothing is known
    deepest = max(above, key=lambda mount: len(mount.path))  # of equal ones max takes the first, and the last is on top
    deepest = [mount for mount in above if mount.path == deepest.path][-1]
    if deepest.path == "/":
        there = "is part of the container's own file system" if os.path.isdir(place) else "does not exist"
        return f"{directory} {there}"
    if _EMPTY_DIR in deepest.root:
        return f"{directory} is an emptyDir volume"
    on_tmpfs = deepest.kind == "tmpfs" and deepest.root == "/" and deepest.path != place
    if on_tmpfs and not _holds(istio.HOST_ROOT, deepest.path):
        return f"{directory} is on a tmpfs of the container, mounted at {deepest.path}"
    return ""


def shown_directory(directory: str, mounts: Iterable[MountPoint] | None = None) -> str:
    """Which directory of its file system is seen at `directory`: the host's own name for it, where it has one."""
    place = os.path.realpath(directory)
    above = [mount for mount in (mount_points() if mounts is None else mounts) if _holds(mount.path, place)]
    if not above:
        return place
    length = max(len(mount.path) for mount in above)
    deepest = [mount for mount in above if len(mount.path) == length][-1]
    rest = place if deepest.path == "/" else place[len(deepest.path) :]
    return deepest.root.rstrip("/") + rest


def _holds(mount: str, place: str) -> bool:
    return mount == "/" or place == mount or place.startswith(mount + "/")


def _parsed(line: str) -> MountPoint | None:
    """Fields 4 and 5 are root and mount point; the type follows a lone dash, before which optional fields stand."""
    before, dash, after = line.partition(" - ")
    fields = before.split()
    if not dash or len(fields) < 5 or not after.split():
        return None
    root, path = (_OCTAL.sub(lambda found: chr(int(found[1], 8)), field) for field in fields[3:5])
    return MountPoint(path, root, after.split()[0])
