"""Random events in the agent's own parts, with doubles for cluster and enrolment: always an answer, nothing lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from lab.ambient import ENABLEMENT_SELECTORS
from lab.objects import ambient_pod, namespace_object
from tests.agent.eventbodies import bodies
from tests.kernel.world import Netns

from meshcni.agent import metrics as m
from meshcni.agent.metrics import Metrics
from meshcni.agent.podevents import ANSWER_SECONDS, PodEvents
from meshcni.agent.podlookup import PodLookup
from meshcni.agent.socketservices import MAX_ANSWER_CHARACTERS, EventService
from meshcni.agent.web import Request, Response
from meshcni.errors import KubeError, ZtunnelError
from meshcni.pods.eligibility import Policy
from meshcni.pods.model import Namespace, Pod, pod_from_object
from meshcni.pods.selectors import parse_enablement_selectors

BODIES = 60_000
POLICY = Policy(ambient_enabled=True, enablement_selectors=parse_enablement_selectors(json.loads(ENABLEMENT_SELECTORS)))
Addresses = tuple[IPv4Address | IPv6Address, ...]


class Cluster:
    """One pod, shop/cart, that is ambient; some questions fail."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.slow_seconds = 0.0

    async def get_pod(self, namespace: str, name: str, *, timeout: float) -> Pod:
        await asyncio.sleep(self.slow_seconds)
        if (namespace, name) != ("shop", "cart"):
            raise KubeError(404, f"pods {name!r} not found")
        if self._chance.random() < 0.1:
            raise KubeError(0, "no answer")
        return pod_from_object(ambient_pod("shop", "cart"))

    async def get_object(
        self, group: str, version: str, resource: str, namespace: str | None, name: str, *, timeout: float
    ) -> dict[str, Any]:
        if self._chance.random() < 0.1:
            raise RuntimeError("a fault of ours")
        return namespace_object(name)


class Unsynced:
    """An informer that has not read anything yet."""

    def get(self, namespace: str, name: str) -> None:
        return None


class Enrolment:
    """Notes who came with which netns; refuses some."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.inodes: Counter[int] = Counter()
        self.longest_seconds = 0.0

    async def enroll(self, pod: Pod, netns: int, addresses: Addresses, name: str, seconds: float) -> object:
        assert pod.full_name == "shop/cart"
        self.inodes[os.fstat(netns).st_ino] += 1
        self.longest_seconds = max(self.longest_seconds, seconds)
        await asyncio.sleep(0)
        if self._chance.random() < 0.3:
            raise ZtunnelError("nack", f"no: {'x' * self._chance.randrange(5000)}", "\ud800")
        return None


class Service:
    """The service with its doubles, and what came of all requests."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.metrics, self.enrolment = Metrics(of_process=False), Enrolment(chance)
        pods: Unsynced = Unsynced()
        namespaces: dict[str, Namespace] | None = None
        self.cluster = Cluster(chance)
        lookup = PodLookup(self.cluster, pods, namespaces, 1.0)
        events = PodEvents(lookup, POLICY, self.enrolment.enroll)
        self.service = EventService(self.metrics, events.handle)
        self.statuses: Counter[int] = Counter()

    async def send(self, body: bytes) -> Response:
        response = await self.service.handle(Request("POST", "/cmdadd", "", body))
        self.statuses[response.status] += 1
        return response

    def counted(self) -> dict[str, float]:
        return self.metrics.series(m.PLUGIN_REQUESTS)


@pytest.fixture
def netns() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


def check(body: bytes, response: Response) -> None:
    assert response.status in (200, 400, 500), body
    text = response.body.decode()
    assert (text == "") == (response.status == 200), body
    assert len(text) <= MAX_ANSWER_CHARACTERS + 1, body
    assert text.endswith("\n") or not text, body


@pytest.mark.parametrize("seed", [1, random.randrange(10**9)])
def test_every_body_is_answered_and_counted(seed: int) -> None:
    service, descriptors = Service(seed), len(os.listdir("/proc/self/fd"))

    async def run() -> None:
        for body in bodies(BODIES // 2, seed):
            check(body, await service.send(body))

    asyncio.run(run())
    assert sum(service.statuses.values()) == BODIES // 2
    assert service.counted() == {str(status): count for status, count in service.statuses.items()}
    assert 0 < service.enrolment.longest_seconds <= ANSWER_SECONDS or not service.enrolment.inodes
    assert min(service.statuses[status] for status in (400, 500)) > BODIES // 50, "the bodies are not varied enough"
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_many_at_once_with_good_ones_among_them(netns: Netns) -> None:
    """Good events that come between bad ones are enrolled, each once, in their own netns."""
    seed = random.randrange(10**9)
    service = Service(seed)
    path = f"/proc/{os.getpid()}/fd/{netns.fd}"
    good = json.dumps({"Netns": path, "PodName": "cart", "PodNamespace": "shop", "IPs": None}).encode()
    descriptors = len(os.listdir("/proc/self/fd"))

    async def one(body: bytes) -> None:
        check(body, await service.send(body))

    async def run() -> None:
        everything = [*bodies(2000, seed), *[good] * 500]
        random.Random(seed).shuffle(everything)
        await asyncio.gather(*map(one, everything))

    asyncio.run(run())
    assert service.enrolment.inodes.keys() == {os.fstat(netns.fd).st_ino}
    assert 0 < service.statuses[200] <= service.enrolment.inodes.total() <= 500
    assert sum(service.counted().values()) == 2500
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_time_of_the_look_up_is_no_longer_there_for_the_enrolment(netns: Netns) -> None:
    """The plugin's client counts from its request."""
    service = Service(3)
    service.cluster.slow_seconds = 0.5
    path = f"/proc/{os.getpid()}/fd/{netns.fd}"
    event = json.dumps({"Netns": path, "PodName": "cart", "PodNamespace": "shop", "IPs": None}).encode()
    asyncio.run(service.send(event))
    assert 0 < service.enrolment.longest_seconds <= ANSWER_SECONDS - 0.5


def test_cluster_that_does_not_answer_in_time() -> None:
    service = Service(1)
    service.cluster.slow_seconds = 60
    response = asyncio.run(service.send(b'{"Netns": "/x", "PodName": "cart", "PodNamespace": "shop"}'))
    assert response.status == 500
    assert b"the API server did not tell" in response.body
