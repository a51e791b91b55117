"""The stand-in's table of pods: what each message means, row by row as the real ztunnel behaves."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lab.ztunnel.record import Recorder


class StartError(Exception):
    """A pod's proxy cannot start; the text is the refusal."""


class Proxy(Protocol):
    """What serves one pod."""

    def close(self) -> None:
        """Stop listening and cut what is open."""

    def counters(self) -> dict[str, dict[str, int]]:
        """Connections and bytes by direction."""


Start = Callable[[str, int], Awaitable[Proxy]]  # UID and descriptor, which stays the caller's; raises StartError


class NoProxy:
    """Serves nothing: for tests of the protocol alone."""

    def close(self) -> None:
        """Nothing to do."""

    def counters(self) -> dict[str, dict[str, int]]:
        """Return no counter."""
        return {}


@dataclass(slots=True)
class Workload:
    """One pod; `netns` is ours and keeps the namespace alive."""

    uid: str
    info: dict[str, str]
    netns: int
    device: int
    inode: int
    proxy: Proxy = field(default_factory=NoProxy)

    def end(self) -> None:
        """Stop serving it."""
        self.proxy.close()
        os.close(self.netns)


class Workloads:
    """Pods that are served and pods that wait; survives the connections of one ztunnel."""

    def __init__(self, start: Start, record: Recorder, end: Callable[[Workload], None]) -> None:
        self._start = start
        self._record = record
        self._end = end
        self.running: dict[str, Workload] = {}
        self.pending: dict[str, Workload] = {}
        self.named: set[str] = set()
        self.snapshot_received = False
        self.ready = False
        self.started = self.stopped = 0

    def new_stream(self) -> None:
        """A connection was made: its snapshot is still to come. What is served stays."""
        self.named.clear()
        for workload in self.pending.values():
            os.close(workload.netns)
        self.pending.clear()
        self.snapshot_received = False

    def evaluate(self) -> None:
        """Tell anew whether we are ready; a refusal alone changes nothing."""
        self.ready = self.snapshot_received and not self.pending

    async def add(self, uid: str, info: dict[str, str], netns: int) -> None:
        """Serve a pod; `netns` becomes ours. Raises StartError; the pod waits then."""
        status = os.fstat(netns)
        new = Workload(uid, info, netns, status.st_dev, status.st_ino)
        if not self.snapshot_received:
            self.named.add(uid)
        waiting = self.pending.pop(uid, None)
        if waiting is not None:
            os.close(waiting.netns)
        running = self.running.get(uid)
        if running is not None and (running.device, running.inode) == (new.device, new.inode):
            os.close(netns)
            return
        if running is not None:
            self._stop(uid, "moved")
        await self._begin(new)

    async def retry(self) -> None:
        """Try again with every pod that waits."""
        for workload in list(self.pending.values()):
            del self.pending[workload.uid]
            try:
                await self._begin(workload)
            except StartError as error:
                self._record("retry-failed", uid=workload.uid, error=str(error))
        self.evaluate()

    async def _begin(self, workload: Workload) -> None:
        try:
            workload.proxy = await self._start(workload.uid, workload.netns)
        except StartError:
            self.pending[workload.uid] = workload
            raise
        self.running[workload.uid] = workload
        self.started += 1
        self._record("started", uid=workload.uid, device=workload.device, inode=workload.inode, info=workload.info)

    def keep(self, uid: str) -> None:
        """Go on serving a pod, if we do."""
        self.named.add(uid)

    def delete(self, uid: str) -> None:
        """Serve a pod no longer; before the snapshot that is left to its end."""
        self.named.discard(uid)
        waiting = self.pending.pop(uid, None)
        if waiting is not None:
            os.close(waiting.netns)
        if self.snapshot_received:
            self._stop(uid, "deleted")

    def end_snapshot(self) -> None:
        """Drop whatever was not named."""
        for uid in [uid for uid in self.running if uid not in self.named]:
            self._stop(uid, "not named")
        self.snapshot_received = True

    def close(self) -> None:
        """Stop everything."""
        for uid in list(self.running):
            self._stop(uid, "ended")
        self.new_stream()

    def _stop(self, uid: str, why: str) -> None:
        workload = self.running.pop(uid, None)
        if workload is not None:
            self.stopped += 1
            self._record("stopped", uid=uid, inode=workload.inode, why=why)
            self._end(workload)

    def dump(self) -> dict[str, Any]:
        """What the real one shows as its configuration dump, and more."""
        states = [("Up", workload) for workload in self.running.values()]
        states += [("Pending", workload) for workload in self.pending.values()]
        return {
            workload.uid: {
                "state": state,
                "info": workload.info,
                "device": workload.device,
                "inode": workload.inode,
                "counters": workload.proxy.counters(),
            }
            for state, workload in states
        }
