"""Just enough DNS to tell that a query was captured: names that are given, and NXDOMAIN for all others."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping

A, AAAA = 1, 28
RESPONSE, RECURSION, NO_SUCH_NAME = 0x8000, 0x0180, 3
TTL_SECONDS = 30


def respond(query: bytes, names: Mapping[str, str]) -> bytes | None:
    """The response to a query; None for what is none."""
    try:
        identifier, flags, questions = struct.unpack("!HHH", query[:6])
        name, end = _name(query, 12)
        kind = int.from_bytes(query[end : end + 2])
    except (struct.error, IndexError, UnicodeDecodeError):
        return None
    if questions != 1 or flags & RESPONSE:
        return None
    question = query[12 : end + 4]
    found = names.get(name.rstrip("."))
    records = b""
    if found is not None:
        packed = ipaddress.ip_address(found).packed
        if kind == (A if len(packed) == 4 else AAAA):
            records = struct.pack("!HHHIH", 0xC00C, kind, 1, TTL_SECONDS, len(packed)) + packed
    code = 0 if found is not None else NO_SUCH_NAME
    header = struct.pack("!HHHHHH", identifier, RESPONSE | RECURSION | code, 1, int(bool(records)), 0, 0)
    return header + question + records


def ask(name: str, kind: int = A, identifier: int = 0x4D45) -> bytes:
    """A query for `name`."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split("."))
    return struct.pack("!HHHHHH", identifier, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)


def answers(response: bytes) -> list[str]:
    """The addresses in a response of `respond`."""
    if int.from_bytes(response[6:8]) == 0:
        return []
    _, end = _name(response, 12)
    length = int.from_bytes(response[end + 14 : end + 16])
    return [str(ipaddress.ip_address(response[end + 16 : end + 16 + length]))]


def _name(data: bytes, start: int) -> tuple[str, int]:
    """The name at `start` and where it ends."""
    labels: list[str] = []
    while length := data[start]:
        labels.append(data[start + 1 : start + 1 + length].decode("ascii"))
        start += 1 + length
    return ".".join(labels), start + 1
