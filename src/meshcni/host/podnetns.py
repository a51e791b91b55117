"""Finds the network namespaces of pods that run already, by the processes of the host.

A process tells its pod by its cgroup, and its netns by /proc/PID/ns/net. Neither proves that the netns is the pod's: a
privileged container can enter others, and a process number can change hands between two looks. So a netns is a pod's
only when it holds an address of the pod, is neither the host's nor our own, and the process that led to it is still
the same after the netns was opened. Upstream: cni/pkg/nodeagent/podcgroupns_linux.go.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

from meshcni.errors import NetnsError
from meshcni.host import processes
from meshcni.host.netns import enter, open_netns
from meshcni.host.podprocesses import NetnsId, PodProcess, ProcessWalker, Walk
from meshcni.host.rtnetlink import Rtnetlink
from meshcni.pods.cgrouppath import uid_key
from meshcni.pods.sandboxes import Sandbox, is_runtime_process, needs_command, sandbox_of_process

Address = IPv4Address | IPv6Address

SANDBOXED = "sandboxed"
UNREADABLE = "unreadable"
WRONG_ADDRESS = "wrong-address"
TAKEN = "taken"
HOST_NETNS = "host-netns"
NOT_FOUND = "not-found"
NO_ADDRESS = "no-address"
_WEIGHTIEST_FIRST = (SANDBOXED, UNREADABLE, WRONG_ADDRESS, TAKEN, HOST_NETNS, NOT_FOUND)
_MAX_NAMED = 4  # of addresses or processes in a sentence


@dataclass(frozen=True, slots=True)
class Wanted:
    """A pod to find: its UIDs (a static pod has two: of its API object and of its manifest) and its addresses.

    `container_ids` (the API's, without `cri-o://` and the like) find it where the runtime's cgroups name no pod.
    """

    uids: tuple[str, ...]
    addresses: tuple[Address, ...]
    container_ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Found:
    """A pod's network namespace: an open descriptor, which the caller owns, and the process that led to it."""

    descriptor: int
    device: int
    inode: int
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is no netns for a pod: `code` for machines, `text` with the evidence for people.

    not-found: it has no process; no-address: none to recognise its netns by; wrong-address: its processes are where its
    addresses are not; taken: that netns is another pod's of the same call; host-netns: it is on the host's network;
    sandboxed: rules in its netns would not reach its traffic; unreadable: its netns may not be read or entered.
    """

    code: str
    text: str


@dataclass(slots=True)
class _Search:
    """What is known of one wanted pod."""

    pod: Wanted
    by_netns: dict[NetnsId, list[PodProcess]] = field(default_factory=dict)  # each oldest first
    on_host: list[PodProcess] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)

    @property
    def has_processes(self) -> bool:
        """Whether any was seen that tells something about the pod."""
        return bool(self.by_netns or self.on_host or self.refusals)

    def refusal(self) -> Refused:
        """Return the weightiest refusal, with the texts of all of the same code."""
        code = next(code for code in _WEIGHTIEST_FIRST if any(one.code == code for one in self.refusals))
        texts = dict.fromkeys(one.text for one in self.refusals if one.code == code)
        return Refused(code, "; ".join(list(texts)[:_MAX_NAMED]))


class NetnsFinder:
    """Looks pods up under a procfs root; remembers which pod a process belongs to, as long as the process lives.

    `open_file` opens a netns file as `netns.open_netns` does.
    """

    def __init__(self, proc_root: str, open_file: Callable[[str], int] = open_netns) -> None:
        self._walker = ProcessWalker(proc_root)
        self._open = open_file
        self._lock = threading.Lock()

    @property
    def remembered(self) -> int:
        """Of how many processes the pod is remembered; never more than ran at the last walk."""
        return self._walker.remembered

    def find(self, wanted: Mapping[str, Wanted]) -> dict[str, Found | Refused]:
        """Look for all of `wanted` in one walk and answer under the same keys; blocks.

        Raises NetnsError when the root does not tell the host's network namespace, and OSError when it is none.
        """
        addressed = {key: pod for key, pod in wanted.items() if pod.addresses}
        results: dict[str, Found | Refused] = {
            key: Refused(NO_ADDRESS, "it has no address yet, by which its network namespace could be recognised")
            for key in wanted.keys() - addressed.keys()
        }
        if addressed:
            searches = self._look(addressed)
            for search in searches.values():
                _refuse_virtual_machine(search, self._walker.proc_root)
            # The thread enters one netns after the other and ends: the caller's must stay where it is.
            with ThreadPoolExecutor(1, "netns-finder") as thread:
                found = thread.submit(self._claim_all, searches).result()
            results |= found
            results |= {key: search.refusal() for key, search in searches.items() if key not in found}
        return results

    def _look(self, wanted: Mapping[str, Wanted]) -> dict[str, _Search]:
        """Walk once and sort what is seen by wanted pod; a search without a netns has a refusal afterwards."""
        searches = {key: _Search(pod) for key, pod in wanted.items()}
        by_uid = {uid_key(uid): search for search in searches.values() for uid in search.pod.uids}
        by_container = {name: search for search in searches.values() for name in search.pod.container_ids}

        def search_of(process: PodProcess) -> _Search | None:
            if process.cgroup.pod_uid is None:
                return by_container.get(process.cgroup.container_id)
            return by_uid.get(uid_key(process.cgroup.pod_uid))

        with self._lock:
            seen = self._walker.walk()
            for process in seen.in_pods:
                search = search_of(process)
                if search is None:
                    continue
                if process.netns is None:
                    text = f"the network namespace of its process {process} cannot be read: {process.trouble}"
                    search.refusals.append(Refused(UNREADABLE, text))
                else:
                    search.by_netns.setdefault(process.netns, []).append(process)
            if not all(search.has_processes for search in searches.values()):
                for process in self._walker.on_host(seen):
                    search = search_of(process)
                    if search is not None:
                        search.on_host.append(process)
        for search in searches.values():
            for group in search.by_netns.values():
                group.sort(key=lambda process: (process.start, process.pid))
            _explain_absence(search, seen, self._walker.proc_root)
        return searches

    def _claim_all(self, searches: Mapping[str, _Search]) -> dict[str, Found | Refused]:
        """Give each pod the netns of its oldest process that holds an address of it; runs on a thread of its own."""
        candidates = [
            (group[0].start, group[0].pid, key, netns)
            for key, search in searches.items()
            for netns, group in search.by_netns.items()
        ]
        found: dict[str, Found | Refused] = {}
        owner: dict[NetnsId, str] = {}
        try:
            for _start, _pid, key, netns in sorted(candidates):
                if key in found:
                    continue
                search = searches[key]
                if netns in owner:
                    text = f"its processes {_listed(search.by_netns[netns])} are in the netns of {owner[netns]}"
                    search.refusals.append(Refused(TAKEN, text))
                    continue
                outcome = self._claim(search.pod, netns, search.by_netns[netns])
                if isinstance(outcome, Found):
                    found[key], owner[netns] = outcome, key
                else:
                    search.refusals.append(outcome)
        except BaseException:
            for one in found.values():
                if isinstance(one, Found):
                    os.close(one.descriptor)
            raise
        return found

    def _claim(self, pod: Wanted, netns: NetnsId, group: list[PodProcess]) -> Found | Refused:
        for process in group:
            try:
                descriptor = self._open(f"{process.folder}/ns/net")
            except NetnsError as error:
                if process.is_same():
                    return Refused(UNREADABLE, f"the network namespace of its process {process}: {error}")
                continue
            try:
                outcome = self._judge(pod, netns, process, group, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if not isinstance(outcome, Found):
                os.close(descriptor)
            if outcome is not None:
                return outcome
        return Refused(NOT_FOUND, f"its processes {_listed(group)} ended while they were looked at")

    def _judge(
        self, pod: Wanted, netns: NetnsId, process: PodProcess, group: list[PodProcess], descriptor: int
    ) -> Found | Refused | None:
        """Decide about an open netns; None when it is no longer the one that was looked at."""
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != netns or not process.is_same():
            return None
        try:
            enter(descriptor)
            addresses = _addresses_here()
        except (NetnsError, OSError) as error:
            return Refused(UNREADABLE, f"the network namespace of its process {process}: {error}")
        if addresses & {_unmapped(address) for address in pod.addresses}:
            return Found(descriptor, *netns, process.pid)
        for other in group:
            if sandbox := _sandbox_of(other):
                return Refused(SANDBOXED, sandboxed(sandbox, other))
        here = _listed(one for one in sorted(addresses, key=_order) if not one.is_loopback) or "no address"
        where = f"its processes {_listed(group)} are in a netns (inode {netns[1]})"
        return Refused(WRONG_ADDRESS, f"{where} with {here}, not {_listed(pod.addresses)}")


def _refuse_virtual_machine(search: _Search, proc_root: str) -> None:
    """Drop all candidates of a pod that is a virtual machine, whose netns has the pod's addresses but not its traffic.

    A pod may run a hypervisor in a container, as KubeVirt's do, and is a plain one; where the pod itself is a virtual
    machine, the hypervisor is what was started first, and by the runtime: outside of every container.
    """
    everything = [process for group in search.by_netns.values() for process in group]
    if not everything:
        return
    oldest = min(everything, key=lambda process: (process.start, process.pid))
    sandbox = _sandbox_of(oldest)
    if sandbox is not None and sandbox.keeps_addresses and not _is_in_container(oldest, proc_root):
        search.refusals.append(Refused(SANDBOXED, sandboxed(sandbox, oldest)))
        search.by_netns.clear()


def _sandbox_of(process: PodProcess) -> Sandbox | None:
    return sandbox_of(process.comm, process.folder)


def sandbox_of(comm: str, folder: str) -> Sandbox | None:
    """Return the sandbox that the process is part of whose name is `comm` and whose procfs folder is `folder`."""
    command = ""
    if needs_command(comm):
        try:
            command = next(iter(processes.read_arguments(folder)), "")
        except OSError:
            pass  # it ended meanwhile
    return sandbox_of_process(comm, command)


def _is_in_container(process: PodProcess, proc_root: str) -> bool:
    """Whether the process has a PID namespace other than the host's; False when that cannot be told."""
    try:
        return processes.namespace_of(process.folder, "pid") != processes.namespace_of(f"{proc_root}/1", "pid")
    except OSError:
        return False


def _explain_absence(search: _Search, seen: Walk, proc_root: str) -> None:
    if search.by_netns or search.refusals:
        return
    for process in search.on_host:
        if sandbox := _sandbox_of(process):
            search.refusals.append(Refused(SANDBOXED, sandboxed(sandbox, process)))
            return
    if plain := [process for process in search.on_host if not is_runtime_process(process.comm)]:
        text = f"its processes {_listed(plain)} are in the network namespace of the host or of the agent"
        search.refusals.append(Refused(HOST_NETNS, text))
        return
    text = f"none of the {seen.total} processes under {proc_root} is in a cgroup of pod {' or '.join(search.pod.uids)}"
    if seen.passed_over:
        text += f"; {len(seen.passed_over)} could not be looked at, such as {seen.passed_over[0]}"
    search.refusals.append(Refused(NOT_FOUND, text))


def _addresses_here() -> set[Address]:
    """Return the addresses of the calling thread's netns."""
    with Rtnetlink() as netlink:
        packed = [entry.packed for entry in netlink.addresses()]
    return {_unmapped(ip_address(one)) for one in packed if len(one) in (4, 16)}


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _order(address: Address) -> tuple[bool, int, int]:
    return address.is_link_local, address.version, int(address)


def sandboxed(sandbox: Sandbox, process: object) -> str:
    """Say why a pod is refused whose `process` gives its sandbox away."""
    return f"it runs in {sandbox.name} (process {process}), and rules in its netns would not reach its traffic"


def _listed(values: Iterable[object]) -> str:
    texts = [str(value) for value in values]
    more = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
    return ", ".join(texts[:_MAX_NAMED]) + more
