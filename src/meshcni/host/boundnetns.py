"""Finds the network namespace of a pod without a process, among the files that the runtime has bound namespaces to.

CRI-O without an infra container (`drop_infra_ctr`) has no process in a pod's namespace while its only container waits
to be started again, which is just when the pod is to be repaired. A file's name tells no pod, so the namespace is known
by its addresses alone: it must hold every one of the pod's, no other namespace may, and no process of another pod may
be in it. Nor may a hypervisor: a runtime may keep the processes of a virtual machine out of the pod's cgroup, and its
RuntimeClass may have any name. Runtimes bind namespaces below /var/run/netns, which the chart mounts at
/host/var/run/netns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from meshcni.errors import NetnsError
from meshcni.host import processes
from meshcni.host.netns import enter, facts, open_netns
from meshcni.host.podnetns import (
    NOT_FOUND,
    SANDBOXED,
    TAKEN,
    Address,
    Found,
    Refused,
    Wanted,
    sandbox_of,
    sandboxed,
)
from meshcni.host.podprocesses import NetnsId, ProcessWalker
from meshcni.pods.cgrouppath import uid_key


@dataclass(frozen=True, slots=True)
class _Bound:
    """One namespace, open; the search owns the descriptor."""

    path: str
    descriptor: int
    id: NetnsId


@dataclass(slots=True)
class _Inhabitants:
    """Who is where: the pods whose processes are in a namespace, and the folders of processes that are no pod's.

    `never` are the namespaces of the host and of this process.
    """

    never: frozenset[NetnsId]
    pods: dict[NetnsId, set[str]] = field(default_factory=dict)
    others: dict[NetnsId, list[str]] = field(default_factory=dict)


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
        inhabitants = self._inhabitants()
        # The thread enters one netns after the other and ends: the caller's must stay where it is.
        with ThreadPoolExecutor(1, "bound-netns") as thread:
            return thread.submit(self._look, wanted, inhabitants).result()

    def _inhabitants(self) -> _Inhabitants:
        walk = ProcessWalker(self._proc_root).walk()
        found = _Inhabitants(frozenset(map(processes.namespace_of, (f"{self._proc_root}/1", "/proc/self"))))
        for process in walk.in_pods:
            if process.netns is not None:
                who = process.cgroup.pod_uid or process.cgroup.container_id
                found.pods.setdefault(process.netns, set()).add(who)
        for netns, folder in walk.outside:
            found.others.setdefault(netns, []).append(folder)
        return found

    def _look(self, wanted: Mapping[str, Wanted], inhabitants: _Inhabitants) -> dict[str, Found | Refused]:
        seen = _Seen()
        holding: dict[str, list[_Bound]] = {key: [] for key in wanted}
        kept: set[int] = set()
        try:
            for bound in self._namespaces(inhabitants.never, seen):
                try:
                    keys = _holders(bound, wanted, seen)
                    for key in keys:
                        holding[key].append(bound)
                        kept.add(bound.descriptor)
                finally:
                    if bound.descriptor not in kept:
                        os.close(bound.descriptor)
            return {key: self._judge(key, pod, holding, inhabitants, seen) for key, pod in wanted.items()}
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
        inhabitants: _Inhabitants,
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
        others = {who for who in inhabitants.pods.get(bound.id, ()) if uid_key(who) not in own} - pod.container_ids
        others |= {other for other, found in holding.items() if other != key and bound in found}
        if others:
            return Refused(TAKEN, f"{paths} holds {addresses}, and is the network namespace of {sorted(others)[0]}")
        if machine := _virtual_machine(inhabitants.others.get(bound.id, ())):
            return Refused(SANDBOXED, machine)
        return Found(os.dup(bound.descriptor), *bound.id, 0)


def _virtual_machine(folders: Iterable[str]) -> str:
    """Why rules in the netns of these processes hold nothing, empty when they do."""
    for folder in folders:
        try:
            comm = processes.read_comm(folder)
        except OSError:
            continue  # it ended meanwhile
        sandbox = sandbox_of(comm, folder)
        if sandbox is not None and sandbox.keeps_addresses:
            return sandboxed(sandbox, f"{os.path.basename(folder)} ({comm})")
    return ""


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
