"""The plugin alone: what it costs when it decides without the agent."""

from __future__ import annotations

import json
from collections.abc import Callable

from lab.agent import EXCLUDED_NAMESPACE
from lab.containerd import SYSTEM_PLUGINS
from lab.mesh import Mesh
from lab.objects import sidecar_pod
from lab.plugin import PodNetns, environment_for, stdin_for

from bench.report import Row, ratio
from bench.runs import Command, Cost, interleaved, peak_memory_mib, run, typical
from meshcni import istio

ROUNDS = 60
CASES = ("VERSION", "DEL", "ADD, excluded namespace")
MAX_RATIO = 1.8
MAX_MEMORY_MIB = 7.0


def measure(mesh: Mesh) -> list[Row]:
    """VERSION, DEL and ADD of an excluded namespace against portmap VERSION and /bin/true."""
    mesh.agent.ensure(mesh.agent.options)
    program = str(mesh.runtime.bin_dir / istio.PLUGIN_NAME)
    pod = sidecar_pod(EXCLUDED_NAMESPACE, "excluded")
    with PodNetns(mesh.node, "bench-plugin", 0) as netns:
        stdin = mesh.node.folder / "bench-plugin.json"
        stdin.write_text(json.dumps(stdin_for(mesh.agent, netns, {})))
        commands = {
            "true": Command(["/bin/true"], {}),
            "portmap": Command([str(SYSTEM_PLUGINS / "portmap")], {"CNI_COMMAND": "VERSION"}, stdin),
            "VERSION": Command([program], {"CNI_COMMAND": "VERSION"}, stdin),
            "DEL": Command([program], environment_for(mesh.agent, "DEL", pod, netns), stdin),
            "ADD, excluded namespace": Command([program], environment_for(mesh.agent, "ADD", pod, netns), stdin),
        }
        costs = interleaved(ROUNDS, {name: always(mesh, command) for name, command in commands.items()})
        memory = {
            name: peak_memory_mib(mesh.node, commands[name]) for name in ("VERSION", "DEL", "ADD, excluded namespace")
        }
    yardstick, true = typical(costs["portmap"]), typical(costs["true"])
    note = f"/bin/true takes {true.wall:.2f} ms of wall clock, {true.cpu:.2f} ms of CPU"
    rows = []
    for name in CASES:
        cost = typical(costs[name])
        rows.append(ratio(f"plugin {name}: wall", cost.wall, yardstick.wall, MAX_RATIO, "portmap VERSION"))
        rows.append(ratio(f"plugin {name}: CPU", cost.cpu, yardstick.cpu, MAX_RATIO, "portmap VERSION"))
        rows.append(Row(f"plugin {name}: peak memory", memory[name], MAX_MEMORY_MIB, "MiB", note))
    return rows


def always(mesh: Mesh, command: Command) -> Callable[[int], Cost]:
    """Return a case that runs the same command in every round."""
    return lambda _: run(mesh.node, command)
