"""Entering network and mount namespaces on threads made for it, and sockets that belong to another netns.

A socket stays in the netns in which it was made, so a test can serve and call inside a pod from its own process.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# linux/sched.h
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def enter(path: str, kind: int) -> None:
    """Move the calling thread into the namespace at `path`; `kind` is its CLONE_ flag."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}", path)
    finally:
        os.close(descriptor)


def leave_shared_filesystem() -> None:
    """Give the calling thread a root and a working directory of its own, which a mount namespace asks for."""
    if _libc.unshare(CLONE_FS) != 0:
        raise OSError(ctypes.get_errno(), "unshare CLONE_FS")


def call_in_netns(netns: str, function: Callable[[], T]) -> T:
    """Run `function` on a new thread inside the netns at path `netns` and return (or raise) what it does."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            enter(netns, CLONE_NEWNET)
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET6 for an address with a colon."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def connect(netns: str, address: str, port: int, timeout_seconds: float = 5.0) -> socket.socket:
    """Open a TCP connection from inside `netns`; OSError when nobody answers."""

    def make() -> socket.socket:
        made = socket.socket(family_of(address), socket.SOCK_STREAM)
        made.settimeout(timeout_seconds)
        try:
            made.connect((address, port))
        except BaseException:
            made.close()
            raise
        return made

    return call_in_netns(netns, make)


def datagram(address: str, port: int, timeout_seconds: float) -> socket.socket:
    """Make a UDP socket in the calling thread's netns that talks to one server."""
    made = socket.socket(family_of(address), socket.SOCK_DGRAM)
    made.settimeout(timeout_seconds)
    try:
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def listen(netns: str, address: str, port: int) -> socket.socket:
    """Open a listening TCP socket inside `netns`; port 0 takes a free one."""

    def make() -> socket.socket:
        made = socket.socket(family_of(address), socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        made.listen(128)
        return made

    return call_in_netns(netns, make)
