"""A small node for agent tests: a netns without a way out, an API server double in it, directories, the real agent."""

from __future__ import annotations

import array
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lab.ambient import ambient_environment
from lab.apiserver import ServerThread, run_in_thread
from lab.namespaces import call_in_netns

from meshcni import istio
from meshcni.cli.control import STATUS_PATH, ask
from meshcni.errors import AgentUnavailableError
from meshcni.protocols.podadd import AddReply, AddRequest, decode_reply, encode_request

T = TypeVar("T")
NODE = "agent-test-node"
PATIENCE_SECONDS = 20.0
SETTLED_SECONDS = 0.5
_numbers = itertools.count(1)


def wait_until(what: str, condition: Callable[[], T | None]) -> T:
    """Ask again and again until `condition` says something true; a plain failure after PATIENCE_SECONDS."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {PATIENCE_SECONDS:.0f} s for: {what}"
        time.sleep(0.01)


@contextmanager
def new_netns(*addresses: str) -> Iterator[str]:
    """A netns with lo up and, when there are addresses, an interface eth0 that has them; yields its path."""
    name = f"mc-agent-{os.getpid()}-{next(_numbers)}"

    def ip(*arguments: str) -> None:
        subprocess.run(("ip", *arguments), check=True)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        if addresses:
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
            ip("-n", name, "link", "set", "peer0", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        for address in addresses:
            ip("-n", name, "address", "add", address, "dev", "eth0", *(("nodad",) if ":" in address else ()))
        yield f"/run/netns/{name}"
    finally:
        ip("netns", "del", name)


class Agent:
    """A running agent process."""

    def __init__(self, scene: Scene, process: subprocess.Popen[bytes], log: Path) -> None:
        self.scene = scene
        self.process = process
        self.log_path = log

    @property
    def log(self) -> str:
        """Everything it has printed so far."""
        return self.log_path.read_text()

    def get(self, path: str, port: int = istio.HEALTH_PORT) -> tuple[int, str]:
        """GET on one of its TCP ports; status 0 when nobody listens."""

        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except ConnectionRefusedError:
                return 0, ""
            finally:
                connection.close()

        return call_in_netns(self.scene.netns, ask)

    def wait_ready(self) -> None:
        """Wait for /readyz to answer 200."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return self.get(istio.READY_PATH)[0] == 200

        wait_until("the agent to be ready", ready)

    def status(self) -> dict[str, Any]:
        """What `install-cni status` is told."""
        return ask(str(self.scene.run_dir), "GET", STATUS_PATH)

    def wait_watching(self) -> None:
        """Wait until the agent knows the pods of its node."""

        def watching() -> bool:
            assert self.process.poll() is None, self.log
            try:
                return all(watch["synced"] for watch in self.status()["watches"])
            except AgentUnavailableError:
                return False

        wait_until("the agent to watch pods", watching)

    def metrics(self) -> dict[str, float]:
        """Every series by its exposed name with labels."""
        _, text = self.get("/metrics", istio.METRICS_PORT)
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in rows}

    def add(self, pod: Mapping[str, Any], netns: str, **changes: Any) -> AddReply:
        """Do what the plugin does in an ADD of `pod` (an API object) with the netns at path `netns`."""
        request = request_for(pod, netns, **changes)
        descriptor = os.open(netns, os.O_RDONLY)
        try:
            answer = self.exchange(encode_request(request), (descriptor,))
        finally:
            os.close(descriptor)
        assert answer is not None, f"no reply; the agent said:\n{self.log}"
        return decode_reply(answer)

    def exchange(self, data: bytes, descriptors: Sequence[int] = ()) -> bytes | None:
        """Send one message to agent.sock and take one; None when the agent just closes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect(str(self.scene.run_dir / istio.AGENT_SOCKET_NAME))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            connection.sendmsg([data], rights)
            try:
                return connection.recv(1 << 17) or None
            except ConnectionResetError:
                return None

    def descriptors(self) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def settled_descriptors(self) -> int:
        """How many files it has open once that stays so: a ready agent may still be making connections."""
        seen, since = self.descriptors(), time.monotonic()

        def stays() -> bool:
            nonlocal seen, since
            if (now := self.descriptors()) != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > SETTLED_SECONDS

        wait_until("descriptors to settle", stays)
        return seen

    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def rss_mib(self) -> float:
        """Its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for its end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """End it without giving it a chance to do anything."""
        self.process.kill()
        self.process.wait()


class Scene:
    """Directories, API double and netns of one node; agents are started in it and ended with it."""

    program: tuple[str, ...] = (sys.executable, "-m", "meshcni.agent")

    def __init__(self, directory: Path, netns: str, api: ServerThread, stack: ExitStack) -> None:
        self.directory = directory
        self.netns = netns
        self.api = api
        self._stack = stack
        self.run_dir = directory / "run"
        self.ztunnel_socket = directory / "ztunnel.sock"
        self.conf_dir = directory / "net.d"
        self.conf = self.conf_dir / "10-lab.conflist"
        for name in ("net.d", "bin", "source", "account"):
            (directory / name).mkdir()
        shutil.copy("/bin/true", directory / "source" / istio.PLUGIN_NAME)
        self.conf.write_text(json.dumps({"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "bridge"}]}))
        (directory / "account" / "ca.crt").write_text("the double speaks plain HTTP\n")
        api.do(lambda server: server.write_service_account(directory / "account", "a-token"))

    def environment(self, *, ambient: bool = False) -> dict[str, str]:
        """The variables of an agent on this node."""
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": "src",
            "NODE_NAME": NODE,
            "POD_NAME": "istio-cni-node-abcde",
            "POD_NAMESPACE": "istio-system",
            "MOUNTED_CNI_NET_DIR": str(self.conf_dir),
            "CNI_AGENT_RUN_DIR": str(self.run_dir),
            "CNI_BINARY_SOURCE_DIR": str(self.directory / "source"),
            "CNI_BINARY_TARGET_DIR": str(self.directory / "bin"),
            "SERVICE_ACCOUNT_DIR": str(self.directory / "account"),
            "NATIVE_NFTABLES": "true",
            **self.api.environment,
            **(ambient_environment(self.ztunnel_socket) if ambient else {}),
        }

    def run(self, *arguments: str, ambient: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run an install-cni command line to its end, in the node's netns."""
        return call_in_netns(
            self.netns,
            lambda: subprocess.run(
                (*self.program, *arguments),
                env=self.environment(ambient=ambient) | environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            ),
        )

    def start(self, *arguments: str, ambient: bool = False, **environment: str) -> Agent:
        """Start the agent; it is ended with the scene if the test does not end it."""
        log = self.directory / f"agent-{next(_numbers)}.log"
        node = {"ZTUNNEL_UDS_ADDRESS": str(self.ztunnel_socket), "KUBELET_UID": "0"}  # never those of the machine

        def begin() -> subprocess.Popen[bytes]:
            with log.open("wb") as output:
                return subprocess.Popen(
                    (*self.program, *arguments),
                    env=node | self.environment(ambient=ambient) | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

        agent = Agent(self, call_in_netns(self.netns, begin), log)
        self._stack.callback(end, agent.process)
        return agent

    def open_to_everybody(self) -> None:
        """Let every user reach the sockets, worse than any installation does: the check of the peer must do then."""
        for path in (self.run_dir, self.directory, *self.directory.parents[:3]):
            path.chmod(0o755)
        for path in self.run_dir.glob("*.sock"):
            path.chmod(0o666)

    def add_namespace(self, namespace: Mapping[str, Any]) -> dict[str, Any]:
        """Give the API double a namespace; returns it as the API has it."""
        metadata = namespace["metadata"]
        return self.api.do(lambda server: server.add_namespace(metadata["name"], metadata.get("labels")))

    def add_pod(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Give the API double a pod of this node; returns it as the API has it."""
        pod["spec"]["nodeName"] = NODE
        return self.api.do(lambda server: server.add_pod(pod))

    def pod_netns(self, *addresses: str) -> str:
        """A netns that is gone with the scene."""
        return self._stack.enter_context(new_netns(*addresses))


def answer_to_nobody(path: Path, kind: socket.SocketKind, request: bytes = b"") -> bytes:
    """What user nobody gets from a Unix socket; nothing when the connection is closed."""
    program = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "connection = socket.socket(socket.AF_UNIX, int(sys.argv[2])); connection.settimeout(10)\n"
        "connection.connect(sys.argv[1])\n"
        "try:\n"
        "    connection.sendall(bytes.fromhex(sys.argv[3])) if sys.argv[3] else None\n"
        "    os.write(1, connection.recv(100))\n"
        "except (ConnectionResetError, BrokenPipeError): pass\n"
    )
    command = ("/usr/bin/python3", "-c", program, str(path), str(int(kind)), request.hex())
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout


def end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that the process is gone."""
    if process.poll() is None:
        process.kill()
    process.wait()


def request_for(pod: Mapping[str, Any], netns: str, **changes: Any) -> AddRequest:
    """The plugin's request for an API object."""
    metadata = pod["metadata"]
    fields: dict[str, Any] = {
        "cni_version": "1.0.0",
        "container_id": "c" * 64,
        "ifname": "eth0",
        "netns": netns,
        "pod_namespace": metadata["namespace"],
        "pod_name": metadata["name"],
        "pod_uid": metadata.get("uid", ""),
    }
    return AddRequest(**(fields | changes))


@contextmanager
def new_scene(directory: Path) -> Iterator[Scene]:
    """Set a node up and take it down."""
    with ExitStack() as stack:
        netns = stack.enter_context(new_netns())
        api = call_in_netns(netns, lambda: stack.enter_context(run_in_thread()))
        yield Scene(directory, netns, api, stack)
