"""A whole mesh node: runtime, API server, agent and pods, put together for the tests, the demo and the benchmark."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from lab.agent import AGENT_NAMESPACE
from lab.api import api_server_in
from lab.apiserver import ApiServer
from lab.containerd import Containerd
from lab.cri import CriError, Sandbox
from lab.envoy import Envoy, Mode
from lab.imageagent import make_agent
from lab.node import Node, wait_until
from lab.objects import NODE_NAME, daemonset_object, namespace_object
from lab.standin import StandIn
from lab.traffic import EchoServers
from meshcni import istio

APP_PORT = 8080
PODS_PATH = "/api/v1/pods"
COUNTERS = re.compile(r" packets \d+ bytes \d+| \[\d+:\d+\]")  # of rules and chains; they differ from look to look
KNOWN_SECONDS = 10.0
RETRY_SECONDS = 0.2  # between two attempts to start a sandbox, as a kubelet would


@dataclass(slots=True)
class RunningPod:
    """A pod with a sandbox; `netns` is its path from outside, `envoy` None for a pod without a proxy."""

    object: Mapping[str, Any]
    sandbox: Sandbox
    netns: str
    envoy: Envoy | None = None
    attempt: int = 0

    @property
    def uid(self) -> str:
        """The pod's UID."""
        return self.sandbox.uid

    @property
    def name(self) -> str:
        """The pod's name."""
        return self.sandbox.name

    def address(self, version: int) -> str:
        """Return its address of IP version 4 or 6."""
        return self.sandbox.address(version)


class Mesh:
    """Context manager: a node with containerd and an API server; the agent is there, but not started.

    `agent` says which one it is (`lab.imageagent.AGENTS`); empty: what the environment says.
    """

    def __init__(self, agent: str = "") -> None:
        self._which = agent
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.node = stack.enter_context(Node())
            service_account = self.node.folder / "serviceaccount"
            self.api = stack.enter_context(api_server_in(self.node, service_account))
            self.servers = stack.enter_context(EchoServers())
            self.runtime = Containerd(self.node)
            stack.callback(self.runtime.close)
            self.agent = make_agent(self.node, self.runtime, self.api.environment, service_account, self._which)
            self.api.do(lambda server: server.add("nodes", {"metadata": {"name": NODE_NAME, "labels": {}}}))
            self.api.do(lambda server: server.add("daemonsets", daemonset_object(AGENT_NAMESPACE)))
            self.pods: list[RunningPod] = []
            self.ztunnels: dict[str, StandIn] = {}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def add_object(self, pod: Mapping[str, Any]) -> None:
        """Add a pod, and its namespace, to the API server."""
        self.api.do(lambda server: server.add_pod(dict(pod)))

    def add_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Add a namespace to the API server."""
        self.api.do(lambda server: server.add("namespaces", namespace_object(name, labels)))

    def wait_until_known(self) -> None:
        """Return when the agent's informer holds as many pods as the API server has."""
        count = self.api.do(lambda server: len(server.cluster.objects("pods")))
        wait_until("the agent knows all pods", lambda: self.agent.known_pods() == count, KNOWN_SECONDS)

    def stop_watch_events(self) -> None:
        """Make the agent's pod watch half-open: what changes from now on does not reach the agent."""

        def freeze(server: ApiServer) -> bool:
            watching = [watch for watch in server.watches if watch.path == PODS_PATH and not watch.frozen]
            server.freeze_watches(PODS_PATH)
            return bool(watching)

        wait_until("the agent watches pods", lambda: self.api.do(freeze), KNOWN_SECONDS)

    def resume_watch_events(self) -> None:
        """Break the half-open watch, so that the agent makes a new one."""
        self.api.do(lambda server: server.cut_watches(PODS_PATH))

    @contextmanager
    def chain_without_us(self) -> Iterator[None]:
        """Let the runtime use a chain without our plugin, as before an installation or just after a rewrite."""
        agent = self.agent
        with agent.frozen() if agent.is_running else nullcontext():
            self.runtime.write_chain()
            wait_until("containerd has loaded the bare chain", lambda: not agent.is_in_chain(), KNOWN_SECONDS)
            yield
        if agent.is_running:
            agent.wait_in_chain()

    def start_pod(
        self, pod: Mapping[str, Any], *, in_api: bool = True, retry_seconds: float = 0.0, report: bool = True
    ) -> RunningPod:
        """Start the sandbox of `pod`, report its addresses, serve its application port; its proxy is not started.

        With `retry_seconds` a refused sandbox is tried again for so long, as a kubelet does. Raises CriError.
        """
        if in_api:
            self.add_object(pod)
        sandbox = self._run_sandbox(pod, retry_seconds)
        running = RunningPod(pod, sandbox, self.runtime.netns_path(sandbox))
        self.pods.append(running)
        if report:
            self.report(running)
        if sandbox.netns:
            self.servers.serve(running.netns, APP_PORT)
        return running

    def restart_sandbox(self, pod: RunningPod, retry_seconds: float = 0.0) -> RunningPod:
        """Give a running pod another sandbox, as a kubelet does when the first one has died."""
        attempt = pod.attempt + 1
        self.stop_sandbox(pod)
        sandbox = self._run_sandbox(pod.object, retry_seconds, attempt)
        running = RunningPod(pod.object, sandbox, self.runtime.netns_path(sandbox), attempt=attempt)
        self.pods.append(running)
        self.report(running)
        self.servers.serve(running.netns, APP_PORT)
        return running

    def _run_sandbox(self, pod: Mapping[str, Any], retry_seconds: float, attempt: int = 0) -> Sandbox:
        metadata = pod["metadata"]
        host_network = bool(pod["spec"].get("hostNetwork"))
        deadline = time.monotonic() + retry_seconds
        while True:
            try:
                return self.runtime.cri.run_sandbox(
                    metadata["namespace"],
                    metadata["name"],
                    metadata["uid"],
                    attempt=attempt,
                    host_network=host_network,
                )
            except CriError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)

    def report(self, pod: RunningPod, phase: str = "Running") -> None:
        """Tell the API server what a kubelet does: the pod's phase and, where it has a network, its addresses."""
        status: dict[str, Any] = {"phase": phase}
        if pod.sandbox.addresses:
            status["podIP"] = pod.sandbox.addresses[0]
            status["podIPs"] = [{"ip": address} for address in pod.sandbox.addresses]
        self.api.do(lambda server: patch_pod(server, pod, {"status": status}, "status"))

    def label_pod(self, pod: RunningPod, labels: Mapping[str, str | None]) -> None:
        """Change labels of a pod in the API server; None removes one."""
        self.api.do(lambda server: patch_pod(server, pod, {"metadata": {"labels": dict(labels)}}))

    def annotate_pod(self, pod: RunningPod, annotations: Mapping[str, str | None]) -> None:
        """Change annotations of a pod in the API server; None removes one."""
        self.api.do(lambda server: patch_pod(server, pod, {"metadata": {"annotations": dict(annotations)}}))

    def label_namespace(self, name: str, labels: Mapping[str, str | None]) -> None:
        """Change labels of a namespace in the API server; None removes one."""
        self.api.do(lambda server: server.patch("namespaces", "", name, {"metadata": {"labels": dict(labels)}}))

    def api_object(self, pod: RunningPod) -> dict[str, Any]:
        """Return the pod as the API server has it; empty when it has none of that UID."""
        return self.api.do(lambda server: known_object(server, pod))

    def redirection(self, pod: RunningPod) -> str:
        """Return what the annotation `ambient.istio.io/redirection` of a pod says; empty when it is not there."""
        annotations = self.api_object(pod).get("metadata", {}).get("annotations", {})
        return str(annotations.get(istio.AMBIENT_REDIRECTION, ""))

    def start_ztunnel(self, name: str = "ztunnel", *arguments: str) -> StandIn:
        """Start the stand-in for ztunnel of that name, unless it runs, and wait until it is ready."""
        if name not in self.ztunnels:
            self.ztunnels[name] = StandIn(self.node, self.agent, name)
        self.ztunnels[name].ensure(*arguments)
        return self.ztunnels[name]

    def start_proxy(self, pod: RunningPod, mode: Mode | None = None) -> Envoy:
        """Start Envoy in a pod, in the mode that the pod asks for, and wait until it is live."""
        asked = pod.object["metadata"]["annotations"].get(istio.INTERCEPTION_MODE, "REDIRECT")
        pod.envoy = Envoy(self.node, pod.netns, pod.name, mode or Mode(asked))
        pod.envoy.start()
        return pod.envoy

    def remove_pod(self, pod: RunningPod) -> None:
        """Stop and remove the sandbox and take the pod out of the API server."""
        self.stop_sandbox(pod)
        self.api.do(lambda server: forget_pod(server, pod))

    def stop_sandbox(self, pod: RunningPod) -> None:
        """Stop the pod's proxy, stop and remove its sandbox; the API server keeps the pod."""
        if pod.envoy is not None:
            pod.envoy.stop()
        self.pods.remove(pod)
        if pod.sandbox.netns:  # else it is the node's own
            self.servers.leave(pod.netns)
        self.runtime.cri.stop_sandbox(pod.sandbox.id)
        self.runtime.cri.remove_sandbox(pod.sandbox.id)

    def rules(self, netns: str) -> Redirection:
        """Read what redirects traffic in a netns, from the kernel's own listings, packet counters left out."""
        listing = self.node.run(["nft", "list", "ruleset"], netns=netns)
        legacy = self.node.run(["iptables-legacy-save"], netns=netns) if legacy_tables_loaded(self.node, netns) else ""
        return Redirection(
            nftables="table inet istio-proxy-nat" in listing,
            iptables_nft=bool(re.search(r"chain ISTIO_OUTPUT\b", listing)),
            iptables_legacy="ISTIO_OUTPUT" in legacy,
            listing=COUNTERS.sub("", listing + legacy),
        )


@dataclass(frozen=True, slots=True)
class Redirection:
    """Which backends hold our rules in a netns, and their listings."""

    nftables: bool
    iptables_nft: bool
    iptables_legacy: bool
    listing: str

    @property
    def count(self) -> int:
        """How many backends redirect: 1 for a mesh pod, 0 for any other, never more."""
        return self.nftables + self.iptables_nft + self.iptables_legacy


def legacy_tables_loaded(node: Node, netns: str) -> bool:
    """Tell whether a netns has legacy tables at all: asking iptables-legacy would create them."""
    return bool(node.run(["sh", "-c", "cat /proc/net/ip_tables_names 2>/dev/null || true"], netns=netns).strip())


def known_object(server: ApiServer, pod: RunningPod) -> dict[str, Any]:
    """Return the object of a pod, empty when there is none or another pod has its name."""
    for known in server.cluster.objects("pods"):
        if known["metadata"]["uid"] == pod.uid:
            return known
    return {}


def patch_pod(server: ApiServer, pod: RunningPod, patch: dict[str, Any], subresource: str = "") -> None:
    """Change a pod in the API server, if it is there."""
    if known_object(server, pod):
        server.patch("pods", pod.sandbox.namespace, pod.name, patch, subresource)


def forget_pod(server: ApiServer, pod: RunningPod) -> None:
    """Delete a pod in the API server, if it is there."""
    if known_object(server, pod):
        server.delete_pod(pod.sandbox.namespace, pod.name)
