"""The cluster that `python -m lab.cluster up` leaves running: a process holds it, a file says where it is.

The holder ends the cluster on SIGTERM; whatever else ends the holder, the kernel ends the cluster's processes with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.cluster.binaries import ROOT
from lab.cluster.cluster import PROXY_MODES, Cluster
from lab.node import LabError, start_ticks, wait_until

VARIABLE = "MESHCNI_CLUSTER_STATE"  # another folder than build/cluster, for a second cluster
FOLDER = Path(os.environ.get(VARIABLE) or ROOT / "build" / "cluster")
STATE, LOG = FOLDER / "state.json", FOLDER / "holder.log"
UP_SECONDS, DOWN_SECONDS = 300.0, 60.0
AMBIENT = {"ambient": {"enabled": True}}


@dataclass(frozen=True, slots=True)
class Running:
    """What others need to know of it; `pid` with `ticks` is the holder, `control` process 1 of the control plane."""

    pid: int
    ticks: int
    name: str
    control: int
    environment: Mapping[str, str]
    nodes: Mapping[str, int]

    @property
    def is_alive(self) -> bool:
        """Whether its holder is."""
        return start_ticks(self.pid) == self.ticks


def find() -> Running | None:
    """Return the cluster that is up; None when none is. A file of one that has ended is removed."""
    try:
        found = Running(**json.loads(STATE.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if found.is_alive:
        return found
    STATE.unlink(missing_ok=True)
    return None


def require() -> Running:
    """Return the cluster that is up; LabError when none is."""
    found = find()
    if found is None:
        raise LabError("no cluster is up (python -m lab.cluster up, or make cluster-up, starts one)")
    return found


def up(nodes: int, proxy_mode: str, *, with_agent: bool) -> Running:
    """Start a holder and return when its cluster is up; LabError with the end of its log when it ends instead."""
    if (found := find()) is not None:
        raise LabError(f"cluster {found.name} is up already (python -m lab.cluster down ends it)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lab.cluster.running", str(nodes), proxy_mode, "agent" if with_agent else ""]
    with LOG.open("wb") as log:
        holder = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def is_up() -> bool:
        if holder.poll() is not None:
            raise LabError(f"the cluster did not start: {LOG.read_text().strip()[-1500:]}")
        return STATE.exists()

    try:
        wait_until("the cluster is up", is_up, UP_SECONDS, 0.1)
    except BaseException:
        holder.terminate()
        holder.wait(DOWN_SECONDS)
        raise
    return require()


def down() -> str:
    """End the cluster that is up and return its name when all of it is gone; empty when none is up."""
    found = find()
    if found is None:
        return ""
    with suppress(ProcessLookupError):
        os.kill(found.pid, signal.SIGTERM)
    wait_until(f"cluster {found.name} has ended", lambda: not found.is_alive, DOWN_SECONDS, 0.05)
    STATE.unlink(missing_ok=True)
    return found.name


def hold(nodes: int, proxy_mode: str, *, with_agent: bool) -> None:
    """Be the holder: start a cluster, write the file, wait for SIGTERM, end the cluster."""
    end = threading.Event()

    def stop(*_: object) -> None:
        if end.is_set() or not STATE.exists():
            raise KeyboardInterrupt  # it is still starting
        end.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with Cluster(nodes=nodes, proxy_mode=proxy_mode) as cluster:
        if with_agent:
            cluster.install_agent(AMBIENT)
            cluster.install_ztunnel()
        pid, environment = os.getpid(), cluster.command_environment()
        pids = {name: node.pid for name, node in cluster.nodes.items()}
        state = Running(pid, start_ticks(pid), cluster.name, cluster.control.pid, environment, pids)
        partial = STATE.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(state), indent=1))
        partial.rename(STATE)
        end.wait()
        STATE.unlink(missing_ok=True)


def netns_command(found: Running, program: Path, arguments: list[str]) -> list[str]:
    """Return the command that runs a program of the host in the control plane's netns."""
    return ["nsenter", f"--net=/proc/{found.control}/ns/net", "--", str(program), *arguments]


if __name__ == "__main__":
    assert sys.argv[2] in PROXY_MODES
    hold(int(sys.argv[1]), sys.argv[2], with_agent=sys.argv[3] == "agent")
