"""Containers in the sandboxes of a lab node, as the kubelet makes them: what one is, and one that runs."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.containerd import Containerd
from lab.node import LabError, last_lines, wait_until

STOP_SECONDS = 30
EXEC_SECONDS = 60
KILLED = 128  # a runtime adds it to the number of the signal that ended a container


@dataclass(frozen=True, slots=True)
class Mount:
    """A path of the node inside the container; `propagates` as `mountPropagation: HostToContainer`."""

    outside: str
    inside: str
    read_only: bool = False
    propagates: bool = False


@dataclass(frozen=True, slots=True)
class Security:
    """A container's securityContext; `user` None is the image's own."""

    user: int | None = None
    group: int | None = None
    privileged: bool = False
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    read_only_root: bool = False
    no_new_privileges: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """What a container is to be; without `command` the image's entry point runs."""

    image: str
    name: str = "main"
    command: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    security: Security = Security()


@dataclass(frozen=True, slots=True)
class Executed:
    """What a command in a container gave."""

    status: int
    output: str
    errors: str


class Pod:
    """A sandbox for containers, made by `start`; its containers' output is kept line by line."""

    def __init__(
        self,
        runtime: Containerd,
        namespace: str,
        name: str,
        uid: str,
        *,
        privileged: bool = False,
        host_network: bool = True,
    ) -> None:
        self.runtime, self.name = runtime, name
        self.log_folder = runtime.node.folder / "log" / name
        self.log_folder.mkdir(exist_ok=True)
        self._config = runtime.cri.sandbox_config(
            namespace, name, uid, host_network=host_network, privileged=privileged, log_directory=str(self.log_folder)
        )
        self.sandbox = ""
        self.netns = ""  # its path from outside
        self._host_network = host_network
        self._attempts = 0

    def start(self) -> None:
        """Start the sandbox."""
        self.sandbox = self.runtime.cri.call("RunPodSandbox", config=self._config).pod_sandbox_id
        self.netns = self.runtime.netns_path(self.runtime.cri.sandbox(self.sandbox))

    def close(self) -> None:
        """Stop and remove the sandbox with its containers."""
        if self.sandbox:
            self.runtime.cri.stop_sandbox(self.sandbox)
            self.runtime.cri.remove_sandbox(self.sandbox)
            self.sandbox = ""

    def run(self, spec: ContainerSpec, *, beside: Container | None = None) -> Container:
        """Start a container; `beside` shares the pid namespace of another one, as an ephemeral container does."""
        self._attempts += 1
        log = f"{spec.name}.log"
        config = self._container_config(spec, log, beside)
        cri = self.runtime.cri
        identifier = cri.call(
            "CreateContainer", pod_sandbox_id=self.sandbox, config=config, sandbox_config=self._config
        ).container_id
        container = Container(self.runtime, identifier)
        cri.call("StartContainer", container_id=identifier)
        return container

    def log_text(self, name: str = "main") -> str:
        """Return what the containers of that name have written, without the runtime's heads of lines."""
        log = self.log_folder / f"{name}.log"
        return log_lines(log.read_text()) if log.exists() else ""

    def run_to_end(self, spec: ContainerSpec, timeout_seconds: float = STOP_SECONDS) -> tuple[int, str]:
        """Run a container to its end: exit status and what it wrote."""
        before = len(self.log_text(spec.name))
        status = self.run(spec).wait(timeout_seconds)
        return status, self.log_text(spec.name)[before:]

    def _container_config(self, spec: ContainerSpec, log: str, beside: Container | None) -> Any:  # noqa: ANN401
        pb = self.runtime.cri.messages
        security, mode = spec.security, pb.NamespaceMode.Value
        context = pb.LinuxContainerSecurityContext(
            capabilities=pb.Capability(add_capabilities=security.add, drop_capabilities=security.drop),
            privileged=security.privileged,
            readonly_rootfs=security.read_only_root,
            no_new_privs=security.no_new_privileges,
            namespace_options=pb.NamespaceOption(
                network=mode("NODE" if self._host_network else "POD"),
                pid=mode("TARGET" if beside else "CONTAINER"),
                target_id=beside.id if beside else "",
            ),
        )
        if security.user is not None:
            context.run_as_user.value = security.user
        if security.group is not None:
            context.run_as_group.value = security.group
        propagation = pb.MountPropagation.Value
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=spec.name, attempt=self._attempts),
            image=pb.ImageSpec(image=spec.image),
            command=spec.command,
            args=spec.arguments,
            envs=[pb.KeyValue(key=key, value=value) for key, value in spec.environment.items()],
            mounts=[
                pb.Mount(
                    container_path=mount.inside,
                    host_path=mount.outside,
                    readonly=mount.read_only,
                    propagation=propagation(
                        "PROPAGATION_HOST_TO_CONTAINER" if mount.propagates else "PROPAGATION_PRIVATE"
                    ),
                )
                for mount in spec.mounts
            ],
            log_path=log,
            linux=pb.LinuxContainerConfig(security_context=context),
        )


class Container:
    """A container that has been started."""

    def __init__(self, runtime: Containerd, identifier: str) -> None:
        self.runtime, self.id = runtime, identifier

    @property
    def is_running(self) -> bool:
        """Whether its process 1 runs."""
        return bool(self._status().state == self.runtime.cri.messages.ContainerState.Value("CONTAINER_RUNNING"))

    @property
    def pid(self) -> int:
        """The pid of its process 1, in the node's own pid namespace."""
        answer = self.runtime.cri.call("ContainerStatus", container_id=self.id, verbose=True)
        return int(json.loads(answer.info["info"])["pid"])

    def signal(self, number: signal.Signals) -> None:
        """Send its process 1 a signal from outside, which even SIGSTOP and SIGKILL pass."""
        self.runtime.node.run(["kill", f"-{number.value}", str(self.pid)])

    def stop(self, grace_seconds: int = STOP_SECONDS) -> int:
        """Send SIGTERM, after the grace SIGKILL, as the kubelet does; returns the exit status."""
        self.runtime.cri.call("StopContainer", container_id=self.id, timeout=grace_seconds)
        return self.wait()

    def wait(self, timeout_seconds: float = STOP_SECONDS) -> int:
        """Wait for its end: the exit status, negative as Popen's where a signal ended it; the container is removed."""
        wait_until("the container ends", lambda: not self.is_running, timeout_seconds)
        code = int(self._status().exit_code)
        self.runtime.cri.call("RemoveContainer", container_id=self.id)
        return KILLED - code if code > KILLED else code

    def exec(self, *command: str) -> Executed:
        """Run a command in it, as `kubectl exec` does."""
        answer = self.runtime.cri.call("ExecSync", container_id=self.id, cmd=command, timeout=EXEC_SECONDS)
        return Executed(int(answer.exit_code), answer.stdout.decode(), answer.stderr.decode())

    def check(self, *command: str) -> str:
        """Run a command in it and return its output; LabError when it fails."""
        done = self.exec(*command)
        if done.status != 0:
            raise LabError(f"{' '.join(command)}: exit {done.status}: {last_lines(done.errors or done.output, 5)}")
        return done.output

    def _status(self) -> Any:  # noqa: ANN401
        return self.runtime.cri.call("ContainerStatus", container_id=self.id).status


def log_lines(text: str) -> str:
    """Return a log of the runtime without the heads of its lines: time, stream, F for a whole line or P for a part."""
    parts: list[str] = []
    for line in text.splitlines():
        _, _, kind, content = line.split(" ", 3)
        parts.append(content if kind == "P" else f"{content}\n")
    return "".join(parts)


def capabilities_of(status: str, kind: str = "CapEff") -> int:
    """Return a set of capabilities from the text of a /proc/PID/status."""
    line = next(line for line in status.splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1], 16)
