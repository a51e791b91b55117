"""Reading the texts that people write into annotations and variables: ports, prefixes, interfaces, groups.

Every function raises ValueError with a message that quotes the wrong item and says what is accepted. Lists come back
normalised: trimmed, numeric, without repetitions, in the order written; one trailing comma is forgiven.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Final, TypeVar

from meshcni import istio
from meshcni.pods.interception import (
    EVERYTHING,
    CidrSelection,
    GroupSelection,
    Network,
    NumberRange,
    PortSelection,
)

T = TypeVar("T")
_DIGITS: Final = re.compile(r"[0-9]+", re.ASCII)
_PREFIX_LENGTH: Final = re.compile(r"0|[1-9][0-9]{0,2}", re.ASCII)
_INTERFACE: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9_.\-]{0,14}", re.ASCII)  # IFNAMSIZ is 16 with the final NUL
HIGHEST_PORT: Final = 65535
HIGHEST_ID: Final = 2**32 - 2  # the last one, 2**32 - 1, means "nobody" to the kernel
_LOOPBACK: Final = IPv4Network("127.0.0.0/8")


def read_list(text: str, read_item: Callable[[str], T], form: str) -> tuple[T, ...]:
    """Split at commas and read each item; an empty text is an empty list, an empty item an error."""
    if not text.strip():
        return ()
    items = [item.strip() for item in text.split(",")]
    if len(items) > 1 and not items[-1]:
        items.pop()
    if not all(items):
        raise ValueError(f"an item between commas is empty: write {form}")
    return tuple(dict.fromkeys(read_item(item) for item in items))


def _number(text: str, highest: int) -> int | None:
    """Read an unsigned decimal of at most ten digits, leading zeros aside; None when it is none or above `highest`."""
    digits = text.lstrip("0") or "0"
    if not _DIGITS.fullmatch(text) or len(digits) > 10 or int(digits) > highest:
        return None
    return int(digits)


def read_port(text: str) -> NumberRange:
    """Read one decimal port, 0 to 65535, without sign."""
    number = _number(text, HIGHEST_PORT)
    if number is None:
        raise ValueError(f"{text!r} is no port: write a decimal number from 0 to {HIGHEST_PORT}")
    return NumberRange.single(number)


def read_prefix(text: str) -> Network:
    """Read one prefix by the strict rules of Go's netip.ParsePrefix; host bits are allowed and masked away."""
    address_text, slash, length_text = text.rpartition("/")
    form = f"{text!r} is no prefix: write ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8"
    if not slash or "%" in address_text or not _PREFIX_LENGTH.fullmatch(length_text):
        raise ValueError(form)
    try:
        address = ip_address(address_text)
        return ip_network((address, int(length_text)), strict=False)
    except ValueError:
        raise ValueError(form) from None


def read_interface(text: str) -> str:
    """Read one interface name: a letter, then up to 14 letters, digits, `_`, `.` or `-`."""
    if not _INTERFACE.fullmatch(text):
        raise ValueError(
            f"{text!r} is no interface name: write at most 15 letters, digits, '_', '.' or '-', first a letter"
        )
    return text


def read_id_range(text: str) -> NumberRange:
    """Read a user or group id, or an inclusive range `FIRST-LAST` of them."""
    first_text, dash, last_text = text.partition("-")
    first = _number(first_text, HIGHEST_ID)
    last = _number(last_text, HIGHEST_ID) if dash else first
    if first is None or last is None:
        raise ValueError(f"{text!r} is no id: write a number from 0 to {HIGHEST_ID}, or FIRST-LAST")
    if first > last:
        raise ValueError(f"{text!r} is an empty range: write FIRST-LAST with FIRST not above LAST")
    return NumberRange(first, last)


def read_ports(text: str) -> tuple[NumberRange, ...]:
    """Read an exclusion list of ports; `*` would exclude everything and is refused."""
    _refuse_wildcard(text, "ports")
    return read_list(text, read_port, "ports like 80,443")


def read_port_selection(text: str) -> PortSelection:
    """Read `*` (all ports) or a list of ports."""
    return EVERYTHING if text.strip() == "*" else read_list(text, read_port, "* or ports like 80,443")


def read_prefixes(text: str) -> tuple[Network, ...]:
    """Read an exclusion list of prefixes; `*` is refused."""
    _refuse_wildcard(text, "prefixes")
    return read_list(text, read_prefix, "prefixes like 10.0.0.0/8,fd00::/8")


def read_cidr_selection(text: str) -> CidrSelection:
    """Read `*` (all addresses) or a list of prefixes."""
    return EVERYTHING if text.strip() == "*" else read_list(text, read_prefix, "* or prefixes like 10.0.0.0/8")


def read_interfaces(text: str) -> tuple[str, ...]:
    """Read a list of interface names."""
    return read_list(text, read_interface, "interface names like eth1,net1")


def read_group_selection(text: str) -> GroupSelection:
    """Read `*` (every group) or a list of at most 64 group ids."""
    if text.strip() == "*":
        return EVERYTHING
    groups = read_id_ranges(text)
    check_owner_groups(groups)
    return groups


def read_id_ranges(text: str) -> tuple[NumberRange, ...]:
    """Read a list of ids and ranges of ids; names of groups are those of another root and cannot be looked up."""
    return read_list(text, read_id_range, "group ids like 202,1000-1999")


def check_owner_groups(groups: GroupSelection) -> None:
    """Refuse more groups than the rule that lists them may hold."""
    if isinstance(groups, tuple) and len(groups) > istio.MAX_OWNER_GROUPS:
        raise ValueError(f"{len(groups)} groups: at most {istio.MAX_OWNER_GROUPS} may be listed")


def read_loopback(text: str) -> IPv4Network:
    """Read the IPv4 loopback prefix: within 127.0.0.0/8, so of length 8 to 32."""
    prefix = read_prefix(text.strip())
    if not isinstance(prefix, IPv4Network) or not prefix.subnet_of(_LOOPBACK):
        raise ValueError(f"{text!r} is no IPv4 loopback prefix: write one within 127.0.0.0/8, such as 127.0.0.1/32")
    return prefix


def _refuse_wildcard(text: str, what: str) -> None:
    if any(item.strip() == "*" for item in text.split(",")):
        raise ValueError(f"'*' cannot be excluded: list {what}, or make the matching include list empty")
