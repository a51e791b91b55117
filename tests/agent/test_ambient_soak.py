"""Many pods, random events, steps that fail before or after they took effect: what must never be never is.

The same as the machine of tests/pure/pods, with the real workers, and with pods that are in each other's way.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from tests.agent.ambientnode import LONG_SECONDS, MODE, VERIFY_SECONDS, Inside, Node, Ztunnel, run, settle

from meshcni.errors import ApplyError, MeshCniError

SEEDS = range(int(os.environ.get("MESHCNI_EXAMPLES", "25")) // 5)
PODS = 12
EVENTS = 250
OUT = {MODE: "none"}


class Soak:
    """A node that is not left in peace."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node, self.chance = node, Random(seed)
        self.adding: dict[str, asyncio.Task[None]] = {}
        self.failure_rate = 0.0
        self.number = 0
        self.for_adds: dict[int, Inside] = {}  # sandboxes in which nothing runs before their rules are in
        node.accident = self.accident

    def accident(self, what: str, inside: Inside | None) -> None:
        if self.chance.random() < self.failure_rate:
            raise ApplyError(f"{what} fails")
        if what == "api done":
            self.check_enabled()

    def check_enabled(self) -> None:
        """Whoever becomes enabled is captured: rules in the sandbox it runs in."""
        for pod in self.node.pods.values():
            sandbox = self.node.runs.get(pod.uid)
            newest = self.node.patches[-1]
            if newest == (pod.name, "enabled") and sandbox is not None and pod.name not in self.adding:
                record = self.node.record(pod.name)
                known = record is not None and record.netns is not None and record.netns.id.inode == sandbox.inode
                assert not known or sandbox.inside.rules is not None, f"{pod.name} is enabled and open"

    def watch(self, ztunnel: Ztunnel) -> Ztunnel:
        """No sandbox in which nothing runs is announced without rules."""

        def announced(uid: str, inode: int) -> None:
            inside = self.for_adds.get(inode)
            is_right = inside is None or inside.rules is not None or inside.opened > 0
            assert is_right, f"{uid} was announced before its rules were in"

        ztunnel.watched = announced
        return ztunnel

    # --- events -------------------------------------------------------------------------------------------------------

    def address(self) -> str:
        self.number += 1
        return f"10.{self.number // 60000}.{self.number // 250 % 240}.{self.number % 250 + 1}"

    def name(self) -> str:
        return f"pod-{self.chance.randrange(PODS)}"

    def exists(self, name: str) -> bool:
        return ("shop", name) in self.node.pods

    async def make(self) -> None:
        name = self.name()
        if not self.exists(name):
            self.number += 1
            self.node.pod(name, uid=f"uid-{name}-{self.number}")

    async def begin_add(self) -> None:
        name = self.name()
        if name not in self.adding:
            self.adding[name] = asyncio.ensure_future(self.add(name))
            await asyncio.sleep(0)

    async def add(self, name: str) -> None:
        seconds = self.chance.choice((0.05, 3.0, 20.0))
        pod = self.node.pods.get(("shop", name))
        try:
            if pod is None or pod.labels == OUT or pod.has_terminated or self.node.namespaces["shop"] == {}:
                return  # no pod for us
            self.node.runs.pop(pod.uid, None)
            sandbox = self.node.sandbox(self.address())
            self.for_adds[sandbox.inode] = sandbox.inside
            addresses = tuple(sandbox.inside.addresses)
            await self.node.agent.add(pod, sandbox.descriptor, addresses, "/run/netns/x", seconds)
        except MeshCniError:
            return
        finally:
            del self.adding[name]
        if self.exists(name) and self.node.uid(name) == pod.uid and not self.node.pods["shop", name].has_terminated:
            self.node.runs[pod.uid] = sandbox
            self.node.pod(name, *map(str, addresses))

    async def run_without_us(self) -> None:
        name = self.name()
        if self.exists(name) and name not in self.adding and not self.node.pods["shop", name].has_terminated:
            self.node.running(name, self.address(), uid=self.node.uid(name))

    async def label(self) -> None:
        name = self.name()
        if self.exists(name):
            self.node.pod(name, labels={} if self.node.pods["shop", name].labels else OUT)

    async def label_namespace(self) -> None:
        self.node.label_namespace("shop", **({} if self.node.namespaces["shop"] else {"mode": "ambient"}))

    async def end(self) -> None:
        name = self.name()
        if self.exists(name) and self.node.uid(name) in self.node.runs:
            del self.node.runs[self.node.uid(name)]
            self.node.pod(name, phase="Succeeded")

    async def delete(self) -> None:
        name = self.name()
        if self.exists(name):
            self.node.runs.pop(self.node.uid(name), None)
            self.node.delete(name)

    async def tamper(self) -> None:
        if self.node.runs:
            inside = self.chance.choice(list(self.node.runs.values())).inside
            if inside.rules is not None:
                inside.rules = "tampered"

    async def ztunnel_comes_or_goes(self) -> None:
        connected = [one for one in self.node.ztunnels if one.is_connected]
        if len(connected) < 2 and self.chance.random() < 0.7:
            self.watch(self.node.ztunnel())
        elif connected:
            self.chance.choice(connected).disconnect()

    async def ztunnel_refuses(self) -> None:
        for one in self.node.ztunnels:
            uids = [pod.uid for pod in self.node.pods.values()]
            one.refused = set(self.chance.sample(uids, min(2, len(uids))))

    async def verify(self) -> None:
        self.node.agent.verification.hurry()

    async def restart(self) -> None:
        for adding in tuple(self.adding.values()):
            adding.cancel()
        await asyncio.gather(*self.adding.values(), return_exceptions=True)
        await self.node.restart()

    async def wait(self) -> None:
        await settle(self.chance.choice((0.0, 0.001, 0.02, 0.3, 5.0)))

    async def play(self) -> None:
        events: dict[Callable[[], object], int] = {
            self.make: 6,
            self.begin_add: 12,
            self.run_without_us: 4,
            self.label: 6,
            self.label_namespace: 1,
            self.end: 2,
            self.delete: 3,
            self.tamper: 2,
            self.ztunnel_comes_or_goes: 3,
            self.ztunnel_refuses: 1,
            self.verify: 2,
            self.restart: 1,
            self.wait: 20,
        }
        for _ in range(EVENTS):
            self.failure_rate = self.chance.choice((0.0, 0.0, 0.05, 0.3))
            event = self.chance.choices(list(events), list(events.values()))[0]
            await event()  # type: ignore[misc]

    async def converge(self) -> None:
        """Failures stop; one ztunnel stays."""
        self.failure_rate = 0.0
        await asyncio.gather(*self.adding.values(), return_exceptions=True)
        for one in self.node.ztunnels:
            one.refused.clear()
            one.disconnect()
        self.watch(self.node.ztunnel())
        await settle(LONG_SECONDS)
        self.node.agent.verification.hurry()
        await settle(2 * VERIFY_SECONDS)

    def check_end(self) -> None:
        node = self.node
        for pod in node.pods.values():
            belongs = pod.labels != OUT and node.namespaces["shop"] != {}
            sandbox = node.runs.get(pod.uid)
            if belongs and sandbox is not None and not pod.has_terminated:
                assert node.is_enrolled(pod.name, sandbox), (pod, node.record(pod.name), sandbox.inside, node.served)
            elif not belongs or pod.has_terminated:
                assert node.record(pod.name) is None, (pod, node.record(pod.name))
                assert pod.uid not in node.served
                assert not node.held_by(pod.uid)
                assert node.annotation(pod.name) == ""
        known = {pod.uid for pod in node.pods.values()}
        assert {record.uid for record in node.agent.records} <= known
        assert set(node.served) <= known
        assert set(node.probes.held.values()) <= known


@pytest.mark.parametrize("seed", SEEDS)
def test_soak(tmp_path: Path, seed: int) -> None:
    async def body(node: Node) -> None:
        soak = Soak(node, seed)
        node.start_agent()
        await settle()
        soak.watch(node.ztunnel())
        await soak.play()
        await soak.converge()
        soak.check_end()

    run(tmp_path, body)
