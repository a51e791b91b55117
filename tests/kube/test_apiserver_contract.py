"""What the double and a real API server have in common: one suite for both.

The real one is asked when MESHCNI_REAL_APISERVER names it: `<url>,<token>[,<CA file>]`, with a token that may do
everything. The suite makes its own namespaces and leaves none behind; it needs no node and no controller.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from lab.apiserver import ApiServer
from tests.kube.worlds import TOKEN, until

from meshcni.istio import AMBIENT_REDIRECTION as REDIRECTION
from meshcni.kube.client import MERGE_PATCH, METADATA, METADATA_LIST, PODS, KubeApi, Object, split_lines
from meshcni.kube.credentials import InCluster
from meshcni.kube.events import EventRecorder
from meshcni.kube.failures import ApiError
from meshcni.kube.informer import Informer
from meshcni.kube.reducer import ChangeKind
from meshcni.kube.transport import ClusterTransport
from meshcni.pods.model import pod_from_object

VARIABLE = "MESHCNI_REAL_APISERVER"
REAL = os.environ.get(VARIABLE, "")
NODE = "no-such-node"


@dataclass
class Peer:
    """An API server, real or not, and a namespace of the test's own on it."""

    access: InCluster
    transport: ClusterTransport
    token: str
    namespace: str = ""
    double: ApiServer | None = None

    async def call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        accept: str = "application/json",
        content_type: str = "application/json",
        token: str = "",
        **query: str,
    ) -> tuple[int, Object]:
        headers = self._headers(accept, content_type, token)
        url = path + (f"?{urlencode(query)}" if query else "")
        content = None if body is None else json.dumps(body).encode()
        async with self.transport.stream(method, url, headers, content, 20.0) as answer:
            return answer.status, json.loads(b"".join([chunk async for chunk in answer.chunks]))

    @asynccontextmanager
    async def watch(self, *, accept: str = "application/json", **query: str) -> AsyncIterator[AsyncIterator[Object]]:
        url = f"{self.pods}?{urlencode({'watch': 'true', **query})}"
        async with self.transport.stream("GET", url, self._headers(accept, "", ""), None, 20.0) as answer:
            assert answer.status == 200

            async def events() -> AsyncIterator[Object]:
                async for line in split_lines(answer.chunks, 1 << 20, ValueError):
                    event = json.loads(line)
                    if event["type"] != "BOOKMARK":
                        yield event

            yield events()

    @property
    def pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    async def add_pod(self, name: str, labels: dict[str, str] | None = None, node: str = NODE) -> Object:
        pod = {
            "metadata": {"name": name, "labels": labels or {}},
            "spec": {
                "automountServiceAccountToken": False,
                "containers": [{"name": "app", "image": "example.invalid/app:1"}],
                **({"nodeName": node} if node else {"schedulerName": "nobody"}),  # a real scheduler would find a node
            },
        }
        status, made = await self.call("POST", self.pods, pod)
        assert status == 201, made
        return made

    async def delete_pod(self, name: str) -> None:
        status, answer = await self.call("DELETE", f"{self.pods}/{name}", gracePeriodSeconds="0")
        assert status == 200, answer

    async def version(self) -> str:
        _, listed = await self.call("GET", self.pods)
        return str(listed["metadata"]["resourceVersion"])

    def _headers(self, accept: str, content_type: str, token: str) -> dict[str, str]:
        headers = {"Accept": accept, "Authorization": f"Bearer {token or self.token}"}
        return {**headers, "Content-Type": content_type} if content_type else headers


def test_a_real_api_server_was_asked_too() -> None:
    if not REAL:
        pytest.skip(f"NO REAL API SERVER WAS ASKED: run with {VARIABLE}=https://host:port,TOKEN,/path/to/ca.crt")


@pytest.fixture(params=["double", "real"] if REAL else ["double"])
def open_peer(request: pytest.FixtureRequest, account: Path) -> Any:
    @asynccontextmanager
    async def double() -> AsyncIterator[Peer]:
        async with ApiServer(tokens=[TOKEN]) as server:
            server.write_service_account(account, TOKEN)
            access = InCluster(server.environment(), str(account))
            yield Peer(access, ClusterTransport(access), TOKEN, double=server)

    @asynccontextmanager
    async def named_by_variable() -> AsyncIterator[Peer]:
        url, token, *ca = REAL.split(",")
        parts = urlsplit(url)
        account.mkdir()
        (account / "token").write_text(token)
        if ca:
            (account / "ca.crt").write_bytes(Path(ca[0]).read_bytes())
        environment = {
            "KUBERNETES_SERVICE_HOST": parts.hostname or "",
            "KUBERNETES_SERVICE_PORT": str(parts.port or 443),
            "KUBERNETES_SERVICE_PROTOCOL": parts.scheme,
        }
        access = InCluster(environment, str(account))
        yield Peer(access, ClusterTransport(access), token)

    @asynccontextmanager
    async def with_namespace() -> AsyncIterator[Peer]:
        async with AsyncExitStack() as stack:
            peer = await stack.enter_async_context(double() if request.param == "double" else named_by_variable())
            peer.namespace = f"contract-{uuid.uuid4().hex[:8]}"
            made, answer = await peer.call("POST", "/api/v1/namespaces", {"metadata": {"name": peer.namespace}})
            assert made == 201, answer
            account_path = f"/api/v1/namespaces/{peer.namespace}/serviceaccounts"
            made, answer = await peer.call("POST", account_path, {"metadata": {"name": "default"}})
            assert made in (201, 409), answer  # a controller may have been quicker
            try:
                yield peer
            finally:
                _, left = await peer.call("GET", peer.pods)
                for pod in left["items"]:
                    await peer.delete_pod(pod["metadata"]["name"])
                await peer.call("DELETE", f"/api/v1/namespaces/{peer.namespace}")
                await peer.transport.close()

    return with_namespace


async def take(events: AsyncIterator[Object], count: int) -> list[tuple[str, str]]:
    found = []
    async for event in events:
        found.append((event["type"], event["object"]["metadata"]["name"]))
        if len(found) == count:
            break
    return found


async def test_a_missing_object(open_peer: Any) -> None:
    async with open_peer() as peer:
        status, answer = await peer.call("GET", f"{peer.pods}/nobody")

    assert (status, answer["kind"], answer["apiVersion"]) == (404, "Status", "v1")
    assert (answer["status"], answer["reason"], answer["code"]) == ("Failure", "NotFound", 404)
    assert answer["message"] == 'pods "nobody" not found'
    assert (answer["details"]["name"], answer["details"]["kind"]) == ("nobody", "pods")


async def test_an_unknown_resource(open_peer: Any) -> None:
    async with open_peer() as peer:
        status, _ = await peer.call("GET", "/api/v1/unheardofs")

    assert status == 404


async def test_a_wrong_token(open_peer: Any) -> None:
    async with open_peer() as peer:
        status, answer = await peer.call("GET", peer.pods, token="wrong")

    assert (status, answer["reason"], answer["message"]) == (401, "Unauthorized", "Unauthorized")


async def test_what_a_server_fills_in(open_peer: Any) -> None:
    async with open_peer() as peer:
        made = await peer.add_pod("a", {"app": "x"})
        _, read = await peer.call("GET", f"{peer.pods}/a")

    assert (read["kind"], read["apiVersion"]) == ("Pod", "v1")
    assert read["metadata"]["namespace"] == peer.namespace
    assert read["metadata"]["uid"] == made["metadata"]["uid"]
    assert read["metadata"]["resourceVersion"].isdecimal()
    assert read["metadata"]["creationTimestamp"].endswith("Z")
    assert read["status"]["phase"] == "Pending"


async def test_a_name_is_taken_once(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a")
        pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
        status, answer = await peer.call("POST", peer.pods, pod)

    assert (status, answer["reason"]) == (409, "AlreadyExists")


async def test_a_namespace_must_exist(open_peer: Any) -> None:
    async with open_peer() as peer:
        event = {"metadata": {"name": "e", "namespace": "no-such-namespace"}, "involvedObject": {}}
        status, _ = await peer.call("POST", "/api/v1/namespaces/no-such-namespace/events", event)

    assert status == 404


async def test_a_list(open_peer: Any) -> None:
    async with open_peer() as peer:
        for name in ("b", "a"):
            await peer.add_pod(name)
        _, listed = await peer.call("GET", peer.pods)

    assert (listed["kind"], listed["apiVersion"]) == ("PodList", "v1")
    assert [pod["metadata"]["name"] for pod in listed["items"]] == ["a", "b"]
    assert all("kind" not in pod for pod in listed["items"])
    assert int(listed["metadata"]["resourceVersion"]) >= max(
        int(pod["metadata"]["resourceVersion"]) for pod in listed["items"]
    )


async def test_a_list_in_pages_is_of_one_moment(open_peer: Any) -> None:
    async with open_peer() as peer:
        for name in "abcde":
            await peer.add_pod(name)
        _, first = await peer.call("GET", peer.pods, limit="2")
        await peer.delete_pod("e")
        await peer.add_pod("cc")
        token = first["metadata"]["continue"]
        _, second = await peer.call("GET", peer.pods, limit="2", **{"continue": token})
        _, third = await peer.call("GET", peer.pods, limit="2", **{"continue": second["metadata"]["continue"]})
        refused, _ = await peer.call("GET", peer.pods, resourceVersion="5", **{"continue": token})

    assert [[pod["metadata"]["name"] for pod in page["items"]] for page in (first, second, third)] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert [page["metadata"].get("remainingItemCount") for page in (first, second, third)] == [3, 1, None]
    assert len({page["metadata"]["resourceVersion"] for page in (first, second, third)}) == 1
    assert not third["metadata"].get("continue")
    assert refused == 400


# label selector -> pods; a: app=x tier=1, b: app=y, c: none
LABELS = [
    ("app=x", {"a"}),
    ("app==x", {"a"}),
    ("app!=x", {"b", "c"}),
    ("app in (x, y)", {"a", "b"}),
    ("app notin (x)", {"b", "c"}),
    ("app", {"a", "b"}),
    ("!app", {"c"}),
    ("app,tier=1", {"a"}),
]
# field selector -> pods; c is on no node
FIELDS = [
    (f"spec.nodeName={NODE}", {"a", "b"}),
    ("spec.nodeName=", {"c"}),
    (f"spec.nodeName!={NODE}", {"c"}),
    ("metadata.name=a", {"a"}),
    (f"spec.nodeName={NODE},metadata.name!=a", {"b"}),
]


async def test_selectors(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a", {"app": "x", "tier": "1"})
        await peer.add_pod("b", {"app": "y"})
        await peer.add_pod("c", node="")
        for parameter, table in (("labelSelector", LABELS), ("fieldSelector", FIELDS)):
            for selector, names in table:
                status, listed = await peer.call("GET", peer.pods, **{parameter: selector})
                assert status == 200, selector
                assert {pod["metadata"]["name"] for pod in listed["items"]} == names, selector
        status, answer = await peer.call("GET", peer.pods, fieldSelector="spec.unheardOf=1")

    assert (status, answer["reason"]) == (400, "BadRequest")
    assert "field label not supported" in answer["message"]


async def test_metadata_only(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a", {"app": "x"})
        _, listed = await peer.call("GET", peer.pods, accept=METADATA_LIST)
        _, one = await peer.call("GET", f"{peer.pods}/a", accept=METADATA)
        async with peer.watch(accept=METADATA) as events:
            event = await anext(events)

    assert (listed["kind"], listed["apiVersion"]) == ("PartialObjectMetadataList", "meta.k8s.io/v1")
    for found in (listed["items"][0], one, event["object"]):
        assert found["metadata"]["labels"] == {"app": "x"}
        assert not found.keys() & {"spec", "status"}


async def test_a_watch_goes_on_where_a_list_ended(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("before")
        version = await peer.version()
        await peer.add_pod("a")
        await peer.call("PATCH", f"{peer.pods}/a", {"metadata": {"labels": {"x": "1"}}}, content_type=MERGE_PATCH)
        await peer.delete_pod("a")
        async with peer.watch(resourceVersion=version) as events:
            found = []
            async for event in events:
                found.append(event)
                if event["type"] == "DELETED":
                    break
            await peer.add_pod("live")
            assert await take(events, 1) == [("ADDED", "live")]

    kinds = [event["type"] for event in found]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("ADDED", {"MODIFIED"}, "DELETED")
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in found]
    assert versions == sorted(set(versions))
    assert all(event["object"]["kind"] == "Pod" for event in found)


async def test_a_watch_tells_what_enters_and_leaves_its_selection(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a", {"app": "x"})
        version = await peer.version()
        async with peer.watch(resourceVersion=version, labelSelector="app=x") as events:
            for value in ("y", "x"):
                patch = {"metadata": {"labels": {"app": value}}}
                await peer.call("PATCH", f"{peer.pods}/a", patch, content_type=MERGE_PATCH)

            assert await take(events, 2) == [("DELETED", "a"), ("ADDED", "a")]


async def test_a_watch_from_nowhere_begins_with_what_is_there(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a")
        await peer.add_pod("b")
        async with peer.watch() as events:
            assert set(await take(events, 2)) == {("ADDED", "a"), ("ADDED", "b")}


async def test_a_watch_ends_properly_after_its_time(open_peer: Any) -> None:
    async with open_peer() as peer, peer.watch(resourceVersion=await peer.version(), timeoutSeconds="1") as events:
        assert [event async for event in events] == []


async def test_a_watch_from_too_long_ago_is_told_so_in_an_event(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a")
        if peer.double is not None:
            peer.double.compact()
        async with peer.watch(resourceVersion="1") as events:
            event = await anext(events)
        if peer.double is None and event["type"] == "ADDED":
            pytest.skip("this API server has kept every version since its first start: restart it and ask again")

    assert event["type"] == "ERROR"
    assert (event["object"]["kind"], event["object"]["code"], event["object"]["reason"]) == ("Status", 410, "Expired")
    assert event["object"]["message"].startswith("too old resource version")


async def test_a_list_from_the_future(open_peer: Any) -> None:
    async with open_peer() as peer:
        future = str(int(await peer.version()) + 1_000_000)
        status, answer = await peer.call("GET", peer.pods, resourceVersion=future)

    assert (status, answer["reason"]) == (504, "Timeout")
    assert "Too large resource version" in answer["message"]
    assert answer["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


async def test_a_merge_patch_of_status(open_peer: Any) -> None:
    async with open_peer() as peer:
        made = await peer.add_pod("a")
        patch = {
            "metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}},
            "spec": {"nodeName": "elsewhere"},
            "status": {"reason": "Because"},
        }
        status, patched = await peer.call("PATCH", f"{peer.pods}/a/status", patch, content_type=MERGE_PATCH)
        _, again = await peer.call("PATCH", f"{peer.pods}/a/status", patch, content_type=MERGE_PATCH)
        remove = {"metadata": {"annotations": {"ambient.istio.io/redirection": None}}}
        _, removed = await peer.call("PATCH", f"{peer.pods}/a/status", remove, content_type=MERGE_PATCH)

    assert status == 200
    assert patched["metadata"]["annotations"] == {"ambient.istio.io/redirection": "enabled"}
    assert patched["status"]["reason"] == "Because"
    assert patched["spec"]["nodeName"] == NODE
    assert patched["metadata"]["resourceVersion"] != made["metadata"]["resourceVersion"]
    assert again["metadata"]["resourceVersion"] == patched["metadata"]["resourceVersion"]
    assert "ambient.istio.io/redirection" not in removed["metadata"].get("annotations", {})


async def test_a_patch_of_status_changes_status_and_metadata_only(open_peer: Any) -> None:
    async with open_peer() as peer:
        made = await peer.add_pod("a", {"app": "x"})
        owner = {"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}
        patch = {
            "metadata": {"labels": {"app": "y"}, "ownerReferences": [owner]},
            "spec": {"containers": [], "hostNetwork": True},
            "status": {"podIP": "10.0.0.9"},
        }
        status, patched = await peer.call("PATCH", f"{peer.pods}/a/status", patch, content_type=MERGE_PATCH)
        _, found = await peer.call("GET", f"{peer.pods}/a")

    assert status == 200
    assert found == patched
    assert found["spec"] == made["spec"]
    assert found["metadata"]["labels"] == {"app": "y"}
    assert "ownerReferences" not in found["metadata"]
    assert found["status"]["podIP"] == "10.0.0.9"


# what a patch says of the UID -> HTTP status; {} stands for the pod's own
UIDS = [
    ({"uid": "{}"}, 200),
    ({"uid": ""}, 200),
    ({"uid": None}, 200),
    ({"uid": "00000000-0000-4000-8000-00000000dead"}, 422),
]


@pytest.mark.parametrize(("metadata", "expected"), UIDS)
@pytest.mark.parametrize("subresource", ["", "/status"])
async def test_a_patch_can_name_the_uid_it_is_meant_for(
    open_peer: Any, metadata: Object, expected: int, subresource: str
) -> None:
    async with open_peer() as peer:
        made = await peer.add_pod("a")
        own = made["metadata"]["uid"]
        wanted = own if metadata["uid"] == "{}" else metadata["uid"]
        patch = {"metadata": {"uid": wanted, "annotations": {"x": "1"}}}
        status, answer = await peer.call("PATCH", f"{peer.pods}/a{subresource}", patch, content_type=MERGE_PATCH)
        _, found = await peer.call("GET", f"{peer.pods}/a")

    assert status == expected
    assert found["metadata"]["uid"] == own
    assert found["metadata"].get("annotations", {}) == ({"x": "1"} if expected == 200 else {})
    if expected == 422:
        assert found == made
        assert (answer["kind"], answer["code"], answer["reason"]) == ("Status", 422, "Invalid")
        assert answer["message"] == (f'Pod "a" is invalid: metadata.uid: Invalid value: "{wanted}": field is immutable')
        assert answer["details"]["causes"][0]["field"] == "metadata.uid"


async def test_a_patch_with_an_old_version_is_a_conflict(open_peer: Any) -> None:
    async with open_peer() as peer:
        made = await peer.add_pod("a")
        old = made["metadata"]["resourceVersion"]
        patch = {"metadata": {"resourceVersion": old, "annotations": {"x": "1"}}}
        first, _ = await peer.call("PATCH", f"{peer.pods}/a/status", patch, content_type=MERGE_PATCH)
        patch["metadata"]["annotations"] = {"x": "2"}
        second, answer = await peer.call("PATCH", f"{peer.pods}/a/status", patch, content_type=MERGE_PATCH)

    assert (first, second, answer["reason"]) == (200, 409, "Conflict")


async def test_the_client_annotates_the_pod_it_means_and_no_other(open_peer: Any) -> None:
    async with open_peer() as peer, KubeApi(peer.access) as api:
        await peer.add_pod("a")
        first = await api.get_pod(peer.namespace, "a")
        enabled = await api.patch_redirection(peer.namespace, "a", first.uid, "enabled")
        removed = await api.patch_redirection(peer.namespace, "a", first.uid, None)
        again = await api.patch_redirection(peer.namespace, "a", first.uid, None)
        await peer.delete_pod("a")
        with pytest.raises(ApiError) as gone:
            await api.patch_redirection(peer.namespace, "a", first.uid, "enabled")
        await peer.add_pod("a")  # a successor of the same name, as StatefulSets make
        with pytest.raises(ApiError) as replaced:
            await api.patch_redirection(peer.namespace, "a", first.uid, "enabled")
        successor = await api.get_pod(peer.namespace, "a")

    assert (enabled.uid, enabled.annotations[REDIRECTION]) == (first.uid, "enabled")
    assert REDIRECTION not in removed.annotations
    assert again == removed
    assert (gone.value.status, gone.value.reason) == (404, "NotFound")
    assert (replaced.value.status, replaced.value.reason) == (409, "Conflict")
    assert successor.uid != first.uid
    assert REDIRECTION not in successor.annotations


async def test_a_patch_of_a_missing_pod_and_of_no_known_type(open_peer: Any) -> None:
    async with open_peer() as peer:
        missing, _ = await peer.call("PATCH", f"{peer.pods}/a", {}, content_type=MERGE_PATCH)
        with_uid = {"metadata": {"uid": "u"}}
        missing_status, _ = await peer.call("PATCH", f"{peer.pods}/a/status", with_uid, content_type=MERGE_PATCH)
        unknown, _ = await peer.call("PATCH", f"{peer.pods}/a", {}, content_type="application/x-unheard-of")

    assert (missing, missing_status, unknown) == (404, 404, 415)


async def test_a_pod_on_a_node_is_marked_before_it_goes(open_peer: Any) -> None:
    async with open_peer() as peer:
        await peer.add_pod("a")
        await peer.add_pod("unbound", node="")
        version = await peer.version()
        await peer.call("DELETE", f"{peer.pods}/unbound")
        await peer.call("DELETE", f"{peer.pods}/a")
        gone, _ = await peer.call("GET", f"{peer.pods}/unbound")
        status, marked = await peer.call("GET", f"{peer.pods}/a")
        await peer.delete_pod("a")
        finally_gone, _ = await peer.call("GET", f"{peer.pods}/a")
        async with peer.watch(resourceVersion=version, fieldSelector="metadata.name=a") as events:
            told = []
            async for event in events:
                told.append((event["type"], "deletionTimestamp" in event["object"]["metadata"]))
                if event["type"] == "DELETED":
                    break

    assert (gone, status, finally_gone) == (404, 200, 404)
    assert marked["metadata"]["deletionGracePeriodSeconds"] == 30
    assert ("MODIFIED", True) in told
    assert told[-1] == ("DELETED", True)


async def test_an_event_of_ours_is_accepted(open_peer: Any) -> None:
    async with open_peer() as peer:
        pod = pod_from_object(await peer.add_pod("a"))
        async with KubeApi(peer.access) as api:
            recorder = EventRecorder(api, node=NODE)
            await recorder.warn(pod, "FailedToProgram", "what, which, why")
            await until(lambda: recorder.stats.posted + recorder.stats.failed + recorder.stats.refused)
            path = f"/api/v1/namespaces/{peer.namespace}/events"
            _, listed = await peer.call("GET", path, fieldSelector=f"involvedObject.uid={pod.uid}")

    (event,) = listed["items"]
    assert (event["reason"], event["type"], event["count"]) == ("FailedToProgram", "Warning", 1)
    assert event["source"]["component"] == "istio-cni"


async def test_client_and_informer(open_peer: Any) -> None:
    async with open_peer() as peer, KubeApi(peer.access) as api:
        await peer.add_pod("a")
        pod = await api.get_pod(peer.namespace, "a")
        told: list[tuple[ChangeKind, str]] = []
        informer = Informer(api, PODS, pod_from_object, field_selector=f"metadata.namespace={peer.namespace}")
        informer.subscribe(lambda change: told.append((change.kind, change.value.name)))
        task = asyncio.create_task(informer.run())
        try:
            await informer.synced.wait()
            assert informer.get(peer.namespace, "a") == pod
            await peer.add_pod("b")
            await peer.delete_pod("b")
            await until(lambda: told[-1:] == [(ChangeKind.DELETED, "b")])
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    assert told[:2] == [(ChangeKind.ADDED, "a"), (ChangeKind.ADDED, "b")]
