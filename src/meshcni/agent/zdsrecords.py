"""What the ZDS server, its connections and their owner hand to each other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from meshcni.errors import MeshCniError, ZtunnelError
from meshcni.protocols.zds import Add, Delete, Keep, Request, SnapshotSent
from meshcni.protocols.zdslink import Result

KINDS: dict[type[Request], str] = {Add: "add", Keep: "keep", Delete: "del", SnapshotSent: "snapshot-sent"}
NACK_HINTS = {  # words of ztunnel's reasons
    "AddrInUse": "a process of the pod listens on one of ztunnel's ports 15001, 15006, 15008, 15053",
    "AddrNotAvailable": "is the interface lo of the pod up?",
    "Too many open files": "raise the limit of open files of ztunnel, it needs 8 for each pod",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod as ztunnel is told of it.

    `netns` is a descriptor that stays the caller's (a copy is sent), None when the pod's netns is not known; `inode` is
    the netns's inode number, 0 then.
    """

    uid: str
    name: str
    namespace: str
    service_account: str
    netns: int | None
    inode: int = 0


def _nothing(*_: object) -> None:
    """Hear something and do nothing."""


@dataclass(frozen=True, slots=True)
class Meter:
    """Who counts. `kind`: add, keep, del, snapshot-sent; `result` and `cause`: values of Result and Cause."""

    connected: Callable[[int], None] = _nothing  # connections, from accept to close
    message: Callable[[str, str], None] = _nothing  # kind, result
    latency: Callable[[str, float], None] = _nothing  # kind, seconds from send to ack or nack
    closed: Callable[[str], None] = _nothing  # cause
    refused: Callable[[str], None] = _nothing  # cause of a connection that was not taken: peer


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """What people are told of a connection."""

    number: int
    pid: int
    since: str
    state: str
    version: int | None
    newest: bool
    acked: int
    pending: int
    last_error: str


@dataclass(slots=True, eq=False)
class Pending:
    """A request that is waiting or outstanding; `netns` is our own copy of the descriptor, closed once sent."""

    request: Request
    answer: asyncio.Future[None] | None = None  # None: of the snapshot
    netns: int | None = None
    inode: int = 0
    sent_at: float = 0.0

    @property
    def kind(self) -> str:
        """Its name in metrics."""
        return KINDS[type(self.request)]

    @property
    def is_dropped(self) -> bool:
        """Whoever waited for the answer does so no longer."""
        return self.answer is not None and self.answer.done()

    def release(self) -> None:
        """Close the descriptor."""
        if self.netns is not None:
            os.close(self.netns)
            self.netns = None

    def succeed(self) -> None:
        """Tell who waits."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(None)

    def fail(self, error: MeshCniError) -> None:
        """Tell who waits."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)


def add_of(workload: Workload) -> Add:
    """The request that says who the pod is."""
    return Add(workload.uid, workload.name, workload.namespace, workload.service_account)


def failure(whom: str, pending: Pending, result: Result, text: str, deadline_seconds: float) -> ZtunnelError:
    """What a request that was not done ends with; `whom` is the ztunnel, `text` its reason or why there is none."""
    uid = getattr(pending.request, "uid", "")
    subject = f"{pending.kind} of pod {uid}" if uid else pending.kind
    match result:
        case Result.NACK:
            hint = next((hint for word, hint in NACK_HINTS.items() if word in text), "see ztunnel's own log")
            return ZtunnelError("nack", f"{whom} refused {subject}: {text}", hint)
        case Result.TIMEOUT:
            message = f"{whom} did not answer {subject} within {deadline_seconds:g} s"
            return ZtunnelError("timeout", message, "is the node overloaded?")
    return ZtunnelError("closed", f"{whom} went away before it answered {subject}: {text}", "it connects again")
