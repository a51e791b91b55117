"""HTTP/1.1 to the API server as the node agent uses it: asyncio's streams and TLS, h11's grammar, few connections.

A full client (lightkube's httpx2 and anyio) took 20 MiB and 300 ms more until its first answer than this does, which
is a third of what the whole agent may weigh; kubeconfig.py has it, for kubeconfig files.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import h11

from meshcni.kube import failures
from meshcni.kube.credentials import InCluster, Stamp, TokenFile, file_stamp
from meshcni.kube.failures import ApiError, describe, without_answer
from meshcni.kube.proxies import proxy_towards
from meshcni.kube.tunnel import Tunnel

CONNECT_SECONDS = 4.0  # TCP, proxy and TLS together; less than client.CALL_SECONDS, whose error knows less
MAX_IDLE = 4  # connections kept for the next call
IDLE_SECONDS = 60.0  # a real API server closes idle ones after 90 s
READ_BYTES = 64 * 1024
GZIP = "gzip"  # an API server compresses what is not watched, from 128 KiB on: a list of namespaces to a tenth and less
GZIP_WINDOW = 16 + zlib.MAX_WBITS


@dataclass(frozen=True)
class OpenAnswer:
    """An answer whose body streams in; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class Transport(Protocol):
    """What client.py needs: connections to one API server. Every failure comes out as ApiError with status 0.

    `token` is a bearer token that client.py adds to each request; None when the transport authenticates by itself.
    """

    token: TokenFile | None

    async def close(self) -> None:
        """End all connections."""

    def stream(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, read_seconds: float
    ) -> AbstractAsyncContextManager[OpenAnswer]:
        """One call; `path` carries the query, `read_seconds` is the longest silence, before the answer and in it."""


@dataclass(eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT))
    idle_since: float = 0.0

    async def send(self, request: h11.Request, body: bytes | None) -> None:
        parts = [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        self.writer.write(b"".join(self.http.send(part) or b"" for part in parts))
        await self.writer.drain()

    async def receive(self, read_seconds: float) -> h11.Event | type[h11.PAUSED]:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(read_seconds):
                self.http.receive_data(await self.reader.read(READ_BYTES))
        return event  # type: ignore[return-value]  # NEED_DATA is out

    def abort(self) -> None:
        self.writer.transport.abort()


class ClusterTransport:
    """Transport of a pod to its cluster's API server. One connection per call or watch at a time."""

    def __init__(self, access: InCluster) -> None:
        url = urlsplit(access.server)
        self._host, self._port = url.hostname or "", url.port or 443
        self._authority = url.netloc
        self.token: TokenFile | None = access.token_file()
        self._ca_file = access.ca_file
        self._ca_stamp: Stamp | None = file_stamp(self._ca_file)
        self._tls = _tls_context(self._ca_file) if url.scheme == "https" else None
        self._tunnel: Tunnel | None = None
        if self._tls is not None and (proxy := proxy_towards(self._host, self._port, access.environment)):
            self._tunnel = Tunnel(proxy, self._host, self._port, self._tls)
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def close(self) -> None:
        """End all connections, watches too."""
        for connection in [*self._idle, *self._busy]:
            connection.abort()
        self._idle.clear()

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, read_seconds: float
    ) -> AsyncIterator[OpenAnswer]:
        """One call; see Transport."""
        call = describe(method, path)
        connection = self._take_idle() or await self._connect(call)
        self._busy.add(connection)
        try:
            fields = {"Host": self._authority, "Accept-Encoding": GZIP, **headers}
            if body is not None:
                fields["Content-Length"] = str(len(body))
            with _no_answer(call, failures.TIMEOUT):
                await connection.send(h11.Request(method=method, target=path, headers=list(fields.items())), body)
                head = await connection.receive(read_seconds)
                while isinstance(head, h11.InformationalResponse):
                    head = await connection.receive(read_seconds)
            if not isinstance(head, h11.Response):
                raise without_answer(failures.BROKEN, call, "the connection ended without an answer")
            names = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            chunks = _chunks(call, connection, read_seconds)
            if names.get("content-encoding") == GZIP:
                chunks = _decompressed(call, chunks)
            yield OpenAnswer(head.status_code, names, chunks)
        finally:
            self._busy.discard(connection)
            self._keep_or_abort(connection)

    def _take_idle(self) -> _Connection | None:
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof() and now - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.abort()
        return None

    def _keep_or_abort(self, connection: _Connection) -> None:
        http = connection.http
        if http.our_state is h11.DONE and http.their_state is h11.DONE and len(self._idle) < MAX_IDLE:
            http.start_next_cycle()
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    async def _connect(self, call: str) -> _Connection:
        self._follow_ca_rotation()
        if self._tunnel is not None:
            return _Connection(*await self._tunnel.open(call, CONNECT_SECONDS))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return _Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._tls))
        except TimeoutError as error:
            detail = f"no connection to {self._authority} within {CONNECT_SECONDS:g} s"
            raise without_answer(failures.CONNECT, call, detail) from error
        except ssl.SSLError as error:
            raise without_answer(failures.TLS, call, f"{self._authority}: {error}") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a text that is no name of a host
            raise without_answer(failures.CONNECT, call, f"{self._authority}: {error}") from error

    def _follow_ca_rotation(self) -> None:
        """A CA that was rotated in is trusted by the next handshake; the one before stays trusted until a restart."""
        stamp = file_stamp(self._ca_file)
        if self._tls is None or stamp is None or stamp == self._ca_stamp:
            return
        try:
            self._tls.load_verify_locations(cafile=self._ca_file)
        except (OSError, ssl.SSLError):
            return  # half-written: looked at again at the next connection
        self._ca_stamp = stamp


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ApiError(
            0,
            f"the API server's CA in {ca_file} cannot be used: {error}",
            "is the service account mounted (automountServiceAccountToken)?",
            cause=failures.CREDENTIALS,
        ) from error


async def _chunks(call: str, connection: _Connection, read_seconds: float) -> AsyncIterator[bytes]:
    while True:
        with _no_answer(call, failures.SILENCE):
            event = await connection.receive(read_seconds)
        if not isinstance(event, h11.Data):
            return
        yield bytes(event.data)


async def _decompressed(call: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    stream = zlib.decompressobj(GZIP_WINDOW)
    try:
        async for chunk in chunks:
            yield stream.decompress(chunk)
    except zlib.error as error:
        raise without_answer(failures.BROKEN, call, f"the answer cannot be decompressed: {error}") from error
    if not stream.eof:
        raise without_answer(failures.BROKEN, call, "the compressed answer is not whole")


class _no_answer:
    """Turn what the network raises into ApiError; a time that ran out gets the cause `late`."""

    def __init__(self, call: str, late: str) -> None:
        self._call, self._late = call, late

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TimeoutError):
            raise without_answer(self._late, self._call, "nothing came for longer than it should") from error
        if isinstance(error, OSError | h11.RemoteProtocolError):
            detail = str(error) or type(error).__name__
            raise without_answer(failures.BROKEN, self._call, f"the connection broke: {detail}") from error
