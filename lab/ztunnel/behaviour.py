"""What the stand-in is told to do differently from a good ztunnel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ACTIONS = {
    "delay": "answer after so many seconds",
    "nack": "refuse with this text; @1500 makes a text of so many bytes; what was asked is not done",
    "malformed": "answer with these bytes, in hexadecimal (ff when none are given)",
    "descriptor": "answer, and attach a descriptor",
    "twice": "answer two times",
    "mute": "never answer",
    "hello": "say hello again before the answer",
    "close": "close the connection instead of answering, and connect again",
    "hang-up": "close the connection after the answer, and connect again",
}
KINDS = ("add", "keep", "del", "snapshot-sent")
SYNTAX = "ACTION:WHICH[=VALUE], WHICH being all, add, keep, del, snapshot-sent, uid/UID or nth/N (of a connection)"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row: what to do with which messages."""

    action: str
    which: str
    value: str = ""

    def matches(self, kind: str, uid: str, number: int) -> bool:
        """Whether it is about the message, which is the connection's `number`-th, from 1."""
        return self.which in ("all", kind, f"uid/{uid}", f"nth/{number}")

    @property
    def text(self) -> str:
        """The value, where `@N` stands for N bytes."""
        return "x" * int(self.value[1:]) if self.value.startswith("@") else self.value


def parse_fault(text: str) -> Fault:
    """Read `nack:uid/abc=no`; ValueError says what is wrong."""
    action, _, rest = text.partition(":")
    which, _, value = rest.partition("=")
    named = which.startswith("uid/") or (which.startswith("nth/") and which[4:].isdecimal())
    known = named or which in ("all", *KINDS)
    if action not in ACTIONS or not known:
        raise ValueError(f"{text!r} is no fault; it has to be {SYNTAX}; ACTION one of {', '.join(ACTIONS)}")
    if action == "delay":
        float(value)
    return Fault(action, which, value)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Everything that can be told; the defaults are the real ztunnel's."""

    faults: tuple[Fault, ...] = ()
    silent: bool = False  # never say hello
    close_before_hello: int = 0  # so many connections are closed before a hello
    storm: int = 0  # so many connections are closed right after the hello
    unsolicited_seconds: float = 0.0  # send an ack after so much idle time, once; 0 for never

    def fault(self, action: str, kind: str, uid: str, number: int) -> Fault | None:
        """The first fault of the action that is about a message."""
        return next((f for f in self.faults if f.action == action and f.matches(kind, uid, number)), None)

    def changed(self, changes: Mapping[str, Any]) -> Behaviour:
        """A copy with other values; `faults` is a list of texts."""
        values = dict(changes)
        if "faults" in values:
            values["faults"] = tuple(parse_fault(text) for text in values["faults"])
        return replace(self, **values)


@dataclass(slots=True)
class Options:
    """How a stand-in is started."""

    socket: str
    record: str = ""
    record_connections: bool = False
    control: str = ""
    listen: bool = False
    ipv6: bool = True
    names: Mapping[str, str] = field(default_factory=dict)
    termination_seconds: float = 1.0
    behaviour: Behaviour = field(default_factory=Behaviour)
