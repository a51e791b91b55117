"""Some simulated agents in one process, told what to do by lines of JSON on standard input.

Each is what the real agent has towards the API server: KubeApi with a token, a CA and connections of its own, the
review of its rights, the informers of app.py, the look-up of a pod that an ADD asks for, and in ambient mode the
annotation after it. `python agents.py CONFIG.json`; a line of JSON answers each command.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshcni.agent import rights
from meshcni.agent.podlookup import PodLookup
from meshcni.agent.prerequisites import FIRST_RETRY_SECONDS, LEAST_OF_A_PAUSE, MAX_RETRY_SECONDS
from meshcni.errors import KubeError
from meshcni.istio import REDIRECTION_ENABLED
from meshcni.kube.client import NAMESPACES, PODS, KubeApi
from meshcni.kube.credentials import InCluster
from meshcni.kube.informer import Informer
from meshcni.pods.model import Namespace, Pod, namespace_from_object, pod_from_object

RETRY_SECONDS = 0.5  # after an ADD that failed; a kubelet takes longer
ATTEMPTS = 20


@dataclass
class Agent:
    """One simulated agent."""

    number: int
    node: str
    environment: Mapping[str, str]
    service_account: str
    namespace: str
    ambient: bool
    counts: Counter[str] = field(default_factory=Counter)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        access = InCluster(environment=self.environment, service_account_dir=self.service_account)
        self.api = KubeApi(access, user_agent=f"agent-{self.number}")
        self.pods: Informer[Pod] = Informer(
            self.api, PODS, pod_from_object, field_selector=f"spec.nodeName={self.node}"
        )
        self.namespaces: Informer[Namespace] | None = None
        if self.ambient:
            self.namespaces = Informer(self.api, NAMESPACES, namespace_from_object, metadata_only=True)
        self.lookup = PodLookup(self.api, self.pods, self.namespaces, 4.0)
        self.ready_at = 0.0

    @property
    def informers(self) -> list[Informer[Any]]:
        """Those that it has."""
        return [one for one in (self.pods, self.namespaces) if one is not None]

    def start(self) -> None:
        """Begin everything that the real one begins at its start."""
        works = [self._review(), *(informer.run() for informer in self.informers)]
        self.tasks = [asyncio.get_running_loop().create_task(work) for work in works]

    async def synced(self) -> None:
        """Return when it is ready."""
        for informer in self.informers:
            await informer.synced.wait()
        self.ready_at = time.monotonic()

    async def add(self, namespace: str, name: str, uid: str) -> None:
        """What the ADD of a pod asks of the API server; again, as by a kubelet, when it fails."""
        for _ in range(ATTEMPTS):
            try:
                found = await self.lookup.pod(namespace, name, uid)
                self.counts[f"found by {found.source}"] += 1
                if self.ambient:
                    await self.lookup.namespace(namespace)
                    await self.api.patch_redirection(namespace, name, uid, REDIRECTION_ENABLED)
                return
            except KubeError as error:
                self.counts[f"ADD failed with {error.status}"] += 1
                if error.status == 404:
                    return
                await asyncio.sleep(RETRY_SECONDS)

    async def close(self) -> None:
        """End it."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.api.close()

    async def _review(self) -> None:
        wanted, pause, answers = rights.wanted(ambient=self.ambient), FIRST_RETRY_SECONDS, rights.Answers()
        while True:  # as Prerequisites.run does
            found = await rights.review(self.api, wanted, self.namespace, frozenset(), answers)
            self.counts["reviews"] += 1
            if found.known:
                self.counts["rights refused"] += len(found.refused)
                return
            await asyncio.sleep(pause * random.uniform(LEAST_OF_A_PAUSE, 1.0))
            pause = min(pause * 2, MAX_RETRY_SECONDS)


class Agents:
    """All of this process."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.agents = {
            one["node"]: Agent(
                one["number"],
                one["node"],
                config["environment"],
                one["serviceAccount"],
                config["namespace"],
                config["ambient"],
            )
            for one in config["agents"]
        }
        self._adds: set[asyncio.Task[None]] = set()
        self._began = 0.0

    async def obey(self, command: Mapping[str, Any]) -> object:
        """Do what a line says; returns the answer."""
        match command["do"]:
            case "start":
                self._began = time.monotonic()
                for agent in self.agents.values():
                    agent.start()
                await asyncio.gather(*(agent.synced() for agent in self.agents.values()))
                return [round(agent.ready_at - self._began, 3) for agent in self.agents.values()]
            case "add":
                task = asyncio.ensure_future(
                    self.agents[command["node"]].add(command["namespace"], command["name"], command["uid"])
                )
                self._adds.add(task)
                task.add_done_callback(self._adds.discard)
                return None
            case "report":
                return self.report()
        raise ValueError(f"unknown command {command['do']!r}")

    def report(self) -> dict[str, Any]:
        """Return what the informers counted, all together."""
        states = [informer.state for agent in self.agents.values() for informer in agent.informers]
        names = ("lists", "relists", "watches", "restarts", "events", "bookmarks", "rejected", "callback_errors")
        counts: Counter[str] = Counter()
        for agent in self.agents.values():
            counts += agent.counts
        return {
            **{name: sum(getattr(state, name) for state in states) for name in names},
            "connected": sum(state.connected for state in states),
            "errors": Counter(state.last_error for state in states if state.last_error),
            "objects": sum(len(informer.items()) for agent in self.agents.values() for informer in agent.informers),
            "adds under way": len(self._adds),
            "counts": counts,
        }

    async def run(self) -> None:
        """Obey until standard input ends."""
        reader = asyncio.StreamReader(limit=1 << 20)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            answer = await self.obey(json.loads(line))
            if answer is not None:
                print(json.dumps(answer), flush=True)
        await asyncio.gather(*(agent.close() for agent in self.agents.values()))


def main() -> None:
    """Raise the limit of open files and obey."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(Agents(json.loads(Path(sys.argv[1]).read_text())).run())


if __name__ == "__main__":
    main()
