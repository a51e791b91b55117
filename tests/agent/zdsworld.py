"""A ZDS server on the test's event loop, and ztunnels on the same loop that do what the test says."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from lab.ztunnel.messages import HELLO, Packet, answer, next_packet

from meshcni.agent.ztunnel import ConnectionStatus, Meter, Workload, ZtunnelServer
from meshcni.errors import CNI_TRY_AGAIN_LATER, ZtunnelError
from meshcni.host.sockets import listen_seqpacket
from meshcni.protocols.zds import Add, Request, decode_request

PATIENCE_SECONDS = 20.0
STEP_SECONDS = 0.002
SHORT_SECONDS = 0.2  # a deadline that is meant to pass


async def eventually(what: str, condition: Callable[[], Any]) -> None:
    """Let the loop run until the condition holds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_SECONDS:.0f} s for: {what}"
        await asyncio.sleep(STEP_SECONDS)


@contextmanager
def own_netns() -> Iterator[int]:
    """A descriptor of the test's own network namespace, for stand-ins, which look."""
    descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Netns:
    """A descriptor that may stand for a pod's netns: the server sends, and does not look."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("netns")
        self.inode = os.fstat(self.fd).st_ino

    def close(self) -> None:
        os.close(self.fd)


class World:
    """The server and what it has told."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.pods: dict[str, Workload] = {}
        self.source: Callable[[], Iterable[Workload]] = lambda: list(self.pods.values())
        self.changes = 0
        self.connected = [0]
        self.messages: list[tuple[str, str]] = []
        self.latencies: list[tuple[str, float]] = []
        self.closed: list[str] = []
        self.closed_at: list[float] = []
        self.refused: list[str] = []
        meter = Meter(
            connected=self.connected.append,
            message=lambda kind, result: self.messages.append((kind, result)),
            latency=lambda kind, seconds: self.latencies.append((kind, seconds)),
            closed=self._closed,
            refused=self.refused.append,
        )
        self.server = ZtunnelServer(lambda: self.source(), on_change=self._changed, meter=meter, **settings)
        self.netns = Netns()
        self._peers: list[Peer] = []

    def _changed(self) -> None:
        self.changes += 1

    def _closed(self, cause: str) -> None:
        self.closed.append(cause)
        self.closed_at.append(time.monotonic())

    def pod(self, uid: str, *, known: bool = True, netns: Netns | None = None) -> Workload:
        """A pod in the netns that all share, unless another is given."""
        place = netns or self.netns
        return Workload(uid, f"name-{uid}", "shop", "default", place.fd if known else None, place.inode if known else 0)

    def enrol(self, *uids: str, known: bool = True) -> None:
        """Put pods into the snapshot."""
        self.pods |= {uid: self.pod(uid, known=known) for uid in uids}

    def peer(self, hello: bytes | None = HELLO) -> Peer:
        """A ztunnel that has connected."""
        peer = Peer(self.path, hello)
        self._peers.append(peer)
        return peer

    async def greeted(self) -> Peer:
        """A ztunnel whose hello has been heard."""
        before = {status.number for status in self.statuses()}
        peer = self.peer()

        def is_greeted() -> bool:
            return any(s.version is not None for s in self.statuses() if s.number not in before)

        await eventually("the hello", is_greeted)
        return peer

    async def live(self) -> Peer:
        """A ztunnel with its whole snapshot."""
        self.server.snapshot_ready.set()
        peer = await self.greeted()
        await peer.serve_snapshot()
        await eventually("the snapshot", lambda: self.server.settled)
        return peer

    def statuses(self) -> tuple[ConnectionStatus, ...]:
        return self.server.connections()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.netns.close()


@asynccontextmanager
async def world(path: Path, *, mode: int = 0o600, **settings: Any) -> AsyncIterator[World]:
    """A server that listens; `window_seconds` is 0 unless given, so that tests connect as fast as they like."""
    made = World(path / "ztunnel.sock", **({"window_seconds": 0.0} | settings))
    running = asyncio.create_task(made.server.run(listen_seqpacket(made.path, mode)))
    await asyncio.sleep(0)
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        made.close()


class Peer:
    """A ztunnel moved by hand, on the loop."""

    def __init__(self, path: Path, hello: bytes | None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.socket.connect(str(path))
        self.received: list[Request] = []
        self.inodes: list[int | None] = []
        if hello is not None:
            self.send(hello)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [data], list(descriptors))

    def ack(self, error: str = "") -> None:
        self.send(answer(error))

    async def packet(self) -> Packet:
        """The next packet; empty when the connection has ended."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await next_packet(self.socket)
        except ConnectionResetError:
            return Packet(b"", (), 0)

    async def request(self) -> Request | None:
        """The next request, None at the end. Its descriptor, closed here, is one for an Add and none for others."""
        packet = await self.packet()
        inodes = [os.fstat(descriptor).st_ino for descriptor in packet.descriptors]
        for descriptor in packet.descriptors:
            os.close(descriptor)
        if not packet.data:
            return None
        assert packet.flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) == 0
        request = decode_request(packet.data)
        assert len(inodes) == (type(request).__name__ == "Add")
        self.received.append(request)
        self.inodes.append(inodes[0] if inodes else None)
        return request

    async def serve(self, count: int) -> list[Request | None]:
        """Take and acknowledge so many requests."""
        served = []
        for _ in range(count):
            served.append(await self.request())
            self.ack()
        return served

    async def serve_snapshot(self) -> list[Request]:
        """Take and acknowledge everything up to SnapshotSent."""
        while True:
            request = await self.request()
            assert request is not None, "the connection ended before the snapshot did"
            self.ack()
            if type(request).__name__ == "SnapshotSent":
                return self.received

    def is_quiet(self) -> bool:
        """Whether nothing is there to be read."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self.socket.close()


def add_of(uid: str) -> Add:
    """What ztunnel is told of `World.pod`."""
    return Add(uid, f"name-{uid}", "shop", "default")


def begin(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(coroutine)


async def failure(task: Awaitable[None]) -> ZtunnelError:
    with pytest.raises(ZtunnelError) as raised:
        await task
    assert raised.value.cni_code == CNI_TRY_AGAIN_LATER
    return raised.value


async def ticks() -> None:
    """Let everything happen that does not wait for something."""
    for _ in range(10):
        await asyncio.sleep(0)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Run(Protocol):
    """Runs a test's coroutine against a server (fixture `run` of this folder)."""

    def __call__(self, body: Callable[[World], Awaitable[None]], **settings: Any) -> None: ...


def runner(path: Path) -> Run:
    def start(body: Callable[[World], Awaitable[None]], **settings: Any) -> None:
        async def main() -> None:
            async with world(path, **settings) as made:
                await body(made)

        asyncio.run(main())

    return start
