"""The agent by itself: start, memory, idling, how fast a conf is repaired."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from lab.agent import AgentOptions, milliseconds_since, resident_mib
from lab.apiserver import ApiServer
from lab.containerd import CONF_NAME
from lab.mesh import Mesh
from lab.node import wait_until
from lab.objects import sidecar_pod

from bench.adds import Adds
from bench.report import Row
from bench.runs import process_cpu_milliseconds
from meshcni import istio

STARTS = 7
REPAIRS = 7
IDLE_SECONDS = 20.0
PODS = 250
ADDED = 20  # of them, by an ADD
PAUSE_SECONDS = 0.002
SETTLE_SECONDS = 2.0  # between two repairs, so that each meets an agent at rest
WAIT_SECONDS = 20.0
MAX_START_MS, MAX_REPAIR_MS, MAX_IDLE_PERCENT, MAX_IDLE_MIB, MAX_LOADED_MIB = 700.0, 100.0, 0.3, 65.0, 75.0


def starts(mesh: Mesh) -> list[Row]:
    """From starting the process to 200 from /readyz, without pods."""
    times = []
    for _ in range(STARTS):
        mesh.agent.terminate()
        begin = time.monotonic()
        mesh.agent.start(AgentOptions(nftables=True), wait=False)
        wait_until("the agent is ready", mesh.agent.is_ready, WAIT_SECONDS, PAUSE_SECONDS)
        times.append(milliseconds_since(begin))
    mesh.agent.wait_ready()
    detail = f"{min(times):.0f} to {max(times):.0f} ms in {STARTS} starts"
    return [Row("agent: start to Ready", statistics.median(times), MAX_START_MS, "ms", detail)]


def idling(mesh: Mesh) -> list[Row]:
    """Memory without pods, CPU at rest, memory with pods."""
    mesh.agent.terminate()
    mesh.api.do(delete_all_pods)
    mesh.agent.start(AgentOptions(nftables=True))
    pid = mesh.agent.pid
    time.sleep(SETTLE_SECONDS)
    before = process_cpu_milliseconds(pid)
    time.sleep(IDLE_SECONDS)
    percent = (process_cpu_milliseconds(pid) - before) / (IDLE_SECONDS * 1000) * 100
    idle = resident_mib(pid)
    for number in range(PODS - ADDED):
        mesh.add_object(sidecar_pod("bench", f"there-{number}"))
    with ExitStack() as stack:  # and some of them started, which loads what programming rules needs
        adds = Adds(mesh, "there-too", [sidecar_pod("bench", f"new-{number}") for number in range(ADDED)], stack)
        for number in range(ADDED):
            adds.cost(number)
    loaded = resident_mib(pid)
    return [
        Row("agent: CPU at rest", percent, MAX_IDLE_PERCENT, "%", f"over {IDLE_SECONDS:g} s"),
        Row("agent: memory at rest", idle, MAX_IDLE_MIB, "MiB", "resident"),
        Row(f"agent: memory with {PODS} mesh pods", loaded, MAX_LOADED_MIB, "MiB", "resident"),
    ]


def repairs(mesh: Mesh) -> list[Row]:
    """From another program's rename of the conf to our entry being in it again."""
    mesh.agent.ensure(AgentOptions(nftables=True))
    conf = mesh.runtime.conf_dir / CONF_NAME
    times = []
    for _ in range(REPAIRS):
        time.sleep(SETTLE_SECONDS)
        mesh.runtime.write_chain()
        begin = time.monotonic()
        wait_until("the entry is back", lambda: istio.PLUGIN_NAME in conf.read_text(), WAIT_SECONDS, PAUSE_SECONDS)
        times.append(milliseconds_since(begin))
    detail = f"{min(times):.0f} to {max(times):.0f} ms in {REPAIRS} repairs"
    return [Row("agent: conf change to repaired", statistics.median(times), MAX_REPAIR_MS, "ms", detail)]


def delete_all_pods(server: ApiServer) -> None:
    """Take every pod out of the API server."""
    for pod in server.cluster.objects("pods"):
        server.delete_pod(pod["metadata"]["namespace"], pod["metadata"]["name"])
