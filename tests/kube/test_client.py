"""KubeApi against the double: every call, every way to fail, over every transport."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.apiserver import ApiServer
from lab.apiserver.tls import Certificates, make_certificates
from tests.kube.connectproxy import proxied
from tests.kube.worlds import TOKEN, double_and_api, open_descriptors, pod_object, rotate_token, until

from meshcni.errors import KubeError
from meshcni.kube import failures
from meshcni.kube.client import (
    DAEMONSETS,
    EVENTS,
    MAX_CALLS,
    NAMESPACES,
    NODES,
    PODS,
    KubeApi,
    split_lines,
)
from meshcni.kube.credentials import InCluster, KubeconfigFile, TokenFile
from meshcni.kube.failures import ApiError
from meshcni.kube.transport import MAX_IDLE

World = Callable[[], AbstractAsyncContextManager[tuple[ApiServer, KubeApi]]]


@pytest.fixture(params=["http", "https", "https-proxy", "kubeconfig", "kubeconfig-https"])
def world(request: pytest.FixtureRequest, account: Path, tmp_path: Path) -> World:
    """A double and a client on it, by each transport."""
    certificates = request.getfixturevalue("certificates") if "https" in request.param else None

    @asynccontextmanager
    async def in_cluster() -> AsyncIterator[tuple[ApiServer, KubeApi]]:
        async with double_and_api(account, certificates=certificates) as both:
            yield both

    @asynccontextmanager
    async def by_kubeconfig() -> AsyncIterator[tuple[ApiServer, KubeApi]]:
        async with ApiServer(tokens=[TOKEN], certificates=certificates) as server:
            server.write_kubeconfig(tmp_path / "kubeconfig", TOKEN)
            async with KubeApi(KubeconfigFile(str(tmp_path / "kubeconfig"))) as api:
                yield server, api

    @asynccontextmanager
    async def by_proxy() -> AsyncIterator[tuple[ApiServer, KubeApi]]:
        assert certificates is not None
        async with proxied(account, certificates) as (server, _, api):
            yield server, api

    if "proxy" in request.param:
        return by_proxy
    return by_kubeconfig if "kubeconfig" in request.param else in_cluster


async def failure_of(call: Any) -> ApiError:
    with pytest.raises(KubeError) as caught:
        await call
    assert isinstance(caught.value, ApiError)
    assert TOKEN not in str(caught.value)
    return caught.value


async def test_a_pod_by_name(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("web-0", uid="u1", labels={"app": "web"}))

        pod = await api.get_pod("apps", "web-0")

    assert (pod.full_name, pod.uid, pod.labels["app"], pod.node_name, pod.ips) == (
        "apps/web-0",
        "u1",
        "web",
        "n1",
        ("10.0.0.7",),
    )


async def test_objects_of_other_groups_and_of_no_namespace(world: World) -> None:
    async with world() as (server, api):
        server.add("daemonsets", {"metadata": {"name": "istio-cni-node", "namespace": "kube-system"}, "spec": {}})
        server.add("nodes", {"metadata": {"name": "n1"}})

        daemonset = await api.get_object(*DAEMONSETS, "kube-system", "istio-cni-node")
        node = await api.get_object(*NODES, None, "n1")

    assert (daemonset["kind"], daemonset["apiVersion"], node["kind"]) == ("DaemonSet", "apps/v1", "Node")


async def test_a_list_is_read_page_by_page_as_far_as_asked(world: World) -> None:
    async with world() as (server, api):
        for number in range(1203):
            server.add_pod(pod_object(f"p{number:04}", node=f"n{number % 3}", labels={"odd": str(number % 2)}))

        everything = await api.list_objects(*PODS)
        on_node = await api.list_objects(*PODS, field_selector="spec.nodeName=n1")
        odd = await api.list_objects(*PODS, "apps", label_selector="odd=1", limit=7)
        elsewhere = await api.list_objects(*PODS, "nowhere")
        limits = [record.request.query.get("limit") for record in server.requests]

    assert len({pod["metadata"]["name"] for pod in everything}) == len(everything) == 1203
    assert {pod["spec"]["nodeName"] for pod in on_node} == {"n1"}
    assert len(on_node) == 401
    assert [pod["metadata"]["name"] for pod in odd] == ["p0001", "p0003", "p0005", "p0007", "p0009", "p0011", "p0013"]
    assert elsewhere == []
    assert limits == ["500", "500", "500", "500", "7", "500"]


async def test_metadata_only(world: World) -> None:
    async with world() as (server, api):
        server.add_namespace("apps", {"istio.io/dataplane-mode": "ambient"})

        (found,) = await api.list_objects(*NAMESPACES, metadata_only=True)

    assert found["metadata"]["labels"]["istio.io/dataplane-mode"] == "ambient"
    assert found.keys() <= {"kind", "apiVersion", "metadata"}


async def test_an_event_is_posted(world: World) -> None:
    async with world() as (server, api):
        server.add_namespace("apps")
        await api.create_event("apps", {"metadata": {"name": "e1", "namespace": "apps"}, "reason": "Why"})

        assert [event["reason"] for event in server.cluster.objects("events")] == ["Why"]


async def test_what_a_role_denies_is_told_before_and_when_it_is_tried(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a"))
        server.denied.deny("list pods", "patch pods/status", "* daemonsets")

        assert [await api.may(verb, PODS) for verb in ("get", "list", "watch")] == [True, False, True]
        assert await api.may("patch", PODS)
        assert not await api.may("patch", PODS, subresource="status")
        assert not await api.may("get", DAEMONSETS, name="mine", namespace="apps")
        asked = json.loads(server.requests[-1].request.body)
        attributes = {"verb": "get", "group": "apps", "resource": "daemonsets", "name": "mine", "namespace": "apps"}
        assert asked["spec"] == {"resourceAttributes": attributes}
        assert (await api.get_pod("apps", "a")).name == "a"
        assert (await failure_of(api.list_objects(*PODS))).status == 403
        assert (await failure_of(api.patch_redirection("apps", "a", "u1", None))).status == 403
        assert (await failure_of(api.get_object(*DAEMONSETS, "apps", "mine"))).status == 403


@pytest.mark.parametrize("answer", ['{"status": {}}', '{"status": {"allowed": "yes"}}', "[]", "{}"])
async def test_an_answer_that_is_no_review(account: Path, answer: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 201 Created\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode())
        writer.close()

    account.mkdir(exist_ok=True)
    (account / "token").write_text(TOKEN)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        environment = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(port),
            "KUBERNETES_SERVICE_PROTOCOL": "http",
        }
        async with KubeApi(InCluster(environment, str(account))) as api:
            assert (await failure_of(api.may("get", PODS))).cause == failures.BROKEN


async def test_the_redirection_of_a_pod_is_annotated(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a", uid="u1", annotations={"own": "kept"}))

        pod = await api.patch_redirection("apps", "a", "u1", "pending")
        request = server.requests[-1].request

        assert dict(pod.annotations) == {"own": "kept", "ambient.istio.io/redirection": "pending"}
        assert (request.method, request.path) == ("PATCH", "/api/v1/namespaces/apps/pods/a/status")
        assert request.headers["content-type"] == "application/merge-patch+json"
        wanted = {"metadata": {"uid": "u1", "annotations": {"ambient.istio.io/redirection": "pending"}}}
        assert json.loads(request.body) == wanted
        assert dict((await api.patch_redirection("apps", "a", "u1", None)).annotations) == {"own": "kept"}


async def test_a_pod_that_has_the_name_of_another_is_not_annotated(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a", uid="u2"))

        gone = await failure_of(api.patch_redirection("apps", "b", "u1", "enabled"))
        replaced = await failure_of(api.patch_redirection("apps", "a", "u1", "enabled"))

        assert (gone.status, replaced.status) == (404, 409)
        assert replaced.message.startswith("PATCH /api/v1/namespaces/apps/pods/a/status: HTTP 422: ")
        assert "somebody else" in replaced.hint
        assert "annotations" not in server.cluster.objects("pods")[0]["metadata"]


async def test_another_field_that_is_invalid_is_no_conflict(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.fault("status", status=422, reason="Invalid", message="metadata.annotations: Too long")

        error = await failure_of(api.patch_redirection("apps", "a", "u1", "enabled"))

    assert (error.status, error.reason) == (422, "Invalid")


async def test_an_annotation_done_whose_answer_got_lost_is_done_again(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a", uid="u1"))
        server.fault("truncate", method="PATCH")

        pod = await api.patch_redirection("apps", "a", "u1", "enabled")

        assert pod.annotations["ambient.istio.io/redirection"] == "enabled"
        assert [record.request.method for record in server.requests] == ["PATCH", "PATCH"]


async def test_a_pod_is_deleted_as_it_was_seen_and_never_another_one(world: World) -> None:
    async with world() as (server, api):
        seen = server.add_pod(pod_object("a", uid="u1"))["metadata"]["resourceVersion"]
        changed = server.patch("pods", "apps", "a", {"status": {"reason": "Changed"}}, "status")["metadata"]

        outdated = await failure_of(api.delete_pod("apps", "a", "u1", seen))
        successor = await failure_of(api.delete_pod("apps", "a", "u0", changed["resourceVersion"]))
        assert (outdated.status, successor.status) == (409, 409)
        assert "deletionTimestamp" not in server.cluster.objects("pods")[0]["metadata"]

        await api.delete_pod("apps", "a", "u1", changed["resourceVersion"])
        assert "deletionTimestamp" in server.cluster.objects("pods")[0]["metadata"]
        assert (await failure_of(api.delete_pod("apps", "b", "u1", "1"))).status == 404


async def test_a_pod_is_labelled_through_its_status(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a", uid="u1"))

        await api.label_pod("apps", "a", "u1", "cni.istio.io/uninitialized", "true")
        request = server.requests[-1].request

        assert (request.method, request.path) == ("PATCH", "/api/v1/namespaces/apps/pods/a/status")
        assert server.cluster.objects("pods")[0]["metadata"]["labels"]["cni.istio.io/uninitialized"] == "true"
        assert (await failure_of(api.label_pod("apps", "a", "u2", "k", "v"))).status == 409


async def test_a_watch_gives_events_and_ends_when_the_server_ends_it(world: World) -> None:
    async with world() as (server, api), api.watch(PODS, field_selector="spec.nodeName=n1") as events:
        await until(lambda: server.watches)
        server.add_pod(pod_object("a"))
        server.add_pod(pod_object("elsewhere", node="n2"))
        server.bookmark()
        server.end_watches()

        got = [(event["type"], event["object"]["metadata"].get("name")) async for event in events]

    assert got == [("ADDED", "a"), ("BOOKMARK", None)]


# status -> what the hint must name; 403 is the rule to add, in RBAC's words
STATUSES = [
    (400, "refused"),
    (401, "token"),
    (403, "get pods in namespace apps"),
    (404, "does not exist"),
    (409, "somebody else"),
    (410, "list again"),
    (429, "as long as it says"),
    (500, "problem of its own"),
    (503, "problem of its own"),
    (504, "problem of its own"),
]


@pytest.mark.parametrize(("status", "hint"), STATUSES)
async def test_an_error_says_call_status_and_what_to_do(account: Path, status: int, hint: str) -> None:
    async with double_and_api(account) as (server, api):
        server.fault("status", status=status, count=-1, message="because")

        error = await failure_of(api.get_pod("apps", "a"))

    assert (error.status, error.cause) == (status, failures.STATUS)
    assert error.message == f"GET /api/v1/namespaces/apps/pods/a: HTTP {status}: because"
    assert hint in error.hint


RULES = [
    (lambda api: api.get_object(*DAEMONSETS, "a", "b"), "get daemonsets of API group apps in namespace a"),
    (lambda api: api.get_object(*NODES, None, "n1"), "get nodes"),
    (lambda api: api.list_objects(*PODS), "list pods"),
    (lambda api: api.create_event("a", {}), "create events in namespace a"),
    (lambda api: api.patch_redirection("a", "b", "u", None), "patch pods/status in namespace a"),
    (lambda api: api.label_pod("a", "b", "u", "k", "v"), "patch pods/status in namespace a"),
    (lambda api: api.delete_pod("a", "b", "u", "1"), "delete pods in namespace a"),
]


@pytest.mark.parametrize(("call", "rule"), RULES)
async def test_forbidden_names_the_rule_to_add(account: Path, call: Callable[[KubeApi], Any], rule: str) -> None:
    async with double_and_api(account) as (server, api):
        server.fault("status", status=403)

        error = await failure_of(call(api))

    assert error.hint == f"the service account needs a rule that allows {rule}"


async def test_forbidden_watch_names_the_verb(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.fault("status", status=403)
        with pytest.raises(ApiError, match="allows watch pods"):
            async with api.watch(PODS):
                pass


async def test_throttling_says_how_long_to_wait(world: World) -> None:
    async with world() as (server, api):
        server.fault("status", status=429, retry_after_seconds=7)

        error = await failure_of(api.get_pod("apps", "a"))

    assert (error.status, error.retry_after_seconds) == (429, 7.0)


# the fault, the cause it is known by
NETWORK = [
    ({"kind": "hang"}, failures.TIMEOUT),
    ({"kind": "delay", "seconds": 30.0}, failures.TIMEOUT),
    ({"kind": "drop"}, failures.BROKEN),
    ({"kind": "truncate"}, failures.BROKEN),
    ({"kind": "garbage"}, failures.BROKEN),
]


@pytest.mark.parametrize(("fault", "cause"), NETWORK)
async def test_a_network_that_fails(world: World, fault: dict[str, Any], cause: str) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        server.fault(count=-1, **fault)

        error = await failure_of(api.get_pod("apps", "a", timeout=0.2))

        assert (error.status, error.cause) == (0, cause)
        assert error.message.startswith("GET /api/v1/namespaces/apps/pods/a: ")
        assert error.hint or cause == failures.BROKEN
        server.clear_faults()
        assert (await api.get_pod("apps", "a")).name == "a"


@pytest.mark.parametrize("kind", ["drop", "truncate"])
async def test_a_connection_that_broke_once_is_tried_anew(world: World, kind: str) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a"))
        server.fault(kind, count=1)

        assert (await api.get_pod("apps", "a")).name == "a"


async def test_a_post_is_not_sent_twice(world: World) -> None:
    async with world() as (server, api):
        server.fault("drop", method="POST")

        error = await failure_of(api.create_event("apps", {}))

        assert error.cause == failures.BROKEN
        assert len(server.requests) == 1


async def test_nobody_listens(world: World) -> None:
    async with world() as (server, api):
        await server.stop()

        error = await failure_of(api.get_pod("apps", "a"))

    assert (error.status, error.cause) == (0, failures.CONNECT)
    assert "reaches the API server" in error.hint


async def test_a_server_of_another_ca(certificates: Certificates, account: Path, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other")
    assert other is not None
    async with double_and_api(account, certificates=certificates) as (_, api):
        (account / "ca.crt").write_bytes(other.ca_cert.read_bytes())

        error = await failure_of(api.get_pod("apps", "a"))

    assert (error.status, error.cause) == (0, failures.TLS)
    assert "CA file" in error.hint


async def test_a_rotated_ca_is_trusted_without_a_restart(
    certificates: Certificates, account: Path, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path / "other")
    assert other is not None
    async with double_and_api(account, certificates=certificates) as (server, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        await server.stop()
        server.certificates = other
        await server.start()
        assert (await failure_of(api.get_pod("apps", "a"))).cause == failures.TLS

        (account / "ca.crt").write_bytes(other.ca_cert.read_bytes())

        assert (await api.get_pod("apps", "a")).name == "a"


async def test_a_refused_token_is_read_again_and_the_call_repeated(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        server.tokens = {"token-2"}
        server.requests.clear()

        error = await failure_of(api.get_pod("apps", "a"))  # the file still has the old one

        assert (error.status, [r.token for r in server.requests]) == (401, [TOKEN, TOKEN])
        rotate_token(account, "token-2")
        assert (await api.get_pod("apps", "a")).name == "a"
        assert [r.token for r in server.requests] == [TOKEN, TOKEN, "token-2"]


async def test_a_token_overwritten_unnoticeably_is_read_again_when_it_is_refused(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        server.tokens = {"token-2"}
        before = (account / "token").stat()
        (account / "token").write_text("token-2")  # as long as the one before, in the same inode
        os.utime(account / "token", ns=(before.st_atime_ns, before.st_mtime_ns))

        assert (await api.get_pod("apps", "a")).name == "a"
        assert [r.token for r in server.requests] == [TOKEN, TOKEN, "token-2"]


async def test_a_token_swapped_during_a_call_costs_one_repetition(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.add_pod(pod_object("a"))
        rotate_token(account, TOKEN)
        server.tokens = {"token-2"}
        server.fault("delay", seconds=0.2)
        call = asyncio.ensure_future(api.get_pod("apps", "a"))
        await until(lambda: server.requests)

        rotate_token(account, "token-2")

        assert (await call).name == "a"
        assert [r.token for r in server.requests] == [TOKEN, "token-2"]


def test_a_token_survives_a_half_done_rotation_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = TokenFile(str(file))
    with pytest.raises(ApiError, match="no API token in"):
        token.current()
    file.write_text("secret-1\n")
    assert token.current() == "secret-1"
    for broken in (b"", b"\xff\xfe"):
        file.write_bytes(broken)
        assert token.current() == "secret-1"
    file.unlink()
    assert token.current() == "secret-1"
    file.write_text("secret-2")
    assert token.current() == "secret-2"
    assert "secret" not in repr(token)


ENVIRONMENTS = [
    ({}, "KUBERNETES_SERVICE_HOST is not set"),
    ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "KUBERNETES_SERVICE_PORT is not set"),
    ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}, "ca.crt cannot be used"),
]


@pytest.mark.parametrize(("environment", "complaint"), ENVIRONMENTS)
async def test_outside_of_a_pod(account: Path, environment: dict[str, str], complaint: str) -> None:
    async with KubeApi(InCluster(environment, str(account))) as api:
        error = await failure_of(api.get_pod("apps", "a"))

    assert complaint in error.message
    assert (error.cause, bool(error.hint)) == (failures.CREDENTIALS, True)


def test_addresses_of_the_cluster() -> None:
    def server(**environment: str) -> str:
        return InCluster({f"KUBERNETES_SERVICE_{name}": value for name, value in environment.items()}).server

    assert server(HOST="10.96.0.1", PORT="443") == "https://10.96.0.1:443"
    assert server(HOST="fd00::1", PORT="6443") == "https://[fd00::1]:6443"
    assert server(HOST="127.0.0.1", PORT="80", PROTOCOL="http") == "http://127.0.0.1:80"


KUBECONFIGS = [
    (None, "not found"),
    ("{", "kubeconfig"),
    ("[]", "kubeconfig"),
    ("clusters: []\ncontexts: []\n", "current context"),
    ("clusters: []\ncontexts: []\ncurrent-context: none\n", "none"),
]


@pytest.mark.parametrize(("text", "complaint"), KUBECONFIGS)
async def test_a_kubeconfig_that_cannot_be_used(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    async with KubeApi(KubeconfigFile(str(path))) as api:
        error = await failure_of(api.get_pod("apps", "a"))

    assert complaint in error.message
    assert str(path) in error.message


async def test_calls_share_few_connections(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.add_pod(pod_object("a"))
        for _ in range(20):
            await api.get_pod("apps", "a")
        assert server.connections_accepted == 1

        server.fault("delay", seconds=0.02, count=-1)
        await asyncio.gather(*(api.get_pod("apps", "a") for _ in range(50)))

        assert server.most_connections == MAX_CALLS
        await until(lambda: server.connections_open == MAX_IDLE)


async def test_calls_and_failures_leave_nothing_open(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        before, tasks = open_descriptors(), len(asyncio.all_tasks())
        for kind in ("hang", "drop", "garbage", "truncate", "status") * 10:
            server.clear_faults()
            server.fault(kind, count=-1)
            await failure_of(api.get_pod("apps", "a", timeout=0.03))
        server.clear_faults()
        await api.get_pod("apps", "a")
        # The double closes its ends; a busy machine takes its time for it, and what leaks never goes.
        await until(lambda: open_descriptors() <= before and len(asyncio.all_tasks()) <= tasks + 1)


async def test_the_pool_does_not_use_a_connection_the_server_closed(world: World) -> None:
    async with world() as (server, api):
        server.add_pod(pod_object("a"))
        await api.get_pod("apps", "a")
        await server.stop()
        await server.start()

        assert (await api.get_pod("apps", "a")).name == "a"
        await server.stop()
        await server.start()
        await asyncio.sleep(0.05)  # a proxy passes the end on
        await api.create_event("apps", {"metadata": {"name": "e"}})  # never sent twice, so it must be right at once


async def test_names_are_quoted_into_paths(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        await failure_of(api.get_object(*EVENTS, "../nodes", "a/b?c"))

        assert server.requests[-1].request.path == "/api/v1/namespaces/../nodes/events/a/b?c"
        assert server.requests[-1].request.query == {}


CHUNKS = [
    ([b"a\nbb\n"], [b"a", b"bb"]),
    ([b"a", b"a\n", b"\n\n", b"b\n"], [b"aa", b"b"]),
    ([], []),
    ([b"123456789\n"], None),
    ([b"12345", b"6789"], None),
    ([b"a\nb"], None),
]


@pytest.mark.parametrize(("chunks", "lines"), CHUNKS)
async def test_lines_of_a_stream(chunks: list[bytes], lines: list[bytes] | None) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def read() -> list[bytes]:
        return [line async for line in split_lines(stream(), 8, ValueError)]

    if lines is None:
        with pytest.raises(ValueError, match="line"):
            await read()
    else:
        assert await read() == lines
