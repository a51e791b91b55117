"""Unix sockets of the run directory: made with the right mode from the first moment, peers named by the kernel.

Upstream: the shared listener of pkg/uds (unlink, mkdir 0750, listen, chmod 0666); ours never has a moment of 0666.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from meshcni.errors import ProtocolError

BACKLOG = 512  # 50 ADDs at once must queue in the kernel, not be refused
SOCKET_MODE = 0o600
OPEN_SOCKET_MODE = 0o666  # whoever accepts looks at who calls
PARENT_MODE = 0o750
MAX_DESCRIPTORS = 8  # taken from one message, so that surplus ones are seen and closed; a request carries exactly one
MAX_PATH_BYTES = 107  # sun_path holds 108 with the closing NUL (unix(7))

_umask_lock = threading.Lock()  # the umask belongs to the whole process


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel recorded it at connect (`SO_PEERCRED`)."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Message:
    """One packet of a `SOCK_SEQPACKET` socket; the receiver owns, and closes, `descriptors`."""

    data: bytes
    descriptors: tuple[int, ...]


def listen_seqpacket(path: str | Path, mode: int = SOCKET_MODE) -> socket.socket:
    """Listen on a `SOCK_SEQPACKET` socket at `path`; raises OSError when it cannot be made."""
    return _listen(path, socket.SOCK_SEQPACKET, mode)


def listen_stream(path: str | Path, mode: int = SOCKET_MODE) -> socket.socket:
    """Listen on a stream socket at `path`; raises OSError when it cannot be made."""
    return _listen(path, socket.SOCK_STREAM, mode)


def _listen(path: str | Path, kind: int, mode: int) -> socket.socket:
    """Replace whatever socket is at `path`, make its folder when absent, and listen non-blocking."""
    target = Path(path)
    if len(os.fsencode(target)) > MAX_PATH_BYTES:
        raise OSError(f"socket path {target} is longer than the {MAX_PATH_BYTES} bytes that the kernel takes")
    target.parent.mkdir(mode=PARENT_MODE, parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with _umask_lock:
            previous = os.umask(0o777 & ~mode)
            try:
                listener.bind(str(target))
            finally:
                os.umask(previous)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def peer_credentials(connection: socket.socket) -> Peer:
    """Name the process at the other end of a connected Unix socket."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Peer(pid, uid, gid)


async def accept(listener: socket.socket) -> socket.socket:
    """Wait for the next connection of a non-blocking listener; it is non-blocking and closed on exec.

    asyncio's own `sock_accept` loses the connection that comes in the moment in which the wait is cancelled.
    """
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            await _readable(listener)
        else:
            connection.setblocking(False)
            return connection


async def receive_message(connection: socket.socket, limit: int) -> Message | None:
    """Wait for one packet of at most `limit` bytes; None when the peer closed.

    Raises ProtocolError with cause `oversized` (packet cut) or `descriptors` (more than `MAX_DESCRIPTORS`); whatever
    descriptors came along are closed then. The wait has no deadline of its own.
    """
    while True:
        try:
            return receive_now(connection, limit)
        except BlockingIOError:
            await _readable(connection)


async def _readable(connection: socket.socket) -> None:
    """Wait until `connection` has something to read."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        loop.remove_reader(connection)
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def receive_now(connection: socket.socket, limit: int) -> Message | None:
    """Read one packet of a non-blocking socket as `receive_message` does; BlockingIOError when there is none yet."""
    item = array.array("i")
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * item.itemsize)
    data, ancillary, flags, _ = connection.recvmsg(limit + 1, space, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % item.itemsize])
            descriptors.extend(received)
    problem: ProtocolError | None = None
    if flags & socket.MSG_CTRUNC:
        problem = ProtocolError("descriptors", f"message carries more than {MAX_DESCRIPTORS} descriptors")
    elif flags & socket.MSG_TRUNC or len(data) > limit:
        problem = ProtocolError("oversized", f"message is longer than {limit} bytes")
    if problem is not None:
        close_descriptors(descriptors)
        raise problem
    return Message(data, tuple(descriptors)) if data or descriptors else None


def close_descriptors(descriptors: list[int] | tuple[int, ...]) -> None:
    """Close each descriptor of a message."""
    for descriptor in descriptors:
        os.close(descriptor)
