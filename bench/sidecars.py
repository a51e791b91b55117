"""Looking after running sidecar pods: a round over 250 of them, when nothing has changed and when all has."""

from __future__ import annotations

import time
from contextlib import ExitStack

from lab.agent import AgentOptions, resident_mib
from lab.mesh import Mesh
from lab.node import wait_until
from lab.objects import sidecar_pod

from bench.adds import Adds, counted_processes
from bench.agent import delete_all_pods
from bench.ambient import start_processes
from bench.report import Row
from bench.runs import process_cpu_milliseconds
from meshcni.rules.model import Backend

PODS = 250
ROUNDS = 3
INTERVAL_SECONDS = 10.0
ROUNDS_METRIC = "istio_cni_sidecar_verification_seconds_count"
PODS_METRIC = "istio_cni_sidecar_pods"
WAIT_SECONDS = 300.0
PAUSE_SECONDS = 0.05
MAX_ROUND_MS = 4.0  # of CPU for a pod in which nothing has changed: 250 of them in 45 s are 2 % of a processor
MAX_HEAL_MS = {Backend.NFTABLES: 40.0, Backend.IPTABLES: 80.0}  # of CPU for a pod, its processes included
MAX_RSS_MIB = 85.0


def looking_after(mesh: Mesh, backend: Backend) -> list[Row]:
    """A start of the agent on a node with 250 sidecar pods that nobody captured, then rounds at rest."""
    mesh.agent.terminate()
    mesh.api.do(delete_all_pods)
    options = AgentOptions(
        nftables=backend is Backend.NFTABLES,
        force_iptables="" if backend is Backend.NFTABLES else "nft",
        environment={"AMBIENT_VERIFY_SECONDS": f"{INTERVAL_SECONDS:g}"},
    )
    with ExitStack() as stack:
        pods = [_running(number) for number in range(PODS)]
        mesh.agent.start(options)
        adds = Adds(mesh, f"run-{backend.value[:3]}", pods, stack)
        mesh.agent.terminate()
        start_processes(mesh, adds, stack, PODS)
        mesh.agent.start(options)
        captured = wait_captured(mesh)
        healing = process_cpu_milliseconds(mesh.agent.pid)
        wait_rounds(mesh, 2)  # in the first one after the healing everything is listed once more
        cpu, executed = rounds_at_rest(mesh)
        memory = resident_mib(mesh.agent.pid)
    what = f"{PODS} sidecar pods, {backend.value}"
    return [
        Row(f"{what}: a look at one that is in order", cpu / PODS, MAX_ROUND_MS, "ms", f"{cpu:.0f} ms of CPU a round"),
        Row(f"{what}: processes of a round", executed, 0.0, "", "when nothing has changed"),
        Row(
            f"{what}: CPU to start and heal one",
            healing / PODS,
            MAX_HEAL_MS[backend],
            "ms",
            f"{healing / 1000:.1f} s, all captured {captured:.0f} s after the start",
        ),
        Row(f"agent: memory with {what}", memory, MAX_RSS_MIB, "MiB", "resident"),
    ]


def wait_captured(mesh: Mesh) -> float:
    """Return how long it took until all are."""
    begin = time.monotonic()
    wait_until(
        "all are captured",
        lambda: mesh.agent.metric(PODS_METRIC, state="captured") == PODS,
        WAIT_SECONDS,
        PAUSE_SECONDS,
    )
    return time.monotonic() - begin


def wait_rounds(mesh: Mesh, count: int) -> None:
    """Return when so many rounds have ended."""
    target = mesh.agent.metric(ROUNDS_METRIC) + count
    wait_until("rounds are over", lambda: mesh.agent.metric(ROUNDS_METRIC) >= target, WAIT_SECONDS, 0.5)


def rounds_at_rest(mesh: Mesh) -> tuple[float, float]:
    """CPU milliseconds of one round, and how many programs the agent starts in one."""
    wait_rounds(mesh, 1)
    rounds, before = mesh.agent.metric(ROUNDS_METRIC), process_cpu_milliseconds(mesh.agent.pid)
    time.sleep(ROUNDS * INTERVAL_SECONDS)  # asking how far it is would cost as much as a round
    spent = process_cpu_milliseconds(mesh.agent.pid) - before
    cpu = spent / max(mesh.agent.metric(ROUNDS_METRIC) - rounds, 1)
    with counted_processes(mesh) as executed:
        time.sleep(INTERVAL_SECONDS)  # an agent that is traced is slow to answer questions
    return cpu, float(len(executed))


def _running(number: int) -> dict[str, object]:
    pod = sidecar_pod("bench", f"running-{number}")
    address = f"10.78.{number // 250}.{number % 250 + 1}"
    pod["status"] = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
    return pod
