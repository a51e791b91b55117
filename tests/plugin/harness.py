"""Runs the built plugin as a container runtime does, and stands in for the agent at the other end of the socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from meshcni.protocols.podadd import AddRequest, accepted, decode_request, encode_reply

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "build" / "istio-cni"
YES = encode_reply(accepted("sidecar", "injected", "done"))
PREV_RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}
RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}


@dataclass(frozen=True)
class Outcome:
    """What a runtime sees of one plugin process."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def conf(run_dir: Path | str, **changes: Any) -> bytes:
    """A conf as libcni writes it to stdin; keys set to `...` are left out."""
    document = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "type": "istio-cni",
        "plugin_log_level": "info",
        "cni_agent_run_dir": str(run_dir),
        "exclude_namespaces": ["kube-system"],
        "pod_namespace": "istio-system",
        "agent_wait_seconds": 5,
        "prevResult": PREV_RESULT,
        **changes,
    }
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


def variables(
    command: str = "ADD", netns: str = "/run/netns/none", namespace: str = "shop", name: str = "web"
) -> dict[str, str]:
    """The environment of one verb."""
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "abc",
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=uid-1",
    }


def run(
    environ: Mapping[str, str],
    stdin: bytes = b"",
    *,
    prefix: Iterable[str] = (),
    path: Path | str = PLUGIN,
    **options: Any,
) -> Outcome:
    """One plugin process; `prefix` is a command that executes it (chroot, unshare ...)."""
    done = subprocess.run([*prefix, path], input=stdin, env=dict(environ), capture_output=True, timeout=60, **options)
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(environ: Mapping[str, str], stdin: bytes) -> subprocess.Popen[bytes]:
    """The same without waiting for the end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([PLUGIN], env=dict(environ), stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    process.stdin = None
    return process


def outcome(process: subprocess.Popen[bytes]) -> Outcome:
    """Waits for the end of a started process."""
    stdout, stderr = process.communicate(timeout=60)
    return Outcome(process.returncode, stdout, stderr)


@dataclass
class Received:
    """One request as the agent got it: message, descriptors with their (device, inode), credentials of the peer."""

    request: AddRequest
    raw: bytes
    files: list[tuple[int, int]]
    uid: int


Answer = Callable[[socket.socket], None]


def say(data: bytes) -> Answer:
    """An agent that answers with these bytes."""
    return lambda connection: connection.sendall(data) if data else None


@dataclass
class AgentDouble:
    """Listens on agent.sock, records every request, and answers each with the next of `answers` (then with yes)."""

    run_dir: Path
    answers: list[Answer] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    backlog: int = 128

    def __enter__(self) -> AgentDouble:
        self.stopped = threading.Event()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.path = self.run_dir / "agent.sock"
        self.path.unlink(missing_ok=True)
        self.listener.bind(str(self.path))
        self.listener.listen(self.backlog)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        self.path.unlink(missing_ok=True)

    def serve(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self.answer(connection)

    def answer(self, connection: socket.socket) -> None:
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 17, 8)
        files = []
        for descriptor in descriptors:
            status = os.fstat(descriptor)
            files.append((status.st_dev, status.st_ino))
            os.close(descriptor)
        if not data:  # a plugin that was killed between connect and send
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(credentials[4:8], "little")
        self.received.append(Received(decode_request(data), data, files, uid))
        (self.answers.pop(0) if self.answers else say(YES))(connection)


def identity(path: str) -> tuple[int, int]:
    """Device and inode, which tell network namespaces apart."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
