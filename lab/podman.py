"""Podman with runc inside a lab node: everything it makes lies in the node's folder, namespaces and cgroup.

On the host itself it would leave nat chains of its network program and a bridge conf; in a node neither can happen.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab.imagelayout import Image
from lab.node import CLEAN_ENVIRONMENT, Node

RUN_SECONDS = 120.0
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")  # more may not be ours to give


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run to the end gave."""

    status: int
    output: str
    errors: str


class Podman:
    """Podman of a node; `load` images, then `run` containers."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._command = [
            *(
                "podman",
                "--root",
                str(node.folder / "podman"),
                "--runroot",
                "/run/podman",
                "--tmpdir",
                "/run/podman/tmp",
            ),
            *("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
            *("--network-config-dir", str(node.folder / "podman-networks")),  # else a lock in the host's /etc/cni
        ]

    def load(self, image: Image) -> str:
        """Load an image and return its name."""
        archive = image.write_archive(self.node.folder / "podman.tar")
        self.node.run([*self._command, "load", "-q", "-i", str(archive)], timeout_seconds=RUN_SECONDS)
        archive.unlink()
        return image.name

    def run(
        self,
        image: str,
        *arguments: str,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        network: str = "none",
    ) -> Finished:
        """Run a container to its end and remove it; `network` host is the node's."""
        return self.execute("run", "--rm", *self._options(options, environment, network), image, *arguments)

    def start(
        self, image: str, name: str, *arguments: str, options: tuple[str, ...] = (), network: str = "none"
    ) -> None:
        """Start a container that stays."""
        settings = self._options(options, {}, network)
        self.node.run([*self._command, "run", "-d", "--name", name, *settings, image, *arguments])

    def execute(self, *arguments: str) -> Finished:
        """Run a command of podman's."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.node.spawn([*self._command, *arguments], environment=CLEAN_ENVIRONMENT, **pipes)
        try:
            output, errors = process.communicate(timeout=RUN_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return Finished(process.returncode, output.decode(), errors.decode())

    def logs(self, name: str) -> str:
        """Return what a container has written."""
        done = self.execute("logs", name)
        return done.output + done.errors

    def process_status(self, name: str) -> dict[str, str]:
        """Return /proc/PID/status of a container's process 1."""
        pid = self.execute("inspect", "--format", "{{.State.Pid}}", name).output.strip()
        text = self.node.run(["cat", f"/proc/{pid}/status"])
        return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}

    def remove(self, name: str) -> None:
        """Stop and remove a container."""
        self.execute("rm", "-f", "-t", "5", name)

    def _options(self, options: tuple[str, ...], environment: Mapping[str, str] | None, network: str) -> list[str]:
        variables = [part for key, value in (environment or {}).items() for part in ("--env", f"{key}={value}")]
        parent = f"/{self.node.name}"
        return ["--network", network, "--cgroup-parent", parent, *LIMITS, *variables, *options]
