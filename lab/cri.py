"""The container runtime interface, as the kubelet speaks it: a small client for sandboxes, over gRPC.

`lab.container` adds what goes into a sandbox.

The messages are compiled from proto/cri.proto when that is newer than the compiled module in build/lab.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# A thread that starts processes in another pid namespace cannot start threads, which gRPC does after a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

HERE = Path(__file__).parent
PROTO = HERE / "proto" / "cri.proto"
BUILD = HERE.parent / "build" / "lab"
SERVICE = "/runtime.v1.RuntimeService/"
CALL_SECONDS = 120.0


class CriError(Exception):
    """The runtime refused a call; the text is its own."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A running pod sandbox; `netns` is as the node sees it, empty on the host's network; addresses v4 first."""

    id: str
    namespace: str
    name: str
    uid: str
    netns: str
    addresses: tuple[str, ...]

    def address(self, version: int) -> str:
        """Return the address of IP version 4 or 6."""
        return next(address for address in self.addresses if (":" in address) == (version == 6))


class CriClient:
    """Calls of the runtime behind the unix socket at `socket_path`; thread-safe."""

    def __init__(self, socket_path: Path, cgroup_root: str) -> None:
        self.messages = load_messages()
        self._channel = grpc.insecure_channel(f"unix:{socket_path}")
        self._cgroup_root = cgroup_root

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def wait_ready(self, timeout_seconds: float) -> None:
        """Return when the runtime answers; CriError when it does not within the time."""
        self.call("Version", timeout_seconds, wait=True)

    def network_ready(self) -> bool:
        """Tell whether the runtime has loaded a CNI chain."""
        conditions = self.call("Status").status.conditions
        return any(condition.type == "NetworkReady" and condition.status for condition in conditions)

    def loaded_chain(self) -> list[str]:
        """Return the types of the plugins in the chain that the runtime has loaded."""
        info = json.loads(self.call("Status", verbose=True).info["cniconfig"])
        networks = [network for network in info["Networks"] if network["Config"]["Name"] != "cni-loopback"]
        return [plugin["Network"]["type"] for plugin in networks[0]["Config"]["Plugins"]] if networks else []

    def run_sandbox(
        self, namespace: str, name: str, uid: str, *, attempt: int = 0, host_network: bool = False
    ) -> Sandbox:
        """Start a sandbox, with its network; CriError carries the CNI error when a plugin refused."""
        config = self.sandbox_config(namespace, name, uid, attempt=attempt, host_network=host_network)
        return self.sandbox(self.call("RunPodSandbox", config=config).pod_sandbox_id)

    def sandbox_config(
        self,
        namespace: str,
        name: str,
        uid: str,
        *,
        attempt: int = 0,
        host_network: bool = False,
        privileged: bool = False,
        log_directory: str = "",
    ) -> Any:  # noqa: ANN401
        """Return the message that describes a sandbox: its cgroup is named as the kubelet's cgroupfs driver does.

        `attempt` counts the sandboxes of one pod; only a privileged sandbox takes privileged containers.
        """
        pb = self.messages
        network = pb.NamespaceMode.Value("NODE" if host_network else "POD")
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=uid, namespace=namespace, attempt=attempt),
            hostname="" if host_network else name,
            log_directory=log_directory,
            labels={"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": namespace},
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=f"{self._cgroup_root}/kubepods/besteffort/pod{uid}",
                security_context=pb.LinuxSandboxSecurityContext(
                    namespace_options=pb.NamespaceOption(network=network), privileged=privileged
                ),
            ),
        )

    def sandbox(self, identifier: str) -> Sandbox:
        """Return what the runtime says of a running sandbox."""
        answer = self.call("PodSandboxStatus", pod_sandbox_id=identifier, verbose=True)
        status, network = answer.status, answer.status.network
        kinds = json.loads(answer.info["info"])["runtimeSpec"]["linux"]["namespaces"]
        netns = next((kind["path"] for kind in kinds if kind["type"] == "network"), "")
        addresses = (network.ip, *(extra.ip for extra in network.additional_ips))
        metadata = status.metadata
        ordered = tuple(sorted(filter(None, addresses), key=lambda address: ":" in address))
        return Sandbox(identifier, metadata.namespace, metadata.name, metadata.uid, netns, ordered)

    def sandbox_ids(self) -> list[str]:
        """Return the ids of all sandboxes, running or not."""
        return [item.id for item in self.call("ListPodSandbox").items]

    def stop_sandbox(self, identifier: str) -> None:
        """Stop a sandbox: its network is taken down, DEL is sent."""
        self.call("StopPodSandbox", pod_sandbox_id=identifier)

    def remove_sandbox(self, identifier: str) -> None:
        """Remove a stopped sandbox; DEL is sent a second time."""
        self.call("RemovePodSandbox", pod_sandbox_id=identifier)

    def call(  # messages are made at run time, so their types are not known
        self,
        method: str,
        timeout_seconds: float = CALL_SECONDS,
        wait: bool = False,
        **fields: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Call a method of the runtime with these fields of its request; CriError when it refuses."""
        request = getattr(self.messages, f"{method}Request")
        response = getattr(self.messages, f"{method}Response")
        call = self._channel.unary_unary(
            SERVICE + method, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        try:
            return call(request(**fields), timeout=timeout_seconds, wait_for_ready=wait)
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.details()}") from None


def load_messages() -> ModuleType:
    """Return the compiled module of proto/cri.proto."""
    compiled = BUILD / "cri_pb2.py"
    if not compiled.exists() or compiled.stat().st_mtime < PROTO.stat().st_mtime:
        compile_messages()
    if "lab.cri_pb2" in sys.modules:
        return sys.modules["lab.cri_pb2"]
    spec = importlib.util.spec_from_file_location("lab.cri_pb2", compiled)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lab.cri_pb2"] = module
    spec.loader.exec_module(module)
    return module


def compile_messages() -> None:
    """Compile proto/cri.proto into build/lab."""
    from grpc_tools import protoc  # heavy, and needed once only

    BUILD.mkdir(parents=True, exist_ok=True)
    if protoc.main(["protoc", f"--proto_path={PROTO.parent}", f"--python_out={BUILD}", str(PROTO)]) != 0:
        raise CriError(f"{PROTO.name} does not compile")
