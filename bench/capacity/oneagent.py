"""One real agent, a process of the node, against the real API server: what it costs its node."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab.agent import AGENT, PLUGIN, resident_mib
from lab.ambient import ambient_environment
from lab.node import wait_until

from bench.capacity.fleet import ENVIRONMENT, Pods, service_accounts
from bench.capacity.server import ACCOUNT_NAMESPACE, Server
from bench.runs import process_cpu_milliseconds
from meshcni import istio

NODE = "node-full"
PODS = 250
SETTLE_SECONDS = 5.0
START_SECONDS = 30.0
LIVES, PER_SECOND = 40, 2.0


@dataclass(frozen=True, slots=True)
class NodeCost:
    """CPU as thousandths of a core, memory in MiB; `per_life` is the CPU that the life of one pod costs, in ms."""

    resident: float
    idle: float
    per_life: float


def measure(server: Server, pods: Pods, idle_seconds: float, *, ambient: bool) -> NodeCost:
    """Start the agent of a node that has many pods, let it rest, then let pods come and go on that node."""
    with _agent(server, ambient=ambient) as pid:
        time.sleep(SETTLE_SECONDS)
        begin, before = time.monotonic(), process_cpu_milliseconds(pid)
        time.sleep(idle_seconds)
        idle = (process_cpu_milliseconds(pid) - before) / (time.monotonic() - begin)
        resident = resident_mib(pid)
        begin, before = time.monotonic(), process_cpu_milliseconds(pid)
        pods.churn(None, [NODE], LIVES, PER_SECOND, ambient=False)
        busy = process_cpu_milliseconds(pid) - before - idle * (time.monotonic() - begin)
    return NodeCost(resident, idle, busy / LIVES)  # ms a second are thousandths of a core


@contextmanager
def _agent(server: Server, *, ambient: bool) -> Iterator[int]:
    node = server.node
    name = "ambient" if ambient else "sidecar"
    folder = server.folder / f"agent-{name}"
    places = {key: folder / key for key in ("conf", "bin", "image", "run")}
    for place in places.values():
        place.mkdir(parents=True)
    (places["image"] / istio.PLUGIN_NAME).write_bytes(PLUGIN.read_bytes())
    (places["image"] / istio.PLUGIN_NAME).chmod(0o755)
    (places["conf"] / "10-lab.conflist").write_text(
        '{"cniVersion": "0.4.0", "name": "lab", "plugins": [{"type": "loopback"}]}\n'
    )
    environment = {
        **ENVIRONMENT,
        **(ambient_environment(folder / "ztunnel.sock") if ambient else {}),
        "MOUNTED_CNI_NET_DIR": str(places["conf"]),
        "CNI_BINARY_SOURCE_DIR": str(places["image"]),
        "CNI_BINARY_TARGET_DIR": str(places["bin"]),
        "CNI_AGENT_RUN_DIR": str(places["run"]),
        "SERVICE_ACCOUNT_DIR": str(service_accounts(server, 1)[0]),
        "HOST_PROC_DIR": "/proc",
        "NATIVE_NFTABLES": "true",
        "NODE_NAME": NODE,
        "POD_NAME": "istio-cni-node-capacity",
        "POD_NAMESPACE": ACCOUNT_NAMESPACE,
        "REPAIR_ENABLED": "true",
    }
    process = node.spawn([str(AGENT)], environment=environment, log=f"agent-{name}")
    try:
        command = [str(AGENT), "status", "--cni-agent-run-dir", str(places["run"])]
        wait_until("the real agent is ready", lambda: _succeeds(server, command), START_SECONDS, 0.5)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _succeeds(server: Server, command: list[str]) -> bool:
    return server.node.spawn(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait() == 0
