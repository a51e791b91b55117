"""ztunnels of the tests: the stand-in as a process, the real one where there is a binary, the agent's side by hand."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from lab.namespaces import call_in_netns, connect
from lab.ztunnel.client import Program
from tests.agent.scene import end, new_netns, wait_until
from tests.kernel.world import Netns

from meshcni.host.sockets import listen_seqpacket
from meshcni.protocols import zds_pb2 as pb
from meshcni.protocols.zds import Request, encode_request

REAL = os.environ.get("MESHCNI_ZTUNNEL", "")  # a ztunnel built with the features tls-ring and testing
PATIENCE_SECONDS = 20.0
LISTENING = "0A"  # TCP_LISTEN of linux/tcp_states.h, as /proc/net/tcp shows it
ZTUNNEL_PORTS = {15001, 15006, 15008, 15053}


class Ztunnel(Protocol):
    """What the contract test asks of either."""

    process: subprocess.Popen[bytes]

    def is_ready(self) -> bool: ...

    def workloads(self) -> dict[str, Any]:
        """By UID, at least `state` and `info`."""


class StandIn:
    """Ours, with listeners."""

    def __init__(self, folder: Path, agent_socket: Path, stack: ExitStack) -> None:
        self.program = stack.enter_context(Program(folder, agent_socket, "--listen"))
        self.process = self.program.process

    def is_ready(self) -> bool:
        return bool(self.program.state()["ready"])

    def workloads(self) -> dict[str, Any]:
        found: dict[str, Any] = self.program.state()["workloads"]
        return found


class RealZtunnel:
    """The real one, in a netns of its own, without control plane and with certificates it makes itself."""

    def __init__(self, folder: Path, agent_socket: Path, stack: ExitStack) -> None:
        self.netns = netns = stack.enter_context(new_netns())
        environment = {
            "PATH": os.environ["PATH"],
            "PROXY_MODE": "shared",
            "INPOD_UDS": str(agent_socket),
            "XDS_ADDRESS": "",
            "FAKE_CA": "true",
            "ZTUNNEL_WORKER_THREADS": "2",
            "CONNECTION_TERMINATION_DEADLINE": "1s",
        }
        log = stack.enter_context((folder / "ztunnel.log").open("wb"))

        def begin() -> subprocess.Popen[bytes]:
            return subprocess.Popen([REAL], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)

        self.process = call_in_netns(netns, begin)
        stack.callback(end, self.process)

    def is_ready(self) -> bool:
        return self._get(15021, "/healthz/ready")[0] == 200

    def workloads(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._get(15000, "/config_dump")[1])["workloadState"]
        return found

    def _get(self, port: int, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
        try:
            connection.sock = connect(self.netns, "127.0.0.1", port)
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except ConnectionRefusedError:
            return 0, b"{}"
        finally:
            connection.close()


KINDS: dict[str, Callable[[Path, Path, ExitStack], Ztunnel]] = {"stand-in": StandIn}
if REAL:
    KINDS["real"] = RealZtunnel


class AgentSide:
    """The agent's socket, moved by hand; blocking."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = listen_seqpacket(path)
        self.listener.settimeout(PATIENCE_SECONDS)
        self.connection = socket.socket()

    def close(self) -> None:
        self.connection.close()
        self.listener.close()

    def accept(self) -> bytes:
        """Take the next connection, which replaces the present one; returns its hello."""
        self.connection.close()
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(PATIENCE_SECONDS)
        return self.connection.recv(1 << 16)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self.connection, [data], list(descriptors))

    def answer(self) -> str | None:
        """The error of the next ack, empty for success; None when the connection ends."""
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionResetError:
            return None
        if not data:
            return None
        response = pb.WorkloadResponse.FromString(data)
        assert response.WhichOneof("payload") == "ack"
        return response.ack.error

    def ask(self, request: Request, *descriptors: int) -> str | None:
        self.send(encode_request(request), descriptors)
        return self.answer()


def listening(pod: Netns) -> set[int]:
    """The TCP ports on which somebody listens in the pod."""

    def read() -> set[int]:
        found: set[int] = set()
        for name in ("tcp", "tcp6"):
            with open(f"/proc/thread-self/net/{name}") as file:
                rows = [line.split() for line in file.readlines()[1:]]
            found |= {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING}
        return found

    return pod.call(read)


def wait_listening(pod: Netns, ports: set[int]) -> None:
    """Wait for exactly these ports."""
    wait_until(f"listeners on {sorted(ports)}", lambda: listening(pod) == ports)
