"""The API server through an HTTP proxy: calls, watches and the informer, and every way in which a proxy can fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from pathlib import Path
from typing import Any

import pytest
from lab.apiserver import ApiServer
from lab.apiserver.tls import Certificates, make_certificates
from tests.kube.connectproxy import API_ADDRESS, API_NAME, connect_proxy, environment, proxied
from tests.kube.worlds import TOKEN, open_descriptors, pod_object, until

from meshcni.kube import failures, transport
from meshcni.kube.client import CALL_SECONDS, PODS, KubeApi
from meshcni.kube.credentials import InCluster
from meshcni.kube.failures import ApiError
from meshcni.kube.informer import Informer, Timing
from meshcni.kube.proxies import Proxy
from meshcni.kube.tunnel import MAX_HEAD_BYTES, Tunnel
from meshcni.pods.model import pod_from_object


async def failure_of(api: KubeApi) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await api.get_pod("apps", "a")
    assert caught.value.status == 0
    assert TOKEN not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("host", [API_ADDRESS, API_NAME])
async def test_a_call_goes_through_the_proxy(certificates: Certificates, account: Path, host: str) -> None:
    """By address and by a name that only the proxy resolves; the proxy sees neither token nor path."""
    async with proxied(account, certificates, host=host) as (server, proxy, api):
        server.add_pod(pod_object("a"))
        for _ in range(3):
            assert (await api.get_pod("apps", "a")).name == "a"

        assert proxy.heads == [f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n"]
        assert server.connections_accepted == 1
        assert server.requests[-1].request.headers["host"] == f"{host}:443"


async def test_no_proxy_is_asked_for_what_is_exempt(certificates: Certificates, account: Path) -> None:
    async with ApiServer(tokens=[TOKEN], certificates=certificates) as server, connect_proxy(server.port) as proxy:
        server.write_service_account(account, TOKEN)
        server.add_pod(pod_object("a"))
        url = f"http://127.0.0.1:{proxy.port}"
        own = {**server.environment(), "HTTPS_PROXY": url}  # 127.0.0.1, which always is
        async with KubeApi(InCluster(own, str(account))) as api:
            assert (await api.get_pod("apps", "a")).name == "a"
        exempt = environment("kubernetes.invalid", HTTPS_PROXY=url, NO_PROXY=".invalid")
        async with KubeApi(InCluster(exempt, str(account))) as api:
            error = await failure_of(api)
        assert (error.cause, proxy.heads) == (failures.CONNECT, [])
        assert error.message.startswith("GET /api/v1/namespaces/apps/pods/a: kubernetes.invalid:443: ")


async def test_user_and_password(certificates: Certificates, account: Path) -> None:
    wanted = f"Basic {base64.b64encode(b'me:s@cret').decode()}"
    async with proxied(account, certificates, login="me:s%40cret@", wanted=wanted) as (server, _, api):
        server.add_pod(pod_object("a"))
        assert (await api.get_pod("apps", "a")).name == "a"
        assert "proxy-authorization" not in server.requests[-1].request.headers


async def test_an_interim_answer_and_headers_before_the_tunnel(certificates: Certificates, account: Path) -> None:
    """h11 knows which of them mean nothing: a 2xx to CONNECT has no body, whatever it says."""
    async with ApiServer(tokens=[TOKEN], certificates=certificates) as server:
        server.write_service_account(account, TOKEN)
        server.add_pod(pod_object("a"))

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for part in (b"HTTP/1.1 102 Wait\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Le", b"ngth: 7\r\nVia: me\r\n\r\n"):
                writer.write(part)
                await asyncio.sleep(0.01)
            there = await asyncio.open_connection("127.0.0.1", server.port)
            with contextlib.suppress(OSError):
                await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            async with KubeApi(InCluster(environment(HTTPS_PROXY=url), str(account))) as api:
                assert (await api.get_pod("apps", "a")).name == "a"
            await asyncio.sleep(0.02)


async def test_a_long_list_and_a_watch(certificates: Certificates, account: Path) -> None:
    """More than fits into any buffer on the way, so that flow control has to work over the layers."""
    async with proxied(account, certificates) as (server, proxy, api):
        for number in range(500):
            server.add_pod(pod_object(f"p{number}", annotations={"long": "x" * 10_000}))
        assert len(await api.list_objects(*PODS, timeout=30)) == 500
        async with api.watch(PODS) as events:
            await until(lambda: server.watches)
            server.add_pod(pod_object("new"))
            server.end_watches()
            got = [event["object"]["metadata"]["name"] async for event in events]
        assert got[-1:] == ["new"]
        assert len(proxy.heads) == 1


async def test_the_informer_survives_a_proxy_that_breaks_and_comes_back(
    certificates: Certificates, account: Path
) -> None:
    quick = Timing(back_off_first_seconds=0.01, back_off_max_seconds=0.02)
    async with proxied(account, certificates) as (server, proxy, api):
        server.add_pod(pod_object("a"))
        informer = Informer(api, PODS, pod_from_object, timing=quick)
        task = asyncio.create_task(informer.run())
        await informer.synced.wait()
        await until(lambda: server.watches)

        proxy.answer = b"HTTP/1.1 503 Service Unavailable\r\n\r\n"
        proxy.cut()
        await until(lambda: "503 Service Unavailable" in informer.state.last_error)
        assert f"proxy 127.0.0.1:{proxy.port} (HTTPS_PROXY)" in informer.state.last_error
        server.add_pod(pod_object("b"))
        proxy.answer = None
        await until(lambda: {pod.name for pod in informer.items()} == {"a", "b"})

        task.cancel()
        await asyncio.wait([task])


# what the proxy answers, the cause, what is said, what to do
ANSWERS: dict[str, tuple[bytes, str, str, str]] = {
    "407": (
        b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 3\r\n\r\nno!",
        failures.CONNECT,
        "it answers 407 Proxy Authentication Required",
        "it wants a user and a password: write some into HTTPS_PROXY",
    ),
    "403": (b"HTTP/1.1 403 Forbidden\r\n\r\n", failures.CONNECT, "it answers 403 Forbidden", "allow CONNECT to"),
    "405": (b"HTTP/1.0 405\r\n\r\n", failures.CONNECT, "it answers 405", "allow CONNECT to"),
    "302": (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", failures.CONNECT, "it answers 302 Found", "allow CONNECT to"),
    "502": (
        b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        failures.CONNECT,
        "502 Bad Gateway",
        "the proxy reaches the API server",
    ),
    "504": (b"HTTP/1.1 504 Late\r\n\r\n", failures.CONNECT, "504 Late", "the proxy reaches the API server"),
    "hang-up": (b"", failures.BROKEN, "it ended the connection without an answer", "is an HTTP proxy"),
    "half": (b"HTTP/1.1 200 O", failures.BROKEN, "it ended the connection without an answer", "is an HTTP proxy"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", failures.BROKEN, "is not HTTP: ", "is an HTTP proxy"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x16", failures.BROKEN, "is not HTTP: ", "is an HTTP proxy"),
    "101": (b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\n", failures.BROKEN, "is not HTTP: ", "is an HTTP proxy"),
    "endless": (
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD_BYTES,
        failures.BROKEN,
        f"more than {MAX_HEAD_BYTES} bytes",
        "is an HTTP proxy",
    ),
    "early": (
        b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        failures.BROKEN,
        "it sends data that nobody asked for",
        "is an HTTP proxy",
    ),
}


@pytest.mark.parametrize(("answer", "cause", "said", "hint"), ANSWERS.values(), ids=ANSWERS)
async def test_a_proxy_that_opens_no_tunnel(
    certificates: Certificates, account: Path, answer: bytes, cause: str, said: str, hint: str
) -> None:
    async with proxied(account, certificates, answer=answer) as (server, proxy, api):
        error = await failure_of(api)

        assert error.cause == cause
        start = f"GET /api/v1/namespaces/apps/pods/a: proxy 127.0.0.1:{proxy.port} (HTTPS_PROXY) opens no tunnel to "
        assert error.message.startswith(f"{start}{API_ADDRESS}:443: ")
        assert said in error.message
        assert hint in error.hint
        assert f"exempt {API_ADDRESS} in NO_PROXY" in error.hint
        assert server.connections_accepted == 0
        server.add_pod(pod_object("a"))
        proxy.answer = None
        assert (await api.get_pod("apps", "a")).name == "a"


@pytest.mark.parametrize("after", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"x" * MAX_HEAD_BYTES])
async def test_plain_text_before_tls_is_never_taken_for_the_server_s(
    certificates: Certificates, account: Path, after: bytes
) -> None:
    """A head as long as one read takes, and behind it what a proxy would like us to believe."""
    start = b"HTTP/1.1 200 OK\r\nX: "
    head = start + b"x" * (MAX_HEAD_BYTES - len(start) - 4) + b"\r\n\r\n"
    async with proxied(account, certificates, answer=head + after) as (_, _, api):
        assert (await failure_of(api)).cause == failures.BROKEN


async def test_a_wrong_password_is_asked_for_and_not_shown(certificates: Certificates, account: Path) -> None:
    async with proxied(account, certificates, login="me:s3cret@", wanted="Basic other") as (_, _, api):
        error = await failure_of(api)
    assert "407" in error.message
    assert "write others into HTTPS_PROXY" in error.hint
    encoded = base64.b64encode(b"me:s3cret").decode()
    shown: BaseException | None = error
    while shown is not None:
        assert "s3cret" not in repr(shown)
        assert encoded not in repr(shown)
        shown = shown.__cause__ or shown.__context__


async def test_nobody_listens_at_the_proxy_s_address(certificates: Certificates, account: Path) -> None:
    await make_account(certificates, account)
    async with connect_proxy() as proxy:
        port = proxy.port
    async with KubeApi(InCluster(environment(https_proxy=f"http://127.0.0.1:{port}"), str(account))) as api:
        error = await failure_of(api)
    assert f"proxy 127.0.0.1:{port} (https_proxy) cannot be reached: " in error.message
    assert (error.cause, "check the address in https_proxy" in error.hint) == (failures.CONNECT, True)


@pytest.mark.parametrize("host", ["proxy.invalid", "x" * 70 + ".invalid", "a..b"])
async def test_a_proxy_whose_name_cannot_be_resolved(certificates: Certificates, account: Path, host: str) -> None:
    await make_account(certificates, account)
    async with KubeApi(InCluster(environment(HTTPS_PROXY=f"http://{host}:3128"), str(account))) as api:
        error = await failure_of(api)
    assert f"proxy {host}:3128 (HTTPS_PROXY) cannot be reached: " in error.message
    assert (error.cause, "check the address in HTTPS_PROXY" in error.hint) == (failures.CONNECT, True)


@pytest.mark.parametrize("value", ["https://p:1", "socks5://p:1", "http://p:x", "http://"])
async def test_a_value_that_cannot_be_used_fails_calls_and_watches(
    certificates: Certificates, account: Path, value: str
) -> None:
    await make_account(certificates, account)
    async with KubeApi(InCluster(environment(HTTPS_PROXY=value), str(account))) as api:
        error = await failure_of(api)
        with pytest.raises(ApiError, match="HTTPS_PROXY is "):
            async with api.watch(PODS):
                pass
    assert (error.cause, f"HTTPS_PROXY is {value!r}" in error.message) == (failures.CREDENTIALS, True)


async def make_account(certificates: Certificates, account: Path) -> None:
    async with ApiServer(tokens=[TOKEN], certificates=certificates) as server:
        server.write_service_account(account, TOKEN)


# where the proxy stops to do anything: what is said of it
SILENCES = [({"silent": True}, "opens no tunnel to"), ({"answer": b"HTTP/1.1 200 OK\r\n\r\n"}, "no TLS with")]


@pytest.mark.parametrize(("behaviour", "said"), SILENCES)
async def test_a_proxy_that_hangs(behaviour: dict[str, Any], said: str) -> None:
    held: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(behaviour.get("answer", b""))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        tunnel = Tunnel(Proxy("127.0.0.1", port, "HTTPS_PROXY"), API_ADDRESS, 443, ssl.create_default_context())
        with pytest.raises(ApiError) as caught:
            await tunnel.open("GET /x", 0.2)
        for writer in held:
            writer.close()
    assert caught.value.cause == failures.CONNECT
    assert said in caught.value.message
    assert f"proxy 127.0.0.1:{port} (HTTPS_PROXY)" in caught.value.message
    assert caught.value.message.endswith(": nothing came within 0.2 s")


async def test_the_error_that_names_the_proxy_comes_before_that_of_the_whole_call() -> None:
    assert transport.CONNECT_SECONDS < CALL_SECONDS


async def test_a_proxy_that_opens_tls_itself(certificates: Certificates, account: Path, tmp_path: Path) -> None:
    """Its CA is not the cluster's, so it gets no token."""
    other = make_certificates(tmp_path / "other", (f"IP:{API_ADDRESS}",))
    assert other is not None
    async with ApiServer(certificates=other) as impostor, proxied(account, certificates) as (_, proxy, api):
        proxy.upstream = impostor.port
        error = await failure_of(api)
        assert impostor.requests == []
    assert error.cause == failures.TLS
    assert f"no TLS with {API_ADDRESS}:443 through proxy 127.0.0.1:{proxy.port} (HTTPS_PROXY): " in error.message
    assert "CA file" in error.hint
    assert "NO_PROXY" in error.hint


async def test_a_certificate_for_another_name(certificates: Certificates, account: Path) -> None:
    async with proxied(account, certificates, host="other.test") as (_, _, api):
        error = await failure_of(api)
    assert (error.cause, "ostname mismatch" in error.message) == (failures.TLS, True)


async def test_failures_and_cancellation_leave_nothing_open(certificates: Certificates, account: Path) -> None:
    async with proxied(account, certificates) as (server, proxy, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        proxy.cut()
        before, tasks = open_descriptors(), len(asyncio.all_tasks())
        for answer, _, _, _ in [*ANSWERS.values(), (b"HTTP/1.1 200 OK\r\n\r\n", "", "", "")] * 3:
            proxy.answer = answer
            await failure_of(api)
        proxy.answer, proxy.silent = None, True
        for _ in range(10):
            call = asyncio.create_task(api.get_pod("apps", "a", timeout=9))
            heads = len(proxy.heads)
            await until(lambda heads=heads: len(proxy.heads) > heads)
            call.cancel()
            await asyncio.wait([call])
        await until(lambda: open_descriptors() <= before and len(asyncio.all_tasks()) <= tasks)
