"""HTTP to the API server for people's kubeconfigs, with lightkube and its httpx2.

lightkube knows every way a kubeconfig names TLS, credentials (client certificates, exec plugins, basic) and proxies. It
costs 250 ms and 23 MiB until the first answer, which a person's command affords and a node agent does not: within a
cluster transport.py does everything, and the image has neither this module nor lightkube.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx2
from lightkube.config.client_adapter import ConnectionParams
from lightkube.core.exceptions import ConfigError

from meshcni.kube import failures
from meshcni.kube.credentials import KubeconfigFile, TokenFile
from meshcni.kube.failures import ApiError, describe, without_answer
from meshcni.kube.transport import CONNECT_SECONDS, OpenAnswer

MAX_CONNECTIONS = 16  # watches hold one each; the rest are short calls
KEEPALIVE_SECONDS = 30.0
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request at info
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class KubeconfigTransport:
    """transport.Transport over lightkube's configuration. Every failure comes out as ApiError with status 0."""

    def __init__(self, access: KubeconfigFile) -> None:
        try:
            config = access.load()
            # As with Go's clients, proxies of the environment are used, but never towards our own machine.
            trust_env = urlsplit(config.cluster.server).hostname not in LOOPBACK_HOSTS
            arguments = ConnectionParams(timeout=None, trust_env=trust_env).httpx_params(config)
        except (OSError, ConfigError, ValueError) as error:
            raise ApiError(
                0,
                f"cannot make a client for the API server: {type(error).__name__}: {error}",
                "check the CA file, the client certificate and the kubeconfig",
                cause=failures.CREDENTIALS,
            ) from error
        self.token: TokenFile | None = access.token_file()
        if self.token is not None:
            arguments["auth"] = None  # client.py adds the token
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx2.AsyncClient(**arguments, limits=limits, follow_redirects=False)

    async def close(self) -> None:
        """End all connections, watches too."""
        await self._http.aclose()

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, read_seconds: float
    ) -> AsyncIterator[OpenAnswer]:
        """One call; `read_seconds` is the longest silence allowed, before the answer and within it."""
        timeout = httpx2.Timeout(read_seconds, connect=CONNECT_SECONDS, pool=read_seconds)
        call = describe(method, path)
        try:
            request = self._http.build_request(method, path, headers=dict(headers), content=body, timeout=timeout)
            response = await self._http.send(request, stream=True)
        except (httpx2.HTTPError, httpx2.InvalidURL, ConfigError, OSError) as error:
            raise _no_answer(call, error) from error
        try:
            yield OpenAnswer(response.status_code, response.headers, _chunks(call, response))
        finally:
            await response.aclose()


async def _chunks(call: str, response: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_bytes():
            yield chunk
    except httpx2.ReadTimeout as error:
        raise without_answer(failures.SILENCE, call, "nothing came for longer than it should") from error
    except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
        raise _no_answer(call, error) from error


def _no_answer(call: str, error: Exception) -> ApiError:
    return without_answer(_cause(error), call, f"{type(error).__name__}: {error}".rstrip(": "))


def _cause(error: Exception) -> str:
    if isinstance(error, httpx2.ConnectError):
        below: BaseException | None = error
        while below is not None:
            if isinstance(below, ssl.SSLError):
                return failures.TLS
            below = below.__cause__ or below.__context__
        return failures.CONNECT
    if isinstance(error, httpx2.ConnectTimeout):
        return failures.CONNECT
    return failures.TIMEOUT if isinstance(error, httpx2.TimeoutException) else failures.BROKEN
