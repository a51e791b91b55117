"""Lists come compressed, as a real API server sends large ones to who accepts it, in pieces that end anywhere."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshcni.kube import failures
from meshcni.kube.client import NAMESPACES, KubeApi
from meshcni.kube.credentials import InCluster
from meshcni.kube.failures import ApiError

NAMES = [f"namespace-{number}" for number in range(500)]
LIST = json.dumps({"metadata": {"resourceVersion": "7"}, "items": [{"metadata": {"name": name}} for name in NAMES]})
PIECE = 97  # bytes; no header of gzip and no line ends with one


@asynccontextmanager
async def answering(account: Path, body: bytes, asked: list[str], *, encoding: str = "gzip") -> AsyncIterator[KubeApi]:
    """A client of a server that answers every request with `body`, in small pieces."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        head = ("HTTP/1.1 200 OK", f"Content-Encoding: {encoding}", "Transfer-Encoding: chunked", "Connection: close")
        writer.write("\r\n".join((*head, "", "")).encode())
        for start in range(0, len(body), PIECE):
            piece = body[start : start + PIECE]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    account.mkdir()
    (account / "token").write_text("token")
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    place = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(port)}
    access = InCluster({**place, "KUBERNETES_SERVICE_PROTOCOL": "http"}, str(account))
    async with server, KubeApi(access) as api:
        yield api


async def test_a_compressed_list_is_read(account: Path) -> None:
    asked: list[str] = []
    async with answering(account, gzip.compress(LIST.encode()), asked) as api:
        page = await api.list_page(NAMESPACES)
    assert [one["metadata"]["name"] for one in page.items] == NAMES
    assert "accept-encoding: gzip" in asked[0]


async def test_what_is_not_compressed_is_read_as_it_is(account: Path) -> None:
    async with answering(account, LIST.encode(), [], encoding="identity") as api:
        assert len((await api.list_page(NAMESPACES)).items) == len(NAMES)


@pytest.mark.parametrize(
    "body",
    [gzip.compress(LIST.encode())[:-200], b"no gzip at all", b""],
    ids=["cut short", "something else", "empty"],
)
async def test_what_cannot_be_decompressed_is_a_broken_answer(account: Path, body: bytes) -> None:
    async with answering(account, body, []) as api:
        with pytest.raises(ApiError) as caught:
            await api.list_page(NAMESPACES)
    assert caught.value.cause == failures.BROKEN
    assert "compressed" in str(caught.value)
