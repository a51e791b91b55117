"""Ambient mode: enrolment against the tools by hand, a restart with 250 enrolled pods, looking after them, a slow ack.

The stand-in for ztunnel answers at once and serves nobody: what is measured is ours.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lab.agent import AgentOptions, milliseconds_since, resident_mib
from lab.mesh import Mesh
from lab.node import LabError, wait_until
from lab.objects import ambient_pod
from lab.plugin import PodNetns, container_id
from lab.ztunnel.client import command as stand_in_command
from lab.ztunnel.client import order, program_environment

from bench.adds import ROUNDS, TRACED, WARM_UP, Adds, apply_by_hand, counted_processes
from bench.report import Row, ratio
from bench.runs import interleaved, process_cpu_milliseconds, run, start_here, typical
from meshcni import istio
from meshcni.pods.ambient import AmbientParameters
from meshcni.rules import iptables, nft
from meshcni.rules.ambient import pod_ruleset
from meshcni.rules.model import Backend, Family

PODS = 250
AT_ONCE = 50
SLOW_SECONDS = 1.0
RESTARTS = 3
PAUSE_SECONDS = 0.005
WAIT_SECONDS = 60.0
IDLE_MILLISECONDS = 3.0  # of CPU in SETTLED_SECONDS: the background work is over
SETTLED_SECONDS = 0.5
CGROUPS = Path("/sys/fs/cgroup")
MAX_RATIO = 2.0
MAX_PROCESSES = {Backend.NFTABLES: 0, Backend.IPTABLES: 2}
MAX_VERIFY_SECONDS = {Backend.NFTABLES: 2.0, Backend.IPTABLES: 10.0}
MAX_READY_RATIO, MAX_KNOWN_SECONDS, MAX_WAIT_SECONDS, MAX_RSS_MIB, MAX_LINE_BYTES = 1.5, 2.0, 3.0, 75.0, 400
BOTH = frozenset(Family)
PARAMETERS = AmbientParameters(dns_capture=True)
INFO_LINE = re.compile(r"^\S+\s+(?:info|warn|error)\s", re.MULTILINE)
_names = itertools.count(1)


class StandIn:
    """A stand-in for ztunnel in the node; it acknowledges and does nothing else."""

    def __init__(self, mesh: Mesh) -> None:
        name = f"bench-ztunnel-{next(_names)}"
        folder = mesh.node.folder
        self.control = folder / f"{name}.control"
        arguments = stand_in_command(mesh.agent.ztunnel_socket, self.control, folder / f"{name}.jsonl")
        self._process = mesh.node.spawn(arguments, environment=program_environment(), log=name)

    def wait_connected(self) -> None:
        """Return when it has its snapshot."""
        wait_until("ztunnel has its snapshot", lambda: self.state()["ready"], WAIT_SECONDS, PAUSE_SECONDS)

    def state(self) -> dict[str, Any]:
        """What it knows; nothing is ready before it answers at all."""
        try:
            return order(self.control)
        except OSError:
            return {"ready": False, "workloads": {}}  # it does not listen yet

    def order(self, **values: Any) -> None:  # noqa: ANN401
        """Tell it to behave otherwise."""
        order(self.control, **values)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


@contextmanager
def ambient_mesh(mesh: Mesh, backend: Backend) -> Iterator[StandIn]:
    """Have an agent for ambient mode, and a stand-in connected to it."""
    mesh.agent.ensure(AgentOptions(nftables=backend is Backend.NFTABLES, ambient=True))
    stand_in = StandIn(mesh)
    try:
        stand_in.wait_connected()
        yield stand_in
    finally:
        stand_in.close()


def enrolment(mesh: Mesh, backend: Backend) -> list[Row]:
    """ADD of an ambient pod, plugin and agent together, against the tools called by hand with the same rules."""
    name, by_hand = ("anft", "nft -f") if backend is Backend.NFTABLES else ("aipt", "the two restores")
    count = ROUNDS + WARM_UP + TRACED
    with ambient_mesh(mesh, backend), ExitStack() as stack:
        adds = Adds(mesh, name, [ambient_pod("bench", f"{name}-{number}") for number in range(count)], stack)
        empty = [stack.enter_context(PodNetns(mesh.node, f"{name}-hand-{n}", n)) for n in range(ROUNDS)]
        texts = by_hand_texts(mesh, backend)
        for number in range(WARM_UP):
            adds.cost(ROUNDS + number)
        costs = interleaved(
            ROUNDS, {"add": adds.cost, "hand": lambda number: apply_by_hand(mesh, texts, empty[number])}
        )
        before = mesh.agent.log_text()
        with counted_processes(mesh) as executed:
            for number in range(ROUNDS + WARM_UP, count):
                run(mesh.node, adds.command(number))
        time.sleep(SETTLED_SECONDS)
        lines = [line for line in mesh.agent.log_text()[len(before) :].splitlines() if INFO_LINE.match(line)]
    add, hand = typical(costs["add"]), typical(costs["hand"])
    what = f"ADD, ambient pod, {backend.value}"
    longest = max(len(line.encode()) for line in lines)
    return [
        ratio(f"{what}: CPU with agent", add.cpu, hand.cpu, MAX_RATIO, by_hand),
        Row(
            f"{what}: processes besides the plugin",
            len(executed) / TRACED,
            MAX_PROCESSES[backend],
            "",
            "strace -f -e execve",
        ),
        Row(f"{what}: log lines", len(lines) / TRACED, 1, "", f"longest {longest} bytes"),
        Row(f"{what}: longest log line", longest, MAX_LINE_BYTES, "bytes"),
    ]


def by_hand_texts(mesh: Mesh, backend: Backend) -> list[tuple[list[str], Path]]:
    """Write the rules as files for the tools: the commands and the files."""
    ruleset = pod_ruleset(PARAMETERS, BOTH, backend)
    if backend is Backend.NFTABLES:
        text = "\n".join(line for line in nft.render(ruleset).splitlines() if not line.startswith("delete "))
        texts = [(["/usr/sbin/nft", "-f", "-"], text)]
    else:
        tools = {Family.V4: "/usr/sbin/iptables-restore", Family.V6: "/usr/sbin/ip6tables-restore"}
        texts = [([tool, "--noflush"], iptables.render(ruleset, family)) for family, tool in tools.items()]
    result = []
    for number, (arguments, text) in enumerate(texts):
        path = mesh.node.folder / f"ambient-by-hand-{backend.value}-{number}"
        path.write_text(text + "\n")
        result.append((arguments, path))
    return result


def slow_ack(mesh: Mesh) -> list[Row]:
    """Fifty ADDs at once, one of which ztunnel answers a second late: nobody waits longer than that one."""
    with ambient_mesh(mesh, Backend.NFTABLES) as stand_in, ExitStack() as stack:
        adds = Adds(mesh, "slow", [ambient_pod("bench", f"slow-{number}") for number in range(AT_ONCE)], stack)
        slow = adds.pods[AT_ONCE // 2]["metadata"]["uid"]
        stand_in.order(do="set", faults=[f"delay:uid/{slow}={SLOW_SECONDS}"])
        commands = [adds.command(number) for number in range(AT_ONCE)]

        def work() -> list[float]:
            begin = time.perf_counter()
            pids = {start_here(command): number for number, command in enumerate(commands)}
            ended = []
            for _ in commands:
                pid, status = os.wait()
                if os.waitstatus_to_exitcode(status) != 0:
                    raise LabError(f"ADD {pids[pid]} failed: {mesh.agent.log_text()[-2000:]}")
                ended.append(time.perf_counter() - begin)
            return ended

        ended = mesh.node.call(work)
    detail = f"half of them after {statistics.median(ended):.2f} s, the last after {ended[-1]:.2f} s"
    return [Row("50 ambient ADDs, one ack 1 s late: the last", ended[-1], SLOW_SECONDS + 1.0, "s", detail)]


def restart(mesh: Mesh, backend: Backend) -> list[Row]:
    """A restart with 250 enrolled pods: ready, all known to ztunnel, looked after; a new pod meanwhile."""
    empty = ready_milliseconds_without_pods(mesh, backend)
    with ambient_mesh(mesh, backend) as stand_in, ExitStack() as stack:
        adds = Adds(mesh, f"many-{backend.value[:3]}", _pods(), stack)
        for number in range(PODS):
            run(mesh.node, adds.command(number))
        start_processes(mesh, adds, stack, PODS)
        wait_until("every pod is annotated", lambda: _annotated(mesh) >= PODS, WAIT_SECONDS)
        memory = resident_mib(mesh.agent.pid)
        ready, known, cpu, waits = [], [], [], []
        for number in range(RESTARTS):
            measured = _one_restart(mesh, stand_in, adds, PODS + number)
            ready.append(measured["ready"])
            known.append(measured["known"])
            cpu.append(measured["cpu"])
            waits.append(measured["wait"])
        memory = max(memory, resident_mib(mesh.agent.pid))
        begin, cpu_before = time.monotonic(), process_cpu_milliseconds(mesh.agent.pid)
        with counted_processes(mesh) as executed:
            wait_until("a round is over", lambda: time.monotonic() - begin > 60, 90)
        round_cpu = process_cpu_milliseconds(mesh.agent.pid) - cpu_before
    what = f"restart with {PODS} ambient pods, {backend.value}"
    return [
        ratio(f"{what}: Ready", statistics.median(ready), empty, MAX_READY_RATIO, "start without pods"),
        Row(
            f"{what}: all known to ztunnel", statistics.median(known) / 1000, MAX_KNOWN_SECONDS, "s", "since its start"
        ),
        Row(f"{what}: CPU until all are looked at", statistics.median(cpu), MAX_VERIFY_SECONDS[backend], "s"),
        Row(f"{what}: a new pod waits", max(waits), MAX_WAIT_SECONDS, "s", "asked for at the kill; never refused"),
        Row(f"agent: memory with {PODS} ambient pods, {backend.value}", memory, MAX_RSS_MIB, "MiB", "resident"),
        Row(
            f"verification of one pod, {backend.value}: processes",
            len(executed) / (PODS + RESTARTS),
            MAX_PROCESSES[backend],
            "",
            f"a round of {PODS} took {round_cpu / 1000:.2f} s of CPU in 60 s",
        ),
    ]


def ready_milliseconds_without_pods(mesh: Mesh, backend: Backend) -> float:
    """From starting the process to 200 from /readyz, ambient mode, no pods."""
    from bench.agent import delete_all_pods

    mesh.agent.terminate()
    mesh.api.do(delete_all_pods)
    times = []
    for _ in range(RESTARTS):
        begin = time.monotonic()
        mesh.agent.start(AgentOptions(nftables=backend is Backend.NFTABLES, ambient=True), wait=False)
        wait_until("the agent is ready", mesh.agent.is_ready, WAIT_SECONDS, PAUSE_SECONDS)
        times.append(milliseconds_since(begin))
        mesh.agent.terminate()
    return statistics.median(times)


def _one_restart(mesh: Mesh, stand_in: StandIn, adds: Adds, new: int) -> dict[str, float]:
    """Kill the agent, ask for a new pod, start it again. Milliseconds to ready and known, seconds of the rest."""
    mesh.agent.kill()
    command = adds.command(new)
    begin = time.monotonic()
    pid = mesh.node.call(lambda: start_here(command))
    mesh.agent.start(wait=False)
    wait_until("the agent is ready", mesh.agent.is_ready, WAIT_SECONDS, PAUSE_SECONDS)
    ready = milliseconds_since(begin)
    wait_until("ztunnel knows all", lambda: _is_known(stand_in), WAIT_SECONDS, PAUSE_SECONDS)
    known = milliseconds_since(begin)
    status = mesh.node.call(lambda: os.waitpid(pid, 0)[1])
    waited = time.monotonic() - begin
    if os.waitstatus_to_exitcode(status) != 0:
        raise LabError(f"a pod was refused during the restart: {mesh.agent.log_text()[-2000:]}")
    agent = mesh.agent.pid
    while True:  # until the background work is over
        before = process_cpu_milliseconds(agent)
        time.sleep(SETTLED_SECONDS)
        after = process_cpu_milliseconds(agent)
        if after - before < IDLE_MILLISECONDS * 5:
            return {"ready": ready, "known": known, "cpu": after / 1000, "wait": waited}


def _is_known(stand_in: StandIn) -> bool:
    state = stand_in.state()
    return bool(state["ready"]) and len(state["workloads"]) >= PODS


def _annotated(mesh: Mesh) -> int:
    pods = mesh.api.do(lambda server: server.cluster.objects("pods"))
    enabled = istio.REDIRECTION_ENABLED
    return sum(pod["metadata"].get("annotations", {}).get(istio.AMBIENT_REDIRECTION) == enabled for pod in pods)


def _pods() -> list[Mapping[str, Any]]:
    """Pods whose address the API knows, as those that run, and one to come in each restart."""
    running = [((number // 250), number % 250 + 1) for number in range(PODS)]
    pods = [ambient_pod("bench", f"many-{next(_names)}", ips=(f"10.78.{a}.{b}",)) for a, b in running]
    return [*pods, *(ambient_pod("bench", f"many-{next(_names)}") for _ in range(RESTARTS))]


def start_processes(mesh: Mesh, adds: Adds, stack: ExitStack, count: int) -> None:
    """Give each of the first `count` pods a process in its netns and in a cgroup that names it, as the runtime does."""
    hierarchy = next(path for path in (CGROUPS / "unified", CGROUPS) if (path / "cgroup.procs").exists())
    parent = hierarchy / mesh.node.name
    for pod, netns in itertools.islice(zip(adds.pods, adds.netns, strict=True), count):
        folder = parent / "kubepods" / f"pod{pod['metadata']['uid']}" / container_id(pod).replace("-", "")
        folder.mkdir(parents=True, exist_ok=True)
        process = mesh.node.spawn(["sleep", "infinity"], netns=netns.path)
        (folder / "cgroup.procs").write_text(str(process.pid))
        stack.callback(process.wait)
        stack.callback(process.kill)


def all_rows(mesh: Mesh, backend: Backend) -> Sequence[Row]:
    """Everything for one backend."""
    return [*enrolment(mesh, backend), *restart(mesh, backend)]
