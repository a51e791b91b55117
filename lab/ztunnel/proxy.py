"""Serving a pod: listeners inside its netns, and every captured connection led on to where it wanted to go."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import cast

from lab.ztunnel import dns
from lab.ztunnel.listeners import (
    DNS,
    INBOUND,
    OUTBOUND,
    PORTS,
    TUNNEL,
    Address,
    open_listeners,
    original_destination,
    plain,
    upstream_socket,
)
from lab.ztunnel.workloads import StartError
from meshcni.errors import NetnsError
from meshcni.host.netns import check_netns, run_in_netns

CHUNK_BYTES = 65536
CONNECT_SECONDS = 10.0


class Starter:
    """Starts proxies; `names` are what DNS answers, `tell` hears of each connection before anything of it is led on."""

    def __init__(self, *, ipv6: bool, names: Mapping[str, str], tell: Callable[..., None] | None = None) -> None:
        self._ipv6 = ipv6
        self._names = names
        self._tell = tell
        self._proxies: set[PodProxy] = set()

    async def __call__(self, uid: str, netns: int) -> PodProxy:
        """Serve the pod with this netns, which stays the caller's. Raises StartError when a listener cannot be."""
        try:
            check_netns(netns, uid)
            listeners = await run_in_netns(netns, lambda: open_listeners(self._ipv6))
        except NetnsError as error:
            raise StartError(f"Setns: EINVAL: {error.message}") from None
        except OSError as error:
            raise StartError(str(error)) from None
        tell = partial(self._tell, "connection", uid=uid) if self._tell is not None else None
        proxy = PodProxy(os.dup(netns), self._names, tell)
        for direction, listener in listeners:
            await proxy.serve(direction, listener)
        self._proxies = {each for each in self._proxies if not each.is_closed} | {proxy}
        return proxy

    async def drain(self, seconds: float) -> None:
        """Take no new connections; return when all have ended or `seconds` have passed."""
        for proxy in self._proxies:
            proxy.stop_listening()
        busy = [task for proxy in self._proxies for task in proxy.busy]
        if busy:
            await asyncio.wait(busy, timeout=seconds)


class PodProxy:
    """What serves one pod. `netns` is its own."""

    def __init__(self, netns: int, names: Mapping[str, str], tell: Callable[..., None] | None = None) -> None:
        self._netns = netns
        self._names = names
        self._tell = tell
        self._servers: list[asyncio.Server] = []
        self._datagrams: list[asyncio.DatagramTransport] = []
        self.busy: set[asyncio.Task[None]] = set()
        self.is_closed = False
        self._counters = {name: {"connections": 0, "bytes": 0} for name in (OUTBOUND, INBOUND, TUNNEL, DNS)}

    def counters(self) -> dict[str, dict[str, int]]:
        """Connections (queries) and bytes, both ways together, by direction."""
        return {name: dict(values) for name, values in self._counters.items()}

    async def serve(self, direction: str, listener: socket.socket) -> None:
        """Take what comes to one socket."""
        loop = asyncio.get_running_loop()
        if listener.type == socket.SOCK_DGRAM:
            transport, _ = await loop.create_datagram_endpoint(lambda: Datagrams(self), sock=listener)
            self._datagrams.append(transport)
            return

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.busy.add(task)
            task.add_done_callback(self.busy.discard)
            try:
                await self._connection(direction, reader, writer)
            except (OSError, TimeoutError, asyncio.CancelledError):
                pass  # cut: the client sees it
            finally:
                writer.close()

        self._servers.append(await asyncio.start_server(accepted, sock=listener))

    def stop_listening(self) -> None:
        """Close the listeners."""
        for server in self._servers:
            server.close()
        for transport in self._datagrams:
            transport.close()

    def close(self) -> None:
        """Close the listeners and cut every connection."""
        if not self.is_closed:
            self.is_closed = True
            self.stop_listening()
            for task in tuple(self.busy):
                task.cancel()
            os.close(self._netns)

    def answer(self, query: bytes) -> bytes | None:
        """The response to a DNS query."""
        response = dns.respond(query, self._names)
        self._count(DNS, len(query) + len(response or b""), connections=1)
        return response

    def _count(self, direction: str, size: int, connections: int = 0) -> None:
        counter = self._counters[direction]
        counter["bytes"] += size
        counter["connections"] += connections

    async def _connection(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if direction == DNS:
            await self._resolve(reader, writer)
            return
        self._count(direction, 0, connections=1)
        if direction == TUNNEL:
            return  # we have no certificate to offer
        accepted = writer.get_extra_info("socket")
        destination = original_destination(accepted)
        if destination[1] in PORTS.values() or self.is_closed:
            return  # it was meant for us: leading it on would be a loop
        source = plain(accepted.getpeername()[0]) if direction == INBOUND else None
        upstream = await self._upstream(destination, source)
        try:
            if self._tell is not None:
                self._tell(
                    direction=direction,
                    client=_text(accepted.getpeername()),
                    port=upstream.getsockname()[1],
                    destination=_text(destination),
                )
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(upstream, destination)
        except BaseException:
            upstream.close()
            raise
        inner, outer = await asyncio.open_connection(sock=upstream)
        try:
            await asyncio.gather(self._copy(direction, reader, outer), self._copy(direction, inner, writer))
        finally:
            outer.close()

    async def _upstream(self, destination: Address, source: str | None) -> socket.socket:
        return await run_in_netns(self._netns, lambda: upstream_socket(destination, source))

    async def _copy(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            self._count(direction, len(data))
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()

    async def _resolve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """DNS over TCP: each message has its length in two bytes before it."""
        with suppress(asyncio.IncompleteReadError):
            while True:
                size = int.from_bytes(await reader.readexactly(2))
                response = self.answer(await reader.readexactly(size))
                if response is None:
                    return
                writer.write(len(response).to_bytes(2) + response)
                await writer.drain()


class Datagrams(asyncio.DatagramProtocol):
    """DNS over UDP."""

    def __init__(self, proxy: PodProxy) -> None:
        self._proxy = proxy
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to answer."""
        self._transport = cast(asyncio.DatagramTransport, transport)  # in Python 3.11 it is none by its class

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer a query."""
        response = self._proxy.answer(data)
        if response is not None and self._transport is not None:
            self._transport.sendto(response, addr)


def _text(address: Address) -> str:
    """`10.0.0.1 8080`."""
    return f"{plain(address[0])} {address[1]}"
