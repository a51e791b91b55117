"""A daemon of a node: started, stopped, killed, and, where a real node's service manager would, started again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lab.node import STOP_SECONDS, LabError, Node, last_lines, wait_readable

# What a service manager does with `Restart=always`; the program itself is in the same process group.
SUPERVISE = 'trap "" PIPE; while :; do "$@" || true; sleep 0.5; done'


class Daemon:
    """One program in a node. With `supervised` it is started again whenever it ends by itself."""

    def __init__(
        self,
        node: Node,
        name: str,
        command: Sequence[str],
        *,
        supervised: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.node, self.name, self._command = node, name, list(command)
        self._supervised, self._environment = supervised, dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether its process (with `supervised`: the one that watches over it) runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; nothing when it runs."""
        if self.is_running:
            return
        command = ["sh", "-c", SUPERVISE, "sh", *self._command] if self._supervised else self._command
        self._process = self.node.spawn(command, log=self.name, environment=self._environment)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal and wait for its end; SIGKILL follows when it does not. Its children elsewhere live on."""
        process, self._process = self._process, None
        if process is None:
            return
        programs = [process.pid]
        if self._supervised and process.poll() is None:
            programs = children(process.pid)
            process.kill()  # the watchman first, or it would start another
        for program in programs:
            end(program, number)
        process.wait(STOP_SECONDS)

    def check(self) -> None:
        """Raise LabError with its last words when it has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise LabError(f"{self.name} ended with {self._process.returncode}: {self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        """Return the end of its log."""
        path = self.node.log_path(self.name)
        return last_lines(path.read_text(errors="replace"), lines) if path.exists() else ""


def children(pid: int) -> list[int]:
    """Return the pids of the children of process `pid`."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def end(pid: int, number: signal.Signals) -> None:
    """Send a process a signal and return when it has ended; after STOP_SECONDS it gets SIGKILL."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with suppress(ProcessLookupError):
            for sent in (number, signal.SIGKILL):
                signal.pidfd_send_signal(descriptor, sent)
                if wait_readable(descriptor, STOP_SECONDS):
                    return
    finally:
        os.close(descriptor)
