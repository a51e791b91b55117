"""One connection of ztunnel as a state machine without I/O: `TABLE` is the program.

Its driver feeds in what happened and does what comes out. What must never be said cannot be: only SYNCING has rows for
Keep and SnapshotSent, and nothing leads back to it; a state that awaits something has no row for another request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

from meshcni.errors import ProtocolError
from meshcni.protocols.zds import (
    Ack,
    Add,
    Delete,
    Keep,
    Request,
    SnapshotSent,
    decode_answer,
    decode_hello,
    encode_request,
)

DEADLINE_SECONDS = 5.0  # for the hello, for a packet to be taken, and for its ack: cni/pkg/nodeagent/ztunnelserver.go


class State(StrEnum):
    """Where a connection is; WRITE is a request that the socket has not taken yet, WAIT one without ack so far."""

    AWAITING_HELLO = "awaiting-hello"
    SYNCING = "syncing"
    SYNCING_WRITE = "syncing-write"
    SYNCING_WAIT = "syncing-wait"
    FINISHING_WRITE = "finishing-write"
    FINISHING_WAIT = "finishing-wait"
    LIVE = "live"
    LIVE_WRITE = "live-write"
    LIVE_WAIT = "live-wait"
    CLOSED = "closed"


class Input(Enum):
    """What can happen."""

    HELLO = "hello"
    ACK = "ack"
    BROKEN = "broken"  # a packet that breaks the protocol whatever the state
    EOF = "eof"
    FAILED = "failed"  # the socket says so
    STOP = "stop"  # we want it closed
    DEADLINE = "deadline"
    WRITTEN = "written"
    ADD = "add"
    DELETE = "delete"
    KEEP = "keep"
    FINISH = "finish"


REQUESTS: Mapping[type[Request], Input] = {
    Add: Input.ADD,
    Delete: Input.DELETE,
    Keep: Input.KEEP,
    SnapshotSent: Input.FINISH,
}


class Effect(Enum):
    """What a row makes come out."""

    NOTHING = "nothing"
    GREET = "greet"
    SEND = "send"
    RESOLVE = "resolve"
    CLOSE = "close"


class Cause(StrEnum):
    """Why a connection was closed; the label of metrics and log lines."""

    EOF = "eof"
    TRANSPORT = "transport"
    HELLO_TIMEOUT = "hello-timeout"
    WRITE_TIMEOUT = "write-timeout"
    ACK_TIMEOUT = "ack-timeout"
    UNSOLICITED = "unsolicited"
    SECOND_HELLO = "second-hello"
    MALFORMED = "malformed"
    OVERSIZED = "oversized"
    DESCRIPTORS = "descriptors"
    CROWDED = "crowded"
    SNAPSHOT = "snapshot"
    STOPPED = "stopped"


class Result(StrEnum):
    """What became of a request."""

    ACK = "ack"
    NACK = "nack"
    TIMEOUT = "timeout"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Greet:
    """ztunnel said hello: the connection counts from now on."""

    version: int


@dataclass(frozen=True, slots=True)
class Send:
    """Write this packet, with the pod's network namespace if it is an Add, and say `written` then."""

    data: bytes
    with_netns: bool


@dataclass(frozen=True, slots=True)
class Resolve:
    """The outstanding request has ended; `text` is ztunnel's reason (NACK) or why there will be no answer."""

    result: Result
    text: str = ""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the socket; nothing comes out any more."""

    cause: Cause
    text: str


Output = Greet | Send | Resolve | Close


@dataclass(frozen=True, slots=True)
class Row:
    """What an input leads to."""

    state: State
    effect: Effect
    cause: Cause | None = None  # of CLOSE where the input does not carry its own


WRITES = {State.SYNCING_WRITE, State.FINISHING_WRITE, State.LIVE_WRITE}
WAITS = {State.SYNCING_WAIT, State.FINISHING_WAIT, State.LIVE_WAIT}
OPEN = tuple(state for state in State if state is not State.CLOSED)
GREETED = frozenset(OPEN) - {State.AWAITING_HELLO}
TIMED = frozenset({State.AWAITING_HELLO, *WRITES, *WAITS})  # each of them lasts DEADLINE_SECONDS at most
REMOTE = (Input.HELLO, Input.ACK, Input.BROKEN, Input.EOF, Input.FAILED, Input.STOP, Input.DEADLINE, Input.WRITTEN)


def _closed(cause: Cause | None = None) -> Row:
    return Row(State.CLOSED, Effect.CLOSE, cause)


TABLE: Mapping[tuple[State, Input], Row] = {
    # Whatever ends a connection.
    **{(state, kind): _closed() for state in OPEN for kind in (Input.BROKEN, Input.EOF, Input.FAILED, Input.STOP)},
    **{(state, Input.HELLO): _closed(Cause.SECOND_HELLO) for state in GREETED},
    **{(state, Input.ACK): _closed(Cause.UNSOLICITED) for state in OPEN if state not in WAITS},
    **{(state, Input.DEADLINE): _closed(Cause.WRITE_TIMEOUT) for state in WRITES},
    **{(state, Input.DEADLINE): _closed(Cause.ACK_TIMEOUT) for state in WAITS},
    # The life of a connection.
    (State.AWAITING_HELLO, Input.DEADLINE): _closed(Cause.HELLO_TIMEOUT),
    (State.AWAITING_HELLO, Input.HELLO): Row(State.SYNCING, Effect.GREET),
    (State.SYNCING, Input.ADD): Row(State.SYNCING_WRITE, Effect.SEND),
    (State.SYNCING, Input.DELETE): Row(State.SYNCING_WRITE, Effect.SEND),
    (State.SYNCING, Input.KEEP): Row(State.SYNCING_WRITE, Effect.SEND),
    (State.SYNCING_WRITE, Input.WRITTEN): Row(State.SYNCING_WAIT, Effect.NOTHING),
    (State.SYNCING_WAIT, Input.ACK): Row(State.SYNCING, Effect.RESOLVE),
    (State.SYNCING, Input.FINISH): Row(State.FINISHING_WRITE, Effect.SEND),
    (State.FINISHING_WRITE, Input.WRITTEN): Row(State.FINISHING_WAIT, Effect.NOTHING),
    (State.FINISHING_WAIT, Input.ACK): Row(State.LIVE, Effect.RESOLVE),
    (State.LIVE, Input.ADD): Row(State.LIVE_WRITE, Effect.SEND),
    (State.LIVE, Input.DELETE): Row(State.LIVE_WRITE, Effect.SEND),
    (State.LIVE_WRITE, Input.WRITTEN): Row(State.LIVE_WAIT, Effect.NOTHING),
    (State.LIVE_WAIT, Input.ACK): Row(State.LIVE, Effect.RESOLVE),
    # What was under way when it was closed.
    **{(State.CLOSED, kind): Row(State.CLOSED, Effect.NOTHING) for kind in REMOTE},
}

TEXTS: Mapping[Cause, str] = {
    Cause.EOF: "ztunnel closed it",
    Cause.HELLO_TIMEOUT: "ztunnel said no hello in time",
    Cause.WRITE_TIMEOUT: "ztunnel did not read a message in time",
    Cause.ACK_TIMEOUT: "ztunnel did not answer a message in time",
    Cause.UNSOLICITED: "ztunnel sent an ack that nobody asked for",
    Cause.SECOND_HELLO: "ztunnel said hello again",
    Cause.DESCRIPTORS: "ztunnel sent descriptors",
}
TIMEOUTS = (Cause.ACK_TIMEOUT, Cause.WRITE_TIMEOUT)


class LinkError(RuntimeError):
    """The driver asked for what the table has no row for: a bug of ours, nothing is sent."""


class Link:
    """The state of one connection. Each method returns what the driver has to do, in this order."""

    def __init__(self) -> None:
        self.state = State.AWAITING_HELLO

    def may(self, kind: type[Request]) -> bool:
        """Whether a request of this kind may be sent now."""
        return (self.state, REQUESTS[kind]) in TABLE

    def request(self, request: Request) -> tuple[Output, ...]:
        """Begin a request. Raises ProtocolError (`oversized`, `malformed`) and LinkError; nothing has changed then."""
        row = self._row(REQUESTS[type(request)])
        data = encode_request(request)
        self.state = row.state
        return (Send(data, isinstance(request, Add)),)

    def written(self) -> tuple[Output, ...]:
        """The socket took the packet of the last Send."""
        return self._step(Input.WRITTEN)

    def receive(self, data: bytes, descriptors: int = 0) -> tuple[Output, ...]:
        """A packet came that carried so many descriptors; one without any byte is the end."""
        if descriptors:
            return self._step(Input.BROKEN, Cause.DESCRIPTORS)
        if not data:
            return self.eof()
        try:
            message = decode_hello(data) if self.state is State.AWAITING_HELLO else decode_answer(data)
        except ProtocolError as error:
            return self.broken(error)
        if isinstance(message, Ack):
            return self._step(Input.ACK, text=message.error)
        return self._step(Input.HELLO, version=message.version)

    def broken(self, error: ProtocolError) -> tuple[Output, ...]:
        """A packet came that cannot be taken; the error's cause is one of `Cause`."""
        return self._step(Input.BROKEN, Cause(error.cause), error.message)

    def eof(self) -> tuple[Output, ...]:
        """The peer closed the connection."""
        return self._step(Input.EOF, Cause.EOF)

    def failed(self, text: str) -> tuple[Output, ...]:
        """The socket failed."""
        return self._step(Input.FAILED, Cause.TRANSPORT, text)

    def deadline(self) -> tuple[Output, ...]:
        """The present state, which is one of TIMED, has lasted for DEADLINE_SECONDS."""
        return self._step(Input.DEADLINE)

    def stop(self, cause: Cause, text: str) -> tuple[Output, ...]:
        """We want the connection closed."""
        return self._step(Input.STOP, cause, text)

    def _row(self, kind: Input) -> Row:
        row = TABLE.get((self.state, kind))
        if row is None:
            raise LinkError(f"no {kind.value} in state {self.state}")
        return row

    def _step(self, kind: Input, cause: Cause | None = None, text: str = "", version: int = 0) -> tuple[Output, ...]:
        row = self._row(kind)
        before, self.state = self.state, row.state
        match row.effect:
            case Effect.GREET:
                return (Greet(version),)
            case Effect.RESOLVE:
                return (Resolve(Result.NACK if text else Result.ACK, text),)
            case Effect.CLOSE:
                return _closing(before, row.cause or cause or Cause.STOPPED, text)
        return ()


def _closing(before: State, cause: Cause, text: str) -> tuple[Output, ...]:
    close = Close(cause, TEXTS.get(cause) or text)
    if before in WRITES | WAITS:
        return (Resolve(Result.TIMEOUT if cause in TIMEOUTS else Result.CLOSED, close.text), close)
    return (close,)
