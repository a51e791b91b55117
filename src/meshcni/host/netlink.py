"""Netlink framing: a socket of the calling thread's network namespace that changes, asks and dumps, and attributes.

Message layout: linux/netlink.h. What the messages mean is the business of `rtnetlink`, `ipset` and
`nftmessages`.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE = 0x400, 0x200, 0x100
NLM_F_ACK = 0x4
NLA_F_NESTED, NLA_F_NET_BYTEORDER = 0x8000, 0x4000

_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_DUMP_INTR = 0x10
_DUMP_ATTEMPTS = 5  # as often as the original repeats an interrupted dump
_TIMEOUT_SECONDS = 5.0  # the kernel answers at once; this only keeps a thread from waiting for ever
_KIND_MASK = 0x3FFF  # an attribute's type without NLA_F_NESTED and NLA_F_NET_BYTEORDER

Message = tuple[int, int, bytes]  # type, flags, payload


class NetlinkSocket:
    """A netlink socket bound to the network namespace of the thread that makes it; a context manager.

    Every refusal of the kernel is an OSError with its errno, and so is a kernel without this kind of socket.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def change(self, message: int, flags: int, body: bytes) -> None:
        """Send a message and wait until the kernel has acknowledged it."""
        self.change_all([(message, flags | NLM_F_ACK, body)])

    def change_all(self, messages: Sequence[Message]) -> None:
        """Send messages in one packet and wait until the kernel has acknowledged all that ask for it."""
        self._send(*messages)
        awaited = sum(1 for _kind, flags, _body in messages if flags & NLM_F_ACK)
        replies = self._receive()
        while awaited:
            kind, _flags, payload = next(replies)
            if kind == _NLMSG_ERROR:
                _raise_for(payload)
                awaited -= 1

    def ask(self, message: int, body: bytes) -> bytes:
        """Send a question and return the payload of its one answer."""
        self._send((message, 0, body))
        kind, _flags, payload = next(self._receive())
        if kind == _NLMSG_ERROR:
            _raise_for(payload)
        return payload

    def dump(self, message: int, body: bytes) -> list[bytes]:
        """Send a question and return the payloads of all its answers; asks again when things changed meanwhile."""
        for _attempt in range(_DUMP_ATTEMPTS):
            self._send((message, _NLM_F_DUMP, body))
            replies, interrupted = [], False
            for kind, flags, payload in self._receive():
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_for(payload)
                    break
                replies.append(payload)
            if not interrupted:
                return replies
        raise InterruptedError("the kernel's answer kept changing while it was read")

    def _send(self, *messages: Message) -> None:
        """Send messages with one number, by which `_receive` knows their answers."""
        self._sequence += 1
        self._socket.send(b"".join(_framed(message, self._sequence) for message in messages))

    def _receive(self) -> Iterator[Message]:
        while True:
            data = self._socket.recv(1 << 16)
            while len(data) >= 16:
                length, kind, flags, sequence, _port = struct.unpack_from("=IHHII", data)
                if sequence == self._sequence:
                    yield kind, flags, data[16:length]
                data = data[max(16, (length + 3) & ~3) :]


def _framed(message: Message, sequence: int) -> bytes:
    kind, flags, body = message
    header = struct.pack("=IHHII", 16 + len(body), kind, flags | _NLM_F_REQUEST, sequence, 0)
    return header + body + b"\0" * (-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute with its header and padding; `kind` may carry NLA_F_* flags."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind, without NLA_F_* flags, and value of each attribute in `data`."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & _KIND_MASK, data[4:length]
        data = data[max(4, (length + 3) & ~3) :]


def _raise_for(payload: bytes) -> None:
    if len(payload) < 4:
        return
    (code,) = struct.unpack_from("=i", payload)
    if code < 0:
        raise OSError(-code, os.strerror(-code))
