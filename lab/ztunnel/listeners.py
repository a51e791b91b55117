"""Sockets inside a pod's netns: listeners as ztunnel's, and connections that keep the client's address.

All functions run on a thread inside the netns; a socket stays in the netns in which it was made.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import random
import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from lab.ztunnel.workloads import StartError
from meshcni import istio

# linux/netfilter_ipv4.h (and IP6T_SO_ORIGINAL_DST), linux/in6.h
SO_ORIGINAL_DST = 80
IPV6_TRANSPARENT = 75
BACKLOG = 128
DISABLE_IPV6 = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
TUNNEL, INBOUND, OUTBOUND, DNS = "tunnel", "inbound", "outbound", "dns"
PORTS: Mapping[str, int] = {  # in the order in which they are opened, after DNS
    TUNNEL: istio.ZTUNNEL_INBOUND_PORT,
    INBOUND: istio.ZTUNNEL_INBOUND_PLAINTEXT_PORT,
    OUTBOUND: istio.ZTUNNEL_OUTBOUND_PORT,
}
WORDS = {errno.EADDRINUSE: "AddrInUse", errno.EADDRNOTAVAIL: "AddrNotAvailable", errno.EMFILE: "Too many open files"}
SOURCE_PORTS = range(18000, 32000)  # below those that kernels give to clients (net.ipv4.ip_local_port_range)

Address = tuple[str, int]

_source_ports = itertools.cycle(random.sample(SOURCE_PORTS, len(SOURCE_PORTS)))


def open_listeners(ipv6: bool) -> list[tuple[str, socket.socket]]:
    """All listeners of a pod with their direction, DNS first; all or none. Raises StartError."""
    local = ("127.0.0.1", "::1") if ipv6 and lo_has_ipv6() else ("127.0.0.1",)
    plan = [(DNS, a, istio.ZTUNNEL_DNS_PORT, k) for a in local for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    plan += [(direction, "::" if ipv6 else "0.0.0.0", port, socket.SOCK_STREAM) for direction, port in PORTS.items()]
    with ExitStack() as stack:
        made = [(d, stack.enter_context(_bind(address, port, kind))) for d, address, port, kind in plan]
        stack.pop_all()
    return made


def lo_has_ipv6() -> bool:
    """Whether lo of the thread's netns has IPv6."""
    try:
        return DISABLE_IPV6.read_text().strip() == "0"
    except OSError:
        return False


def _bind(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    try:
        mark(made)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if kind == socket.SOCK_STREAM:
            make_transparent(made)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        made.bind((address, port))
        if kind == socket.SOCK_STREAM:
            made.listen(BACKLOG)
    except OSError as error:
        made.close()
        word = WORDS.get(error.errno or 0, os.strerror(error.errno or 0))
        shown = f"[{address}]" if family == socket.AF_INET6 else address
        raise StartError(f"Bind({shown}:{port}: {word})") from None
    return made


def mark(made: socket.socket) -> None:
    """Put ztunnel's mark on what the socket sends."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, istio.ZTUNNEL_MARK)


def make_transparent(made: socket.socket) -> None:
    """Allow addresses that are not the pod's, where that is possible."""
    with suppress(OSError):
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)


def upstream_socket(destination: Address, source: str | None) -> socket.socket:
    """A socket for a connection to `destination`, from the address `source` when there is one. Raises OSError.

    It has its port already, by which the receiver's view of the connection can be told to be ours.
    """
    family = socket.AF_INET6 if ":" in destination[0] else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        mark(made)
        if source is not None:
            make_transparent(made)
        _bind_as(made, source or "")
    except OSError:
        made.close()
        raise
    return made


def _bind_as(made: socket.socket, source: str) -> None:
    """Take the client's address (or, when empty, any of the netns), and a port that no client has had.

    Otherwise conntrack may take the connection for one of the client's own to the same server, open or forgotten: then
    both hang, or what is new goes the way that the old one went. About one time in 28,000 for each of those.
    """
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for _ in SOURCE_PORTS:
        try:
            made.bind((source, next(_source_ports)))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, "no source port is free")


def plain(address: str) -> str:
    """An address without the clothes of IPv6: `::ffff:10.0.0.1` is 10.0.0.1."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def original_destination(connection: socket.socket) -> Address:
    """Where a captured connection wanted to go, or what it was addressed to when nobody captured it."""
    own_address, own_port = connection.getsockname()[:2]
    try:
        if ":" in plain(own_address):
            answer = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
            _family, port, _flow, packed, _scope = struct.unpack("!HHI16sI", answer)
            return socket.inet_ntop(socket.AF_INET6, packed), port
        answer = connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        _family, port, packed = struct.unpack("!HH4s8x", answer)
        return socket.inet_ntop(socket.AF_INET, packed), port
    except OSError:  # no connection tracking, or no entry: it came directly
        return plain(own_address), own_port
