"""Whether redirection works in the current network namespace, tried with a connection of one's own.

A connection to an address that nobody listens on must arrive at one of the proxy's ports, with its first destination
remembered. Only what the proxy's user sends is redirected on loopback, so this has to run as that user, as the
istio-validation container does. Upstream: tools/istio-iptables/pkg/validation.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

SO_ORIGINAL_DST: Final = 80  # linux/netfilter_ipv4.h, and linux/netfilter_ipv6/ip6_tables.h
DIAL_INTERVAL_SECONDS: Final = 1.0
ATTEMPT_SECONDS: Final = 0.1  # how long one look for arrivals takes at most
_SOCKADDR_PORT: Final = struct.Struct("!2xH")  # sockaddr_in and sockaddr_in6 begin alike: family, port


@dataclass(frozen=True, slots=True)
class Loopback:
    """The addresses of one family: where the proxy listens, and what is dialled."""

    family: socket.AddressFamily
    own: str
    dialled: str
    level: int  # of SO_ORIGINAL_DST


V4: Final = Loopback(socket.AF_INET, "127.0.0.1", "127.0.0.6", socket.IPPROTO_IP)
V6: Final = Loopback(socket.AF_INET6, "::1", "::6", socket.IPPROTO_IPV6)


def redirection_works(
    loopback: Loopback, proxy_ports: tuple[int, ...], probe_port: int, timeout_seconds: float
) -> bool:
    """Listen on `proxy_ports` and dial `probe_port` until a connection meant for it arrives, or time is over.

    Raises OSError when a port is taken.
    """
    deadline = time.monotonic() + timeout_seconds
    listeners: list[socket.socket] = []
    try:
        with selectors.DefaultSelector() as selector:
            for port in proxy_ports:
                listener = _listen(loopback, port)
                listeners.append(listener)
                selector.register(listener, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                next_dial = min(deadline, time.monotonic() + DIAL_INTERVAL_SECONDS)
                with _dial(loopback, probe_port):
                    while time.monotonic() < next_dial:
                        ready = selector.select(ATTEMPT_SECONDS)
                        if any(_arrived_for(key.fileobj, loopback, probe_port) for key, _ in ready):
                            return True
        return False
    finally:
        for listener in listeners:
            listener.close()


def _listen(loopback: Loopback, port: int) -> socket.socket:
    listener = socket.socket(loopback.family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((loopback.own, port))
        listener.listen()
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _dial(loopback: Loopback, port: int) -> socket.socket:
    """Begin to connect; whether that is refused does not matter here."""
    dialling = socket.socket(loopback.family, socket.SOCK_STREAM)
    dialling.setblocking(False)
    dialling.bind((loopback.own, 0))
    try:
        dialling.connect((loopback.dialled, port))
    except OSError:
        pass
    return dialling


def _arrived_for(listener: object, loopback: Loopback, port: int) -> bool:
    assert isinstance(listener, socket.socket)
    try:
        accepted, _ = listener.accept()
        with accepted:
            address = accepted.getsockopt(loopback.level, SO_ORIGINAL_DST, 28)  # a sockaddr_in6, the longer one
    except OSError:
        return False  # gone again, or not redirected
    return bool(_SOCKADDR_PORT.unpack_from(address)[0] == port)
