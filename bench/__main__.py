"""Runs the parts of the benchmark on one lab node and prints one table."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from lab.agent import AgentOptions
from lab.mesh import Mesh
from lab.node import LabError
from rich.console import Console

from bench import adds, agent, ambient, cluster, image, plugin, sidecars
from bench.report import Row, show
from meshcni.rules.model import Backend

PIPE_WIDTH = 140  # characters of a line when the output is no terminal
PARTS: Mapping[str, Callable[[Mesh], list[Row]]] = {
    "start": agent.starts,
    "image": image.measure,
    "plugin": plugin.measure,
    "unmeshed": adds.unmeshed,
    "nftables": lambda mesh: adds.sidecar(mesh, Backend.NFTABLES),
    "iptables": lambda mesh: adds.sidecar(mesh, Backend.IPTABLES),
    "ambient-nftables": lambda mesh: ambient.enrolment(mesh, Backend.NFTABLES),
    "ambient-iptables": lambda mesh: ambient.enrolment(mesh, Backend.IPTABLES),
    "slow-ack": ambient.slow_ack,
    "restart-nftables": lambda mesh: ambient.restart(mesh, Backend.NFTABLES),
    "restart-iptables": lambda mesh: ambient.restart(mesh, Backend.IPTABLES),
    "sidecars-nftables": lambda mesh: sidecars.looking_after(mesh, Backend.NFTABLES),
    "sidecars-iptables": lambda mesh: sidecars.looking_after(mesh, Backend.IPTABLES),
    "repair": agent.repairs,
    "idle": agent.idling,
    "cluster": lambda _: cluster.measure(),
}


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when every target is reached, 1 when one is missed, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="what a pod start costs, as ratios")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be given more than once")
    chosen = parser.parse_args(arguments).only or list(PARTS)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPE_WIDTH)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows: list[Row] = []
    before = os.getloadavg()
    try:
        with Mesh() as mesh:
            mesh.runtime.start()
            mesh.agent.start(AgentOptions(nftables=True))
            for name in chosen:
                begin = time.monotonic()
                rows += PARTS[name](mesh)
                console.print(f"{name}: {time.monotonic() - begin:.0f} s", style="dim")
    except LabError as error:
        console.print(f"The benchmark cannot go on: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted; everything is cleared away.")
        return 130
    show(console, rows)
    console.print(
        f"Load average {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after; throughput assumes idle cores."
    )
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
