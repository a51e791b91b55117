"""The second part of the demo: pods in ambient mode, a stand-in for ztunnel, a running pod that comes and goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab import objects
from lab.agent import EXCLUDED_NAMESPACE, AgentOptions
from lab.ambient import AMBIENT_LABELS, ENABLEMENT_SELECTORS
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import wait_until
from lab.steps import Steps
from lab.streams import Attempt, Proxied, Stream
from lab.traffic import address_seen
from meshcni import istio
from meshcni.pods.assess import Assessment, assess
from meshcni.pods.eligibility import Policy
from meshcni.pods.model import pod_from_object
from meshcni.pods.selectors import parse_enablement_selectors
from meshcni.rules.model import Backend

NAMESPACE = "market"
NAMES = ("web", "orders", "stock")  # each calls the next one
VERSIONS = {"web": 4, "orders": 6, "stock": 4}
HOST = "orders"
GUEST = "report"  # connects to the host all the time; it runs outside the mesh, joins and leaves
ENROL_SECONDS = 30.0
SETTLED = 20  # connections of the guest before and after each change
PAUSE_SECONDS = 0.02  # between two of them
POLICY = Policy(
    exclude_namespaces=frozenset({EXCLUDED_NAMESPACE}),
    ambient_enabled=True,
    enablement_selectors=parse_enablement_selectors(json.loads(ENABLEMENT_SELECTORS)),
)


@dataclass(frozen=True, slots=True)
class Call:
    """One connection from a pod to the next one: what the server saw, what ztunnel took at either end."""

    client: str
    server: str
    version: int
    own_address: str
    seen: str
    taken_out: int
    taken_in: int

    @property
    def is_right(self) -> bool:
        """Whether ztunnel took it at both ends, and nobody could tell by the addresses."""
        return (self.taken_out, self.taken_in, self.seen) == (1, 1, self.own_address)


@dataclass(slots=True)
class Visit:
    """What the guest's connections met: all of them, those that failed, those in the mesh that went past ztunnel.

    `cut` are those that were open while its rules came: conntrack does not know them and ends them.
    """

    total: int = 0
    inside: int = 0
    cut: int = 0
    failed: list[Attempt] = field(default_factory=list)
    past: list[Attempt] = field(default_factory=list)


class AmbientPart:
    """Runs on the demo's node; what it saw is in its attributes."""

    def __init__(self, mesh: Mesh, steps: Steps, backend: Backend) -> None:
        self.mesh, self.steps, self.backend = mesh, steps, backend
        self.objects: dict[str, Mapping[str, Any]] = {}
        self.annotations: dict[str, str] = {}
        self.calls: list[Call] = []
        self.probed = ""
        self.visit = Visit()
        self.status = ""

    def run(self) -> None:
        """Do all of it."""
        with self.steps.step("Start the agent anew, in ambient mode") as step:
            self.mesh.agent.terminate()
            self.mesh.agent.start(AgentOptions(ambient=True, nftables=self.backend is Backend.NFTABLES))
            step.note = f"takes pods with the label {istio.DATAPLANE_MODE}=ambient"
        with self.steps.step("Start a stand-in for ztunnel") as step:
            self.mesh.start_ztunnel()
            step.note = "its own netns has no route: it works inside those of the pods"
        pods = {name: self.start_pod(name) for name in NAMES}
        with self.steps.step("Each pod connects to the next one") as step:
            following = dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))
            self.calls = [self.call(pods[client], pods[server]) for client, server in following.items()]
            step.note = f"connections that ztunnel got: {self.taken('taken_out')} out, {self.taken('taken_in')} in"
        with self.steps.step("The node's kubelet probes one") as step:
            self.probed = address_seen(self.mesh.node.netns, pods["web"].address(4), APP_PORT)
            step.note = f"past ztunnel; the application knows it by its address {self.probed}"
        self.receive_guest(pods[HOST])

    def start_pod(self, name: str) -> RunningPod:
        """Let containerd start an ambient pod and wait for its annotation."""
        with self.steps.step(f"Ambient pod {name}") as step:
            self.objects[name] = objects.ambient_pod(NAMESPACE, name)
            pod = self.mesh.start_pod(self.objects[name])
            self.wait_for(pod, istio.REDIRECTION_ENABLED)
            self.annotations[name] = self.mesh.redirection(pod)
            step.note = f"{istio.AMBIENT_REDIRECTION}: {self.annotations[name]}"
        return pod

    def wait_for(self, pod: RunningPod, annotation: str) -> None:
        """Return when the pod is annotated so."""
        done: Callable[[], bool] = lambda: self.mesh.redirection(pod) == annotation  # noqa: E731
        wait_until(f"{pod.name} is annotated {annotation or 'no more'}", done, ENROL_SECONDS)

    def call(self, client: RunningPod, server: RunningPod) -> Call:
        """Connect once."""
        version = VERSIONS[client.name]
        before = self.counters(client, server)
        seen = address_seen(client.netns, server.address(version), APP_PORT)
        after = self.counters(client, server)
        taken = [now - then for now, then in zip(after, before, strict=True)]
        return Call(client.name, server.name, version, client.address(version), seen, *taken)

    def counters(self, client: RunningPod, server: RunningPod) -> tuple[int, int]:
        """What ztunnel took of the client's outgoing and of the server's incoming connections so far."""
        ztunnel = self.mesh.ztunnels["ztunnel"]
        return ztunnel.connections(client.uid)["outbound"], ztunnel.connections(server.uid)["inbound"]

    def taken(self, end: str) -> int:
        """How many connections ztunnel got at one end."""
        return sum(getattr(call, end) for call in self.calls)

    def receive_guest(self, host: RunningPod) -> None:
        """Let a pod that runs outside the mesh join it and leave it, while it connects to `host` all the time."""
        guest = self.mesh.start_pod(objects.unmeshed_pod(NAMESPACE, GUEST))
        with Stream(guest.netns, host.address(4), APP_PORT, pause_seconds=PAUSE_SECONDS) as stream:
            stream.wait(SETTLED)
            with self.steps.step(f"Running pod {GUEST} joins by a label") as step:
                labelled = time.monotonic()
                self.mesh.label_pod(guest, AMBIENT_LABELS)
                self.wait_for(guest, istio.REDIRECTION_ENABLED)
                enabled = time.monotonic()
                stream.wait(SETTLED)
                step.note = f"enabled; {in_words(stream)}"
            with self.steps.step("Ask the agent: install-cni status") as step:
                self.status = self.mesh.agent.command("status")
                step.note = "shown below"
            with self.steps.step(f"Pod {GUEST} leaves again") as step:
                unlabelled = time.monotonic()
                self.mesh.label_pod(guest, dict.fromkeys(AMBIENT_LABELS))
                self.wait_for(guest, "")
                stream.wait(SETTLED)
                step.note = f"not annotated any more; {in_words(stream)}"
        failed = stream.failures()
        cut = [attempt for attempt in failed if attempt.begin < enabled and attempt.end > labelled]
        inside = [attempt for attempt in stream.attempts if enabled < attempt.begin and attempt.end < unlabelled]
        proxied = Proxied.of(self.mesh.ztunnels["ztunnel"].records("connection"))
        self.visit = Visit(
            total=len(stream.attempts),
            inside=len(inside),
            cut=len(cut),
            failed=[attempt for attempt in failed if attempt not in cut],
            past=proxied.bypassed(inside, host.uid, guest.uid),
        )

    def assessment(self, name: str) -> Assessment:
        """What the agent decides about a pod, by the function that the agent calls."""
        return assess(pod_from_object(self.objects[name]), None, POLICY)

    def failures(self) -> list[str]:
        """Return what is not as it should be."""
        wrong = [f"{call.client}: {call} is no connection through ztunnel" for call in self.calls if not call.is_right]
        wrong += [f"{name} is annotated {text!r}" for name, text in self.annotations.items() if text != "enabled"]
        if self.probed != istio.PROBE_SNAT_V4:
            wrong.append(f"the probe came from {self.probed}")
        wrong += [f"{GUEST}: {attempt.error}" for attempt in self.visit.failed]
        wrong += [f"{GUEST}: {attempt} went past ztunnel" for attempt in self.visit.past]
        return wrong


def in_words(stream: Stream) -> str:
    """Say how many connections there were so far."""
    failed = len(stream.failures())
    return f"{len(stream.attempts)} connections to {HOST} so far, {failed or 'none'} failed"


def ambient_status(text: str) -> Sequence[str]:
    """The part of `install-cni status` that is about ambient mode."""
    lines = text.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("ztunnel"))
    end = next((index for index, line in enumerate(lines) if line.startswith(("TIME", "no ADD"))), len(lines))
    return [line.rstrip() for line in lines[begin:end] if line.strip()]
