"""Which pods' processes run and in which network namespaces: one walk over a procfs root, for all who ask.

What a walk learns of a process's cgroup is kept for the next one, under its number and start time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from meshcni import istio
from meshcni.errors import CgroupError, NetnsError
from meshcni.host import processes
from meshcni.pods.cgrouppath import ContainerCgroup, parse_cgroup

NetnsId = tuple[int, int]  # device and inode of its file


class PodProcess(NamedTuple):
    """A process in the cgroup of a pod's container.

    `folder` is the process's under the procfs root, or that of a living thread when its first thread has ended; `start`
    is in clock ticks since boot; `netns` is None when it could not be read, for the reason in `trouble`.
    """

    pid: int
    start: int
    comm: str
    folder: str
    cgroup: ContainerCgroup
    netns: NetnsId | None
    trouble: str = ""

    def is_same(self) -> bool:
        """Whether this process still has its number; False when it ended, whoever has the number now."""
        try:
            return processes.read_stat(self.folder).start == self.start
        except (OSError, ValueError):
            return False

    def __str__(self) -> str:
        return f"{self.pid} ({self.comm})"


@dataclass(slots=True)
class Walk:
    """What one walk saw: pods' processes elsewhere than `on_host` (numbers), sentences about what was passed over.

    `outside` are those in no pod's cgroup and not on the host's network either: their netns and folder.
    """

    total: int = 0
    in_pods: list[PodProcess] = field(default_factory=list)
    outside: list[tuple[NetnsId, str]] = field(default_factory=list)
    on_host: list[int] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


class _Place(NamedTuple):
    folder: str
    netns: NetnsId | None = None
    trouble: str = ""


class ProcessWalker:
    """Walks the processes under `proc_root`. Not for several threads at once."""

    def __init__(self, proc_root: str) -> None:
        self.proc_root = proc_root
        self._known: dict[int, tuple[int, ContainerCgroup]] = {}  # number -> start time, cgroup; of pods' only

    @property
    def remembered(self) -> int:
        """Of how many processes the cgroup is kept; all of them ran at the last walk."""
        return len(self._known)

    def walk(self) -> Walk:
        """Look at every process once. Raises NetnsError when the root does not tell the host's netns."""
        never = self._never_a_pods()
        seen = Walk()
        known = self._known
        self._known = {}
        for pid in processes.pids(self.proc_root):
            seen.total += 1
            try:
                place = _place(f"{self.proc_root}/{pid}")
                if place.netns in never:
                    seen.on_host.append(pid)
                elif process := self._identify(pid, place, known.get(pid)):
                    seen.in_pods.append(process)
                elif place.netns is not None:
                    seen.outside.append((place.netns, place.folder))
            except processes.GONE:
                continue  # it has ended, or is a zombie and has left its netns
            except (OSError, ValueError, CgroupError) as error:
                seen.passed_over.append(f"process {pid}: {error}")
        return seen

    def on_host(self, seen: Walk) -> Iterator[PodProcess]:
        """Yield those processes in pods' cgroups that are in the host's netns or in our own."""
        for pid in seen.on_host:
            try:
                process = self._identify(pid, _Place(f"{self.proc_root}/{pid}"), None)
            except (OSError, ValueError, CgroupError):
                continue
            if process is not None:
                yield process

    def _identify(self, pid: int, place: _Place, known: tuple[int, ContainerCgroup] | None) -> PodProcess | None:
        """Return the process, None when it is no pod's."""
        folder, netns, trouble = place
        stat = processes.read_stat(folder)
        if known is not None and known[0] == stat.start:
            cgroup: ContainerCgroup | None = known[1]
        else:
            cgroup = parse_cgroup(processes.read(f"{folder}/cgroup").decode("utf-8", "replace"))
        if cgroup is None:
            return None  # not remembered: a runtime starts a container's process outside and moves it in
        self._known[pid] = (stat.start, cgroup)
        return PodProcess(pid, stat.start, stat.comm, folder, cgroup, netns, trouble)

    def _never_a_pods(self) -> frozenset[NetnsId]:
        """Return the netns of the host and of this process."""
        found = []
        for folder in (f"{self.proc_root}/1", "/proc/self"):
            try:
                found.append(processes.namespace_of(folder))
            except OSError as error:
                raise NetnsError(
                    f"cannot tell the host's network namespace by {folder}/ns/net: {error.strerror}",
                    f"mount the host's /proc at {istio.HOST_PROC} and leave the agent the capability SYS_PTRACE",
                ) from None
        return frozenset(found)


def _place(folder: str) -> _Place:
    """Return where a process is, or a thread of it that goes on after the first one has ended.

    Raises FileNotFoundError or ProcessLookupError when it has none.
    """
    try:
        return _Place(folder, processes.namespace_of(folder))
    except processes.GONE:
        pass
    except OSError as error:
        return _Place(folder, None, error.strerror or str(error))
    for thread in os.listdir(f"{folder}/task"):
        try:
            return _Place(f"{folder}/task/{thread}", processes.namespace_of(f"{folder}/task/{thread}"))
        except OSError:
            continue
    raise ProcessLookupError(folder)
