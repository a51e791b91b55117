"""Reading the agent's packets as strictly as the real ztunnel does."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from meshcni.protocols import zds_pb2 as pb

BUFFER_BYTES = 1024
MAX_DESCRIPTORS = 8

HELLO = pb.ZdsHello(version=pb.V1).SerializeToString()


class StreamError(Exception):
    """A packet that ends the connection: it is refused, and we connect again at once."""


class FatalError(Exception):
    """A packet that breaks the protocol: it is refused, and the process ends."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet as it came; `descriptors` are the receiver's."""

    data: bytes
    descriptors: tuple[int, ...]
    flags: int


@dataclass(frozen=True, slots=True)
class Message:
    """What a packet asks for; `netns` and `info` of an Add only."""

    kind: str
    uid: str = ""
    info: dict[str, str] | None = None
    netns: int | None = None


def receive(connection: socket.socket, size: int = BUFFER_BYTES) -> Packet:
    """Read one packet now; BlockingIOError when there is none."""
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return Packet(data, tuple(descriptors), flags)


async def next_packet(connection: socket.socket) -> Packet:
    """Wait for one packet; one without data is the end."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return receive(connection)
        except BlockingIOError:
            ready = asyncio.Event()
            loop.add_reader(connection, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(connection)


def read(packet: Packet) -> Message:
    """Tell what a packet asks for. Raises StreamError or FatalError; the descriptors are closed then."""
    try:
        message = _read(packet)
    except (StreamError, FatalError):
        for descriptor in packet.descriptors:
            os.close(descriptor)
        raise
    return message


def _read(packet: Packet) -> Message:
    if packet.flags & socket.MSG_TRUNC:
        raise StreamError(f"message has more than {BUFFER_BYTES} bytes")
    if packet.flags & socket.MSG_CTRUNC or len(packet.descriptors) > 1:
        raise StreamError("message has more than one descriptor")
    try:
        request = pb.WorkloadRequest.FromString(packet.data)
    except DecodeError as error:
        raise StreamError(f"message cannot be decoded: {error}") from None
    payload = request.WhichOneof("payload")
    if payload is None:
        raise StreamError("message without payload")
    if (payload == "add") != bool(packet.descriptors):
        raise StreamError(f"{payload} with {len(packet.descriptors)} descriptors")
    if payload == "snapshot_sent":
        return Message("snapshot-sent")
    fields = getattr(request, payload)
    if payload != "add":
        return Message(payload, fields.uid)
    if not fields.HasField("workload_info"):
        raise FatalError("Add without workload_info")
    info = fields.workload_info
    values = {"name": info.name, "namespace": info.namespace, "serviceAccount": info.service_account}
    return Message("add", fields.uid, values, packet.descriptors[0])


def answer(error: str = "") -> bytes:
    """An ack, a refusal when there is an error."""
    return pb.WorkloadResponse(ack=pb.Ack(error=error)).SerializeToString()
