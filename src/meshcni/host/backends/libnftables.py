"""nft in this process: commands for the network namespace of the calling thread through Debian's libnftables binding.

A context opens its socket when it is made, so it belongs to the namespace of the thread that makes it, and lives as
long as the `Nft` that stands for one operation there. The library keeps global state, so contexts are made and used one
at a time; a call takes about a millisecond.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

from meshcni.errors import ApplyError

NETLINK_NETFILTER = 12  # linux/netlink.h
SPARE_SOCKETS = 8
_TABLE = re.compile(r"^table (\S+) (\S+) \{")
_CHAIN = re.compile(r"^\tchain (\S+) \{")
_one_at_a_time = threading.Lock()


class NftUnavailableError(ApplyError):
    """There is no nftables here: neither the library nor, perhaps, the kernel's side."""


class Context(Protocol):
    """What of the binding's `Nftables` is used."""

    def cmd(self, cmdline: bytes) -> tuple[int, bytes, bytes]:
        """Execute commands: status, output, errors."""


def _new_context() -> Context:
    """Return a context of the calling thread's namespace; the caller holds the lock. Raises NftUnavailableError."""
    try:
        from nftables import Nftables
    except ImportError:
        raise NftUnavailableError("Python's nftables module is missing", "install python3-nftables") from None
    _check_socket()
    try:
        context = Nftables()
    except OSError as error:
        raise NftUnavailableError(f"libnftables cannot be loaded: {error}", "install libnftables1") from None
    context.set_stateless_output(True)
    made: Context = context
    return made


def _check_socket() -> None:
    """libnftables ends the whole process when it gets no netfilter socket, so ask for one first.

    For more than one: near the limit of descriptors other threads take some in between.
    """
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    try:
        with ExitStack() as taken:
            for _ in range(SPARE_SOCKETS):
                taken.enter_context(socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER))
    except OSError as error:
        raise NftUnavailableError(
            f"no netfilter socket: {error}", "the kernel lacks nf_tables, or the descriptor limit is reached"
        ) from None


def _explain(errors: str) -> ApplyError:
    first = errors.splitlines()[0] if errors else "nft gave no reason"
    if "cache initialization failed" in errors and ("not supported" in errors or "Invalid argument" in errors):
        return NftUnavailableError(f"the kernel has no nf_tables: {first}", "load nf_tables or use iptables (legacy)")
    if "Operation not permitted" in errors:
        return ApplyError(f"nft was refused: {first}", "CAP_NET_ADMIN is needed in the pod's network namespace")
    return ApplyError(f"nft refused the rules: {errors}", "is a kernel module (nft_redir, nft_tproxy, nft_ct) missing?")


class Nft:
    """nft for one operation in one namespace; remembers which chains there are until something changes them."""

    def __init__(self) -> None:
        self._context: Context | None = None
        self._chains: Mapping[tuple[str, str], tuple[str, ...]] | None = None

    def change(self, commands: str) -> None:
        """Execute `commands` as one transaction. Raises ApplyError."""
        self.forget()
        self._run(commands)

    def show(self, command: str) -> str:
        """Return what a `list` command prints, without counter values. Raises ApplyError."""
        return self._run(command)

    def chains(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """Return the chain names of every table, by (nft family, table), in listing order.

        Empty when there is no nftables here at all; every change then says so. Raises ApplyError.
        """
        if self._chains is None:
            try:
                self._chains = _read_chains(self._run("list chains"))
            except NftUnavailableError:
                self._chains = {}
        return self._chains

    def forget(self) -> None:
        """Look again next time: somebody else, such as an iptables command, changed something."""
        self._chains = None

    def _run(self, commands: str) -> str:
        """Execute nft `commands` as one transaction and return what they print, without counter values.

        Raises ApplyError with nft's own message, NftUnavailableError when library or kernel lack nftables.
        """
        with _one_at_a_time:
            if self._context is None:
                self._context = _new_context()
            # As bytes: a comment of somebody else's may hold any, and would make the binding fail on all the rest.
            status, output, errors = self._context.cmd(commands.encode())
        if status != 0:
            raise _explain(_text(errors).strip())
        return _text(output)


def _text(output: bytes) -> str:
    return output.decode(errors="backslashreplace")


def _read_chains(listing: str) -> Mapping[tuple[str, str], tuple[str, ...]]:
    found: dict[tuple[str, str], list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        if table := _TABLE.match(line):
            current = found.setdefault((table[1], table[2]), [])
        elif chain := _CHAIN.match(line):
            current.append(chain[1])
    return {table: tuple(names) for table, names in found.items()}
