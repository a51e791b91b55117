"""The stand-in's side of the connection: connects with ztunnel's delays, answers each message once, in order."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

from lab.ztunnel.behaviour import Behaviour
from lab.ztunnel.messages import HELLO, FatalError, Message, Packet, StreamError, answer, next_packet, read
from lab.ztunnel.record import Recorder
from lab.ztunnel.workloads import StartError, Workloads

# Doubled before each sleep, from the start after each connection (ztunnel, src/inpod).
FIRST_CONNECT_SECONDS, MAX_CONNECT_SECONDS = 0.01, 15.0
FIRST_ANNOUNCE_SECONDS, MAX_ANNOUNCE_SECONDS, ANNOUNCE_JITTER = 0.005, 15.0, 0.2
MAX_SOCKET_BYTES = 1 << 20


class AnnounceError(Exception):
    """The hello could not be sent."""


class AgentLink:
    """Runs until cancelled or until a message breaks the protocol (`run` returns then)."""

    def __init__(self, path: str, workloads: Workloads, record: Recorder, behaviour: Callable[[], Behaviour]) -> None:
        self._path = path
        self._workloads = workloads
        self._record = record
        self._behaviour = behaviour
        self._connection: socket.socket | None = None
        self._silenced = 0  # connections closed on purpose
        self.connections = self.messages = self.number = 0
        self.agent_pid = 0

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    async def run(self) -> None:
        """Connect, serve, connect again."""
        announce_seconds = FIRST_ANNOUNCE_SECONDS
        while True:
            connection = await self._connect()
            try:
                with connection:
                    await self._serve(connection)
            except AnnounceError as error:
                announce_seconds = min(announce_seconds * 2, MAX_ANNOUNCE_SECONDS)
                seconds = announce_seconds * random.uniform(1 - ANNOUNCE_JITTER, 1 + ANNOUNCE_JITTER)
                self._record("announce-failed", error=str(error), seconds=seconds)
                await asyncio.sleep(seconds)
            except FatalError as error:
                self._record("protocol-error", error=str(error))
                return
            except (StreamError, OSError) as error:
                announce_seconds = FIRST_ANNOUNCE_SECONDS
                self._record("disconnected", error=str(error), messages=self.number)
            finally:
                self._connection = None
                self._workloads.ready = False

    async def _connect(self) -> socket.socket:
        """Connect, however long it takes."""
        seconds = FIRST_CONNECT_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_SOCKET_BYTES)
            try:
                connection.connect(self._path)
            except BlockingIOError:
                return connection  # the queue is full; the hello finds out
            except OSError as error:
                connection.close()
                seconds = min(seconds * 2, MAX_CONNECT_SECONDS)
                self._record("connect-failed", error=str(error), seconds=seconds)
                await asyncio.sleep(seconds)
            else:
                return connection

    async def _serve(self, connection: socket.socket) -> None:
        """One connection to its end, which is an exception."""
        self._workloads.new_stream()
        self.number = 0
        behaviour = self._behaviour()
        self.connections += 1
        if self._silenced < behaviour.close_before_hello:
            self._silenced += 1
            raise StreamError("told to close before the hello")
        if not behaviour.silent:
            try:
                connection.send(HELLO)
            except OSError as error:
                raise AnnounceError(str(error)) from None
        self._connection = connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.agent_pid = int.from_bytes(credentials[:4], "little")
        self._record("connected", number=self.connections, agent=self.agent_pid, hello=not behaviour.silent)
        if self._silenced < behaviour.close_before_hello + behaviour.storm:
            self._silenced += 1
            raise StreamError("told to storm")
        while True:
            packet = await self._next(connection)
            if not packet.data:
                for descriptor in packet.descriptors:
                    os.close(descriptor)
                raise StreamError("closed by the agent")
            await self._handle(connection, packet)

    async def _next(self, connection: socket.socket) -> Packet:
        seconds = self._behaviour().unsolicited_seconds
        if seconds:
            try:
                return await asyncio.wait_for(next_packet(connection), seconds)
            except TimeoutError:
                self.say(answer())
        return await next_packet(connection)

    async def _handle(self, connection: socket.socket, packet: Packet) -> None:
        self.number += 1
        self.messages += 1
        received = time.monotonic()
        try:
            message = read(packet)
        except (StreamError, FatalError) as error:
            self._record("broken", error=str(error), hex=packet.data[:64].hex(), descriptors=len(packet.descriptors))
            connection.send(answer(str(error)))
            raise
        details = {"uid": message.uid, "info": message.info, "received": received, **_identity(message.netns)}
        try:
            refusal = await self._perform(message)
        except FatalError as error:
            self._record(message.kind, error=str(error), **details)
            connection.send(answer(str(error)))
            raise
        await self._answer(connection, message, refusal)
        if not refusal:
            self._workloads.evaluate()
        self._record(message.kind, error=refusal[:200], **details)
        if self._fault("hang-up", message) is not None:
            raise StreamError("told to hang up")

    async def _perform(self, message: Message) -> str:
        """Do what is asked; returns the refusal, empty when it was done."""
        workloads = self._workloads
        refusal = self._behaviour().fault("nack", message.kind, message.uid, self.number)
        if refusal is not None:
            if message.netns is not None:
                os.close(message.netns)
            return refusal.text or "told to refuse"
        if message.kind in ("keep", "snapshot-sent") and workloads.snapshot_received:
            raise FatalError(f"{message.kind} after the snapshot")
        match message:
            case Message("add", uid, dict() as info, int() as netns):
                try:
                    await workloads.add(uid, info, netns)
                except StartError as error:
                    return str(error)
            case Message("keep", uid):
                workloads.keep(uid)
            case Message("del", uid):
                workloads.delete(uid)
            case Message("snapshot-sent"):
                workloads.end_snapshot()
        return ""

    async def _answer(self, connection: socket.socket, message: Message, refusal: str) -> None:
        delay = self._fault("delay", message)
        if delay is not None:
            await asyncio.sleep(float(delay))
        if self._fault("close", message) is not None:
            raise StreamError("told to close")
        if self._fault("hello", message) is not None:
            connection.send(HELLO)
        if self._fault("mute", message) is not None:
            return
        malformed = self._fault("malformed", message)
        data = answer(refusal) if malformed is None else bytes.fromhex(malformed or "ff")
        if self._fault("descriptor", message) is not None:
            socket.send_fds(connection, [data], [connection.fileno()])
        else:
            connection.send(data)
        if self._fault("twice", message) is not None:
            connection.send(data)

    def _fault(self, action: str, message: Message) -> str | None:
        fault = self._behaviour().fault(action, message.kind, message.uid, self.number)
        return None if fault is None else fault.value

    # --- on demand ----------------------------------------------------------------------------------------------------

    def say(self, data: bytes) -> None:
        """Send a packet that nobody asked for."""
        if self._connection is not None:
            self._connection.send(data)
            self._record("said", hex=data.hex())

    def hang_up(self) -> None:
        """End the connection from our side; the loop connects again."""
        if self._connection is not None:
            self._connection.shutdown(socket.SHUT_RDWR)


def _identity(netns: int | None) -> dict[str, Any]:
    if netns is None:
        return {}
    status = os.fstat(netns)
    return {"device": status.st_dev, "inode": status.st_ino}
