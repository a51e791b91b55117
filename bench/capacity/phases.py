"""What is measured: all agents start at once, nothing happens, pods come and go, an API server sheds load."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lab.node import LabError, wait_until

from bench.capacity import objects
from bench.capacity.fleet import Fleet, Pods
from bench.capacity.server import Limits, Reading, Request, Server

CHURN_PER_SECOND = 20.0
DRAIN_SECONDS = 60.0
SETTLE_SECONDS = 5.0
AWAY_SECONDS = 10.0  # of an API server that is restarted under the agents
SCARCE = Limits(reading=8, writing=4)
RETRY_AFTER_SECONDS = 1.0  # what an API server asks for that sheds load


@dataclass(frozen=True, slots=True)
class Period:
    """What passed between two readings."""

    seconds: float
    cpu: float  # ms of the API server
    etcd_cpu: float
    bytes_in: int
    bytes_out: int
    requests: Sequence[Request]

    def counted(self) -> Mapping[str, int]:
        """Return how many requests there were of each verb and resource."""
        return Counter(f"{one.verb} {one.resource}" for one in self.requests)


@dataclass(frozen=True, slots=True)
class Storm:
    """A start of all agents at once: seconds until each was ready, and what it took."""

    ready: Sequence[float]
    period: Period
    peak: int  # resident bytes of the API server, above those before


@dataclass(frozen=True, slots=True)
class Shed:
    """What agents did with an API server that refuses: answers 429, and how soon after one the same question came."""

    refused: int
    agents: int  # that were refused at least once
    soonest: float  # seconds; infinity when nobody was refused
    ready: Sequence[float]


@dataclass(frozen=True, slots=True)
class Restart:
    """An API server that went away under connected agents and came back."""

    informers: int  # of all agents
    seconds: float  # until every watch was open again
    period: Period
    relists: int
    restarts: int


@dataclass(frozen=True, slots=True)
class ModeCost:
    """One mode of the agents. Heap is in bytes for each agent; `churn` has the cost of the same without agents."""

    storm: Storm
    heap: float
    watches: int
    quiet: Period
    churn: Period
    lives: int
    report: Mapping[str, Any]


class Meter:
    """Readings of a server around something."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.requests()  # what was before does not count
        self.first: Reading = server.read()
        self.begin, self.cpu, self.etcd_cpu = time.monotonic(), server.cpu, server.etcd_cpu

    def period(self) -> Period:
        """Return what passed since the meter was made."""
        server, first = self.server, self.first
        seconds, cpu, etcd_cpu = time.monotonic() - self.begin, server.cpu - self.cpu, server.etcd_cpu - self.etcd_cpu
        last = server.read()
        return Period(
            seconds, cpu, etcd_cpu, last.bytes_in - first.bytes_in, last.bytes_out - first.bytes_out, server.requests()
        )


def quiet(server: Server, seconds: float) -> Period:
    """Return what a time passes in which nothing happens."""
    meter = Meter(server)
    time.sleep(seconds)
    return meter.period()


def churn(server: Server, pods: Pods, fleet: Fleet | None, nodes: int, lives: int, *, ambient: bool) -> Period:
    """Let pods live and end all over the nodes."""
    meter = Meter(server)
    names = [objects.node_name(number) for number in range(nodes)]
    pods.churn(fleet, names, lives, CHURN_PER_SECOND, ambient=ambient)
    if fleet is not None:
        wait_until("every ADD is answered", lambda: not fleet.report()["adds under way"], DRAIN_SECONDS, 0.2)
    return meter.period()


def direct(server: Server, count: int) -> Period:
    """Ask for one pod after the other, each over a connection of its own, as the original's plugin does in an ADD."""
    (token,) = server.tokens(1)
    items = server.call("GET", f"/api/v1/pods?limit={count}")["items"]
    names = [(one["metadata"]["namespace"], one["metadata"]["name"]) for one in items]
    meter = Meter(server)
    for namespace, name in names:
        server.ask_once(f"/api/v1/namespaces/{namespace}/pods/{name}", token)
    return meter.period()


def mode(server: Server, pods: Pods, count: int, quiet_seconds: float, lives: int, *, ambient: bool) -> ModeCost:
    """Measure agents of one mode."""
    before = server.read()
    with Fleet(server, count, ambient=ambient) as fleet:
        storm = start(server, fleet, before)
        time.sleep(SETTLE_SECONDS)
        settled = server.read()
        still = quiet(server, quiet_seconds)
        busy = churn(server, pods, fleet, count, lives, ambient=ambient)
        report = fleet.report()
    heap = (settled.heap - before.heap) / count
    return ModeCost(storm, heap, settled.watches - before.watches, still, busy, lives, report)


def start(server: Server, fleet: Fleet, before: Reading) -> Storm:
    """Start all agents at the same moment."""
    server.peak_resident()
    meter = Meter(server)
    ready = fleet.start()
    time.sleep(2.0)  # the last watches are opened after the lists
    return Storm(ready, meter.period(), server.peak_resident() - before.resident)


def shed(server: Server, count: int) -> tuple[Shed, Restart]:
    """Let all agents start against an API server that takes few requests at once; then restart it under them."""
    server.stop()
    server.start(SCARCE)
    with Fleet(server, count, ambient=True) as fleet:
        server.requests()
        ready = fleet.start()
        requests = server.requests()
        refused = [one for one in requests if one.code == 429]
        found = Shed(len(refused), len({one.agent for one in refused}), soonest_retry(requests), ready)
        return found, restart(server, fleet)


def restart(server: Server, fleet: Fleet) -> Restart:
    """Take the API server away for a while and see the agents come back."""
    informers = 2 * fleet.count
    wait_until("all watches are open", lambda: fleet.report()["connected"] == informers, DRAIN_SECONDS, 0.2)
    before = fleet.report()
    server.requests()
    server.stop()
    time.sleep(AWAY_SECONDS)
    server.start(Limits())
    meter = Meter(server)
    wait_until("all watches are open again", lambda: fleet.report()["connected"] == informers, 3 * DRAIN_SECONDS, 0.2)
    period, after = meter.period(), fleet.report()
    return Restart(
        informers, period.seconds, period, after["relists"] - before["relists"], after["restarts"] - before["restarts"]
    )


def soonest_retry(requests: Sequence[Request]) -> float:
    """Return the shortest time from an answer 429 to the same list or watch of the same agent, in seconds."""
    asked: dict[tuple[str, str, str], list[Request]] = defaultdict(list)
    for one in sorted(requests, key=lambda one: one.began):
        if one.verb in ("list", "watch"):
            asked[one.agent, one.verb, one.resource].append(one)
    gaps = [
        later.began - earlier.at
        for several in asked.values()
        for earlier, later in pairwise(several)
        if earlier.code == 429
    ]
    return min(gaps, default=float("inf"))


def spread(values: Sequence[float]) -> str:
    """Return median and maximum as text."""
    if not values:
        raise LabError("nothing was measured")
    return f"{statistics.median(values):.1f} s median, {max(values):.1f} s last"
