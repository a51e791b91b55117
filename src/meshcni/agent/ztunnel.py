"""ZDS, the link to ztunnel: takes its connections, tells the newest of new pods and all of them of pods that end.

While ztunnel is updated two are connected. An Add goes to the newest that has said hello; when that goes away, the one
before it is the newest again. Upstream: cni/pkg/nodeagent/ztunnelserver.go.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from meshcni.agent.zdsadmission import MAX_SILENT, WINDOW_SECONDS, Admission
from meshcni.agent.zdsconnection import Connection
from meshcni.agent.zdsrecords import ConnectionStatus, Meter, Workload
from meshcni.errors import ZtunnelError
from meshcni.host.sockets import accept, peer_credentials
from meshcni.protocols.zdslink import DEADLINE_SECONDS, Cause

__all__ = ["ConnectionStatus", "Meter", "Workload", "ZtunnelServer"]

log = logging.getLogger(__name__)

ACCEPT_PAUSE_SECONDS = 0.1  # after an accept that failed, for want of descriptors for example
_NO_CONNECTION = "is ztunnel running on this node, and is its /var/run/ztunnel the agent's?"


class SnapshotReady(asyncio.Event):
    """An event that also calls back when it is set."""

    def __init__(self, on_set: Callable[[], None]) -> None:
        super().__init__()
        self._on_set = on_set

    def set(self) -> None:
        """Set it."""
        super().set()
        self._on_set()


class ZtunnelServer:
    """Serves ZDS on a SEQPACKET listener. All methods belong to one event loop.

    `snapshot` names every pod that is to be served, enrolled ones of unknown netns too; it is called once for each
    connection, its entries are taken one at a time. `on_change` is called (soon, never from within a method) when the
    newest connection is another one or none, when a snapshot is complete, and when a pod in it was refused.
    """

    def __init__(
        self,
        snapshot: Callable[[], Iterable[Workload]],
        *,
        on_change: Callable[[], None],
        meter: Meter | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
        window_seconds: float = WINDOW_SECONDS,
    ) -> None:
        self.snapshot_ready = SnapshotReady(self._pump)
        self._snapshot = snapshot
        self._on_change = on_change
        self._meter = meter or Meter()
        self._deadline_seconds = deadline_seconds
        self._window_seconds = window_seconds
        self._connections: list[Connection] = []  # in the order of their arrival
        self._newest: Connection | None = None
        self._connected = asyncio.Event()
        self._number = 0

    # --- what ztunnel is told -----------------------------------------------------------------------------------------

    async def add(self, workload: Workload) -> None:
        """Have the newest ztunnel serve a pod, whose netns must be known; return when it does.

        Raises ZtunnelError (`no-connection` at once), and NetnsError for a descriptor that cannot be used. A caller
        that is cancelled before the request was sent takes it back.
        """
        for connection in self._connections:
            connection.remember(workload.uid)
        if self._newest is None:
            message = f"no ztunnel is connected to take pod {workload.namespace}/{workload.name}"
            raise ZtunnelError("no-connection", message, _NO_CONNECTION)
        await self._newest.add(workload)

    async def delete(self, uid: str) -> None:
        """Have every ztunnel end a pod; return when all have answered. With none connected there is nothing to do.

        A refusal counts as done, and so does the end of a connection: its next snapshot will not name the pod.
        Raises ZtunnelError (`timeout`) when one did not answer.
        """
        told: list[asyncio.Future[None]] = []
        for connection in tuple(self._connections):
            if connection.is_greeted:
                told.append(connection.delete(uid))
            else:
                connection.forget(uid)
        answers = await asyncio.gather(*told, return_exceptions=True)
        late: list[ZtunnelError] = []
        for answer in answers:
            if isinstance(answer, ZtunnelError):
                if answer.cause not in ("nack", "closed"):
                    late.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
        if late:
            raise ZtunnelError(late[0].cause, "; ".join(error.message for error in late), late[0].hint)

    # --- what is known of ztunnel -------------------------------------------------------------------------------------

    @property
    def has_connection(self) -> bool:
        """Whether an Add can be sent."""
        return self._newest is not None

    @property
    def settled(self) -> bool:
        """Whether the newest connection has its whole snapshot."""
        return self._newest is not None and self._newest.is_complete

    def acked(self, uid: str) -> int | None:
        """The inode of the netns in which the newest ztunnel serves the pod; None when it is not known to."""
        return self._newest.acked.get(uid) if self._newest is not None else None

    async def wait_connected(self, seconds: float) -> bool:
        """Wait until an Add can be sent; False when none can after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._connected.wait()
        except TimeoutError:
            return False
        return True

    def connections(self) -> tuple[ConnectionStatus, ...]:
        """What people are told, oldest first."""
        return tuple(connection.status(connection is self._newest) for connection in self._connections)

    # --- connections --------------------------------------------------------------------------------------------------

    async def run(self, listener: socket.socket) -> None:
        """Serve until cancelled; then all connections and the listener are closed and its path is removed.

        The path is left alone when a successor has bound it anew.
        """
        loop = asyncio.get_running_loop()
        admission = Admission(loop.time, self._window_seconds)
        path = Path(listener.getsockname())
        bound = _identity(path)
        try:
            while True:
                try:
                    self._take(await accept(listener), admission)
                except OSError as error:
                    log.error("cannot accept on %s: %s", path, error)
                    await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
        finally:
            admission.cancel()
            for connection in tuple(self._connections):
                connection.close(Cause.STOPPED, "the agent stops")
            if bound is not None and _identity(path) == bound:
                path.unlink(missing_ok=True)
            listener.close()

    def _take(self, accepted: socket.socket, admission: Admission) -> None:
        peer = peer_credentials(accepted)
        if peer.uid != 0:
            accepted.close()
            self._meter.refused("peer")
            log.warning("refused a connection of pid %d, uid %d on ztunnel's socket: only root may", peer.pid, peer.uid)
            return
        self._number += 1
        connection = Connection(self._number, peer, accepted, self, self._meter, self._deadline_seconds)
        self._connections.append(connection)
        self._meter.connected(len(self._connections))
        silent = [connection for connection in self._connections if not connection.is_greeted]
        if len(silent) > MAX_SILENT:
            silent[0].close(Cause.CROWDED, f"{MAX_SILENT} newer connections have not said hello either")
        admission.arrive(connection)

    def _pump(self) -> None:
        for connection in tuple(self._connections):
            connection.pump()

    def _choose(self) -> None:
        """Find the newest connection that has said hello."""
        newest = next((connection for connection in reversed(self._connections) if connection.is_greeted), None)
        if newest is self._newest:
            return
        self._newest = newest
        if newest is None:
            self._connected.clear()
        else:
            self._connected.set()
        self._changed()

    def _changed(self) -> None:
        asyncio.get_running_loop().call_soon(self._on_change)

    # --- what connections tell ----------------------------------------------------------------------------------------

    def greeted(self, connection: Connection) -> None:
        """A connection said hello."""
        self._choose()

    def changed(self, connection: Connection) -> None:
        """A snapshot is complete, or a pod in it was refused."""
        self._changed()

    def closed(self, connection: Connection) -> None:
        """A connection is closed."""
        self._connections.remove(connection)
        self._meter.connected(len(self._connections))
        self._choose()

    def snapshot(self) -> Iterable[Workload] | None:
        """Every pod that is to be served, for a connection; None until it is known."""
        return self._snapshot() if self.snapshot_ready.is_set() else None


def _identity(path: Path) -> tuple[int, int] | None:
    """What makes the file at `path` the same; our own socket keeps its inode from being used again."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
