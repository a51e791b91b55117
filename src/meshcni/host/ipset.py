"""Messages of the kernel's ipset for sets of addresses with comments, in the calling thread's network namespace.

Layouts, commands and error numbers: linux/netfilter/ipset/ip_set.h. Why our own: docs/adr/0009-ipset-messages.md.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOENT
from ipaddress import IPv4Address, IPv6Address

from meshcni.host.netlink import (
    NLA_F_NESTED,
    NLA_F_NET_BYTEORDER,
    NLM_F_CREATE,
    NetlinkSocket,
    attribute,
    attributes,
)

IpAddress = IPv4Address | IPv6Address

SET_TYPE = "hash:ip"
# hash:ip gained comments with revision 2; a kernel has all revisions up to its newest.
REVISION_WITH_COMMENTS, REVISION_WITHOUT_COMMENTS = 2, 0

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET, linux/netfilter/nfnetlink.h
_CREATE, _DESTROY, _LIST, _ADD, _DELETE = (_SUBSYSTEM | command for command in (2, 3, 7, 9, 10))
_PROTOCOL = 6  # of the messages; the newest is 7, and every kernel since 2.6.39 speaks 6

_ATTR_PROTOCOL, _ATTR_SETNAME, _ATTR_TYPENAME, _ATTR_REVISION, _ATTR_FAMILY, _ATTR_FLAGS = 1, 2, 3, 4, 5, 6
_ATTR_DATA, _ATTR_ADT = 7, 8
_ATTR_IP, _ATTR_TIMEOUT, _ATTR_CADT_FLAGS = 1, 6, 8  # inside DATA
_ATTR_BITMASK, _ATTR_NETMASK, _ATTR_REFERENCES = 12, 20, 25  # inside DATA of a set
_ATTR_NAME, _ATTR_COMMENT = 18, 26  # inside DATA of an entry
_IPADDR = {4: 1, 16: 2}  # attribute inside IP by the address's length
_FLAG_LIST_HEADER = 1 << 2
_FLAG_WITH_COMMENT = 1 << 4

ERROR_FIND_TYPE, ERROR_BUSY, ERROR_COMMENT, ERROR_FULL = 4098, 4100, 4112, 4352
_WORDS = {
    4097: "the kernel speaks another version of the ipset protocol",
    ERROR_FIND_TYPE: "the kernel does not know this type or revision of set",
    4099: "the kernel has no room for another set",
    ERROR_BUSY: "the set is in use",
    4101: "a set of the new name exists",
    4102: "the set is of another type",
    4103: "the entry is there already",
    ERROR_COMMENT: "the set was made without comments",
    ERROR_FULL: "the set is full",
}


@dataclass(frozen=True, slots=True)
class SetHeader:
    """What the kernel says of a set: `family` is AF_INET or AF_INET6, `references` counts rules and sets using it.

    `narrowed` says how its entries are not just addresses that stay: "netmask 24", "timeout 60"; empty when they are.
    """

    name: str
    type: str
    family: int
    comments: bool
    references: int
    narrowed: str = ""


@dataclass(frozen=True, slots=True)
class SetEntry:
    """One entry: an address with its comment, or in a list of sets the name of a member."""

    address: IpAddress | None
    comment: str = ""
    member: str = ""


class Ipset(NetlinkSocket):
    """A netfilter socket that speaks ipset; a context manager.

    Every refusal is an OSError whose errno is the kernel's, or one of ipset's own from 4096 on (ERROR_*).
    """

    def __init__(self) -> None:
        super().__init__(_NETLINK_NETFILTER)

    def create(self, name: str, family: int, *, comments: bool = True) -> None:
        """Make a set of addresses unless there is one like it; EEXIST when there is an unlike one of that name."""
        revision = REVISION_WITH_COMMENTS if comments else REVISION_WITHOUT_COMMENTS
        flags = _number(_ATTR_CADT_FLAGS, _FLAG_WITH_COMMENT) if comments else b""
        body = attribute(_ATTR_TYPENAME, SET_TYPE.encode() + b"\0")
        body += attribute(_ATTR_REVISION, bytes([revision])) + attribute(_ATTR_FAMILY, bytes([family]))
        self._command(_CREATE, name, body + attribute(_ATTR_DATA | NLA_F_NESTED, flags), NLM_F_CREATE)

    def header(self, name: str) -> SetHeader:
        """Return what the kernel says of a set; ENOENT when there is none."""
        question = _message(name, attribute(_ATTR_FLAGS | NLA_F_NET_BYTEORDER, struct.pack(">I", _FLAG_LIST_HEADER)))
        for header in map(read_header, self.dump(_LIST, question)):
            if header is not None:
                return header
        raise OSError(ENOENT, "the kernel described no set")

    def add(self, name: str, address: IpAddress, comment: str | None) -> None:
        """Put an address into a set, or give the one that is there another comment; None in a set without comments."""
        body = _address(address)
        if comment is not None:
            body += attribute(_ATTR_COMMENT, comment.encode() + b"\0")
        self._command(_ADD, name, attribute(_ATTR_DATA | NLA_F_NESTED, body))

    def delete(self, name: str, address: IpAddress) -> None:
        """Take an address out of a set, if it is there."""
        self._command(_DELETE, name, attribute(_ATTR_DATA | NLA_F_NESTED, _address(address)))

    def entries(self, name: str) -> list[SetEntry]:
        """Return the entries of a set in the kernel's order; ENOENT when there is no set."""
        return [entry for payload in self.dump(_LIST, _message(name)) for entry in read_entries(payload)]

    def lists_with(self, name: str) -> list[str]:
        """Return the names of the lists of sets that set `name` is a member of."""
        return [
            _text(dict(attributes(payload[4:])).get(_ATTR_SETNAME, b""))
            for payload in self.dump(_LIST, _message(""))
            if any(entry.member == name for entry in read_entries(payload))
        ]

    def destroy(self, name: str) -> None:
        """Remove a set with its entries; ENOENT when there is none, ERROR_BUSY when something uses it."""
        self._command(_DESTROY, name)

    def _command(self, command: int, name: str, body: bytes = b"", flags: int = 0) -> None:
        # Without NLM_F_EXCL the kernel takes what is there as done: that makes add an upsert, delete and create safe.
        try:
            self.change(command, flags, _message(name, body))
        except OSError as error:
            raise worded(error) from None


def worded(error: OSError) -> OSError:
    """Return `error` with words for ipset's own numbers, which the C library does not know."""
    number = error.errno or 0
    return OSError(number, _WORDS[number]) if number in _WORDS else error


def _message(name: str, body: bytes = b"") -> bytes:
    generic = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)  # struct nfgenmsg
    named = attribute(_ATTR_SETNAME, name.encode() + b"\0") if name else b""
    return generic + attribute(_ATTR_PROTOCOL, bytes([_PROTOCOL])) + named + body


def _number(kind: int, value: int) -> bytes:
    return attribute(kind | NLA_F_NET_BYTEORDER, struct.pack(">I", value))


def _address(address: IpAddress) -> bytes:
    packed = address.packed
    inner = attribute(_IPADDR[len(packed)] | NLA_F_NET_BYTEORDER, packed)
    return attribute(_ATTR_IP | NLA_F_NESTED, inner)


def read_header(payload: bytes) -> SetHeader | None:
    """Read one part of the answer to a listing; None when it is a further part, with entries only."""
    values = dict(attributes(payload[4:]))
    if _ATTR_TYPENAME not in values:
        return None
    data = dict(attributes(values.get(_ATTR_DATA, b"")))
    family = values.get(_ATTR_FAMILY, b"\0")[:1]
    return SetHeader(
        _text(values.get(_ATTR_SETNAME, b"")),
        _text(values[_ATTR_TYPENAME]),
        family[0] if family else 0,
        bool(_integer(data.get(_ATTR_CADT_FLAGS, b"")) & _FLAG_WITH_COMMENT),
        _integer(data.get(_ATTR_REFERENCES, b"")),
        _narrowed(data),
    )


def _narrowed(data: dict[int, bytes]) -> str:
    if timeout := _integer(data.get(_ATTR_TIMEOUT, b"")):
        return f"timeout {timeout}"
    if _ATTR_NETMASK in data:
        return f"netmask {_integer(data[_ATTR_NETMASK])}"
    return "bitmask" if _ATTR_BITMASK in data else ""


def read_entries(payload: bytes) -> Iterator[SetEntry]:
    """Read the entries in one part of the answer to a listing."""
    for kind, values in attributes(payload[4:]):
        if kind != _ATTR_ADT:
            continue
        for _kind, data in attributes(values):
            entry = dict(attributes(data))
            packed = next((value for _, value in attributes(entry.get(_ATTR_IP, b""))), b"")
            address = _unpack(packed)
            member = _text(entry.get(_ATTR_NAME, b""))
            if address is not None or member:
                yield SetEntry(address, _text(entry.get(_ATTR_COMMENT, b"")), member)


def _unpack(packed: bytes) -> IpAddress | None:
    if len(packed) == 4:
        return IPv4Address(packed)
    return IPv6Address(packed) if len(packed) == 16 else None


def _integer(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(value: bytes) -> str:
    """Return a string of the kernel: up to its NUL, whatever bytes somebody put there made printable."""
    return value.split(b"\0", 1)[0].decode(errors="backslashreplace")
