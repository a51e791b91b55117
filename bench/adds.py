"""ADDs through plugin and agent: unmeshed, sidecar with both backends, fifty at once; processes counted by strace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lab.agent import AgentOptions
from lab.containerd import SYSTEM_PLUGINS
from lab.mesh import Mesh
from lab.node import LabError, wait_until
from lab.objects import sidecar_pod, unmeshed_pod
from lab.plugin import PodNetns, environment_for, stdin_for

from bench.report import Row, ratio
from bench.runs import Command, Cost, interleaved, process_cpu_milliseconds, run, start_here, typical
from meshcni import istio
from meshcni.pods.annotations import derive_interception
from meshcni.pods.model import pod_from_object
from meshcni.rules import iptables, nft
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

ROUNDS = 40
WARM_UP = 5
AT_ONCE = 50
TRACED = 10
MAX_UNMESHED, MAX_SIDECAR, MIN_THROUGHPUT = 4.0, 2.0, 0.9
MAX_PROCESSES = {Backend.NFTABLES: 0, Backend.IPTABLES: 2}
EXECUTED = re.compile(r"execve\(|execve resumed>")
BOTH = frozenset(Family)


class Adds:
    """Prepared ADDs: one netns and one pod for each, known to the agent."""

    def __init__(self, mesh: Mesh, name: str, pods: Sequence[Mapping[str, Any]], stack: ExitStack) -> None:
        self.mesh, self.pods = mesh, pods
        self.netns = [
            stack.enter_context(PodNetns(mesh.node, f"{name}-{number}", number)) for number in range(len(pods))
        ]
        self._program = str(mesh.runtime.bin_dir / istio.PLUGIN_NAME)
        for pod in pods:
            mesh.add_object(pod)
        mesh.wait_until_known()

    def command(self, number: int) -> Command:
        """Return the plugin run of ADD `number`."""
        netns = self.netns[number]
        stdin = self.mesh.node.folder / f"{netns.name}.json"
        if not stdin.exists():
            stdin.write_text(json.dumps(stdin_for(self.mesh.agent, netns, {})))
        environment = environment_for(self.mesh.agent, "ADD", self.pods[number], netns)
        return Command([self._program], environment, stdin)

    def cost(self, number: int) -> Cost:
        """Do ADD `number`; CPU is the plugin's and the agent's."""
        command = self.command(number)
        pid = self.mesh.agent.pid
        before = process_cpu_milliseconds(pid)
        plugin = run(self.mesh.node, command)
        return Cost(plugin.wall, plugin.cpu + process_cpu_milliseconds(pid) - before)


def unmeshed(mesh: Mesh) -> list[Row]:
    """ADD of a pod outside the mesh, plugin and agent together, against portmap VERSION."""
    mesh.agent.ensure(AgentOptions(nftables=True))
    with ExitStack() as stack:
        pods = [unmeshed_pod("bench", f"plain-{number}") for number in range(ROUNDS + WARM_UP)]
        adds = Adds(mesh, "plain", pods, stack)
        portmap = Command([str(SYSTEM_PLUGINS / "portmap")], {"CNI_COMMAND": "VERSION"})
        for number in range(WARM_UP):
            adds.cost(ROUNDS + number)
        costs = interleaved(ROUNDS, {"add": adds.cost, "portmap": lambda _: run(mesh.node, portmap)})
    add, yardstick = typical(costs["add"]), typical(costs["portmap"])
    return [
        ratio("ADD, pod not in the mesh: wall", add.wall, yardstick.wall, MAX_UNMESHED, "portmap VERSION"),
        ratio("ADD, pod not in the mesh: CPU with agent", add.cpu, yardstick.cpu, MAX_UNMESHED, "portmap VERSION"),
    ]


def sidecar(mesh: Mesh, backend: Backend) -> list[Row]:
    """ADD of a sidecar pod against the tool called by hand with the same text, and fifty of them at once."""
    mesh.agent.ensure(AgentOptions(nftables=backend is Backend.NFTABLES))
    name, by_hand = ("nft", "nft -f") if backend is Backend.NFTABLES else ("ipt", "the two restores")
    count = ROUNDS + WARM_UP + TRACED
    with ExitStack() as stack:
        adds = Adds(mesh, name, [sidecar_pod("bench", f"{name}-{number}") for number in range(count)], stack)
        empty = [stack.enter_context(PodNetns(mesh.node, f"{name}-hand-{n}", n)) for n in range(ROUNDS)]
        texts = write_texts(mesh, adds.pods[0], backend)
        for number in range(WARM_UP):
            adds.cost(ROUNDS + number)
        costs = interleaved(
            ROUNDS, {"add": adds.cost, "hand": lambda number: apply_by_hand(mesh, texts, empty[number])}
        )
        traced = range(ROUNDS + WARM_UP, count)
        with counted_processes(mesh) as executed:
            for number in traced:
                run(mesh.node, adds.command(number))
        processes = len(executed) / len(traced)
    add, hand = typical(costs["add"]), typical(costs["hand"])
    what = f"ADD, sidecar pod, {backend.value}"
    rows = [
        ratio(f"{what}: wall", add.wall, hand.wall, MAX_SIDECAR, by_hand),
        ratio(f"{what}: CPU with agent", add.cpu, hand.cpu, MAX_SIDECAR, by_hand),
        Row(f"{what}: processes besides the plugin", processes, MAX_PROCESSES[backend], "", "strace -f -e execve"),
    ]
    if backend is Backend.NFTABLES:
        rows.append(at_once(mesh, add.cpu))
    return rows


def at_once(mesh: Mesh, cpu_of_one: float) -> Row:
    """Fifty ADDs at the same moment: all succeed, and how much of the cores' time becomes ADDs."""
    cores = os.cpu_count() or 1
    with ExitStack() as stack:
        adds = Adds(mesh, "once", [sidecar_pod("bench", f"once-{number}") for number in range(AT_ONCE)], stack)
        commands = [adds.command(number) for number in range(AT_ONCE)]

        def work() -> tuple[float, int]:
            begin = time.perf_counter()
            pids = [start_here(command) for command in commands]
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            return time.perf_counter() - begin, sum(status != 0 for status in statuses)

        seconds, failed = mesh.node.call(work)
    if failed:
        raise LabError(f"{failed} of {AT_ONCE} simultaneous ADDs failed: {mesh.agent.log_text()[-2000:]}")
    throughput, possible = AT_ONCE / seconds, cores * 1000 / cpu_of_one
    detail = f"{throughput:.0f} / {possible:.0f} ADDs/s, all succeeded"
    return Row(
        "50 ADDs at once, throughput",
        throughput / possible,
        MIN_THROUGHPUT,
        "×",
        detail,
        f"{cores} cores / CPU of one",
        at_least=True,
    )


def write_texts(mesh: Mesh, pod: Mapping[str, Any], backend: Backend) -> list[tuple[list[str], Path]]:
    """Write the rules of a pod as files: the commands that load them by hand, and the files."""
    parameters = derive_interception(pod_from_object(pod)).interception
    ruleset = sidecar_ruleset(parameters, BOTH, backend)
    if backend is Backend.NFTABLES:
        # Without the deletions, which make the kernel wait 10 ms: the netns are fresh, and the agent sends none either.
        texts = [(["/usr/sbin/nft", "-f", "-"], nft.render(ruleset).removeprefix(nft.render_removal()))]
    else:
        tools = {Family.V4: "/usr/sbin/iptables-restore", Family.V6: "/usr/sbin/ip6tables-restore"}
        texts = [([tool, "--noflush"], iptables.render(ruleset, family)) for family, tool in tools.items()]
    result = []
    for number, (arguments, text) in enumerate(texts):
        path = mesh.node.folder / f"by-hand-{backend.value}-{number}"
        path.write_text(text)
        result.append((arguments, path))
    return result


def apply_by_hand(mesh: Mesh, texts: Sequence[tuple[list[str], Path]], netns: PodNetns) -> Cost:
    """Load the rules with the tools, one after the other."""
    cost = Cost(0, 0)
    for arguments, path in texts:
        cost += run(mesh.node, Command(arguments, {}, path, netns.path))
    return cost


@contextmanager
def counted_processes(mesh: Mesh) -> Iterator[list[str]]:
    """Trace the agent and its children meanwhile; afterwards the list holds one line for each program started."""
    trace = mesh.node.folder / "strace"
    arguments = ["strace", "-f", "-e", "trace=execve", "-o", str(trace), "-p", str(mesh.agent.pid)]
    strace = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    executed: list[str] = []
    try:
        wait_until("strace is attached", lambda: is_traced(mesh.agent.pid), 10)
        yield executed
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(10)
    lines = trace.read_text().splitlines()
    executed += [line for line in lines if EXECUTED.search(line) and line.rstrip().endswith("= 0")]


def is_traced(pid: int) -> bool:
    """Tell whether somebody traces a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return re.search(r"^TracerPid:\s+[1-9]", status, re.MULTILINE) is not None
