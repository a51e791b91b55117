"""The figures as rows with budgets, and what they come to in a large cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console

from bench.capacity.oneagent import PODS, NodeCost
from bench.capacity.phases import RETRY_AFTER_SECONDS, ModeCost, Period, Restart, Shed, spread
from bench.report import Row
from bench.report import show as show_rows

LARGE = 5000  # nodes
WATCH_SECONDS = 450.0  # the mean time for which an informer asks a watch to last (Timing: 300 to 600)
KIB, MIB = 1024.0, 1024.0**2
PIPE_WIDTH = 170


@dataclass(slots=True)
class Measured:
    """What a run has found so far; what comes last in it may be missing."""

    agents: int
    pods: int  # on each node
    namespaces: int
    alone: Period | None = None  # without agents, quiet
    alone_churn: Period | None = None  # without agents, the same lives of pods
    direct: Period | None = None  # GETs of a pod, each over a connection of its own
    modes: dict[str, ModeCost] = field(default_factory=dict)
    costs: dict[str, NodeCost] = field(default_factory=dict)
    shed: Shed | None = None
    restart: Restart | None = None


def show(measured: Measured) -> int:
    """Print all; 0 when every budget is kept."""
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPE_WIDTH)
    rows = list(_rows(measured))
    show_rows(console, rows)
    for line in _facts(measured):
        console.print(line, markup=False)
    console.print(f"\nAt {LARGE} nodes, from {measured.agents} agents:", markup=False)
    for line in extrapolated(measured):
        console.print(f"  {line}", markup=False)
    return 0 if all(row.is_met for row in rows) else 1


def _rows(found: Measured) -> Iterator[Row]:
    for name, cost in found.modes.items():
        informers = 2 if name == "ambient" else 1
        start = len(cost.storm.period.requests) / found.agents
        detail = _counts(cost.storm.period, found.agents)
        yield Row(f"{name}: requests of a start, an agent", start, 16 if informers == 2 else 10, "", detail)
        yield Row(f"{name}: watches of an agent", cost.watches / found.agents, informers, "")
        rate = len(cost.quiet.requests) / found.agents / cost.quiet.seconds * 60
        yield Row(
            f"{name}: requests of an agent at rest, a minute",
            rate,
            1.5 * informers * 60 / WATCH_SECONDS,
            "",
            f"in {cost.quiet.seconds:.0f} s; expected {informers * 60 / WATCH_SECONDS:.3f}",
        )
        asked = [one for one in cost.churn.requests if one.verb != "watch"]
        yield Row(
            f"{name}: requests for the life of a pod",
            len(asked) / cost.lives,
            informers,
            "",
            ", ".join(f"{what} {count / cost.lives:.2f}" for what, count in _tally(cost.churn).items()),
        )
        yield Row(
            f"{name}: lists after the first",
            cost.report.get("relists", 0),
            0,
            "",
            f"errors {dict(cost.report['errors'])}",
        )
        yield Row(f"{name}: API server's heap, an agent", cost.heap / KIB, 1024, "KiB", "in use, after a collection")
    for name, node in found.costs.items():
        yield Row(f"{name}: a real agent's memory, {PODS} pods", node.resident, 75, "MiB", "resident")
        yield Row(f"{name}: its CPU at rest", node.idle, 5, "mcore")
        yield Row(f"{name}: its CPU for the life of a pod", node.per_life, 50, "ms", "seven events of a watch")
    if found.shed is not None:
        shed = found.shed
        detail = f"{shed.refused} refusals of {shed.agents} agents; {spread(shed.ready)}"
        yield Row("after a 429: soonest repetition", shed.soonest, RETRY_AFTER_SECONDS, "s", detail, at_least=True)
    if found.restart is not None:
        back = found.restart
        detail = f"all watches open after {back.seconds:.1f} s; {_counts(back.period, back.informers)} (an informer)"
        yield Row("API server restarted: lists, an informer", back.relists / back.informers, 1, "", detail)


def _facts(found: Measured) -> Iterator[str]:
    if found.alone is None or found.alone_churn is None or found.direct is None:
        return
    for name, cost in found.modes.items():
        storm, quiet, churn = cost.storm, cost.quiet, cost.churn
        agents = found.agents
        yield (
            f"{name}, start of all at once: {spread(storm.ready)}; API server {storm.period.cpu / agents:.1f} ms CPU "
            f"and {storm.period.bytes_out / agents / KIB:.0f} KiB an agent, {storm.peak / MIB:.0f} MiB more at the peak"
        )
        yield (
            f"{name}, at rest: {(quiet.bytes_in + quiet.bytes_out) / agents / quiet.seconds:.1f} bytes/s an agent, API "
            f"server {_surplus(quiet, found.alone) / agents * 1000:.1f} µs CPU a second and agent"
        )
        yield (
            f"{name}, a pod's life: {churn.bytes_out / cost.lives / KIB:.1f} KiB to agents, API server "
            f"{churn.cpu / cost.lives:.2f} ms CPU with agents, {found.alone_churn.cpu / cost.lives:.2f} without; "
            f"{dict(cost.report['counts'])}"
        )
    asked = len(found.direct.requests) or 1
    cpu = (found.direct.cpu - found.alone.cpu / found.alone.seconds * found.direct.seconds) / asked
    size = found.direct.bytes_out / asked / KIB
    yield f"one GET of a pod over a connection of its own: {cpu:.1f} ms CPU, {size:.0f} KiB"


def extrapolated(found: Measured) -> Iterator[str]:
    """Yield what a cluster of LARGE nodes would see, each line with its arithmetic."""
    for name, cost in found.modes.items():
        informers = 2 if name == "ambient" else 1
        start = len(cost.storm.period.requests) / found.agents
        cpu = cost.storm.period.cpu / found.agents
        heap = cost.heap / KIB
        traffic = (cost.quiet.bytes_in + cost.quiet.bytes_out) / found.agents / cost.quiet.seconds
        size = cost.storm.period.bytes_out / found.agents / KIB
        yield f"{name}: watches {LARGE} × {informers} = {LARGE * informers}"
        rate = LARGE * informers / WATCH_SECONDS
        yield f"{name}: at rest {LARGE} × {informers} / {WATCH_SECONDS:g} s = {rate:.1f} requests/s"
        yield f"{name}: at rest {LARGE} × {traffic:.1f} bytes/s = {LARGE * traffic / KIB:.0f} KiB/s"
        yield f"{name}: API server's heap {LARGE} × {heap:.0f} KiB = {LARGE * heap / KIB:.0f} MiB"
        yield f"{name}: all start at once {LARGE} × {start:.1f} = {LARGE * start:.0f} requests"
        yield f"{name}: all start at once {LARGE} × {cpu:.1f} ms = {LARGE * cpu / 1000:.0f} s CPU"
        yield f"{name}: all start at once {LARGE} × {size:.0f} KiB = {LARGE * size / KIB:.0f} MiB"
        asked = sum(one.verb != "watch" for one in cost.churn.requests) / cost.lives
        yield f"{name}: 100 pods begun a second × {asked:.2f} = {100 * asked:.0f} requests/s"


def _surplus(period: Period, alone: Period) -> float:
    """Return CPU beyond what the API server takes for itself, in ms a second."""
    return period.cpu / period.seconds - alone.cpu / alone.seconds


def _tally(period: Period) -> Mapping[str, int]:
    return dict(sorted(period.counted().items()))


def _counts(period: Period, agents: int) -> str:
    return ", ".join(f"{what} {count / agents:.2f}" for what, count in _tally(period).items())
