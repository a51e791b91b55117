"""A small HTTP/1.1 server on asyncio streams: the few endpoints of the agent, on TCP and on Unix sockets.

h11 keeps the protocol's state; here are limits, deadlines and the table of paths.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import h11

from meshcni.host.sockets import peer_credentials

MAX_HEADER_BYTES = 16 * 1024
MAX_CONNECTIONS = 64  # of most servers; for one more, that which has waited longest without a request has to go
IDLE_SECONDS = 60.0  # until the first byte of a request; Prometheus and the kubelet keep connections
REQUEST_SECONDS = 10.0  # from its first byte to the end of its body, and for the answer to be taken
READ_BYTES = 64 * 1024

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its whole body; `path` is without the query string `query`."""

    method: str
    path: str
    query: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered."""

    status: int = 200
    body: bytes = b""
    content_type: str = TEXT


Handler = Callable[[Request], Awaitable[Response]]


class WebServer:
    """Serves a table of exact paths on one listening socket.

    Connections of peers that are none of the `users` are closed (Unix sockets; None: nobody is asked). `on_refused`
    hears the cause of each connection or request that was refused: `peer`, `busy`, `malformed`, `oversized`, `slow`.
    """

    def __init__(
        self,
        routes: Mapping[str, Handler],
        *,
        max_body_bytes: int = 0,
        max_connections: int = MAX_CONNECTIONS,
        users: frozenset[int] | None = None,
        on_refused: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self._routes = routes
        self._max_body_bytes = max_body_bytes
        self._max_connections = max_connections
        self._users = users
        self._on_refused = on_refused
        self._connections: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[None], None] = {}  # for a whole request, the longest waiting first
        self._server: asyncio.Server | None = None
        self._ending = False

    async def start(self, listener: socket.socket) -> None:
        """Serve on `listener`, which belongs to the server from now on."""
        start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        self._server = await start(self._accepted, sock=listener, backlog=512)

    async def drain(self, seconds: float) -> None:
        """Stop listening, and let the requests that are being answered end, at most `seconds`."""
        self._ending = True
        if self._server is not None:
            self._server.close()
        busy = self._connections - self._waiting.keys()
        if busy:
            await asyncio.wait(busy, timeout=seconds)

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection: socket.socket = writer.get_extra_info("socket")
        if self._users is not None and peer_credentials(connection).uid not in self._users:
            self._refuse(writer, "peer")
            return
        if len(self._connections) >= self._max_connections and not self._make_room():
            self._refuse(writer, "busy")
            return
        self._connections.add(task)
        try:
            await self._serve(task, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the peer went away, or we are closing: nobody is left to answer
        finally:
            self._connections.discard(task)
            self._waiting.pop(task, None)
            writer.close()

    def _make_room(self) -> bool:
        """End one connection that says nothing, or whoever opens many keeps the kubelet's probes out."""
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        self._on_refused("busy")
        self._waiting.pop(oldest)
        self._connections.discard(oldest)
        oldest.cancel()
        return True

    def _refuse(self, writer: asyncio.StreamWriter, cause: str) -> None:
        self._on_refused(cause)
        writer.close()

    async def _serve(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer requests on one connection, which is `task`'s, until it ends."""
        machine = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        while True:
            self._waiting[task] = None
            if not await self._first_bytes(machine, reader):
                return
            response, head = await self._answer(task, machine, reader)
            if response is None:
                return
            _send(machine, writer, response, head)
            try:
                async with asyncio.timeout(REQUEST_SECONDS):
                    await writer.drain()
            except TimeoutError:
                writer.transport.abort()
                return
            if self._ending or machine.our_state is not h11.DONE or machine.their_state is not h11.DONE:
                return
            machine.start_next_cycle()

    async def _first_bytes(self, machine: h11.Connection, reader: asyncio.StreamReader) -> bool:
        """Wait for the next request; False when the peer is gone or stays silent."""
        if machine.trailing_data[0]:
            return True
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                data = await reader.read(READ_BYTES)
        except TimeoutError:
            return False
        if data:
            machine.receive_data(data)
        return bool(data)

    async def _answer(
        self, task: asyncio.Task[None], machine: h11.Connection, reader: asyncio.StreamReader
    ) -> tuple[Response | None, bool]:
        """The response to the next request and whether it asked with HEAD; no response when the peer is gone."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                request = await self._read_request(machine, reader)
        except TimeoutError:
            self._on_refused("slow")
            return Response(408), False
        except h11.RemoteProtocolError as error:
            self._on_refused("malformed")
            return Response(error.error_status_hint, f"{error}\n".encode()), False
        finally:
            self._waiting.pop(task, None)
        if request is None:
            return None, False
        if len(request.body) > self._max_body_bytes:
            self._on_refused("oversized")
            return Response(413, f"body is longer than {self._max_body_bytes} bytes\n".encode()), False
        handler = self._routes.get(request.path)
        if handler is None:
            return Response(404, b"not found\n"), request.method == "HEAD"
        try:
            return await handler(request), request.method == "HEAD"
        except Exception:
            log.exception("request %s %s failed", request.method, request.path)
            return Response(500, b"internal error\n"), request.method == "HEAD"

    async def _read_request(self, machine: h11.Connection, reader: asyncio.StreamReader) -> Request | None:
        """One whole request; a body above the limit is cut one byte past it. None when the peer went away."""
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = machine.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(READ_BYTES)
                if not data and head is None:
                    return None
                machine.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data[: self._max_body_bytes + 1 - len(body)]
            if head is not None and (isinstance(event, h11.EndOfMessage) or len(body) > self._max_body_bytes):
                path, _, query = head.target.decode("ascii", "replace").partition("?")
                return Request(head.method.decode("ascii"), path, query, bytes(body))
            if isinstance(event, h11.ConnectionClosed):
                return None


def _send(machine: h11.Connection, writer: asyncio.StreamWriter, response: Response, head: bool) -> None:
    """Write one response; the connection is closed after it when the request was not read to its end."""
    headers = [("content-length", str(len(response.body))), ("content-type", response.content_type)]
    if machine.their_state not in (h11.DONE, h11.MUST_CLOSE):
        headers.append(("connection", "close"))
    reason = HTTPStatus(response.status).phrase
    parts = [machine.send(h11.Response(status_code=response.status, headers=headers, reason=reason))]
    if response.body and not head:
        parts.append(machine.send(h11.Data(data=response.body)))
    parts.append(machine.send(h11.EndOfMessage()))
    writer.write(b"".join(part for part in parts if part))


def listen_tcp(address: str, port: int) -> socket.socket:
    """Listen on `address` (`*`: every address of both families) and `port`; raises OSError when it is taken."""
    if address != "*":
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=512)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        except OSError as error:
            if error.errno not in NO_IPV6:
                raise
    return socket.create_server(("0.0.0.0", port), backlog=512)


NO_IPV6 = frozenset({97, 99})  # EAFNOSUPPORT, EADDRNOTAVAIL: a kernel, or a netns, without IPv6
