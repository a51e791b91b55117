"""Finds the network namespace of a pod without a process, among the files that the runtime has bound namespaces to.

CRI-O without an infra container (`drop_infra_ctr`) has no process in a pod's namespace while its only container waits
to be started again, which is just when the pod is to be repaired. A file's name tells no pod, so the namespace is known
by its addresses alone: it must hold every one of the pod's, no other namespace may, and no process of another pod may
be in it. Runtimes bind namespaces below /var/run/netns, which the chart mounts at /host/var/run/netns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from meshcni.errors import NetnsError
from meshcni.host import processes
from meshcni.host.netns import enter, facts, open_netns
from meshcni.host.podnetns import NOT_FOUND, TAKEN, Address, Found, Refused, Wanted
from meshcni.host.podprocesses import NetnsId, ProcessWalker
from meshcni.pods.cgrouppath import uid_key


@dataclass(frozen=True, slots=True)
class _Bound:
    """One namespace, open; the search owns the descriptor."""

    path: str
    descriptor: int
    id: NetnsId


@dataclass(slots=True)
class _Seen:
    """What a search has looked at: how many namespaces, which files were none for us."""

    namespaces: int = 0
    unreadable: list[str] = field(default_factory=list)


class BoundNetns:
    """Looks into `folder`; `proc_root` tells whose processes are where."""

    def __init__(self, proc_root: str, folder: str, open_file: Callable[[str], int] = open_netns) -> None:
        self._proc_root = proc_root
        self._folder = folder
        self._open = open_file

    def find(self, wanted: Mapping[str, Wanted]) -> dict[str, Found | Refused]:
        """Look for all of `wanted` and answer under the same keys; blocks. The caller owns what is found.

        Raises NetnsError when the root does not tell the host's network namespace, and OSError when it is none.
        """
        if not os.path.isdir(self._folder):
            text = f"no folder of network namespaces is mounted at {self._folder}, to look for one without a process"
            return dict.fromkeys(wanted, Refused(NOT_FOUND, text))
        never, occupants = self._occupants()
        # The thread enters one netns after the other and ends: the caller's must stay where it is.
        with ThreadPoolExecutor(1, "bound-netns") as thread:
            return thread.submit(self._look, wanted, never, occupants).result()

    def _occupants(self) -> tuple[frozenset[NetnsId], dict[NetnsId, set[str]]]:
        """The namespaces of the host and of this process, and the pods whose processes are in each of the others."""
        walk = ProcessWalker(self._proc_root).walk()
        occupants: dict[NetnsId, set[str]] = {}
        for process in walk.in_pods:
            if process.netns is not None:
                who = process.cgroup.pod_uid or process.cgroup.container_id
                occupants.setdefault(process.netns, set()).add(who)
        return frozenset(map(processes.namespace_of, (f"{self._proc_root}/1", "/proc/self"))), occupants

    def _look(
        self, wanted: Mapping[str, Wanted], never: frozenset[NetnsId], occupants: Mapping[NetnsId, set[str]]
    ) -> dict[str, Found | Refused]:
        seen = _Seen()
        holding: dict[str, list[_Bound]] = {key: [] for key in wanted}
        kept: set[int] = set()
        try:
            for bound in self._namespaces(never, seen):
                try:
                    keys = _holders(bound, wanted, seen)
                    for key in keys:
                        holding[key].append(bound)
                        kept.add(bound.descriptor)
                finally:
                    if bound.descriptor not in kept:
                        os.close(bound.descriptor)
            return {key: self._judge(key, pod, holding, occupants, seen) for key, pod in wanted.items()}
        finally:
            for descriptor in kept:
                os.close(descriptor)

    def _namespaces(self, never: frozenset[NetnsId], seen: _Seen) -> Iterator[_Bound]:
        """Every namespace once; whoever iterates owns the descriptors."""
        known: set[NetnsId] = set(never)
        for path in _files(self._folder):
            try:
                descriptor = self._open(path)
            except NetnsError as error:
                seen.unreadable.append(f"{path}: {error.message}")
                continue
            status = os.fstat(descriptor)
            netns = (status.st_dev, status.st_ino)
            if netns in known:
                os.close(descriptor)
                continue
            known.add(netns)
            seen.namespaces += 1
            yield _Bound(path, descriptor, netns)

    def _judge(
        self,
        key: str,
        pod: Wanted,
        holding: Mapping[str, list[_Bound]],
        occupants: Mapping[NetnsId, set[str]],
        seen: _Seen,
    ) -> Found | Refused:
        candidates = holding[key]
        addresses = ", ".join(map(str, pod.addresses))
        if not candidates:
            text = f"none of the {seen.namespaces} network namespaces in {self._folder} holds {addresses}"
            if seen.unreadable:
                text += f"; {len(seen.unreadable)} files are none for us, such as {seen.unreadable[0]}"
            return Refused(NOT_FOUND, text)
        paths = ", ".join(one.path for one in candidates)
        if len(candidates) > 1:
            return Refused(TAKEN, f"{len(candidates)} network namespaces hold {addresses}: {paths}")
        (bound,) = candidates
        own = {uid_key(uid) for uid in pod.uids}
        others = {who for who in occupants.get(bound.id, ()) if uid_key(who) not in own} - pod.container_ids
        others |= {other for other, found in holding.items() if other != key and bound in found}
        if others:
            return Refused(TAKEN, f"{paths} holds {addresses}, and is the network namespace of {sorted(others)[0]}")
        return Found(os.dup(bound.descriptor), *bound.id, 0)


def _holders(bound: _Bound, wanted: Mapping[str, Wanted], seen: _Seen) -> list[str]:
    """The keys of the pods whose addresses are all there; the calling thread is in that netns afterwards."""
    try:
        enter(bound.descriptor)
        here: frozenset[Address] = frozenset(facts().addresses)
    except (NetnsError, OSError) as error:
        seen.unreadable.append(f"{bound.path}: {error}")
        return []
    return [key for key, pod in wanted.items() if pod.addresses and here.issuperset(pod.addresses)]


def _files(folder: str) -> Iterator[str]:
    return (f"{folder}/{name}" for name in sorted(os.listdir(folder)))
