"""A mark of a netns' packet rules: as long as it stays the same, nobody has changed any. Starts no process.

Looking at rules means listing them, in the worst case with two processes a pod; asking whether anything changed since
the last look is three short questions to the kernel.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from meshcni.errors import ApplyError
from meshcni.host import nftmessages
from meshcni.host.backends import xtables
from meshcni.rules.model import Family

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h; Linux 5.14
_NO_NF_TABLES = -1


@dataclass(frozen=True, slots=True)
class RulesMark:
    """What identifies a state of the packet rules of one netns.

    `cookie` is the kernel's name for the netns, never used twice; `generation` counts changes of nf_tables; `legacy`
    are digests of the legacy tables by family and table.
    """

    cookie: int
    generation: int
    legacy: tuple[tuple[str, bytes], ...] = ()


def take_mark() -> RulesMark | None:
    """The mark of the calling thread's netns; None where the kernel does not tell, so that one has to look."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as here:
            cookie = int.from_bytes(here.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
        legacy = tuple(digest for family in Family for digest in xtables.digests(family))
    except (OSError, ApplyError):
        return None
    try:
        generation = nftmessages.generation()
    except (OSError, KeyError):
        generation = _NO_NF_TABLES
    return RulesMark(cookie, generation, legacy)
