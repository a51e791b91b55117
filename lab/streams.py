"""Connections out of a pod that go on while something happens to it: one after the other, or one that is held.

What a server saw of a connection is compared with what the stand-in for ztunnel recorded before it led it on: a
connection without a record has gone past it.
"""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from lab import namespaces
from lab.traffic import Peer, ask

PAUSE_SECONDS = 0.003
STOP_SECONDS = 15.0
# A connection that was open when the last rules of a netns went stays in conntrack's table, where nothing tracks it to
# its end: a new one from the same port goes the way that it went. So no port is used twice, nor one of the stand-in.
CLIENT_PORTS = range(33000, 60000)
RECORD_SECONDS = 15.0  # a port is used again; a record that is older than so long is another connection's


_client_ports = itertools.cycle(random.sample(CLIENT_PORTS, len(CLIENT_PORTS)))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One connection: when it began and ended (time.monotonic), what the server saw, the error when it failed."""

    begin: float
    end: float
    seen: Peer | None
    error: str = ""


class _Client:
    """A thread inside a netns; context manager."""

    def __init__(self, netns: str, address: str, port: int, timeout_seconds: float) -> None:
        self.netns, self.address, self.port, self.timeout_seconds = netns, address, port, timeout_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._enter_and_run, name="stream", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; safe to call twice."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        if self._failure is not None:
            raise self._failure

    def _enter_and_run(self) -> None:
        try:
            namespaces.enter(self.netns, namespaces.CLONE_NEWNET)
            self._run()
        except BaseException as error:
            self._failure = error

    def _connect(self) -> socket.socket:
        made = socket.socket(namespaces.family_of(self.address), socket.SOCK_STREAM)
        made.settimeout(self.timeout_seconds)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(("", next(_client_ports)))
            made.connect((self.address, self.port))
        except BaseException:
            made.close()
            raise
        return made

    def _run(self) -> None:
        raise NotImplementedError


class Stream(_Client):
    """Connects, asks and ends, over and over, from inside `netns`."""

    def __init__(
        self,
        netns: str,
        address: str,
        port: int,
        timeout_seconds: float = 4.0,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        super().__init__(netns, address, port, timeout_seconds)
        self.pause_seconds = pause_seconds
        self.attempts: list[Attempt] = []

    def wait(self, count: int) -> None:
        """Return when `count` more connections were made, failed ones included."""
        wanted = len(self.attempts) + count
        while len(self.attempts) < wanted and self._thread.is_alive():
            time.sleep(PAUSE_SECONDS)

    def failures(self) -> list[Attempt]:
        """Return those that failed."""
        return [attempt for attempt in self.attempts if attempt.seen is None]

    def _run(self) -> None:
        while not self._stop.wait(self.pause_seconds):
            begin = time.monotonic()
            seen, words = None, ""
            try:
                with self._connect() as client:
                    seen = ask(client)
            except OSError as error:
                words = f"{type(error).__name__}: {error}"
            self.attempts.append(Attempt(begin, time.monotonic(), seen, words))


class Held(_Client):
    """One connection that is used all the time and made anew when it breaks; `breaks` says when (time.monotonic)."""

    def __init__(self, netns: str, address: str, port: int, timeout_seconds: float = 4.0) -> None:
        super().__init__(netns, address, port, timeout_seconds)
        self.breaks: list[tuple[float, str]] = []
        self.exchanges = 0
        self.is_up = threading.Event()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._connect() as client:
                    self._exchange(client)
            except OSError as error:
                if self.is_up.is_set():
                    self.breaks.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                    self.is_up.clear()
                self._stop.wait(0.02)

    def _exchange(self, client: socket.socket) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            sent = f"{self.exchanges}.".encode()
            client.sendall(sent)
            received = b""
            while len(received) < len(sent):
                part = client.recv(len(sent) - len(received))
                if not part:
                    raise ConnectionResetError("closed by the server")
                received += part
            if received != sent:
                raise AssertionError(f"sent {sent!r}, received {received!r}")
            self.exchanges += 1
            self.is_up.set()


@dataclass(slots=True)
class Proxied:
    """What stand-ins recorded of connections: by direction, pod and the port they used towards the server."""

    records: Mapping[tuple[str, str, int], list[Mapping[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Proxied:
        """Sort the records of one or more stand-ins."""
        found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
        for record in records:
            if record["event"] == "connection":
                found.setdefault((record["direction"], record["uid"], record["port"]), []).append(record)
        return cls(found)

    def took(self, direction: str, uid: str, port: int, end: float) -> Mapping[str, Any] | None:
        """Return the record of the connection that ended at `end` and had `port`, if there is one."""
        candidates = self.records.get((direction, uid, port), ())
        return next((one for one in reversed(candidates) if end - RECORD_SECONDS < one["at"] <= end), None)

    def bypassed(self, attempts: Collection[Attempt], server_uid: str, client_uid: str = "") -> list[Attempt]:
        """Return those that reached the server past its ztunnel or, for a client in the mesh, past the client's."""
        found = []
        for attempt in attempts:
            if attempt.seen is None:
                continue
            inbound = self.took("inbound", server_uid, attempt.seen.port, attempt.end)
            if inbound is None:
                found.append(attempt)
            elif client_uid:
                port = int(inbound["client"].split()[1])
                if self.took("outbound", client_uid, port, attempt.end) is None:
                    found.append(attempt)
        return found
