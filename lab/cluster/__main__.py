"""`python -m lab.cluster up|down|kubectl ...|helm ...|demo`: a real Kubernetes of this machine's own, and its end."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from lab.cluster import binaries, running
from lab.cluster.cluster import PROXY_MODES
from lab.cri import CriError
from lab.node import LabError

PASSED_ON = {"kubectl": (binaries.hyperkube, ["kubectl"]), "helm": (binaries.helm, [])}
EXIT_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Obey; 0 when done, 1 when it could not be done."""
    try:
        if arguments[:1] and arguments[0] in PASSED_ON:
            pass_on(arguments[0], arguments[1:])
        return obey(parse(arguments))
    except KeyboardInterrupt:
        print("interrupted; everything is cleared away", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (LabError, CriError, OSError) as error:
        print(f"lab.cluster: {error}", file=sys.stderr)
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; ends the process when it cannot be understood."""
    parser = argparse.ArgumentParser(prog="python -m lab.cluster", description=__doc__)
    orders = parser.add_subparsers(dest="order", required=True)
    up = orders.add_parser("up", help="start a cluster that stays until `down`")
    up.add_argument("--nodes", type=int, default=2, help="how many (default 2)")
    up.add_argument("--proxy-mode", choices=PROXY_MODES, default=PROXY_MODES[0], help="kube-proxy's")
    up.add_argument("--agent", action="store_true", help="with our chart, ambient mode, and a stand-in for ztunnel")
    orders.add_parser("down", help="end it; nothing is left")
    for name in PASSED_ON:
        orders.add_parser(name, help=f"{name} as administrator; everything after it is {name}'s", add_help=False)
    orders.add_parser("demo", help="show the agent at work on a cluster of its own")
    return parser.parse_args(arguments)


def obey(given: argparse.Namespace) -> int:
    """Do what was ordered."""
    if given.order == "demo":
        from lab.cluster import demo

        return demo.main()
    if given.order == "down":
        name = running.down()
        print(f"cluster {name} has ended, nothing of it is left" if name else "no cluster is up")
        return 0
    found = running.up(given.nodes, given.proxy_mode, with_agent=given.agent)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"cluster [bold]{found.name}[/] is up: nodes {', '.join(found.nodes)}")
    console.print("  python -m lab.cluster kubectl get pods -A    (make kubectl ARGS='get pods -A')")
    for name, pid in found.nodes.items():
        console.print(f"  nsenter -t {pid} -m -n -p -u bash    a shell on {name}")
    console.print("  python -m lab.cluster down    (make cluster-down)")
    return 0


def pass_on(order: str, arguments: list[str]) -> None:
    """Become kubectl or helm, in the control plane's netns."""
    find, first = PASSED_ON[order]
    found = running.require()
    command = running.netns_command(found, find(), [*first, *arguments])
    environment = {**found.environment, **{key: os.environ[key] for key in ("TERM", "EDITOR") if key in os.environ}}
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
