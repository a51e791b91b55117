"""One connection of ztunnel on the event loop: drives `protocols.zdslink` over a socket, everything in callbacks.

A packet that came before a request was sent cannot be its answer, so the socket is read empty before each send.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol

from meshcni.agent.logs import labels
from meshcni.agent.zdsrecords import ConnectionStatus, Meter, Pending, Workload, add_of, failure
from meshcni.agent.zdssnapshot import Snapshot, without_netns
from meshcni.errors import NetnsError, ProtocolError, ZtunnelError
from meshcni.host.netns import copy_netns
from meshcni.host.sockets import Peer, receive_now
from meshcni.protocols.zds import MAX_READ_BYTES, Add, Delete, Request, SnapshotSent
from meshcni.protocols.zdslink import GREETED, TIMED, Cause, Close, Greet, Link, Output, Resolve, Result, Send, State

log = logging.getLogger(__name__)

MAX_TEXT_CHARACTERS = 2000  # kept of ztunnel's reason, which can carry a backtrace


class Owner(Protocol):
    """Who has the connections."""

    def greeted(self, connection: Connection) -> None:
        """It said hello."""

    def changed(self, connection: Connection) -> None:
        """Its snapshot is complete, or a pod of the snapshot was refused."""

    def closed(self, connection: Connection) -> None:
        """It is closed, and nothing comes from it any more."""

    def snapshot(self) -> Iterable[Workload] | None:
        """Every pod that is to be served; None as long as that is not known."""


class Connection:
    """A connection; `begin` starts it. Not to be used from other threads."""

    def __init__(
        self, number: int, peer: Peer, connection: socket.socket, owner: Owner, meter: Meter, deadline_seconds: float
    ) -> None:
        self.number, self.peer = number, peer
        self.version: int | None = None
        self.acked: dict[str, int] = {}  # by UID, the inode of the netns
        self.last_error = ""
        self._socket = connection
        self._owner = owner
        self._meter = meter
        self._deadline_seconds = deadline_seconds
        self._loop = asyncio.get_running_loop()
        self._since = datetime.now(UTC)
        self._link = Link()
        self._begun = False
        self._snapshot = Snapshot(owner.snapshot)
        self._waiting: deque[Pending] = deque()
        self._outstanding: Pending | None = None
        self._packet = b""
        self._timer: asyncio.TimerHandle | None = None
        self._timed_state = State.CLOSED

    # --- what the owner sees ------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Not closed yet."""
        return self._link.state is not State.CLOSED

    @property
    def is_greeted(self) -> bool:
        """It has said hello and is open."""
        return self._link.state in GREETED

    @property
    def is_complete(self) -> bool:
        """It is open and has its whole snapshot."""
        return self._link.state in (State.LIVE, State.LIVE_WRITE, State.LIVE_WAIT)

    def status(self, newest: bool) -> ConnectionStatus:
        """What people are told."""
        pending = sum(not pending.is_dropped for pending in self._waiting) + (self._outstanding is not None)
        return ConnectionStatus(
            number=self.number,
            pid=self.peer.pid,
            since=self._since.isoformat("T", "seconds"),
            state=self._link.state.value if self._begun else "delayed",
            version=self.version,
            newest=newest,
            acked=len(self.acked),
            pending=pending,
            last_error=self.last_error,
        )

    def begin(self) -> None:
        """Listen to the peer; until then nothing is read, and no deadline runs."""
        self._begun = True
        self._loop.add_reader(self._socket, self._readable)
        self._arm()

    def add(self, workload: Workload) -> asyncio.Future[None]:
        """Queue an Add; the future ends with its ack or a ZtunnelError. Raises NetnsError for a useless descriptor.

        A future that is cancelled before the request was sent takes it back.
        """
        if workload.netns is None:
            raise NetnsError(f"the network namespace of pod {workload.namespace}/{workload.name} is not known")
        netns = copy_netns(workload.netns)
        return self._queue(Pending(add_of(workload), self._loop.create_future(), netns, workload.inode))

    def delete(self, uid: str) -> asyncio.Future[None]:
        """Queue a Del; the future ends as that of `add`."""
        return self._queue(Pending(Delete(uid), self._loop.create_future()))

    def forget(self, uid: str) -> None:
        """Keep a pod out of a snapshot that is still to come."""
        if not self.is_complete:
            self._snapshot.forget(uid)

    def remember(self, uid: str) -> None:
        """Take `forget` back."""
        self._snapshot.remember(uid)

    def close(self, cause: Cause, text: str) -> None:
        """Close it; requests fail with cause `closed`."""
        self._do(self._link.stop(cause, text))

    def pump(self) -> None:
        """Send the next request if there is one and none is outstanding."""
        if self._link.may(Delete) and self._read_all():
            self._send_next()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _queue(self, pending: Pending) -> asyncio.Future[None]:
        assert pending.answer is not None
        answer = pending.answer

        def done(_: object) -> None:
            if pending is not self._outstanding:
                pending.release()

        answer.add_done_callback(done)
        self._waiting.append(pending)
        self.pump()
        return answer

    def _send_next(self) -> None:
        """Begin requests until one is outstanding or there is none."""
        while self._link.may(Delete):
            pending = self._next()
            if pending is None:
                return
            try:
                outputs = self._link.request(pending.request)
            except ProtocolError as error:
                self._unsendable(pending, error)
                continue
            self._outstanding = pending
            self._do(outputs)

    def _next(self) -> Pending | None:
        """The next request: what somebody waits for goes before the snapshot."""
        while self._waiting:
            pending = self._waiting.popleft()
            if not pending.is_dropped:
                return pending
        if not self._link.may(SnapshotSent):
            return None
        try:
            return self._snapshot.next(self.acked)
        except Exception as error:  # with less than the whole snapshot ztunnel would drop pods
            log.exception("the snapshot for ztunnel cannot be made")
            self.close(Cause.SNAPSHOT, f"the snapshot cannot be made: {error}")
            return None

    def _unsendable(self, pending: Pending, error: ProtocolError) -> None:
        """Fail a request that makes no packet; a pod of the snapshot is named all the same."""
        pending.release()
        self.last_error = error.message
        if pending.answer is not None:
            pending.fail(ZtunnelError("oversized", error.message, error.hint))
            return
        log.error("%s", error)
        named = without_netns(pending)
        if named is not None:
            self._waiting.appendleft(named)

    # --- the socket ---------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._read_all():
            self._send_next()

    def _read_all(self) -> bool:
        """Take every packet there is; False when that ended the connection."""
        while self.is_open:
            try:
                message = receive_now(self._socket, MAX_READ_BYTES)
            except BlockingIOError:
                return True
            except ProtocolError as error:
                self._do(self._link.broken(error))
            except OSError as error:
                self._do(self._link.failed(f"cannot read from ztunnel: {error}"))
            else:
                if message is None:
                    self._do(self._link.eof())
                    continue
                for descriptor in message.descriptors:
                    os.close(descriptor)
                self._do(self._link.receive(message.data, len(message.descriptors)))
        return False

    def _write(self) -> None:
        """Give the packet to the socket, when it takes one."""
        pending = self._outstanding
        assert pending is not None
        try:
            if pending.netns is None:
                self._socket.send(self._packet)
            else:
                socket.send_fds(self._socket, [self._packet], [pending.netns])
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._write)
            return
        except OSError as error:
            self._do(self._link.failed(_write_failure(error)))
            return
        self._loop.remove_writer(self._socket)
        pending.release()
        pending.sent_at = self._loop.time()
        self._expect(pending.request)
        self._do(self._link.written())

    def _expect(self, request: Request) -> None:
        """From now on, until the ack, nobody knows what ztunnel has of this pod."""
        if isinstance(request, Add | Delete):
            self.acked.pop(request.uid, None)
        if isinstance(request, Add):
            self.remember(request.uid)
        elif isinstance(request, Delete):
            self.forget(request.uid)

    def _deadline(self) -> None:
        self._timer = None
        self._do(self._link.deadline())

    def _arm(self) -> None:
        """Set the timer of the state."""
        state = self._link.state
        if state is self._timed_state:
            return
        self._timed_state = state
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if state in TIMED:
            self._timer = self._loop.call_later(self._deadline_seconds, self._deadline)

    # --- what comes out of the link -----------------------------------------------------------------------------------

    def _do(self, outputs: tuple[Output, ...]) -> None:
        self._arm()
        for output in outputs:
            match output:
                case Greet(version):
                    self.version = version
                    log.debug("ztunnel said hello", extra=labels(pid=self.peer.pid, version=version))
                    self._owner.greeted(self)
                case Send(data):
                    self._packet = data
                    self._write()
                case Resolve(result, text):
                    self._resolve(result, text[:MAX_TEXT_CHARACTERS])
                case Close(cause, text):
                    self._close(cause, text[:MAX_TEXT_CHARACTERS])

    def _resolve(self, result: Result, text: str) -> None:
        pending, self._outstanding = self._outstanding, None
        assert pending is not None
        pending.release()
        self._meter.message(pending.kind, result.value)
        if result in (Result.ACK, Result.NACK):
            self._meter.latency(pending.kind, self._loop.time() - pending.sent_at)
        if result is Result.ACK and isinstance(pending.request, Add):
            self.acked[pending.request.uid] = pending.inode
        if result is Result.ACK:
            pending.succeed()
        else:
            pending.fail(self._failure(pending, result, text))
        if pending.answer is None and result in (Result.ACK, Result.NACK):
            self._resolve_of_snapshot(pending, result)

    def _failure(self, pending: Pending, result: Result, text: str) -> ZtunnelError:
        whom = f"ztunnel (pid {self.peer.pid}, connected since {self._since:%H:%M:%S} UTC)"
        error = failure(whom, pending, result, text, self._deadline_seconds)
        self.last_error = error.message
        return error

    def _resolve_of_snapshot(self, pending: Pending, result: Result) -> None:
        if result is Result.NACK:
            log.warning("%s", self.last_error)
        is_last = self._snapshot.resolved(pending, result is Result.ACK)
        if is_last:
            counts = self._snapshot.counts
            self._log("ztunnel connected", adds=counts["add"], keeps=counts["keep"], nacks=counts["nack"])
        if is_last or result is Result.NACK:
            self._owner.changed(self)

    def _close(self, cause: Cause, text: str) -> None:
        if self._begun:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._snapshot.end()
        while self._waiting:
            pending = self._waiting.popleft()
            pending.release()
            if pending.answer is not None and not pending.is_dropped:
                self._meter.message(pending.kind, Result.CLOSED.value)
                pending.fail(self._failure(pending, Result.CLOSED, text))
        self._meter.closed(cause.value)
        self._log(f"ztunnel disconnected: {text}", cause=cause.value)
        self._owner.closed(self)

    def _log(self, text: str, **values: object) -> None:
        seconds = round((datetime.now(UTC) - self._since).total_seconds(), 3)
        log.info("%s", text, extra=labels(pid=self.peer.pid, version=self.version, **values, seconds=seconds))


def _write_failure(error: OSError) -> str:
    gone = error.errno in (errno.EPIPE, errno.ECONNRESET)
    return "ztunnel closed it before it took a message" if gone else f"cannot write to ztunnel: {error}"
