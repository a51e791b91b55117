"""Servers that tell a client which address they saw, and clients, inside the netns of pods.

Both are sockets of this process that belong to the pod's netns, so the kernel treats them as the application's: they
are root's, not the proxy's. A server answers REQUEST with the client's address and port, as it sees them, and ends the
connection; anything else it sends back.
"""

from __future__ import annotations

import selectors
import socket
import threading
from typing import NamedTuple

from lab import namespaces

REQUEST = b"who am I?\n"
CLIENT_SECONDS = 5.0
ANY = ("0.0.0.0", "::")


class Peer(NamedTuple):
    """A client as a server sees it."""

    address: str
    port: int


class EchoServers:
    """Answers on any number of listening sockets, on one thread; context manager."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._waiting: list[socket.socket] = []
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
        """Answer on `ports` at `addresses` inside `netns`, until the netns or these servers end."""
        for port in ports:
            for address in addresses:
                self._waiting.append(namespaces.listen(netns, address, port))
        self._wake_in.send(b"x")

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_out:
                    self._wake_out.recv(64)
                    while self._waiting:
                        self._selector.register(self._waiting.pop(), selectors.EVENT_READ, "listener")
                elif key.data == "listener":
                    self._accept(key.fileobj)
                else:
                    self._answer(key.fileobj, key.data)

    def _accept(self, listener: object) -> None:
        assert isinstance(listener, socket.socket)
        try:
            client, peer = listener.accept()
        except OSError:  # the client has gone again
            return
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ, Peer(str(peer[0]), int(peer[1])))

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
