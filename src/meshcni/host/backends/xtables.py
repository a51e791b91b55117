"""What the legacy iptables tables of the calling thread's network namespace hold, asked of the kernel directly.

Every legacy command makes the tables it looks at appear, so that the next look finds "legacy in use". The two socket
options below make no table as long as only tables are asked for that /proc already lists, and start no process.
Layouts: linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h, linux/netfilter/x_tables.h (64 bit).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import struct
from dataclasses import dataclass

from meshcni.errors import ApplyError
from meshcni.host.procfs import legacy_table_names
from meshcni.rules.model import Family

_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES; the same numbers for IPv6
_INFO_SIZE = 84
_ENTRIES_HEADER = 40
_NAME_SIZE = 32
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Layout:
    family: int
    level: int
    offsets_at: int  # of target_offset and next_offset within an entry
    counters_at: int  # of the packets and bytes that it has seen


_LAYOUTS = {
    Family.V4: _Layout(socket.AF_INET, socket.IPPROTO_IP, 88, 96),
    Family.V6: _Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 140, 152),
}
_COUNTERS_SIZE = 16


def chains(family: Family) -> dict[str, tuple[str, ...]]:
    """Return the user-defined chains of each existing legacy table of `family`; a table without any has ()."""
    return {table: _user_chains(family, table) for table in sorted(legacy_table_names(family))}


def has_rules(family: Family) -> bool:
    """Tell whether any existing legacy table of `family` holds a rule or a user-defined chain."""
    for table in legacy_table_names(family):
        hooks, entries, _size = _info(family, table)
        if entries > hooks.bit_count() + 1:  # one policy for each built-in chain, one end marker
            return True
    return False


def digests(family: Family) -> tuple[tuple[str, bytes], ...]:
    """Return something short for each existing legacy table that changes with its rules, and not with its counters."""
    return tuple((table, _digest(family, table)) for table in sorted(legacy_table_names(family)))


def _digest(family: Family, table: str) -> bytes:
    blob, layout, at = bytearray(_entries(family, table)), _LAYOUTS[family], 0
    while at + layout.offsets_at + 4 <= len(blob):
        (next_offset,) = struct.unpack_from("=H", blob, at + layout.offsets_at + 2)
        start = at + layout.counters_at
        blob[start : start + _COUNTERS_SIZE] = bytes(_COUNTERS_SIZE)
        if next_offset == 0:
            break
        at += next_offset
    return hashlib.blake2b(blob, digest_size=16).digest()


def _entries(family: Family, table: str) -> bytes:
    _hooks, _count, size = _info(family, table)
    request = struct.pack("=32sI", table.encode(), size)
    return _getsockopt(family, _GET_ENTRIES, request, _ENTRIES_HEADER + size)[_ENTRIES_HEADER:]


def _user_chains(family: Family, table: str) -> tuple[str, ...]:
    """Walk the table's entries: a user-defined chain begins with an ERROR target that carries its name."""
    blob = _entries(family, table)
    names, at = [], 0
    while at < len(blob):
        target_offset, next_offset = struct.unpack_from("=HH", blob, at + _LAYOUTS[family].offsets_at)
        _target_size, target = struct.unpack_from("=H29s", blob, at + target_offset)
        if _text(target) == "ERROR":
            names.append(_text(blob[at + target_offset + _NAME_SIZE : at + next_offset]))
        if next_offset == 0:
            break
        at += next_offset
    return tuple(names[:-1])  # the last one is the table's end marker


def _info(family: Family, table: str) -> tuple[int, int, int]:
    """Return the bit set of hooks, the number of entries and their size in bytes."""
    answer = _getsockopt(family, _GET_INFO, table.encode(), _INFO_SIZE)
    (hooks,) = struct.unpack_from("=I", answer, 32)
    entries, size = struct.unpack_from("=II", answer, 76)
    return hooks, entries, size


def _getsockopt(family: Family, option: int, request: bytes, size: int) -> bytes:
    layout = _LAYOUTS[family]
    buffer = ctypes.create_string_buffer(request, size)
    length = ctypes.c_uint(size)
    with socket.socket(layout.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        if _libc.getsockopt(sock.fileno(), layout.level, option, buffer, ctypes.byref(length)) != 0:
            number = ctypes.get_errno()
            raise ApplyError(
                f"the kernel does not show its legacy IPv{family.value} tables: {os.strerror(number)}",
                "CAP_NET_ADMIN is needed in the pod's network namespace",
            )
    return buffer.raw[: length.value]


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")
