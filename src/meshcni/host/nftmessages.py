"""Messages of the kernel's nf_tables in the calling thread's network namespace: sets of addresses, and its generation.

Layouts and numbers: linux/netfilter/nf_tables.h, nfnetlink.h. Not left to libnftables, because 1.1 writes more about a
set of `type ipv4_addr` than its type, and over that a 1.0 ends its whole process, be it `nft` or an agent
(docs/adr/0009-ipset-messages.md).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from meshcni.host.netlink import NLM_F_ACK, NLM_F_CREATE, Message, NetlinkSocket, attribute, attributes

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEW_TABLE, _NEW_SET = (_SUBSYSTEM << 8 | command for command in (0, 9))
_GET_GENERATION = _SUBSYSTEM << 8 | 16
_GENERATION_ID = 1
_GENERIC_SIZE = 4  # of struct nfgenmsg
_INET = 1  # NFPROTO_INET: a table for IPv4 and IPv6

_TABLE_NAME = 1
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LENGTH, _SET_ID, _SET_USERDATA = 1, 2, 3, 4, 5, 10, 13
# What the kernel keeps for nft and never looks at: nft's number of the type by the version of IP, and in the user data
# the byte order of keys (entry 0, a number in the machine's own order: 2 is big endian).
_TYPES, _LENGTHS = {4: 7, 6: 8}, {4: 4, 6: 16}
_KEY_BYTE_ORDER = struct.pack("=BBI", 0, 4, 2)


def make_sets(table: str, versions: Mapping[str, int]) -> None:
    """Make an inet table and sets of IPv4 or IPv6 addresses, by name, in one transaction; what is there stays.

    Every refusal is an OSError: EEXIST when there is a set of the name that is of another type, EOPNOTSUPP or
    EPROTONOSUPPORT when there is no nf_tables.
    """
    sets = (_new_set(table, name, version, number) for number, (name, version) in enumerate(versions.items(), 1))
    with NetlinkSocket(_NETLINK_NETFILTER) as kernel:
        kernel.change_all([_edge(_BATCH_BEGIN), _new(_NEW_TABLE, _text(_TABLE_NAME, table)), *sets, _edge(_BATCH_END)])


def generation() -> int:
    """Return the number that changes with every change of the namespace's nf_tables, whoever makes it.

    Every refusal is an OSError, as when there is no nf_tables.
    """
    with NetlinkSocket(_NETLINK_NETFILTER) as kernel:
        answer = kernel.ask(_GET_GENERATION, _generic(socket.AF_UNSPEC, 0))
    found = dict(attributes(answer[_GENERIC_SIZE:]))
    return int.from_bytes(found[_GENERATION_ID], "big")


def _new_set(table: str, name: str, version: int, number: int) -> Message:
    body = _text(_SET_TABLE, table) + _text(_SET_NAME, name) + _number(_SET_FLAGS, 0)
    body += _number(_SET_KEY_TYPE, _TYPES[version]) + _number(_SET_KEY_LENGTH, _LENGTHS[version])
    return _new(_NEW_SET, body + _number(_SET_ID, number) + attribute(_SET_USERDATA, _KEY_BYTE_ORDER))


def _new(kind: int, body: bytes) -> Message:
    return kind, NLM_F_CREATE | NLM_F_ACK, _generic(_INET, 0) + body


def _edge(kind: int) -> Message:
    return kind, 0, _generic(socket.AF_UNSPEC, _SUBSYSTEM)


def _generic(family: int, resource: int) -> bytes:
    return struct.pack(">BBH", family, 0, resource)  # struct nfgenmsg


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))
