"""The few calls meshcni makes to the Kubernetes API, each with a deadline and an error that says what to do.

Objects travel as the API's own JSON: a projection (`pods.pod_from_object`) takes from it what is needed, so no typed
model of the API is loaded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

from meshcni import __version__, istio
from meshcni.kube import failures
from meshcni.kube.credentials import Access, InCluster
from meshcni.kube.failures import ApiError, describe, from_answer, from_status, without_answer
from meshcni.pods.model import Pod, pod_from_object

if TYPE_CHECKING:
    from meshcni.kube.transport import Transport

CALL_SECONDS = 5.0  # deadline of one call, retries included; the runtime gives an ADD minutes, a person seconds
MAX_CALLS = 8  # at once; more wait within their deadline. 429 answers are honoured by who retries
PAGE_LIMIT = 500  # objects per page of a list, as client-go's pager asks
MAX_EVENT_BYTES = 4 * 1024 * 1024  # one line of a watch; etcd allows objects of 1.5 MiB
MAX_ERROR_BYTES = 64 * 1024
REPEATABLE = frozenset({"GET", "PATCH"})  # our patches name the state they want: sent twice they do the same as once

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

Object = dict[str, Any]
T = TypeVar("T")


class Resource(NamedTuple):
    """A kind of object as the API's paths name it; `group` is empty for the core group."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """`/api/v1/namespaces/a/pods/b`; without a namespace the path of all namespaces, or of a cluster-wide kind."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)


PODS = Resource("", "v1", "pods")
NAMESPACES = Resource("", "v1", "namespaces")
NODES = Resource("", "v1", "nodes")
EVENTS = Resource("", "v1", "events")
DAEMONSETS = Resource("apps", "v1", "daemonsets")
ACCESS_REVIEWS = Resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews")


@dataclass(frozen=True)
class Page:
    """A part of a list: the objects, the version of the whole, and where it goes on (empty at the end)."""

    items: tuple[Object, ...]
    resource_version: str
    go_on: str


class KubeApi:
    """The API server behind `access`. Nothing is read or connected before the first call.

    Every method raises ApiError (a KubeError) and nothing else, apart from cancellation.
    """

    def __init__(self, access: Access, *, user_agent: str = f"{istio.AGENT_NAME}/{__version__} (meshcni)") -> None:
        self._access = access
        self._user_agent = user_agent
        self._transport: Transport | None = None
        self._opening = asyncio.Lock()
        self._slots = asyncio.Semaphore(MAX_CALLS)

    async def close(self) -> None:
        """End all connections; a later call would open new ones."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    async def __aenter__(self) -> KubeApi:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def get_pod(self, namespace: str, name: str, *, timeout: float = CALL_SECONDS) -> Pod:
        """One pod. Raises ApiError (404 when there is none), PodSpecError when the answer is no pod."""
        found = await self.get_object(*PODS, namespace, name, timeout=timeout)
        return pod_from_object(found)

    async def get_object(
        self,
        group: str,
        version: str,
        resource: str,
        namespace: str | None,
        name: str,
        *,
        timeout: float = CALL_SECONDS,
    ) -> Object:
        """One object as JSON, for example `get_object(*DAEMONSETS, "kube-system", "istio-cni-node")`."""
        return await self._json("GET", Resource(group, version, resource).path(namespace, name), timeout=timeout)

    async def list_objects(
        self,
        group: str,
        version: str,
        resource: str,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int | None = None,
        metadata_only: bool = False,
        timeout: float = CALL_SECONDS,
    ) -> list[Object]:
        """The objects that match, at most `limit` of them; `timeout` is for each page of 500."""
        found: list[Object] = []
        go_on = ""
        while True:
            page = await self.list_page(
                Resource(group, version, resource),
                namespace,
                label_selector=label_selector,
                field_selector=field_selector,
                page_limit=PAGE_LIMIT if limit is None else min(PAGE_LIMIT, limit - len(found)),
                go_on=go_on,
                metadata_only=metadata_only,
                timeout=timeout,
            )
            found += page.items
            go_on = page.go_on
            if not go_on or (limit is not None and len(found) >= limit):
                return found[:limit]

    async def list_page(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: str = "",
        page_limit: int = PAGE_LIMIT,
        go_on: str = "",
        metadata_only: bool = False,
        timeout: float = CALL_SECONDS,
    ) -> Page:
        """One page. `resource_version` is the API's "not older than"; it may not be given with `go_on`."""
        query = _query(
            labelSelector=label_selector,
            fieldSelector=field_selector,
            resourceVersion=resource_version,
            limit=str(page_limit) if page_limit else "",
            **{"continue": go_on},
        )
        accept = f"{METADATA_LIST}, {JSON}" if metadata_only else JSON
        path = resource.path(namespace) + query
        answer = await self._json("GET", path, accept=accept, timeout=timeout)
        metadata, items = answer.get("metadata"), answer.get("items", [])
        if not isinstance(metadata, dict) or not isinstance(items, list | None):
            raise without_answer(failures.BROKEN, describe("GET", path), "the answer is not a list of objects")
        return Page(tuple(items or ()), str(metadata.get("resourceVersion") or ""), str(metadata.get("continue") or ""))

    async def patch_redirection(
        self, namespace: str, name: str, uid: str, value: str | None, *, timeout: float = CALL_SECONDS
    ) -> Pod:
        """Annotate a pod with the state of its redirection, None takes the annotation away; returns the pod after it.

        The pod of UID `uid` or none: 404 is for a name that nobody has, 409 for one that another pod has by now.
        `pods/status` is patched because that is what the agent's role allows. Raises ApiError, and PodSpecError when
        it was done but the answer is no pod.
        """
        body = {"metadata": {"uid": uid, "annotations": {istio.AMBIENT_REDIRECTION: value}}}
        path = PODS.path(namespace, name, "status")
        answer = await self._json("PATCH", path, body=body, content_type=MERGE_PATCH, timeout=timeout)
        return pod_from_object(answer)

    async def label_pod(
        self, namespace: str, name: str, uid: str, key: str, value: str, *, timeout: float = CALL_SECONDS
    ) -> None:
        """Set a label of the pod of UID `uid` or none, through `pods/status`; errors as of `patch_redirection`."""
        body = {"metadata": {"uid": uid, "labels": {key: value}}}
        path = PODS.path(namespace, name, "status")
        await self._json("PATCH", path, body=body, content_type=MERGE_PATCH, timeout=timeout)

    async def delete_pod(
        self, namespace: str, name: str, uid: str, resource_version: str, *, timeout: float = CALL_SECONDS
    ) -> None:
        """Delete the pod as it was seen: 404 when there is none, 409 for another UID or a newer version of it."""
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        await self._json("DELETE", PODS.path(namespace, name), body=body, timeout=timeout)

    async def create_event(self, namespace: str, event: Object, *, timeout: float = CALL_SECONDS) -> None:
        """Post a core/v1 Event into `namespace`."""
        await self._json("POST", EVENTS.path(namespace), body=event, timeout=timeout)

    async def may(
        self,
        verb: str,
        resource: Resource,
        *,
        subresource: str = "",
        name: str = "",
        namespace: str = "",
        timeout: float = CALL_SECONDS,
    ) -> bool:
        """Whether the API server would allow us `verb` on a resource, in one namespace or (empty) in all of them."""
        attributes = {
            "verb": verb,
            "group": resource.group,
            "resource": resource.plural,
            "subresource": subresource,
            "name": name,
            "namespace": namespace,
        }
        body = {
            "apiVersion": f"{ACCESS_REVIEWS.group}/{ACCESS_REVIEWS.version}",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
        }
        answer = await self._json("POST", ACCESS_REVIEWS.path(), body=body, timeout=timeout)
        status = answer.get("status")
        if not isinstance(status, dict) or not isinstance(status.get("allowed"), bool):
            raise without_answer(failures.BROKEN, describe("POST", ACCESS_REVIEWS.path()), "the answer is no review")
        return bool(status["allowed"])

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: str = "",
        server_timeout_seconds: int = 300,
        open_seconds: float = 15.0,
        silence_seconds: float = 90.0,
        metadata_only: bool = False,
    ) -> AsyncIterator[AsyncIterator[Object]]:
        """Open a watch and give its events (`{"type": ..., "object": ...}`), bookmarks included.

        The iterator ends when the server ends the watch as agreed. No answer within `open_seconds`, a connection that
        breaks, a last line that is not whole, an ERROR event, or `silence_seconds` without a byte raise ApiError.
        """
        query = _query(
            watch="true",
            allowWatchBookmarks="true",
            labelSelector=label_selector,
            fieldSelector=field_selector,
            resourceVersion=resource_version,
            timeoutSeconds=str(server_timeout_seconds),
        )
        path = resource.path(namespace) + query
        accept = f"{METADATA}, {JSON}" if metadata_only else JSON
        call = describe("GET", path)
        transport = await self._open()
        headers = self._headers(transport, {"Accept": accept, "Content-Type": JSON})
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(open_seconds):
                    answer = await stack.enter_async_context(
                        transport.stream("GET", path, headers, None, silence_seconds)
                    )
            except TimeoutError as error:
                raise without_answer(failures.TIMEOUT, call, f"no answer within {open_seconds:g} s") from error
            if answer.status >= 300:
                if answer.status == 401 and transport.token is not None:
                    transport.token.forget()
                raise from_answer(answer.status, call, answer.headers, await _bounded(answer.chunks))
            yield _events(call, answer.chunks)

    async def _json(
        self,
        method: str,
        path: str,
        *,
        accept: str = JSON,
        body: Object | None = None,
        content_type: str = JSON,
        timeout: float,
    ) -> Object:
        """One call with deadline. A 401 reads the token again, a connection that broke is tried anew: once each."""
        call = describe(method, path)
        wanted = {"Accept": accept, "Content-Type": content_type}
        try:
            async with asyncio.timeout(timeout), self._slots:
                status, headers, content = await self._call(method, path, wanted, body, timeout)
        except TimeoutError as error:
            raise without_answer(failures.TIMEOUT, call, f"no answer within {timeout:g} s") from error
        if status >= 300:
            raise from_answer(status, call, headers, content)
        return _decoded(call, content)

    async def _call(
        self, method: str, path: str, wanted: Mapping[str, str], body: Object | None, timeout: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        transport = await self._open()
        content = json.dumps(body).encode() if body is not None else None
        retries = {"unauthorized": 1, "broken": 1 if method in REPEATABLE else 0}
        while True:
            headers = self._headers(transport, wanted)
            try:
                async with transport.stream(method, path, headers, content, timeout) as answer:
                    got = b"".join([chunk async for chunk in answer.chunks])
            except ApiError as error:
                if error.cause != failures.BROKEN or not retries["broken"]:
                    raise
                retries["broken"] -= 1
                continue
            if answer.status != 401 or transport.token is None or not retries["unauthorized"]:
                return answer.status, answer.headers, got
            transport.token.forget()
            retries["unauthorized"] -= 1

    def _headers(self, transport: Transport, wanted: Mapping[str, str]) -> dict[str, str]:
        headers = {"User-Agent": self._user_agent, **wanted}
        if transport.token is not None:
            headers["Authorization"] = f"Bearer {transport.token.current()}"
        return headers

    async def _open(self) -> Transport:
        """The transport, made on a thread at first use: it imports, reads files and makes a TLS context."""
        async with self._opening:
            if self._transport is None:
                self._transport = await asyncio.to_thread(_make_transport, self._access)
            return self._transport


def _make_transport(access: Access) -> Transport:
    """The light transport in a cluster, lightkube where a kubeconfig may ask for anything."""
    if isinstance(access, InCluster):
        from meshcni.kube.transport import ClusterTransport

        return ClusterTransport(access)
    from meshcni.kube.kubeconfig import KubeconfigTransport

    return KubeconfigTransport(access)


def _query(**parameters: str) -> str:
    given = {name: value for name, value in parameters.items() if value}
    return f"?{urlencode(given)}" if given else ""


def _decoded(call: str, body: bytes) -> Object:
    try:
        decoded = json.loads(body)
    except ValueError as error:
        raise without_answer(failures.BROKEN, call, f"the answer is not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise without_answer(failures.BROKEN, call, "the answer is not a JSON object")
    return decoded


async def _bounded(chunks: AsyncIterator[bytes]) -> bytes:
    found = b""
    async for chunk in chunks:
        found += chunk
        if len(found) >= MAX_ERROR_BYTES:
            break
    return found


async def _events(call: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[Object]:
    async for line in split_lines(
        chunks, MAX_EVENT_BYTES, lambda problem: without_answer(failures.BROKEN, call, problem)
    ):
        event = _decoded(call, line)
        if event.get("type") == "ERROR":
            status = event.get("object")
            raise from_status(call, status if isinstance(status, Mapping) else {})
        yield event


async def split_lines(
    chunks: AsyncIterator[bytes], max_bytes: int, failure: Callable[[str], Exception]
) -> AsyncIterator[bytes]:
    """The lines of a stream without blank ones. A line over `max_bytes` or a last one without its end is a failure."""
    rest: list[bytes] = []
    size = 0
    async for chunk in chunks:
        *complete, tail = chunk.split(b"\n")
        for part in complete:
            line = b"".join([*rest, part])
            rest, size = [], 0
            if len(line) > max_bytes:
                raise failure(f"a line of {len(line)} bytes, more than {max_bytes}")
            if line.strip():
                yield line
        if tail:
            rest.append(tail)
            size += len(tail)
            if size > max_bytes:
                raise failure(f"a line of more than {max_bytes} bytes")
    if b"".join(rest).strip():
        raise failure("the stream ended within a line")
