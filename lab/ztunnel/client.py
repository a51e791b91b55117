"""For tests, the demo and the benchmark: a stand-in as a process, orders to it, and a peer that is driven by hand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lab.ztunnel.messages import HELLO, Packet, answer, receive
from lab.ztunnel.record import read_records
from meshcni.protocols import zds_pb2 as pb

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 20.0
STEP_SECONDS = 0.005


def order(control: Path | str, **values: Any) -> dict[str, Any]:  # noqa: ANN401
    """Give an order (`do=…`) to the stand-in behind a control socket; returns its state. Raises ValueError, OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(control))
        connection.sendall(json.dumps({"do": "state"} | values).encode() + b"\n")
        with connection.makefile("rb") as file:
            reply: dict[str, Any] = json.loads(file.readline())
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply


class Program:
    """A stand-in as a process of its own; `folder` gets its files. Context manager."""

    def __init__(
        self,
        folder: Path,
        agent_socket: Path | str,
        *arguments: str,
        name: str = "ztunnel",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.control = folder / f"{name}.control"
        self.record = folder / f"{name}.jsonl"
        self.command = command(agent_socket, self.control, self.record, *arguments)
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **program_environment(), **(environment or {})},
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def state(self) -> dict[str, Any]:
        """What it is doing; empty before it listens."""
        try:
            return order(self.control)
        except (FileNotFoundError, ConnectionRefusedError):
            return {}

    def order(self, **values: Any) -> dict[str, Any]:  # noqa: ANN401
        """Give an order: `do="set", faults=[…]`, `do="say", hex="0a00"`, `do="hang-up"`."""
        return order(self.control, **values)

    def wait(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask until its state fulfils a condition."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            state = self.state()
            if state and condition(state):
                return state
            assert self.process.poll() is None, f"it ended, waiting for {what}: {self.log.read_text()}"
            assert time.monotonic() < end, f"waited {PATIENCE_SECONDS:.0f} s for {what}: {state}"
            time.sleep(STEP_SECONDS)

    def records(self, event: str = "") -> list[dict[str, Any]]:
        """What it has recorded so far."""
        return read_records(self.record, event)

    def terminate(self) -> int:
        """Send SIGTERM and wait for its end; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)


def command(agent_socket: Path | str, control: Path | str, record: Path | str, *arguments: str) -> list[str]:
    """The command line of a stand-in, to be run with `program_environment`."""
    files = ("--socket", str(agent_socket), "--control", str(control), "--record", str(record))
    return [sys.executable, "-m", "lab.ztunnel", *files, *arguments]


def program_environment() -> dict[str, str]:
    """What the program needs in its environment."""
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


class Peer:
    """A ztunnel that does what the test says, step by step; blocking. Context manager."""

    def __init__(self, path: Path | str, hello: bytes | None = HELLO) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(str(path))
        if hello is not None:
            self.send(hello)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send any packet."""
        socket.send_fds(self.socket, [data], list(descriptors))

    def ack(self, error: str = "") -> None:
        """Answer."""
        self.send(answer(error))

    def packet(self) -> Packet:
        """The next packet as it came; empty at the end of the connection. The descriptors are the caller's."""
        try:
            return receive(self.socket, 1 << 16)
        except ConnectionResetError:
            return Packet(b"", (), 0)

    def request(self) -> pb.WorkloadRequest | None:
        """The next request, None at the end of the connection; descriptors are closed."""
        packet = self.packet()
        for descriptor in packet.descriptors:
            os.close(descriptor)
        return pb.WorkloadRequest.FromString(packet.data) if packet.data else None

    def close(self) -> None:
        """End the connection."""
        self.socket.close()
