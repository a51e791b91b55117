"""kill -9 of the agent, of ztunnel, of both, at random points while pods come and go and labels flip.

In the end kernel, stand-in, host's set, annotations and API server agree. Meanwhile a connection between two enrolled
pods lasts as long as their ztunnel, and nothing reaches an enrolled pod past it: what its server saw is compared with
what the stand-in recorded.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from lab import namespaces
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import wait_until
from lab.objects import ambient_pod, unmeshed_pod
from lab.standin import StandIn
from lab.streams import Attempt, Held, Proxied, Stream
from lab.traffic import address_seen, ask
from tests.node.ambientworld import BACKENDS, MODE, kernel, start_ambient, wait_agreement

ROUNDS = {"nftables": 60, "iptables-nft": 40}
ACTIONS = ("agent", "agent", "agent", "ztunnel", "both")
SEED = 20260103
KUBELET_SECONDS = 90.0
RECOVERY_SECONDS = 60.0
MOST_PODS = 6  # of each tenant
CLIENT_SECONDS = 2.0


@dataclass(slots=True)
class Tenant:
    """A namespace whose pods come, go and change their labels, on a thread of its own, until it is told to stop."""

    mesh: Mesh
    namespace: str
    client: RunningPod
    chance: random.Random
    stop: threading.Event
    pods: list[RunningPod] = field(default_factory=list)
    faithful: dict[str, list[Attempt]] = field(default_factory=dict)  # by UID of pods that were in from their ADD on
    failure: BaseException | None = None
    number: int = 0

    def live(self) -> None:
        """Do one thing after the other."""
        try:
            while not self.stop.is_set():
                self.chance.choice((self.come, self.come, self.go, self.flip, self.flip_all, self.call, self.call))()
        except BaseException as error:
            self.failure = error

    def come(self) -> None:
        if len(self.pods) >= MOST_PODS:
            return
        self.number += 1
        name, is_ambient = f"{self.namespace}-{self.number}", self.chance.random() < 0.7
        pod = ambient_pod(self.namespace, name) if is_ambient else unmeshed_pod(self.namespace, name)
        running = self.mesh.start_pod(pod, retry_seconds=KUBELET_SECONDS)
        self.pods.append(running)
        if is_ambient:
            self.faithful[running.uid] = []
            self.call()

    def go(self) -> None:
        if self.pods:
            self.mesh.remove_pod(self.pods.pop(self.chance.randrange(len(self.pods))))

    def flip(self) -> None:
        """Another label for a pod, which is in no state to be judged from then on."""
        if self.pods:
            pod = self.chance.choice(self.pods)
            self.faithful.pop(pod.uid, None)
            self.mesh.label_pod(pod, {MODE: self.chance.choice(("ambient", "none", None))})

    def flip_all(self) -> None:
        self.mesh.label_namespace(self.namespace, {MODE: self.chance.choice(("ambient", None))})

    def call(self) -> None:
        """A connection to a pod that is in the mesh; while its ztunnel is away there is none."""
        candidates = [pod for pod in self.pods if pod.uid in self.faithful]
        if not candidates:
            return
        pod, begin = self.chance.choice(candidates), time.monotonic()
        try:
            with namespaces.connect(self.client.netns, pod.address(4), APP_PORT, CLIENT_SECONDS) as connection:
                seen = ask(connection)
        except OSError:
            return
        self.faithful[pod.uid].append(Attempt(begin, time.monotonic(), seen))


@contextmanager
def tenants(mesh: Mesh, client: RunningPod, backend: str) -> Iterator[list[Tenant]]:
    """Two of them, at work until the block ends; what failed in them fails the test."""
    stop = threading.Event()
    made = []
    for number in range(2):
        mesh.add_namespace(f"tenant-{number}-{backend}")
        chance = random.Random(SEED + 1 + number)
        made.append(Tenant(mesh, f"tenant-{number}-{backend}", client, chance, stop))
    threads = [threading.Thread(target=tenant.live, name=tenant.namespace) for tenant in made]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        stop.set()
        for thread in threads:
            thread.join(KUBELET_SECONDS)
    for tenant in made:
        if tenant.failure is not None:
            raise tenant.failure


@dataclass(slots=True)
class Chaos:
    """One run of it."""

    mesh: Mesh
    ztunnel: StandIn
    held: Held
    chance: random.Random
    breaks: list[str] = field(default_factory=list)  # of the held connection while its ztunnel was alive

    def round(self, number: int) -> None:
        """Wait a little, kill, start again; sometimes let everything come to rest before the next."""
        action, known = self.chance.choice(ACTIONS), len(self.held.breaks)
        time.sleep(self.chance.uniform(0, 0.3))
        if action != "ztunnel":
            self.mesh.agent.kill()
        if action != "agent":
            self.ztunnel.kill()
            self.ztunnel.start(wait=False)
        time.sleep(self.chance.uniform(0, 0.1))
        if action != "ztunnel":
            self.mesh.agent.start(wait=False)
        if action != "agent":
            # A busy client notices late, and its connection seems to be up until then.
            wait_until("the end of the connection is noticed", lambda: len(self.held.breaks) > known, RECOVERY_SECONDS)
            self.recover()
            return
        if self.chance.random() < 0.3:
            self.mesh.agent.wait_ready()
        self.breaks += [f"round {number}: {words}" for _, words in self.held.breaks[known:]]

    def recover(self) -> None:
        """Return when the connection is there again, through the new ztunnel."""
        wait_until("the connection is there again", self.held.is_up.is_set, RECOVERY_SECONDS)


@pytest.mark.parametrize("backend", ROUNDS)
def test_chaos(ambient: Mesh, backend: str) -> None:
    mesh = ambient
    mesh.agent.ensure(BACKENDS[backend])
    ztunnel = mesh.start_ztunnel()
    client, server = start_ambient(mesh, f"client-{backend}", f"server-{backend}")
    reference = kernel(mesh, client.netns)
    with (
        tenants(mesh, client, backend) as made,
        Stream(client.netns, server.address(6), APP_PORT, CLIENT_SECONDS) as stream,
        Held(client.netns, server.address(4), APP_PORT, CLIENT_SECONDS) as held,
    ):
        chaos = Chaos(mesh, ztunnel, held, random.Random(SEED))
        chaos.recover()
        for number in range(ROUNDS[backend]):
            chaos.round(number)
        mesh.agent.wait_ready()
        attempts = list(stream.attempts)
    assert chaos.breaks == []
    ztunnel.wait_ready()
    wait_agreement(mesh, reference)

    records = ztunnel.records("connection")
    proxied = Proxied.of(records)
    assert proxied.bypassed(attempts, server.uid, client.uid) == []
    calls = {uid: found for tenant in made for uid, found in tenant.faithful.items()}
    for uid, found in calls.items():
        assert proxied.bypassed(found, uid, client.uid) == []
    assert sum(map(len, calls.values())) > 0
    assert sum(attempt.seen is not None for attempt in attempts) > ROUNDS[backend]
    assert address_seen(client.netns, server.address(4), APP_PORT) == client.address(4)
    assert sum(tenant.number for tenant in made) > ROUNDS[backend] // 10, "too few pods came to mean anything"
