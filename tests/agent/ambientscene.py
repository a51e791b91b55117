"""A small node in ambient mode: the scene, pods with netns of their own, stand-ins for ztunnel, a procfs of the host.

What is in a netns is told by the system's own tools, what the API server has by the double.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.apiserver.server import RequestRecord
from lab.namespaces import call_in_netns
from lab.objects import ambient_pod
from lab.ztunnel.client import Program
from tests.agent.scene import PATIENCE_SECONDS, Agent, Scene, wait_until
from tests.kernel.processworlds import FileWorld, PodPaths
from tests.kernel.world import Netns, state

from meshcni import istio
from meshcni.protocols.podadd import AddReply

NFT_TABLES = {"istio-ambient-nat", "istio-ambient-mangle", "istio-ambient-raw"}
ZTUNNEL_WAIT = {"AMBIENT_ZTUNNEL_WAIT_SECONDS": "1"}
VARIANTS: dict[str, dict[str, str]] = {
    "nftables": {},
    "nft": {"NATIVE_NFTABLES": "false", "FORCE_IPTABLES_BINARY": "nft"},
    "legacy": {"NATIVE_NFTABLES": "false", "FORCE_IPTABLES_BINARY": "legacy"},
}
LISTS = ("/api/v1/pods", "/api/v1/namespaces")
API_CONNECTIONS = 8  # that an agent keeps open, the more the more happened at once


@dataclass
class AmbientPod:
    """A pod as the API has it, and its netns."""

    obj: dict[str, Any]
    path: str
    netns: Netns
    address: str

    @property
    def uid(self) -> str:
        return str(self.obj["metadata"]["uid"])

    @property
    def name(self) -> str:
        return str(self.obj["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.obj["metadata"]["namespace"])

    @property
    def inode(self) -> int:
        return os.fstat(self.netns.fd).st_ino

    @property
    def api_path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"


class AmbientScene:
    """Everything of one ambient node; `procfs` is what the agent takes for the host's /proc."""

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        self.scene, self.api = scene, scene.api
        self._stack = stack
        folder = scene.directory / "proc"
        folder.mkdir()
        self.procfs = FileWorld(folder)
        stack.callback(self.procfs.close)
        self._addresses = (f"10.1.{high}.{low}" for high in range(16) for low in range(2, 250))

    # --- programs -----------------------------------------------------------------------------------------------------

    def start(self, *arguments: str, **environment: str) -> Agent:
        """The agent in ambient mode."""
        return self.scene.start(*arguments, ambient=True, **({"HOST_PROC_DIR": self.procfs.root} | environment))

    def ready(self, *arguments: str, **environment: str) -> Agent:
        """The agent, ready."""
        agent = self.start(*arguments, **environment)
        agent.wait_ready()
        return agent

    def ztunnel(self, *arguments: str, name: str = "ztunnel") -> Program:
        """A stand-in, which connects as soon as there is a socket; gone with the scene."""
        program = Program(self.scene.directory, self.scene.ztunnel_socket, *arguments, name=name)
        self._stack.push(program)
        return program

    def connected(self, *arguments: str, name: str = "ztunnel") -> Program:
        """A stand-in that has its snapshot."""
        program = self.ztunnel(*arguments, name=name)
        program.wait("its snapshot", lambda state: bool(state["snapshot"]))
        return program

    def serving(self, ztunnel: Program, **environment: str) -> Agent:
        """The agent, ready, with a ztunnel that has its snapshot."""
        agent = self.ready(**environment)
        ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
        return agent

    @contextmanager
    def lists_refused(self, *paths: str) -> Iterator[None]:
        """Lists of these paths fail, everything else is answered."""
        for path in paths:
            for watch in (False, True):
                self.api.do(
                    lambda server, path=path, watch=watch: server.fault(
                        "status", prefix=path, method="GET", watch=watch, status=500, count=-1
                    )
                )
        yield
        self.api.do(lambda server: server.clear_faults())

    # --- pods ---------------------------------------------------------------------------------------------------------

    def enrolled_pods(self, count: int, ztunnel: Program) -> list[AmbientPod]:
        """Pods that an agent enrolled before it was killed."""
        first = self.serving(ztunnel)
        pods = [self.running_pod(f"cart-{number}") for number in range(count)]
        for pod in pods:
            wait_state(first, pod, "enrolled")
            self.wait_annotation(pod, "enabled")
        first.kill()
        return pods

    def new_pod(self, name: str = "cart", namespace: str = "shop", *, known: bool = True, **fields: Any) -> AmbientPod:
        """A pod whose sandbox is being made: no address in the API yet. `known` False: the API has not heard of it."""
        obj = ambient_pod(namespace, name, **fields)
        return self._with_netns(self.scene.add_pod(obj) if known else obj)

    def many_pods(self, count: int, **fields: Any) -> list[AmbientPod]:
        """Pods as `new_pod` makes them, whose netns have no name: hundreds of them are made in no time."""
        made = []
        for number in range(count):
            netns, address = Netns(), next(self._addresses)
            self._stack.callback(netns.close)
            link = "link add eth0 type veth peer name peer0"
            netns.ip("link set lo up", link, "link set eth0 up", f"addr add {address}/24 dev eth0")
            obj = self.scene.add_pod(ambient_pod("shop", f"cart-{number}", **fields))
            made.append(AmbientPod(obj, f"/proc/{os.getpid()}/fd/{netns.fd}", netns, address))
        return made

    def running_pod(
        self, name: str = "cart", namespace: str = "shop", *, labelled: bool = True, **fields: Any
    ) -> AmbientPod:
        """A pod that runs: with an address in the API and a process in the host's procfs."""
        address = next(self._addresses)
        obj = ambient_pod(namespace, name, ips=(address,), **fields)
        if not labelled:
            del obj["metadata"]["labels"][istio.DATAPLANE_MODE]
        pod = self._with_netns(obj, address)
        self.run_process(pod)
        pod.obj = self.scene.add_pod(obj)
        return pod

    def run_process(self, pod: AmbientPod) -> int:
        """Give a pod a process; returns its number."""
        return self.procfs.start(PodPaths(pod.uid).systemd("ab" * 32), pod.netns)

    def new_sandbox(self, pod: AmbientPod) -> AmbientPod:
        """The same pod in another netns, with another address."""
        return self._with_netns(pod.obj)

    def _with_netns(self, obj: dict[str, Any], address: str = "") -> AmbientPod:
        address = address or next(self._addresses)
        path = self.scene.pod_netns(f"{address}/24")
        return AmbientPod(obj, path, self.open_netns(path), address)

    def open_netns(self, path: str) -> Netns:
        """A netns by its path; closed with the scene."""
        netns = Netns(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self._stack.callback(netns.close)
        return netns

    def report_address(self, pod: AmbientPod) -> None:
        """Do what the kubelet does once the sandbox is there."""
        status = {"phase": "Running", "podIP": pod.address, "podIPs": [{"ip": pod.address}]}
        self.api.do(lambda server: server.patch("pods", pod.namespace, pod.name, {"status": status}, "status"))

    # --- what the API server has --------------------------------------------------------------------------------------

    def object_of(self, pod: AmbientPod) -> dict[str, Any]:
        """The pod in the API."""
        return self.api.do(lambda server: _pod(server.cluster.objects("pods"), pod))

    def annotation(self, pod: AmbientPod) -> str | None:
        """What the API says of its redirection."""
        found = self.object_of(pod)["metadata"].get("annotations") or {}
        return found.get(istio.AMBIENT_REDIRECTION)

    def wait_annotation(self, pod: AmbientPod, value: str | None) -> None:
        """Wait for an annotation, None for its absence."""
        wait_until(f"annotation {value} of {pod.name}", lambda: self.annotation(pod) == value)

    def label(self, pod: AmbientPod, **labels: str | None) -> None:
        """Change a pod's labels; `mode` stands for the one that asks for ambient mode."""
        values = {istio.DATAPLANE_MODE if name == "mode" else name: value for name, value in labels.items()}
        patch = {"metadata": {"labels": values}}
        self.api.do(lambda server: server.patch("pods", pod.namespace, pod.name, patch))

    def annotate(self, pod: AmbientPod, value: str | None) -> None:
        """Set the redirection's annotation, as an earlier agent has."""
        patch = {"metadata": {"annotations": {istio.AMBIENT_REDIRECTION: value}}}
        self.api.do(lambda server: server.patch("pods", pod.namespace, pod.name, patch, "status"))

    def delete(self, pod: AmbientPod) -> None:
        """Take the pod out of the API."""
        self.api.do(lambda server: server.delete_pod(pod.namespace, pod.name))

    def patches(self, pod: AmbientPod) -> list[RequestRecord]:
        """The PATCH requests for a pod, in order."""
        requests = self.api.do(lambda server: list(server.requests))
        return [one for one in requests if one.request.method == "PATCH" and one.request.path.startswith(pod.api_path)]

    def values_patched(self, pod: AmbientPod) -> list[str | None]:
        """The annotation's values in those."""
        bodies = [json.loads(one.request.body) for one in self.patches(pod)]
        return [body["metadata"]["annotations"][istio.AMBIENT_REDIRECTION] for body in bodies]

    def events(self) -> list[dict[str, Any]]:
        """The Events that were posted."""
        return self.api.do(lambda server: list(server.cluster.objects("events")))

    # --- what the node has --------------------------------------------------------------------------------------------

    def host_rules(self) -> str:
        """What nftables has in the node's netns, which is the agent's."""
        return shell_in(self.scene.netns, "nft", "list", "ruleset")

    def set_entries(self) -> dict[str, str]:
        """The nftables sets of enrolled addresses: address, comment."""
        return dict(re.findall(r'([0-9a-f.:]+) comment "([^"]*)"', self.host_rules()))

    def ipset_entries(self) -> dict[str, str]:
        """The same of ipset."""
        return dict(re.findall(r'add \S+ ([0-9a-f.:]+) comment "([^"]*)"', shell_in(self.scene.netns, "ipset", "save")))


def _pod(pods: Sequence[dict[str, Any]], pod: AmbientPod) -> dict[str, Any]:
    names = (pod.namespace, pod.name)
    return next(one for one in pods if (one["metadata"]["namespace"], one["metadata"]["name"]) == names)


@contextmanager
def new_ambient_scene(scene: Scene) -> Iterator[AmbientScene]:
    """Set it up around a scene and take it down before that ends."""
    with ExitStack() as stack:
        yield AmbientScene(scene, stack)


# --- asking the agent -------------------------------------------------------------------------------------------------


def add(agent: Agent, pod: AmbientPod, **changes: Any) -> AddReply:
    """The plugin's ADD."""
    fields: dict[str, Any] = {"ips": (f"{pod.address}/24",)}
    return agent.add(pod.obj, pod.path, **(fields | changes))


def row_of(agent: Agent, pod: AmbientPod) -> Mapping[str, Any]:
    """The pod's row in the status; empty when it has none."""
    rows = agent.status()["ambient"]["pods"]
    return next((row for row in rows if row["uid"] == pod.uid), {})


def wait_state(agent: Agent, pod: AmbientPod, wanted: str) -> Mapping[str, Any]:
    """Wait until the status gives the pod this state; empty for no row at all."""
    wait_until(f"state {wanted!r} of {pod.name}", lambda: row_of(agent, pod).get("state", "") == wanted)
    return row_of(agent, pod)


def wait_reason(agent: Agent, part: str) -> None:
    """Wait for a reason not to be ready."""

    def has_it() -> bool:
        status, body = agent.get(istio.READY_PATH)
        return status == 503 and part in body

    wait_until(f"the reason {part!r}", has_it)


def wait_metric(agent: Agent, name: str, value: float) -> None:
    """Wait for a series to have a value."""
    wait_until(f"{name} to be {value:g}", lambda: agent.metrics().get(name, 0.0) == value)


def lines_of(agent: Agent, *parts: str) -> list[str]:
    """The lines of its log that contain all parts."""
    return [line for line in agent.log.splitlines() if all(part in line for part in parts)]


# --- what the stand-in was told ---------------------------------------------------------------------------------------


def told(ztunnel: Program, *kinds: str) -> list[dict[str, Any]]:
    """Its records of these kinds; whatever it has answered is among them."""
    ztunnel.state()  # an answer is recorded before this one is given
    return [one for one in ztunnel.records() if one["event"] in kinds]


def records_of(ztunnel: Program, pod: AmbientPod, *kinds: str) -> list[dict[str, Any]]:
    """Those about a pod."""
    return [one for one in told(ztunnel, *kinds) if one["uid"] == pod.uid]


def announced(ztunnel: Program, pod: AmbientPod) -> list[dict[str, Any]]:
    """The Adds of a pod: one, and another one in the snapshot when ztunnel connects just then."""
    found = wait_until(f"an Add of {pod.name}", lambda: records_of(ztunnel, pod, "add"))
    assert len(found) <= 2
    return found


# --- the socket of the original's plugin ------------------------------------------------------------------------------


class UnixHttp(http.client.HTTPConnection):
    """HTTP over a Unix socket, as Go's client of the original's plugin speaks it."""

    def __init__(self, path: Path, timeout_seconds: float = 30.0) -> None:
        super().__init__("unix", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    text: str
    content_type: str


def post(path: Path, body: bytes, *, target: str = istio.EVENT_PATH, method: str = "POST") -> Answer:
    """Send one request on a connection of its own."""
    connection = UnixHttp(path)
    try:
        connection.request(method, target, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read().decode(), answer.getheader("content-type", ""))
    finally:
        connection.close()


def event_of(pod: AmbientPod, **changes: Any) -> dict[str, Any]:
    """The original's event of a pod, as its plugin spells it."""
    address = {"IP": pod.address, "Mask": "////AA=="}
    fields: dict[str, Any] = {
        "Netns": pod.path,
        "PodName": pod.name,
        "PodNamespace": pod.namespace,
        "IPs": [{"Interface": 0, "Address": address, "Gateway": "10.1.0.1"}],
    }
    return fields | changes


def push(scene: Scene, pod: AmbientPod, **changes: Any) -> Answer:
    """The original plugin's ADD."""
    return post(scene.run_dir / istio.EVENT_SOCKET_NAME, json.dumps(event_of(pod, **changes)).encode())


# --- what is in a netns -----------------------------------------------------------------------------------------------


def wait_unchanged(pod: AmbientPod, before: str) -> None:
    """Wait until its netns is as `everything_in` said before."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (now := everything_in(pod)) != before:
        assert time.monotonic() < end, now
        time.sleep(0.05)


def shell_in(netns: str, *command: str) -> str:
    """What a command prints in a netns."""
    return call_in_netns(netns, lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def everything_in(pod: AmbientPod) -> str:
    """All that redirection can consist of, in every backend; link-local addresses come when they like."""
    return "".join(line for line in state(pod.netns).splitlines(keepends=True) if "fe80:" not in line)


def is_captured(pod: AmbientPod, variant: str = "nftables") -> bool:
    """Whether outbound and inbound traffic goes to ztunnel, with its policy rule and its route."""
    routed = "fwmark 0x111/0xfff lookup 100" in pod.netns.shell("ip", "rule")
    local = "local default dev lo" in pod.netns.shell("ip", "route", "show", "table", "all", "type", "local")
    if variant == "nftables":
        rules = pod.netns.shell("nft", "list", "ruleset")
        captured = "redirect to :15001" in rules and "redirect to :15006" in rules and "istio-ambient-nat" in rules
    else:
        rules = pod.netns.shell(f"iptables-{variant}-save")
        captured = all(f"-A ISTIO_{one}" in rules and port in rules for one, port in PORTS_OF_CHAINS)
    return captured and routed and local


PORTS_OF_CHAINS = (("OUTPUT", "--to-ports 15001"), ("PRERT", "--to-ports 15006"))
