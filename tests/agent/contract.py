"""What the contract tests share: files of a node, and what the original writes, spelled out by hand.

Source of every expected byte: cni/pkg/install/cniconfig.go, cni/pkg/install/kubeconfig.go and pkg/log of istio/istio.
"""

from __future__ import annotations

import json
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.agent.scene import Agent, Scene

from meshcni import istio

INSTALLED_PROGRAM = Path(sys.executable).with_name("install-cni")
HEAL_SECONDS = 3.0  # what cni/test/install_k8s_test.go allows the original

BRIDGE = """\
{
  "cniVersion": "0.4.0",
  "name": "dbnet",
  "plugins": [
    {
      "bridge": "cni0",
      "type": "bridge"
    }
  ]
}
"""
SINGLE = """\
{
  "cniVersion": "0.4.0",
  "name": "mynet",
  "type": "bridge",
  "bridge": "cni0",
  "mtu": 1500,
  "big": 9007199254740993,
  "note": "a<b>&c"
}
"""
# The entry inside a list: keys sorted, two spaces a level, no cniVersion.
ENTRY = """\
    {
      "ambient_enabled": false,
      "cni_agent_run_dir": "RUN",
      "dns": {},
      "enable_ambient_detection_retry": false,
      "enablement_selectors": [],
      "exclude_namespaces": null,
      "ipam": {},
      "name": "istio-cni",
      "native_nftables": false,
      "plugin_log_level": "info",
      "pod_namespace": "istio-system",
      "type": "istio-cni"
    }"""
BRIDGE_WITH_ENTRY = f"""\
{{
  "cniVersion": "0.4.0",
  "name": "dbnet",
  "plugins": [
    {{
      "bridge": "cni0",
      "type": "bridge"
    }},
{ENTRY}
  ]
}}
"""


class Node:
    """A scene whose process is the installed `install-cni`, with the conf files that a test wants."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        scene.program = (str(INSTALLED_PROGRAM),)
        scene.conf.unlink()
        self.conf, self.run, self.account = scene.conf_dir, scene.run_dir, scene.directory / "account"
        self.source, self.bin = scene.directory / "source", scene.directory / "bin"
        self.plugin = self.bin / istio.PLUGIN_NAME
        self.kubeconfig = self.run / istio.KUBECONFIG_NAME

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """A conf file, renamed into place as most primary plugins do it."""
        beside = self.scene.directory / f"{name}.new"
        beside.write_text(text)
        beside.chmod(mode)
        return beside.rename(self.conf / name)

    def start(self, *arguments: str, **environment: str) -> Agent:
        """The agent; iptables rather than the scene's nftables, because that is the original's default."""
        return self.scene.start(*arguments, **({"NATIVE_NFTABLES": "false"} | environment))

    def ready(self, *arguments: str, **environment: str) -> Agent:
        """The agent, ready."""
        agent = self.start(*arguments, **environment)
        agent.wait_ready()
        return agent

    def text(self, name: str) -> str:
        """A conf file with the run directory's path as `RUN`; empty when it is not there."""
        try:
            return (self.conf / name).read_text().replace(str(self.run), "RUN")
        except FileNotFoundError:
            return ""

    def types(self, name: str) -> list[str]:
        """The plugins of a list; none when it is not there."""
        text = self.text(name)
        return [plugin["type"] for plugin in json.loads(text)["plugins"]] if text else []

    def entry(self, name: str) -> dict[str, Any]:
        """The last plugin of a list."""
        found: dict[str, Any] = json.loads(self.text(name))["plugins"][-1]
        return found

    def listing(self) -> list[str]:
        """The conf directory."""
        return sorted(path.name for path in self.conf.iterdir())

    def snapshot(self) -> dict[str, bytes]:
        """Every file that an installation consists of."""
        notes = {"backend.json"}  # what the agent keeps for itself, at its own time
        return {str(path): path.read_bytes() for path in self.files() if path.name not in notes}

    def files(self) -> Iterator[Path]:
        """The regular files of the conf, run and binary directories."""
        return (path for base in (self.conf, self.run, self.bin) for path in base.rglob("*") if path.is_file())

    def leftovers(self) -> list[str]:
        """Temporary files anywhere."""
        return [str(path) for path in self.files() if ".tmp." in path.name]

    def mode(self, name: str) -> int:
        """The file mode of a conf."""
        return mode_of(self.conf / name)


def mode_of(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def healed(what: str, condition: Callable[[], object]) -> None:
    """Wait as long as the original's own test does."""
    end = time.monotonic() + HEAL_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {HEAL_SECONDS:g} s: {what}"
        time.sleep(0.02)


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """`text` with every key of `changes` exchanged; each must be there."""
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text
