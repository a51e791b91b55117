"""The real facade of ambient mode on a node of doubles, all in one thread: API, informers, runtime, netns, ztunnels.

Real are the records, the workers, the steps, the ZDS server and its sockets, and who owns which address of the set.
The clock moves only while nothing else can happen, so no test waits.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from lab.ztunnel.messages import HELLO, answer, receive
from tests.agent.zdsworld import open_descriptors

from meshcni.agent.ambient import Ambient
from meshcni.agent.ambientconfig import AmbientConfig
from meshcni.agent.hostside import HostConfig, HostSide
from meshcni.agent.metrics import Metrics
from meshcni.agent.netnssearch import NetnsNotFoundError
from meshcni.agent.podrecord import Netns, PodRecord
from meshcni.errors import ApplyError, KubeError, MeshCniError
from meshcni.host.netns import NetnsFacts
from meshcni.host.probeset import FakeProbeSet
from meshcni.host.sockets import listen_seqpacket
from meshcni.kube.reducer import Parsed, Store
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.eligibility import Policy
from meshcni.pods.model import Namespace, Pod
from meshcni.pods.podidentity import uids_of
from meshcni.pods.selectors import parse_enablement_selectors
from meshcni.protocols.zds import Add, Delete, Keep, Request, SnapshotSent, decode_request
from meshcni.rules.model import Backend, Family

Address = IPv4Address | IPv6Address

REDIRECTION = "ambient.istio.io/redirection"
MODE = "istio.io/dataplane-mode"
SELECTORS = [  # the chart's
    {"podSelector": {"matchLabels": {MODE: "ambient"}}},
    {
        "podSelector": {"matchExpressions": [{"key": MODE, "operator": "NotIn", "values": ["none"]}]},
        "namespaceSelector": {"matchLabels": {MODE: "ambient"}},
    },
]
ADD_SECONDS = 20.0
VERIFY_SECONDS = 300.0
MOMENT_SECONDS = 2.0  # more than what a pod waits for before it is let go of
LONG_SECONDS = 60.0  # any retry has come by then
BOTH = frozenset(Family)
V4 = frozenset({Family.V4})


class _OnlyWhenIdle(selectors.DefaultSelector):
    """Instead of waiting it puts the clock forward, and only when no socket has anything."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everything waits for something that cannot come any more"
            self.now += max(timeout, 0.0)
        return events


class FastLoop(asyncio.SelectorEventLoop):
    """A loop on which delays take no time."""

    def __init__(self) -> None:
        self._pace = _OnlyWhenIdle()
        super().__init__(self._pace)

    def time(self) -> float:
        return self._pace.now


@dataclass
class Inside:
    """A sandbox's netns. `opened` counts how often rules were taken out or away."""

    addresses: frozenset[Address]
    rules: AmbientParameters | str | None = None
    routes: bool = False
    opened: int = 0

    @property
    def is_clean(self) -> bool:
        return self.rules is None and not self.routes


class Sandbox:
    """A netns for one pod; the descriptor is the node's."""

    def __init__(self, *addresses: str) -> None:
        self.descriptor = os.memfd_create("netns")
        self.inode = os.fstat(self.descriptor).st_ino
        self.inside = Inside(frozenset(map(ip_address, addresses)))


class Ztunnel:
    """A ztunnel on the test's loop. `refused` UIDs are nacked, `silent` says nothing any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.proxies: dict[str, int] = {}  # by UID, the inode of the netns
        self.requests: list[Request] = []
        self.refused: set[str] = set()
        self.silent = False
        self.watched: Callable[[str, int], None] = lambda uid, inode: None
        self._named: set[str] | None = None  # None: the snapshot is over
        self._socket: socket.socket | None = None

    @property
    def is_connected(self) -> bool:
        return self._socket is not None

    def connect(self) -> None:
        """Connect and say hello; what is served goes on."""
        assert self._socket is None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._socket.connect(str(self.path))
        self._named = set()
        self._socket.send(HELLO)
        asyncio.get_running_loop().add_reader(self._socket, self._readable)

    def disconnect(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            packet = receive(self._socket)
        except ConnectionResetError:
            self.disconnect()
            return
        inodes = [os.fstat(descriptor).st_ino for descriptor in packet.descriptors]
        for descriptor in packet.descriptors:
            os.close(descriptor)
        if not packet.data:
            self.disconnect()
            return
        if self.silent:
            return
        request = decode_request(packet.data)
        self.requests.append(request)
        try:
            self._socket.send(answer(self._take(request, inodes)))
        except BrokenPipeError:
            self.disconnect()

    def _take(self, request: Request, inodes: list[int]) -> str:
        match request:
            case Add(uid=uid):
                self._name(uid)
                if uid in self.refused:
                    return "AddrInUse"
                others = [other for other, inode in self.proxies.items() if inode == inodes[0] and other != uid]
                assert not others, f"the netns of {others} for {uid} too"
                self.watched(uid, inodes[0])
                self.proxies[uid] = inodes[0]
            case Keep(uid=uid):
                assert self._named is not None, "a Keep after the snapshot ends the real one"
                self._name(uid)
            case Delete(uid=uid):
                self.proxies.pop(uid, None)
                if self._named is not None:
                    self._named.discard(uid)
            case SnapshotSent():
                assert self._named is not None, "a second SnapshotSent ends the real one"
                self.proxies = {uid: inode for uid, inode in self.proxies.items() if uid in self._named}
                self._named = None
        return ""

    def _name(self, uid: str) -> None:
        if self._named is not None:
            self._named.add(uid)


class Informer:
    """What is needed of an informer, over the real store."""

    def __init__(self) -> None:
        self.store: Store[Any] = Store()
        self.synced = asyncio.Event()

    def get(self, namespace: str, name: str) -> Any:
        return self.store.get((namespace, name))

    def items(self) -> tuple[Any, ...]:
        return self.store.values()


class Host(HostSide):
    """The real owner of addresses over a set without a kernel."""

    def __init__(self, node: Node) -> None:
        async def no_choice() -> None:
            return None

        config = HostConfig(Backend.NFTABLES, node.families, IPv4Address("1.1.1.1"), IPv6Address("::1"), "", "")
        super().__init__(config, no_choice)
        self._node = node

    async def _in_host(self, work: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        self._node.accident("host", None)
        result = work()
        self._node.accident("host done", None)
        return result

    def _set(self) -> FakeProbeSet:
        return self._node.probes

    async def _set_up(self) -> None:
        self.owners = await self._in_host(self._set().entries)

    def _mend_rules(self, uid: int | None, choice: object) -> tuple[str, ...]:
        return ()

    def _kubelet_uid(self) -> int | None:
        return None


class Inner:
    """Stands for host.ambient and for the programmer: what is done is done to the sandbox whose descriptor came."""

    config = SimpleNamespace(backend=Backend.NFTABLES, forced_variant="")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._here = Inside(frozenset())
        self._alone: dict[int, asyncio.Lock] = {}

    async def run(self, netns_fd: int, work: Callable[[None], Any], *, urgent: bool = True) -> Any:
        inode = os.fstat(netns_fd).st_ino
        async with self._alone.setdefault(inode, asyncio.Lock()):
            await asyncio.sleep(self._node.netns_seconds)
            if inode in self._node.stuck:
                await self._node.stuck[inode].wait()
            self._here = self._node.inside[inode]
            return work(None)

    def facts(self) -> NetnsFacts:
        return NetnsFacts(tuple(self._here.addresses))

    def prepare_routes(self, families: frozenset[Family]) -> bool:
        self._node.accident("routes", self._here)
        was_missing, self._here.routes = not self._here.routes, True
        self._node.accident("routes done", self._here)
        return was_missing

    def apply_pod(
        self,
        parameters: AmbientParameters,
        families: frozenset[Family],
        backend: Backend,
        *,
        force_iptables: str = "",
        choice: object = None,
        expected_addresses: Iterable[Address] = (),
        keep_on_failure: bool = False,
    ) -> None:
        here, expected = self._here, frozenset(expected_addresses)
        if expected and not expected & here.addresses:
            raise ApplyError(f"none of {sorted(map(str, expected))} is here")
        try:
            self._node.accident("rules", here)
        except MeshCniError:
            if not keep_on_failure:
                self._open(here)
            raise
        here.rules, here.routes = parameters, True
        self._node.accident("rules done", here)

    def verify_pod(self, parameters: AmbientParameters, *_: object, **__: object) -> tuple[str, ...]:
        self._node.accident("verify", self._here)
        return () if self._here.rules == parameters and self._here.routes else ("the rules are others",)

    def release_pod(self) -> None:
        self._node.accident("release", self._here)
        if self._here.rules is not None:
            self._here.opened += 1
            self._here.rules = None
        self._node.accident("release done", self._here)

    def remove_pod(self) -> None:
        self._node.accident("remove", self._here)
        self._open(self._here)
        self._node.accident("remove done", self._here)

    def _open(self, here: Inside) -> None:
        here.opened += here.rules is not None
        here.rules, here.routes = None, False


class Search:
    """Finds what the node runs, as agent.netnssearch does."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def find(self, record: PodRecord) -> Netns:
        await asyncio.sleep(0.02)
        found = self._look(record)
        if isinstance(found, str):
            raise NetnsNotFoundError(found, f"no network namespace: {found}")
        return found

    async def find_all(self, records: list[PodRecord]) -> dict[str, Netns]:
        await asyncio.sleep(0.02)
        found = {record.uid: self._look(record) for record in records}
        return {uid: netns for uid, netns in found.items() if isinstance(netns, Netns)}

    def _look(self, record: PodRecord) -> Netns | str:
        sandbox = next((self._node.runs[uid] for uid in uids_of(record.pod) if uid in self._node.runs), None)
        if sandbox is None:
            return "not-found"
        if not sandbox.inside.addresses & record.addresses:
            return "wrong-address"
        return Netns(os.dup(sandbox.descriptor))


class Node:
    """See the module. `runs`: by UID, what the runtime has made and whose processes can be found."""

    def __init__(self, folder: Path, families: frozenset[Family] = V4, without_ipv6: str = "") -> None:
        self.folder, self.families, self.without_ipv6 = folder, families, without_ipv6
        self.namespaces: dict[str, dict[str, str]] = {"shop": {MODE: "ambient"}, "plain": {}}
        self.defaults = AmbientParameters()
        self.pods: dict[tuple[str, str], Pod] = {}  # the API's
        self.version = 100
        self.watches = True  # changes reach the informer at once
        self.runs: dict[str, Sandbox] = {}
        self.inside: dict[int, Inside] = {}
        self.sandboxes: list[Sandbox] = []
        self.probes = FakeProbeSet(self.families)
        self.events: list[tuple[str, str, str]] = []
        self.patches: list[tuple[str, str | None]] = []
        self.netns_seconds = 0.001
        self.stuck: dict[int, asyncio.Event] = {}  # namespaces in which nothing ends before its event
        self.accident: Callable[[str, Inside | None], None] = lambda what, inside: None
        self.api_trouble: KubeError | None = None
        self.ztunnels: list[Ztunnel] = []
        self._serving: list[asyncio.Task[Any]] = []
        self.agent: Ambient

    # --- agent and ztunnel --------------------------------------------------------------------------------------------

    def start_agent(self, *, synced: bool = True) -> Ambient:
        """Start an agent with no memory; it hears of pods at once, of their being all when `synced`."""
        self.pod_informer, self.namespace_informer = Informer(), Informer()
        inner = Inner(self)
        config = AmbientConfig(
            Policy(ambient_enabled=True, enablement_selectors=parse_enablement_selectors(SELECTORS)),
            self.defaults,
            self.families,
            VERIFY_SECONDS,
            2.0,
            ("kata*",),
            self.without_ipv6,
        )
        self.agent = Ambient(
            config,
            pods=self.pod_informer,
            namespaces=self.namespace_informer,
            programmer=inner,  # type: ignore[arg-type]
            search=Search(self),  # type: ignore[arg-type]
            host=Host(self),
            api=self,
            warn=self._warn,
            metrics=Metrics(of_process=False),
            rules=inner,  # type: ignore[arg-type]
            facts=inner.facts,
        )
        listener = listen_seqpacket(self.folder / "ztunnel.sock", 0o600)
        self._serving = [asyncio.create_task(self.agent.ztunnel.run(listener)), asyncio.create_task(self.agent.run())]
        if synced:
            self.sync()
        return self.agent

    def sync(self) -> None:
        """The informers have read everything."""
        for name in self.namespaces:
            self.tell_namespace(name)
        for pod in self.pods.values():
            self.tell(pod)
        self.pod_informer.synced.set()
        self.namespace_informer.synced.set()

    async def stop_agent(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self.agent.close()

    async def restart(self) -> Ambient:
        """Another agent; ztunnels come back as they do."""
        again = [one for one in self.ztunnels if one.is_connected]
        await self.stop_agent()
        for one in again:
            one.disconnect()
        self.start_agent()
        for one in again:
            one.connect()
        return self.agent

    def ztunnel(self) -> Ztunnel:
        """A ztunnel that has connected."""
        made = Ztunnel(self.folder / "ztunnel.sock")
        made.connect()
        self.ztunnels.append(made)
        return made

    @property
    def served(self) -> dict[str, int]:
        """What the newest ztunnel serves."""
        return self.ztunnels[-1].proxies if self.ztunnels else {}

    # --- API ----------------------------------------------------------------------------------------------------------

    def pod(self, name: str, *ips: str, namespace: str = "shop", uid: str = "", **fields: Any) -> Pod:
        """Make or change a pod in the API; `annotations` and `labels` replace the ones that are there."""
        known = self.pods.get((namespace, name))
        if known is None or (uid and known.uid != uid):
            known = Pod(namespace, name, uid or f"uid-{name}", phase="Running", service_account="default")
        self.version += 1
        fields |= {"ips": ips} if ips else {}
        pod = replace(known, resource_version=str(self.version), **fields)
        self.pods[namespace, name] = pod
        if self.watches:
            self.tell(pod)
        return pod

    def delete(self, name: str, namespace: str = "shop") -> None:
        pod = self.pods.pop((namespace, name))
        if self.watches:
            for change in self.pod_informer.store.remove(_parsed(pod)):
                self.agent.pod_changed(change)

    def tell(self, pod: Pod) -> None:
        """The informer of pods hears of a pod as it is, or was."""
        if hasattr(self, "agent"):
            for change in self.pod_informer.store.put(_parsed(pod)):
                self.agent.pod_changed(change)

    def label_namespace(self, name: str, **labels: str) -> None:
        """Replace its labels; `mode` is the one that selects."""
        self.namespaces[name] = {MODE if key == "mode" else key: value for key, value in labels.items()}
        self.tell_namespace(name)

    def tell_namespace(self, name: str) -> None:
        namespace = Namespace(name, MappingProxyType(dict(self.namespaces[name])))
        for change in self.namespace_informer.store.put(Parsed(("", name), name, namespace)):
            self.agent.namespace_changed(change)

    async def get_pod(self, namespace: str, name: str) -> Pod:
        """See steps.PatchesRedirection."""
        if self.api_trouble is not None:
            raise self.api_trouble
        pod = self.pods.get((namespace, name))
        if pod is None:
            raise KubeError(404, f"pods {name!r} not found")
        return pod

    async def patch_redirection(self, namespace: str, name: str, uid: str, value: str | None) -> Pod:
        """See steps.PatchesRedirection."""
        self.patches.append((name, value))
        await asyncio.sleep(0.005)
        self.accident("api", None)
        if self.api_trouble is not None:
            raise self.api_trouble
        pod = self.pods.get((namespace, name))
        if pod is None:
            raise KubeError(404, f"pods {name!r} not found")
        if pod.uid != uid:
            raise KubeError(409, f"the UID in the precondition ({uid}) does not match ({pod.uid})")
        annotations = {key: text for key, text in pod.annotations.items() if key != REDIRECTION}
        if value is not None:
            annotations[REDIRECTION] = value
        if annotations != dict(pod.annotations):
            self.version += 1
            pod = replace(pod, annotations=annotations, resource_version=str(self.version))
            self.pods[namespace, name] = pod
            if self.watches:
                asyncio.get_running_loop().call_soon(self.tell, pod)
        self.accident("api done", None)
        return pod

    async def _warn(self, pod: Pod, reason: str, text: str) -> None:
        self.events.append((pod.name, reason, text))

    def annotation(self, name: str, namespace: str = "shop") -> str:
        return self.pods[namespace, name].annotations.get(REDIRECTION, "")

    # --- runtime ------------------------------------------------------------------------------------------------------

    def sandbox(self, *addresses: str) -> Sandbox:
        made = Sandbox(*addresses)
        self.sandboxes.append(made)
        self.inside[made.inode] = made.inside
        return made

    def running(self, name: str, *ips: str, namespace: str = "shop", uid: str = "", **fields: Any) -> Sandbox:
        """A pod that runs, in a sandbox that nobody told us of."""
        sandbox = self.runs[uid or f"uid-{name}"] = self.sandbox(*ips)
        self.pod(name, *ips, namespace=namespace, uid=uid, **fields)
        return sandbox

    def enrolled(self, name: str, *ips: str, annotation: str = "enabled", **fields: Any) -> Sandbox:
        """A pod that an earlier agent has enrolled."""
        annotations = {REDIRECTION: annotation} | fields.pop("annotations", {})
        sandbox = self.runs[f"uid-{name}"] = self.sandbox(*ips)
        sandbox.inside.rules, sandbox.inside.routes = self.defaults, True
        if not hasattr(self, "agent"):
            self.probes.held |= {ip_address(ip): f"uid-{name}" for ip in ips}
        self.pod(name, *ips, annotations=annotations, **fields)
        return sandbox

    def uid(self, name: str, namespace: str = "shop") -> str:
        return self.pods[namespace, name].uid

    async def add(self, name: str, sandbox: Sandbox, *, seconds: float = ADD_SECONDS, namespace: str = "shop") -> None:
        """The runtime's ADD; when it succeeds the pod runs."""
        pod = self.pods[namespace, name]
        addresses = tuple(sandbox.inside.addresses)
        await self.agent.add(pod, sandbox.descriptor, addresses, f"/run/netns/{name}", seconds)
        assert sandbox.inside.rules is not None, "an ADD was answered without rules"
        self.runs[pod.uid] = sandbox

    async def started(self, name: str, *ips: str, **fields: Any) -> Sandbox:
        """A pod that an ADD has enrolled, and that the kubelet has told the API of."""
        self.pod(name, **fields)
        sandbox = self.sandbox(*ips)
        await self.add(name, sandbox)
        self.pod(name, *ips)
        await settle()
        return sandbox

    # --- looking ------------------------------------------------------------------------------------------------------

    def record(self, name: str, namespace: str = "shop") -> PodRecord | None:
        return self.agent.records.get(self.uid(name, namespace))

    def held_by(self, uid: str) -> set[str]:
        return {str(address) for address, owner in self.probes.held.items() if owner == uid}

    def is_enrolled(self, name: str, sandbox: Sandbox) -> bool:
        """Kernel, ztunnel, set and annotation, all of them."""
        uid = self.uid(name)
        record = self.record(name)
        return (
            record is not None
            and sandbox.inside.rules == record.parameters
            and sandbox.inside.routes
            and self.served.get(uid) == sandbox.inode
            and self.held_by(uid)
            == {str(one) for one in sandbox.inside.addresses if Family(one.version) in self.families}
            and self.annotation(name) == "enabled"
        )

    def is_out(self, uid: str, sandbox: Sandbox | None) -> bool:
        """Nothing of it anywhere."""
        annotations = [pod.annotations for pod in self.pods.values() if pod.uid == uid]
        return (
            (sandbox is None or sandbox.inside.is_clean)
            and all(uid not in one.proxies for one in self.ztunnels if one.is_connected)
            and not self.held_by(uid)
            and all(REDIRECTION not in one for one in annotations)
        )

    def close(self) -> None:
        for sandbox in self.sandboxes:
            os.close(sandbox.descriptor)


def _parsed(pod: Pod) -> Parsed[Pod]:
    return Parsed((pod.namespace, pod.name), pod.uid, pod)


async def settle(seconds: float = MOMENT_SECONDS) -> None:
    """Let so much time pass."""
    await asyncio.sleep(seconds)


def run(folder: Path, body: Callable[[Node], Awaitable[None]], **settings: Any) -> None:
    """Run a test's coroutine on a node; afterwards nothing may be left open, and no fault may have gone unheard."""

    async def main() -> None:
        before = open_descriptors()
        faults: list[Mapping[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        node = Node(folder, **settings)
        try:
            await body(node)
        finally:
            if hasattr(node, "agent"):
                await node.stop_agent()
            for one in node.ztunnels:
                one.disconnect()
            node.close()
        assert faults == [], faults
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert open_descriptors() == before

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(main())


@contextmanager
def failing(node: Node, *what: str) -> Iterator[None]:
    """Let these things fail."""

    def accident(happening: str, _inside: Inside | None) -> None:
        if happening in what:
            raise ApplyError(f"{happening} fails")

    before, node.accident = node.accident, accident
    try:
        yield
    finally:
        node.accident = before
