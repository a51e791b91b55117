"""The plugin called directly, below the runtime: in a netns with addresses, with a runtime's environment and stdin."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab.agent import Agent
from lab.node import Node
from meshcni import istio

ANSWER_SECONDS = 60.0
IFNAME = "eth0"
OTHER_END = "lab0"  # of the veth pair, in the same netns: nothing arrives from elsewhere


@dataclass(frozen=True, slots=True)
class Answer:
    """What a plugin run gave: exit status (negative: killed by a signal), its JSON (empty without one), its stderr."""

    status: int
    result: Mapping[str, Any]
    stderr: str

    @property
    def code(self) -> int:
        """The CNI error code, 0 when there is none."""
        return int(self.result.get("code", 0))

    @property
    def text(self) -> str:
        """Message and details of the error."""
        return f"{self.result.get('msg', '')} {self.result.get('details', '')}".strip()


class PodNetns:
    """A netns as the plugins before ours leave it: lo up, an interface with a v4 and a v6 address. Context manager."""

    def __init__(self, node: Node, name: str, number: int) -> None:
        self.node, self.name = node, name
        self.addresses = (f"10.78.{number // 250}.{number % 250 + 1}/16", f"fd00:78::{number + 1:x}/64")
        self.path_inside = f"/run/netns/{name}"
        self.path = str(node.path(self.path_inside))

    def __enter__(self) -> PodNetns:
        commands = [f"-n {self.name} link set lo up"]
        commands += [f"-n {self.name} link add {IFNAME} type veth peer name {OTHER_END}"]
        commands += [f"-n {self.name} link set {name} up" for name in (IFNAME, OTHER_END)]
        commands += [f"-n {self.name} addr add {address} dev {IFNAME}" for address in self.addresses]
        script = "\n".join(f"ip {command}{' nodad' if '::' in command else ''}" for command in commands)
        self.node.run(["sh", "-ec", f"{self.making()}\n{script}"])
        return self

    def making(self) -> str:
        """Return the script that makes the netns itself."""
        return f"ip netns add {self.name}"

    def __exit__(self, *_: object) -> None:
        self.node.run(["sh", "-c", f"ip netns del {self.name} 2>/dev/null || true"])


def environment_for(agent: Agent, command: str, pod: Mapping[str, Any], netns: PodNetns) -> dict[str, str]:
    """Return the CNI variables that containerd would set."""
    metadata = pod["metadata"]
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": metadata["namespace"],
        "K8S_POD_NAME": metadata["name"],
        "K8S_POD_INFRA_CONTAINER_ID": container_id(pod),
        "K8S_POD_UID": metadata["uid"],
    }
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container_id(pod),
        "CNI_NETNS": netns.path_inside,
        "CNI_IFNAME": IFNAME,
        "CNI_PATH": str(agent.runtime.bin_dir),
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in arguments.items()),
    }


def start_call(
    agent: Agent, command: str, pod: Mapping[str, Any], netns: PodNetns, **overrides: object
) -> subprocess.Popen[bytes]:
    """Start the installed plugin for `pod`; `overrides` are changed fields of the conf."""
    process = agent.node.spawn(
        [str(agent.runtime.bin_dir / istio.PLUGIN_NAME)],
        environment=environment_for(agent, command, pod, netns),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(stdin_for(agent, netns, overrides)).encode())
        process.stdin.close()
    except BrokenPipeError:  # it need not read what it does not need, as runtimes know
        pass
    process.stdin = None
    return process


def finish_call(process: subprocess.Popen[bytes], timeout_seconds: float = ANSWER_SECONDS) -> Answer:
    """Wait for the end of a plugin run and read its answer."""
    output, errors = process.communicate(timeout=timeout_seconds)
    text = output.decode()
    return Answer(process.returncode, json.loads(text) if text else {}, errors.decode())


def call(agent: Agent, command: str, pod: Mapping[str, Any], netns: PodNetns, **overrides: object) -> Answer:
    """Run the installed plugin for `pod` to its end."""
    return finish_call(start_call(agent, command, pod, netns, **overrides))


def container_id(pod: Mapping[str, Any]) -> str:
    """Return the sandbox id that a runtime would have for the pod."""
    return f"lab-{pod['metadata']['uid']}"


def conf_entry(agent: Agent) -> dict[str, Any]:
    """Return our entry of the conflist that the agent has written."""
    for path in sorted(agent.runtime.conf_dir.glob("*.conflist")):
        for plugin in json.loads(path.read_text())["plugins"]:
            if plugin["type"] == istio.PLUGIN_NAME:
                return dict(plugin)
    raise LookupError(f"no entry of {istio.PLUGIN_NAME} in {agent.runtime.conf_dir}")


def stdin_for(agent: Agent, netns: PodNetns, overrides: Mapping[str, object]) -> dict[str, Any]:
    """Return what libcni writes to the plugin: our entry, the list's name and version, the result so far."""
    result = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": IFNAME, "mac": "02:00:00:00:00:01", "sandbox": netns.path_inside}],
        "ips": [{"address": address, "interface": 0} for address in netns.addresses],
    }
    return {**conf_entry(agent), "cniVersion": "1.0.0", "name": "lab", "prevResult": result, **overrides}
