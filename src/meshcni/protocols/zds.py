"""What the agent and ztunnel say to each other (ZDS): messages, and their bytes. One message is one packet, unprefixed.

The agent sends requests, ztunnel a hello first and then one ack for each request. `zdslink` says which may come when.
Upstream: pkg/zdsapi/zds.proto, cni/pkg/nodeagent/ztunnelserver.go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from meshcni.errors import ProtocolError
from meshcni.protocols import zds_pb2 as pb

MAX_SENT_BYTES = 1024  # ztunnel's receive buffer: 1024 bytes arrive, 1025 end the connection
MAX_READ_BYTES = 65536  # the reason of a refusal can carry a backtrace, 1504 bytes were seen
VERSION_1 = 1

_HINT = "ztunnel and the agent may be of releases that do not fit together"
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Add:
    """Serve the pod whose network namespace travels with the message. There is none without the pod's identity."""

    uid: str
    name: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Go on serving the pod; for pods whose network namespace is not known (yet)."""

    uid: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Serve the pod no longer."""

    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """Every pod of the node has been named: whatever ztunnel serves beside them is to end."""


Request = Add | Keep | Delete | SnapshotSent


@dataclass(frozen=True, slots=True)
class Hello:
    """ztunnel's first message."""

    version: int


@dataclass(frozen=True, slots=True)
class Ack:
    """ztunnel's answer to one request; `error` is empty when it did what was asked."""

    error: str = ""


def encode_request(request: Request) -> bytes:
    """The packet of a request. Raises ProtocolError with cause `oversized` or `malformed` (text that is no Unicode)."""
    try:
        data = _message(request).SerializeToString()
    except ValueError as error:
        raise ProtocolError("malformed", f"{request!r} cannot be sent to ztunnel: {error}") from None
    if len(data) > MAX_SENT_BYTES:
        kind, uid = type(request).__name__, getattr(request, "uid", "")[:40]
        raise ProtocolError(
            "oversized",
            f"{kind} of pod {uid} has {len(data)} bytes, ztunnel takes at most {MAX_SENT_BYTES}",
            "shorten the names of the pod and of its service account",
        )
    return data


def decode_request(data: bytes) -> Request:
    """The request in a packet, as ztunnel reads it. Raises ProtocolError with cause `oversized` or `malformed`."""
    if len(data) > MAX_SENT_BYTES:
        raise ProtocolError("oversized", f"request has {len(data)} bytes, at most {MAX_SENT_BYTES} are allowed", _HINT)
    message = _parse(pb.WorkloadRequest, data, "request")
    payload = message.WhichOneof("payload")
    if payload is None:
        raise ProtocolError("malformed", "request asks for nothing that is known", _HINT)
    if payload == "snapshot_sent":
        return SnapshotSent()
    fields = getattr(message, payload)
    if payload != "add":
        return Keep(fields.uid) if payload == "keep" else Delete(fields.uid)
    if not fields.HasField("workload_info"):
        raise ProtocolError("malformed", f"Add of pod {fields.uid} does not say who the pod is")
    info = fields.workload_info
    return Add(fields.uid, info.name, info.namespace, info.service_account)


def encode_hello(hello: Hello) -> bytes:
    """The packet of a hello."""
    return pb.ZdsHello(version=_version(hello.version)).SerializeToString()


def encode_ack(ack: Ack) -> bytes:
    """The packet of an ack."""
    return pb.WorkloadResponse(ack=pb.Ack(error=ack.error)).SerializeToString()


def decode_hello(data: bytes) -> Hello:
    """The hello in a connection's first packet; any version will do. Raises ProtocolError as `decode_answer`."""
    _check_read(data)
    if _parse(pb.WorkloadResponse, data, "hello").WhichOneof("payload") is not None:
        raise ProtocolError("malformed", "ztunnel sent an ack before its hello", _HINT)
    return Hello(_parse(pb.ZdsHello, data, "hello").version)


def decode_answer(data: bytes) -> Ack | Hello:
    """What ztunnel sent after its hello: an ack, or wrongly a second hello.

    Raises ProtocolError with cause `oversized` or `malformed`.
    """
    _check_read(data)
    response = _parse(pb.WorkloadResponse, data, "answer")
    if response.WhichOneof("payload") is not None:
        return Ack(response.ack.error)
    version = _parse(pb.ZdsHello, data, "answer").version
    if version == pb.NOT_USED:
        raise ProtocolError("malformed", f"ztunnel sent neither ack nor hello: {data[:32].hex()}", _HINT)
    return Hello(version)


def _message(request: Request) -> Message:
    match request:
        case Add(uid, name, namespace, account):
            info = pb.WorkloadInfo(name=name, namespace=namespace, service_account=account)
            return pb.WorkloadRequest(add=pb.AddWorkload(uid=uid, workload_info=info))
        case Keep(uid):
            return pb.WorkloadRequest(keep=pb.KeepWorkload(uid=uid))
        case Delete(uid):
            message = pb.WorkloadRequest()
            getattr(message, "del").CopyFrom(pb.DelWorkload(uid=uid))  # a keyword of Python
            return message
        case SnapshotSent():
            return pb.WorkloadRequest(snapshot_sent=pb.SnapshotSent())


def _version(number: int) -> pb.Version:
    return number  # type: ignore[return-value]  # the enumeration is open, so every int32 is one


def _check_read(data: bytes) -> None:
    if len(data) > MAX_READ_BYTES:
        raise ProtocolError("oversized", f"ztunnel's message is longer than {MAX_READ_BYTES} bytes", _HINT)


def _parse(kind: type[M], data: bytes, name: str) -> M:
    try:
        return kind.FromString(data)
    except (DecodeError, ValueError) as error:  # the pure-Python runtime raises ValueError for text that is no UTF-8
        raise ProtocolError("malformed", f"{name} cannot be decoded ({error}): {data[:32].hex()}", _HINT) from None
