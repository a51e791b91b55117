"""Running a process and asking the kernel what it cost; all on the thread that lives in the lab's node."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.node import CLEAN_ENVIRONMENT, LabError, Node

BUILD = Path(__file__).parent.parent / "build" / "bench"
CLOCK_OF_PROCESS = 2  # CPUCLOCK_SCHED, include/linux/posix-timers.h
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took: wall clock and CPU time (its own and that of its reaped children), in milliseconds."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run: `stdin` is a file's path; `netns` is one as seen from outside, empty for the node's own."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    stdin: Path = Path("/dev/null")
    netns: str = ""
    expected_status: int = 0


def run(node: Node, command: Command) -> Cost:
    """Run a program to its end; LabError when its exit status is another than expected."""
    status, cost = node.call(lambda: run_here(command), command.netns)
    if status != command.expected_status:
        raise LabError(f"{' '.join(command.arguments)}: exit {status}, expected {command.expected_status}")
    return cost


def run_here(command: Command) -> tuple[int, Cost]:
    """Run a program from the calling thread and wait for it: exit status and cost."""
    begin = time.perf_counter()
    pid = start_here(command)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - begin
    return os.waitstatus_to_exitcode(status), Cost(wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000)


def start_here(command: Command) -> int:
    """Start a program from the calling thread, with its output thrown away, and return its pid."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, str(command.stdin), os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
    ]
    full = {**CLEAN_ENVIRONMENT, **command.environment}
    return os.posix_spawn(command.arguments[0], list(command.arguments), full, file_actions=actions)


def peak_memory_mib(node: Node, command: Command) -> float:
    """Return the peak resident memory of a program, in MiB."""
    program = BUILD / "peak"
    source = Path(__file__).parent / "peak.c"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-Os", "-static", "-o", program, source], check=True)
    with command.stdin.open("rb") as stdin:
        process = node.spawn(
            [str(program), *command.arguments],
            environment=command.environment,
            netns=command.netns,
            stdin=stdin,
            stderr=subprocess.PIPE,
        )
        _, errors = process.communicate(timeout=60)
    return int(errors.split()[-1]) / 1024


def process_cpu_milliseconds(pid: int) -> float:
    """Return the CPU time of a running process, its ended threads included, and of its reaped children."""
    own = time.clock_gettime((~pid << 3) | CLOCK_OF_PROCESS)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = (int(fields[13]) + int(fields[14])) / TICKS_PER_SECOND
    return (own + children) * 1000


def typical(costs: Sequence[Cost]) -> Cost:
    """Return the median of wall and the mean of CPU.

    The CPU time of the agent's children is told in ticks of 10 ms: a median of such figures is 0 or 10.
    """
    return Cost(statistics.median(cost.wall for cost in costs), statistics.fmean(cost.cpu for cost in costs))


def interleaved(rounds: int, cases: Mapping[str, Callable[[int], Cost]]) -> dict[str, list[Cost]]:
    """Run every case once a round, so that all meet the same weather; a case gets the number of the round."""
    results: dict[str, list[Cost]] = {name: [] for name in cases}
    for number in range(rounds):
        for name, case in cases.items():
            results[name].append(case(number))
    return results
