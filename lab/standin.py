"""Our stand-in for ztunnel as a process of a lab node, in a netns of its own that leads nowhere.

Whatever it opens for a pod has to be opened in the pod's netns: from its own it reaches nothing.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from lab.agent import Agent
from lab.node import LabError, Node, last_lines, wait_until
from lab.ztunnel.client import command, order, program_environment
from lab.ztunnel.record import read_records

START_SECONDS = 20.0
STOP_SECONDS = 20.0
DNS_NAMES: Mapping[str, str] = {"mesh.test": "240.240.0.1", "mesh6.test": "2001:2::1"}  # what it answers


class StandIn:
    """Starts, stops, kills and asks one stand-in; `name` tells two of a rolling update apart."""

    def __init__(self, node: Node, agent: Agent, name: str) -> None:
        self.node, self.agent, self.name = node, agent, name
        self.process: subprocess.Popen[bytes] | None = None
        self._control = node.folder / f"{name}.control"
        self._record = node.folder / f"{name}.jsonl"
        self._netns = str(node.path(f"/run/netns/{name}"))

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.poll() is None

    def start(self, *arguments: str, wait: bool = True) -> None:
        """Start it; with `wait` return when it has its snapshot."""
        if self.is_running:
            raise LabError(f"{self.name} runs already")
        self.node.run(["sh", "-c", f"test -e /run/netns/{self.name} || ip netns add {self.name}"])
        self._control.unlink(missing_ok=True)
        names = [part for name, address in DNS_NAMES.items() for part in ("--name", f"{name}={address}")]
        line = command(
            self.agent.ztunnel_socket,
            self._control,
            self._record,
            "--listen",
            "--record-connections",
            *names,
            *arguments,
        )
        self.process = self.node.spawn(line, netns=self._netns, environment=program_environment(), log=self.name)
        if wait:
            self.wait_ready()

    def ensure(self, *arguments: str) -> None:
        """Have it running."""
        if not self.is_running:
            self.start(*arguments)

    def wait_ready(self) -> None:
        """Return when it has its snapshot and serves every pod of it."""
        self.wait("it is ready", lambda state: bool(state["ready"]))

    def wait(self, what: str, condition: Any) -> dict[str, Any]:  # noqa: ANN401
        """Ask until its state fulfils `condition`; returns that state. LabError when it does not in time."""
        found: dict[str, Any] = {}

        def fulfilled() -> bool:
            if not self.is_running:
                raise LabError(f"{self.name} ended; its log ends with\n{last_lines(self.log_text(), 12)}")
            found.clear()
            found.update(self.state())
            return bool(found) and bool(condition(found))

        try:
            wait_until(f"{self.name}: {what}", fulfilled, START_SECONDS)
        except LabError as error:
            raise LabError(f"{error}; its state is {found}") from None
        return found

    def state(self) -> dict[str, Any]:
        """What it is doing; empty while it cannot be asked."""
        try:
            return order(self._control)
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, ValueError):
            return {}

    def order(self, **values: Any) -> dict[str, Any]:  # noqa: ANN401
        """Give it an order, such as `do="set", faults=[…]`."""
        return order(self._control, **values)

    def workloads(self) -> dict[str, dict[str, Any]]:
        """The pods it has, by UID."""
        found: dict[str, dict[str, Any]] = self.state().get("workloads", {})
        return found

    def connections(self, uid: str) -> dict[str, int]:
        """How many connections of a pod it took, by direction; how many queries for `dns`."""
        counters = self.workloads().get(uid, {}).get("counters", {})
        return {direction: values["connections"] for direction, values in counters.items()}

    def records(self, event: str = "") -> list[dict[str, Any]]:
        """What it has recorded, over all its starts."""
        return read_records(self._record, event)

    def terminate(self) -> int:
        """Send SIGTERM, as the kubelet does, and return the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """Send SIGKILL."""
        return self._end(signal.SIGKILL)

    def log_text(self) -> str:
        """Return all it has said."""
        return self.node.log_path(self.name).read_text()

    def _end(self, number: int) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        status = self.process.wait(STOP_SECONDS)
        self.process = None
        return status
