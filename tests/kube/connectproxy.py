"""An HTTP proxy that knows CONNECT, and a cluster whose API server only it reaches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.apiserver import ApiServer
from lab.apiserver.tls import Certificates
from tests.kube.worlds import TOKEN, until

from meshcni.kube.client import KubeApi
from meshcni.kube.credentials import InCluster

API_ADDRESS, API_NAME, API_PORT = "198.51.100.1", "kubernetes.test", 443  # no machine has them (RFC 5737, RFC 6761)


@dataclass
class ConnectProxy:
    """Tunnels everything to `upstream`, a port of this machine. What it misbehaves in, tests set.

    `answer` replaces the one to CONNECT (empty: hang up, None: tunnel), `silent` says nothing at all, `wanted` is the
    Proxy-Authorization without which it answers 407.
    """

    upstream: int = 0
    answer: bytes | None = None
    silent: bool = False
    wanted: str = ""
    heads: list[str] = field(default_factory=list)
    port: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            if self.silent:
                await reader.read()
            elif self.answer is not None:
                writer.write(self.answer)
            elif self.wanted and f"Proxy-Authorization: {self.wanted}\r\n" not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            else:
                await self._tunnel(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        pumps = {asyncio.ensure_future(_pump(reader, there[1])), asyncio.ensure_future(_pump(there[0], writer))}
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        there[1].transport.abort()
        writer.transport.abort()
        await asyncio.wait(pumps)

    def cut(self) -> None:
        """Break every tunnel."""
        for writer in tuple(self._writers):
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        await writer.drain()
    except OSError:
        pass


@asynccontextmanager
async def connect_proxy(upstream: int = 0, **behaviour: Any) -> AsyncIterator[ConnectProxy]:
    proxy = ConnectProxy(upstream, **behaviour)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        await until(lambda: not proxy._writers)
        await asyncio.sleep(0.01)  # the transports close


def environment(host: str = API_ADDRESS, **variables: str) -> dict[str, str]:
    """What the pod finds: the API server's address, which leads nowhere, and `variables`."""
    return {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": str(API_PORT), **variables}


@asynccontextmanager
async def proxied(
    account: Path, certificates: Certificates, *, host: str = API_ADDRESS, login: str = "", **behaviour: Any
) -> AsyncIterator[tuple[ApiServer, ConnectProxy, KubeApi]]:
    """A double that wants TOKEN, a proxy before it, and a client that reaches it by that alone."""
    async with ApiServer(tokens=[TOKEN], certificates=certificates) as server:
        server.write_service_account(account, TOKEN)
        async with connect_proxy(server.port, **behaviour) as proxy:
            url = f"http://{login}127.0.0.1:{proxy.port}"
            async with KubeApi(InCluster(environment(host, HTTPS_PROXY=url), str(account))) as api:
                yield server, proxy, api
