"""Entries of the host's address sets: which set an address belongs to, and what may be written beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address

from meshcni import istio
from meshcni.errors import RulesError
from meshcni.rules.model import Family

IpAddress = IPv4Address | IPv6Address

SET_NAMES = {Family.V4: istio.PROBE_SET_V4, Family.V6: istio.PROBE_SET_V6}

_UID = re.compile(r"[A-Za-z0-9._-]{1,127}")  # 127 bytes is what nft has room for; a UID has 36 or 32


def ordered(families: Iterable[Family]) -> list[Family]:
    """Return the families in the order in which their sets are made and listed."""
    return sorted(families, key=lambda family: family.value)


def checked(owners: Mapping[IpAddress, str]) -> Mapping[IpAddress, str]:
    """Return what is to be put in; raises RulesError for what is no UID: it becomes part of nft commands."""
    for address, uid in owners.items():
        if not _UID.fullmatch(uid):
            raise RulesError(
                f"{uid!r}, given as the UID of the pod with address {address}, is none",
                "a UID has 1 to 127 letters, digits, hyphens, dots and underscores",
            )
    return owners


def by_family(comments: Mapping[IpAddress, str], families: frozenset[Family]) -> dict[Family, dict[IpAddress, str]]:
    """Sort addresses into the sets they belong to; those of families that are off belong nowhere."""
    sorted_out: dict[Family, dict[IpAddress, str]] = {}
    for address, comment in comments.items():
        plain = _plain(address)
        family = Family(plain.version)
        if family in families:
            sorted_out.setdefault(family, {})[plain] = comment
    return sorted_out


def _plain(address: IpAddress) -> IpAddress:
    if isinstance(address, IPv4Address):
        return address
    # Made anew from its bytes, because an address may carry a scope, which is text from elsewhere.
    return address.ipv4_mapped or IPv6Address(address.packed)


def reachable(entries: dict[IpAddress, str]) -> dict[IpAddress, str]:
    """Leave out IPv4-mapped entries: no packet has such an address, and deleting one would hit its IPv4 namesake."""
    return {address: comment for address, comment in entries.items() if _plain(address) == address}
