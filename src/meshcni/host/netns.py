"""Network namespaces: open and check them, run a function inside one, tell what one offers.

A namespace belongs to a thread, so whatever has to happen inside one happens on a thread made for it, which ends
afterwards; processes started there inherit the namespace. The main thread never changes its own.
"""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from errno import EMFILE, ENOTTY
from fcntl import ioctl
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import TypeVar

from meshcni import istio
from meshcni.errors import NetnsError
from meshcni.host.rtnetlink import Rtnetlink

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # linux/sched.h
NSFS_MAGIC = 0x6E736673  # linux/magic.h
NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
OTHERS_NETNS = (istio.OWN_NETNS, istio.HOST_NETNS, "/proc/1/ns/net")  # never a pod's
MAX_THREADS = 8  # at work in namespaces at once; more would only queue for two to four cores
_SELF_V6 = IPv6Network(istio.SELF_V6).network_address
_libc = ctypes.CDLL(None, use_errno=True)


def open_netns(path: str) -> int:
    """Open the network namespace file at `path` and return its descriptor (close-on-exec), which the caller owns.

    Raises NetnsError when the file cannot be opened or is no network namespace.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise NetnsError(f"cannot open the network namespace {path!r}: {error}", "is the pod still there?") from None
    try:
        check_netns(fd, path)
    except NetnsError:
        os.close(fd)
        raise
    return fd


def copy_netns(fd: int) -> int:
    """Return a copy of the descriptor `fd` of a network namespace, which the caller owns. Raises NetnsError."""
    try:
        return os.dup(fd)
    except OSError as error:
        raise NetnsError(
            f"the descriptor of the pod's network namespace cannot be copied: {error.strerror}",
            "raise the limit of open files" if error.errno == EMFILE else "is the pod still there?",
        ) from None


def check_netns(fd: int, name: str) -> None:
    """Raise NetnsError unless `fd` refers to a network namespace; `name` is for the message."""
    statfs = (ctypes.c_long * 64)()  # struct statfs is 120 bytes; f_type, the only field needed, comes first
    if _libc.fstatfs(fd, statfs) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise NetnsError(f"cannot tell what {name!r} is: {reason}", "a descriptor of a network namespace is needed")
    if statfs[0] != NSFS_MAGIC:
        raise NetnsError(f"{name!r} is not a namespace file", "expected something like /run/netns/NAME")
    try:
        kind = ioctl(fd, NS_GET_NSTYPE)
    except OSError as error:
        if error.errno != ENOTTY:
            raise NetnsError(f"cannot tell the kind of the namespace {name!r}: {error}") from None
        return  # Linux before 4.11 has no such question; setns refuses what is no network namespace
    if kind != CLONE_NEWNET:
        raise NetnsError(f"{name!r} is a namespace of another kind", "expected a network namespace")


def check_pod_netns(fd: int, others: tuple[str, ...] = OTHERS_NETNS) -> int:
    """Return the inode number of the pod's network namespace `fd`.

    Raises NetnsError when it is no network namespace, or one of `others` (paths; unreadable ones are skipped): those
    of this process and of the host, in which nothing may ever be programmed for a pod.
    """
    check_netns(fd, f"descriptor {fd}")
    status = os.fstat(fd)
    for path in others:
        try:
            other = os.stat(path)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (other.st_dev, other.st_ino):
            whose = "the agent's own" if path == istio.OWN_NETNS else "the host's"
            raise NetnsError(
                f"the network namespace given for the pod is {whose} ({path}, inode {status.st_ino})",
                "a pod with hostNetwork must not be handed to the plugin",
            )
    return status.st_ino


def call_in_netns(fd: int, function: Callable[[], T]) -> T:
    """Run `function` inside the network namespace `fd`, on a thread of its own, and return or raise what it does.

    Blocks until it is done. Raises NetnsError when the namespace cannot be entered.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            enter(fd)
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def enter(fd: int) -> None:
    """Move the calling thread, which must not be the main one, into the network namespace `fd` for good."""
    if threading.get_ident() == threading.main_thread().ident:
        raise RuntimeError("the main thread must keep its network namespace")
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise NetnsError(
            f"cannot enter the pod's network namespace: {os.strerror(number)}",
            "setns needs CAP_SYS_ADMIN" if number == 1 else "is the pod still there?",
        )


def call_in_new_netns(function: Callable[[], T]) -> T:
    """Run `function` on a thread in an empty network namespace that nobody else sees and that ends with the call."""
    fd = new_netns()
    try:
        return call_in_netns(fd, function)
    finally:
        os.close(fd)


def new_netns() -> int:
    """Make an empty network namespace and return its descriptor, which the caller owns; closing it ends the namespace.

    Raises NetnsError.
    """
    opened: list[int] = []
    number: list[int] = []

    def work() -> None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            number.append(ctypes.get_errno())
        else:
            opened.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=work, name="new-netns")
    thread.start()
    thread.join()
    if not opened:
        reason = os.strerror(number[0]) if number else "/proc is not readable"
        raise NetnsError(f"cannot make a network namespace: {reason}", "unshare needs CAP_SYS_ADMIN")
    return opened[0]


_slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


async def run_in_netns(fd: int, function: Callable[[], T]) -> T:
    """As `call_in_netns`, without blocking the event loop; at most MAX_THREADS calls of a loop are at work at once.

    A cancelled caller stops waiting, but what has begun runs to its end on its own copy of `fd`, and keeps its place
    among the MAX_THREADS until then: a half-programmed namespace is never left because nobody waits any more.
    """
    loop = asyncio.get_running_loop()
    slots = _slots.setdefault(loop, asyncio.Semaphore(MAX_THREADS))
    await slots.acquire()
    future: asyncio.Future[T] = loop.create_future()

    def done(result: list[T], error: BaseException | None) -> None:
        slots.release()
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result[0])

    def work(own_fd: int) -> None:
        result: list[T] = []
        failure: BaseException | None = None
        try:
            enter(own_fd)
            result.append(function())
        except BaseException as error:
            failure = error
        finally:
            os.close(own_fd)
        try:
            loop.call_soon_threadsafe(done, result, failure)
        except RuntimeError:
            pass  # the loop was closed meanwhile: nobody waits any more

    try:
        own_fd = copy_netns(fd)
    except NetnsError:
        slots.release()
        raise
    try:
        _thread.start_new_thread(work, (own_fd,))  # nobody joins it, so the event loop need not wait for its start
    except RuntimeError as error:
        os.close(own_fd)
        slots.release()
        raise NetnsError(f"no thread for the pod's network namespace: {error}", "check the pids limit") from None
    return await future


@dataclass(frozen=True, slots=True)
class NetnsFacts:
    """What a network namespace has: usable addresses in the kernel's order (IPv4 before IPv6).

    Usable are all but loopback and link-local ones and the proxy's own `::6`, which an earlier run of ours put there;
    an IPv4-mapped IPv6 address counts as the IPv4 address in it.
    """

    addresses: tuple[IPv4Address | IPv6Address, ...]

    @property
    def has_ipv4(self) -> bool:
        """Whether there is a usable IPv4 address."""
        return any(address.version == 4 for address in self.addresses)

    @property
    def has_ipv6(self) -> bool:
        """Whether there is a usable (global or unique local) IPv6 address."""
        return any(address.version == 6 for address in self.addresses)


def facts() -> NetnsFacts:
    """Return the facts of the calling thread's network namespace."""
    with Rtnetlink() as netlink:
        found = [ip_address(entry.packed) for entry in netlink.addresses() if len(entry.packed) in (4, 16)]
    plain = [_unmapped(address) for address in found]
    return NetnsFacts(tuple(address for address in plain if _is_usable(address)))


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_usable(address: IPv4Address | IPv6Address) -> bool:
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address == _SELF_V6)
