"""`make demo`: a real containerd starts pods; an Envoy, then a ztunnel, gets the traffic of those that are in the mesh.

Each sidecar pod runs twice: before the agent is on the node, and after. Ambient pods follow: three that start in the
mesh, and one that joins it and leaves it while it runs. Everything happens in namespaces of its own; nothing of the
host is touched and nothing is left behind, whatever ends the demo.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lab import objects
from lab.agent import EXCLUDED_NAMESPACE, AgentOptions
from lab.clean import leftovers
from lab.containerd import GATEWAY_V4, GATEWAY_V6
from lab.demoambient import AmbientPart
from lab.demopage import Traffic, show_ambient, show_next, show_sidecars
from lab.demorun import run_demo
from lab.envoy import Captured
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import LabError
from lab.steps import Steps
from lab.traffic import address_seen
from meshcni.pods.assess import Assessment, assess
from meshcni.pods.eligibility import Policy
from meshcni.pods.model import pod_from_object
from meshcni.rules.model import Backend

OUTSIDE_PORT = 9090  # of the server outside the pods
EACH_WAY_ONCE = Captured(inbound=1, outbound=1)
NOTHING = Captured(inbound=0, outbound=0)


@dataclass(frozen=True, slots=True)
class Case:
    """One pod of the demo; its traffic is of IP version `version`."""

    pod: Mapping[str, Any]
    version: int
    description: str

    @property
    def name(self) -> str:
        """The pod's name."""
        return str(self.pod["metadata"]["name"])

    @property
    def assessment(self) -> Assessment:
        """What the agent decides, by the function that the agent calls."""
        policy = Policy(exclude_namespaces=frozenset({EXCLUDED_NAMESPACE}))
        return assess(pod_from_object(self.pod), None, policy)

    @property
    def has_proxy(self) -> bool:
        """Whether the injector gave it one."""
        return len(self.pod["spec"]["containers"]) > 1


CASES = (
    Case(objects.sidecar_pod("shop", "cart"), 4, "sidecar, REDIRECT, IPv4"),
    Case(objects.sidecar_pod("shop", "ledger", mode="TPROXY"), 6, "sidecar, TPROXY, IPv6"),
    Case(objects.unmeshed_pod("shop", "batch"), 4, "no sidecar, IPv4"),
)


class Demo:
    """The demonstration, step by step; `before` and `after` the agent came hold what traffic each sidecar pod had."""

    def __init__(self, mesh: Mesh, steps: Steps, backend: Backend) -> None:
        self.mesh, self.steps, self.backend = mesh, steps, backend
        self.before: dict[str, Traffic] = {}
        self.after: dict[str, Traffic] = {}
        self.ambient = AmbientPart(mesh, steps, backend)

    def run(self) -> None:
        """Do all of it."""
        with self.steps.step("Start containerd in a node of its own") as step:
            self.mesh.runtime.start()
            step.note = self.chain()
        self.mesh.servers.serve(self.mesh.node.netns, OUTSIDE_PORT)
        for case in CASES:
            self.mesh.add_object(case.pod)
            with self.steps.step(f"Pod {case.name} without the agent") as step:
                self.before[case.name] = self.run_pod(case)
                step.note = in_words(self.before[case.name])
        with self.steps.step("Start the agent, wait until it is Ready") as step:
            self.mesh.agent.start(AgentOptions(nftables=self.backend is Backend.NFTABLES))
            step.note = self.chain()
        for case in CASES:
            with self.steps.step(f"Pod {case.name} with the agent") as step:
                self.after[case.name] = self.run_pod(case)
                step.note = in_words(self.after[case.name])
        self.ambient.run()

    def run_pod(self, case: Case) -> Traffic:
        """Let containerd start the pod, start its proxy, connect once to it and once from it, remove it."""
        begin = time.monotonic()
        running = self.mesh.start_pod(case.pod, in_api=False)
        start_milliseconds = (time.monotonic() - begin) * 1000
        try:
            return self.exchange(case, running, start_milliseconds)
        finally:
            self.mesh.stop_sandbox(running)

    def exchange(self, case: Case, running: RunningPod, start_milliseconds: float) -> Traffic:
        """Connect once to the pod and once from it."""
        envoy = self.mesh.start_proxy(running) if case.has_proxy else None
        begin = envoy.captured() if envoy else NOTHING
        outside, gateway = self.mesh.node.netns, GATEWAY_V4 if case.version == 4 else GATEWAY_V6
        seen_inside = address_seen(outside, running.address(case.version), APP_PORT)
        seen_outside = address_seen(running.netns, gateway, OUTSIDE_PORT)
        captured = envoy.captured() - begin if envoy else None
        return Traffic(captured, seen_inside, seen_outside, start_milliseconds)

    def chain(self) -> str:
        """Say which plugins containerd calls."""
        return "CNI chain: " + " → ".join(self.mesh.runtime.cri.loaded_chain())

    def failures(self) -> list[str]:
        """Return what is not as it should be."""
        wrong = []
        for case in CASES:
            if self.before[case.name].captured not in (None, NOTHING):
                wrong.append(f"{case.name}: captured without the agent")
            if self.after[case.name].captured != (EACH_WAY_ONCE if case.has_proxy else None):
                wrong.append(f"{case.name}: {in_words(self.after[case.name])} with the agent, one each way was sent")
        return wrong + self.ambient.failures()


def in_words(traffic: Traffic) -> str:
    """Say what Envoy got."""
    if traffic.captured is None:
        return "no proxy, traffic goes straight through"
    return f"connections that Envoy got: {traffic.captured.inbound} in, {traffic.captured.outbound} out"


def play(console: Console, backend: Backend) -> list[str]:
    """Run it on a node of its own, which is gone afterwards, and show the page; returns what was wrong."""
    with Steps(console) as steps:
        with steps.step("Make namespaces, start the API server") as step:
            mesh = Mesh().__enter__()
            step.note = f"{mesh.node.name}: private mounts, network, pids"
        try:
            demo = Demo(mesh, steps, backend)
            demo.run()
        finally:
            with steps.step("Clear everything away") as step:
                name = mesh.node.name
                mesh.close()
                if name in leftovers():
                    raise LabError(f"something of {name} is left; python -m lab.clean removes it")
                step.note = "its processes, netns, mounts, cgroups and files are gone"
    show_sidecars(console, CASES, demo.before, demo.after, backend)
    show_ambient(console, demo.ambient)
    show_next(console)
    return demo.failures()


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 when every pod was as it should be, else see demorun."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__.partition("\n")[0])
    backends = [backend.value for backend in Backend]
    parser.add_argument("--backend", choices=backends, default=Backend.NFTABLES.value, help="who programs the kernel")
    backend = Backend(parser.parse_args(arguments).backend)
    return run_demo(lambda console: play(console, backend))


if __name__ == "__main__":
    sys.exit(main())
