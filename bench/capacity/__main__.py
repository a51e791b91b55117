"""Runs the phases and prints the figures, then what they mean for a large cluster, with the arithmetic."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from lab.node import LabError, Node

from bench.capacity import oneagent, phases
from bench.capacity.fleet import Pods
from bench.capacity.report import Measured, show
from bench.capacity.server import HYPERKUBE, Server

AGENTS, PODS_PER_NODE, NAMESPACES, QUIET_SECONDS, LIVES = 200, 30, 1000, 60.0, 600
REST_SECONDS = 60.0  # at most, of what needs no renewal of a watch
DIRECT = 200
SHED_AGENTS = 50  # at most, of those that an API server of a few seats has to serve
MODES = ("sidecar", "ambient")
ENVIRONMENT = "MESHCNI_HYPERKUBE"


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when every budget is kept, 1 when one is not, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description="what many agents cost an API server")
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--pods", type=int, default=PODS_PER_NODE, help="pods on each node")
    parser.add_argument("--namespaces", type=int, default=NAMESPACES)
    parser.add_argument(
        "--quiet-seconds", type=float, default=QUIET_SECONDS, help="watches are renewed every 5 to 10 min"
    )
    parser.add_argument("--lives", type=int, default=LIVES, help="pods that come and go")
    parser.add_argument("--hyperkube", type=Path, default=Path(os.environ.get(ENVIRONMENT, HYPERKUBE)))
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = Measured(chosen.agents, chosen.pods, chosen.namespaces)
    try:
        with Node() as node, Server(node, chosen.hyperkube) as server:
            _measure(server, chosen, found)
        return show(found)
    except LabError as error:
        show(found)
        print(f"The benchmark cannot go on: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        show(found)
        print("Interrupted; everything is cleared away.", file=sys.stderr)
        return 130


def _measure(server: Server, chosen: argparse.Namespace, found: Measured) -> None:
    pods = Pods(server, chosen.namespaces)
    say = _Teller()
    pods.make_namespaces()
    pods.fill_all(chosen.agents, chosen.pods)
    pods.fill(oneagent.NODE, oneagent.PODS)
    say(f"{chosen.namespaces} namespaces, {chosen.agents * chosen.pods + oneagent.PODS} pods")
    rest = min(chosen.quiet_seconds, REST_SECONDS)
    found.alone = phases.quiet(server, rest)
    found.alone_churn = phases.churn(server, pods, None, chosen.agents, chosen.lives, ambient=False)
    found.direct = phases.direct(server, DIRECT)
    say("without agents")
    for name in MODES:
        found.modes[name] = phases.mode(
            server, pods, chosen.agents, chosen.quiet_seconds, chosen.lives, ambient=name == "ambient"
        )
        say(f"{chosen.agents} agents, {name} mode")
    for name in MODES:
        found.costs[name] = oneagent.measure(server, pods, rest, ambient=name == "ambient")
    say("one real agent")
    found.shed, found.restart = phases.shed(server, min(chosen.agents, SHED_AGENTS))
    say("an API server that sheds load, and one that is restarted")


class _Teller:
    """Says what is done, and how long it took."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        print(f"{what}: {now - self._begin:.0f} s", file=sys.stderr, flush=True)
        self._begin = now


if __name__ == "__main__":
    sys.exit(main())
