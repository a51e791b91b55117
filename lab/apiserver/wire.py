"""One HTTP connection of the double: requests in, answers out, endings of every kind. h11 does the grammar."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import h11


class ConnectionLostError(Exception):
    """The client went away, or a fault ended its connection."""


@dataclass(frozen=True)
class Request:
    """One request with its whole body; header names are lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_watch(self) -> bool:
        """Whether it asks for a watch."""
        return self.query.get("watch") in ("true", "1")


@dataclass(eq=False)
class Connection:
    """One client's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 16))

    async def next_request(self) -> Request:
        """Wait for one request. Raises ConnectionLostError at the end of the stream."""
        head = await self._receive()
        body = b""
        while isinstance(data := await self._receive(), h11.Data):
            body += data.data
        url = urlsplit(head.target.decode())
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        return Request(head.method.decode(), unquote(url.path), dict(parse_qsl(url.query)), headers, body)

    async def answer(self, status: int, obj: Any, headers: Mapping[str, str] | None = None) -> None:  # noqa: ANN401
        """Send one whole answer; `obj` is JSON, or bytes to be sent as they are."""
        body = obj if isinstance(obj, bytes) else json.dumps(obj).encode() + b"\n"
        await self.start(status, {"content-length": str(len(body)), **(headers or {})})
        await self.send_data(body)
        await self.finish()

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer; without a content-length its body goes out in chunks."""
        fields = {"content-type": "application/json", **headers}
        await self._send(h11.Response(status_code=status, headers=list(fields.items())))

    async def send_data(self, data: bytes) -> None:
        """Send a part of the body."""
        await self._send(h11.Data(data=data))

    async def finish(self) -> None:
        """End the answer properly; the connection may carry another request."""
        await self._send(h11.EndOfMessage())

    def reusable(self) -> bool:
        """Make ready for the next request, if both sides keep the connection."""
        if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
            return False
        self.http.start_next_cycle()
        return True

    async def closed_by_client(self) -> None:
        """Return when the client has gone."""
        while await self.reader.read(65536):
            pass

    def abort(self) -> None:
        """End it at once, without a word."""
        self.writer.transport.abort()

    async def _receive(self) -> Any:  # noqa: ANN401 - one of h11's events
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(65536))
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise ConnectionLostError
        return event

    async def _send(self, event: Any) -> None:  # noqa: ANN401 - one of h11's events
        if self.writer.transport.is_closing():
            raise ConnectionLostError
        self.writer.write(self.http.send(event) or b"")
        await self.writer.drain()
