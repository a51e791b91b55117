"""A TLS connection through an HTTP proxy: CONNECT in h11's grammar, then TLS with the server at the other end."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

import h11

from meshcni.kube import failures
from meshcni.kube.failures import ApiError
from meshcni.kube.proxies import Proxy, authority

MAX_HEAD_BYTES = 16 * 1024  # of the proxy's answers to CONNECT


class _NoTunnelError(Exception):
    """The proxy opens no tunnel: `cause` is a word of failures.py, `hint` what to do."""

    def __init__(self, cause: str, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.cause, self.hint = cause, hint


@dataclass(frozen=True)
class Tunnel:
    """The way to `host`:`port` through a proxy; each `open` makes a connection of its own."""

    proxy: Proxy
    host: str
    port: int
    tls: ssl.SSLContext

    async def open(self, call: str, seconds: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect for `call` within `seconds`. Raises ApiError that names the proxy and where it was configured."""
        target = authority(self.host, self.port)
        step, hint = f"{self.proxy} cannot be reached", f"check the address in {self.proxy.variable}"
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(self.proxy.host, self.proxy.port)
                try:
                    step, hint = f"{self.proxy} opens no tunnel to {target}", "check that it is an HTTP proxy"
                    await self._ask(reader, writer, target)
                    step, hint = f"no TLS with {target} through {self.proxy}", "check the CA file and the proxy"
                    await writer.start_tls(self.tls, server_hostname=self.host)
                except BaseException:
                    writer.transport.abort()
                    raise
                return reader, writer
        except (_NoTunnelError, OSError, UnicodeError) as error:  # UnicodeError: a text that is no name of a host
            silence = f"nothing came within {seconds:g} s" if isinstance(error, TimeoutError) else type(error).__name__
            advice = f"{getattr(error, 'hint', '') or hint}, or exempt {self.host} in NO_PROXY if it is reached without"
            raise ApiError(0, f"{call}: {step}: {str(error) or silence}", advice, cause=_cause(error)) from error

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str) -> None:
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        fields = [("Host", target)]
        if self.proxy.authorization:
            fields.append(("Proxy-Authorization", self.proxy.authorization))
        try:
            request = http.send(h11.Request(method="CONNECT", target=target, headers=fields))
            writer.write((request or b"") + (http.send(h11.EndOfMessage()) or b""))
            head = await _answer(http, reader)
        except h11.ProtocolError as error:
            raise _NoTunnelError(failures.BROKEN, f"what it answers is not HTTP: {error}") from error
        if not 200 <= head.status_code < 300:
            reason = head.reason.decode("latin-1")[:100]
            problem = f"it answers {head.status_code} {reason}".rstrip()
            raise _NoTunnelError(failures.CONNECT, problem, self._what_to_do(head.status_code, target))
        if http.trailing_data[0]:
            raise _NoTunnelError(failures.BROKEN, "it sends data that nobody asked for before the tunnel's own")

    def _what_to_do(self, status: int, target: str) -> str:
        if status == 407:
            kind = "others" if self.proxy.authorization else "some"
            return f"it wants a user and a password: write {kind} into {self.proxy.variable}"
        if status >= 500:
            return f"check that the proxy reaches the API server at {target}"
        return f"let the proxy allow CONNECT to {target}"


def _cause(error: Exception) -> str:
    if isinstance(error, _NoTunnelError):
        return error.cause
    return failures.TLS if isinstance(error, ssl.SSLError) else failures.CONNECT


async def _answer(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Response:
    """The head of the proxy's final answer.

    Less is read than may be buffered in all, so every read empties the reader: nothing that came before TLS can be
    taken for an answer of the API server afterwards.
    """
    left = MAX_HEAD_BYTES
    while True:
        event = http.next_event()
        if isinstance(event, h11.Response):
            return event
        if event is h11.NEED_DATA:
            data = await reader.read(left)
            left -= len(data)
            if not left:
                raise _NoTunnelError(failures.BROKEN, f"it answers more than {MAX_HEAD_BYTES} bytes")
            if not data:
                raise _NoTunnelError(failures.BROKEN, "it ended the connection without an answer")
            http.receive_data(data)
