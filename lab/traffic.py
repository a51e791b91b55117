"""Servers that tell a client which address they saw, and clients, inside the netns of pods.

Both are sockets of this process that belong to the pod's netns, so the kernel treats them as the application's: they
are root's, not the proxy's. A server answers REQUEST with the client's address and port, as it sees them, and ends the
connection; anything else it sends back.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lab import namespaces

REQUEST = b"who am I?\n"
CLIENT_SECONDS = 5.0
ANY = ("0.0.0.0", "::")


class Peer(NamedTuple):
    """A client as a server sees it."""

    address: str
    port: int


class Socket(NamedTuple):
    """What an open socket is for; `peer` is None for one that listens."""

    netns: str
    peer: Peer | None = None


class EchoServers:
    """Answers on any number of listening sockets, on one thread; context manager."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._orders: deque[Callable[[], object]] = deque()  # for the thread, which alone uses the selector
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="echo", daemon=True)

    def __enter__(self) -> EchoServers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._wake_in.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            self._close(key.fileobj)
        self._wake_in.close()
        self._selector.close()

    def serve(self, netns: str, *ports: int, addresses: tuple[str, ...] = ANY) -> None:
        """Answer on `ports` at `addresses` inside `netns`, until `leave` or the end of these servers."""
        for port in ports:
            for address in addresses:
                listener = namespaces.listen(netns, address, port)
                self._order(partial(self._selector.register, listener, selectors.EVENT_READ, Socket(netns)))

    def leave(self, netns: str) -> None:
        """Close every socket inside `netns` (the path that `serve` was given), which would keep it from being removed.

        Returns as soon as they are closed.
        """
        done = threading.Event()
        self._order(partial(self._leave, netns, done))
        done.wait(CLIENT_SECONDS)

    def _order(self, work: Callable[[], object]) -> None:
        self._orders.append(work)
        self._wake_in.send(b"x")

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_out:
                    self._wake_out.recv(64)
                elif key.data.peer is None:
                    self._accept(key.fileobj, key.data.netns)
                else:
                    self._answer(key.fileobj, key.data.peer)
            while self._orders:  # after the others, because they may close one that is ready
                self._orders.popleft()()

    def _leave(self, netns: str, done: threading.Event) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data.netns == netns:
                self._close(key.fileobj)
        done.set()

    def _accept(self, listener: object, netns: str) -> None:
        assert isinstance(listener, socket.socket)
        try:
            client, peer = listener.accept()
        except OSError:  # the client has gone again
            return
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ, Socket(netns, Peer(str(peer[0]), int(peer[1]))))

    def _answer(self, client: object, peer: Peer) -> None:
        assert isinstance(client, socket.socket)
        try:
            data = client.recv(4096)
            if data and data != REQUEST:
                client.send(data)
                return
            if data:
                client.send(f"{peer.address} {peer.port}\n".encode())
        except OSError:
            pass
        self._close(client)

    def _close(self, closing: object) -> None:
        assert isinstance(closing, socket.socket)
        self._selector.unregister(closing)
        closing.close()


def address_seen(netns: str, address: str, port: int, timeout_seconds: float = CLIENT_SECONDS) -> str:
    """Connect from inside `netns` and return the client address that the server saw; OSError when nobody answers."""
    with namespaces.connect(netns, address, port, timeout_seconds) as client:
        return ask(client).address


def ask(client: socket.socket) -> Peer:
    """Send REQUEST on a connection and return what the server answers; OSError when it does not."""
    client.sendall(REQUEST)
    answer = b""
    while not answer.endswith(b"\n"):
        part = client.recv(256)
        if not part:
            raise ConnectionResetError("the connection was closed without an answer")
        answer += part
    seen, port = answer.decode().split()
    return Peer(seen, int(port))
