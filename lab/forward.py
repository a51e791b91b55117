"""Connections to a port of one netns, carried to the same port of another, as a Service's address does in a cluster."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from lab import namespaces

LOOPBACK = "127.0.0.1"
CHUNK = 65536


class Forwarder:
    """Listens on the loopback interface of `netns` and connects to that of `target`, until `close`."""

    def __init__(self, netns: str, target: str, port: int) -> None:
        self._target, self._port = target, port
        self._listener = namespaces.listen(netns, LOOPBACK, port)
        threading.Thread(target=self._accept, name="forwarder", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are open end with their ends."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = namespaces.connect(self._target, LOOPBACK, self._port)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=carry, args=(source, sink), name="forwarded", daemon=True).start()


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends, then tell the sink."""
    with suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
