"""The double itself: routes, bearer tokens, faults and the commands that tests give."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11

from lab.apiserver.access import REVIEWS, Denials, review
from lab.apiserver.faults import REASONS, Fault
from lab.apiserver.objects import BY_PLURAL, KINDS, Cluster, Kind, Object, Refusal, parse_selection
from lab.apiserver.tls import Certificates
from lab.apiserver.watches import Ending, Watch, partial_metadata
from lab.apiserver.wire import Connection, ConnectionLostError, Request

MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True)
class RequestRecord:
    """A request as tests look at it, with the bearer token it came with and when (seconds of time.monotonic)."""

    request: Request
    token: str
    at: float

    @property
    def is_watch(self) -> bool:
        """Whether it asked for a watch."""
        return self.request.is_watch


class ApiServer:
    """The double. `async with ApiServer() as server:` listens on 127.0.0.1 and a port of the kernel's choice.

    `tokens` None lets everybody in, otherwise a bearer token of the set is needed. `certificates` makes it HTTPS.
    `bookmark_seconds` is the interval of bookmarks; 0 sends none but those on command.
    """

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tokens: Iterable[str] | None = None,
        certificates: Certificates | None = None,
        bookmark_seconds: float = 0.0,
    ) -> None:
        self.cluster = cluster or Cluster()
        self.tokens = None if tokens is None else set(tokens)
        self.host, self.port = host, port
        self.certificates = certificates
        self.denied = Denials()
        self.faults: list[Fault] = []
        self.requests: list[RequestRecord] = []
        self.watches: set[Watch] = set()
        self.connections_accepted = 0
        self.most_connections = 0  # at once
        self._bookmark_seconds = bookmark_seconds
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()

    # --- life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> ApiServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; `port` is known afterwards and stays the same over `stop` and another `start`."""
        tls: ssl.SSLContext | None = None
        if self.certificates is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self.certificates.server_cert, self.certificates.server_key)
        self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]
        if self._bookmark_seconds:
            self._spawn(self._send_bookmarks())

    async def stop(self) -> None:
        """Stop listening and break all connections, as a crash would. The objects stay."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections_open(self) -> int:
        """How many connections clients have open now."""
        return len(self._connections)

    @property
    def url(self) -> str:
        """`http://127.0.0.1:40123`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.certificates is None else 'https'}://{host}:{self.port}"

    def environment(self) -> dict[str, str]:
        """What the kubelet would give a pod, so that in-cluster clients find the double."""
        return {
            "KUBERNETES_SERVICE_HOST": self.host,
            "KUBERNETES_SERVICE_PORT": str(self.port),
            "KUBERNETES_SERVICE_PROTOCOL": self.url.partition(":")[0],
        }

    def write_service_account(self, directory: Path, token: str, namespace: str = "istio-system") -> None:
        """The files that a pod finds in its service account's mount."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "token").write_text(token)
        (directory / "namespace").write_text(namespace)
        if self.certificates is not None:
            (directory / "ca.crt").write_bytes(Path(self.certificates.ca_cert).read_bytes())

    def write_kubeconfig(self, path: Path, token: str) -> None:
        """A kubeconfig (JSON is YAML) with `token`."""
        cluster: Object = {"server": self.url}
        if self.certificates is not None:
            cluster["certificate-authority"] = str(self.certificates.ca_cert)
        context = {"cluster": "double", "user": "tester"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "double", "cluster": cluster}],
            "users": [{"name": "tester", "user": {"token": token}}],
            "contexts": [{"name": "double", "context": context}],
            "current-context": "double",
        }
        path.write_text(json.dumps(config, indent=1))

    # --- commands -----------------------------------------------------------------------------------------------

    def add(self, plural: str, obj: Object) -> Object:
        """Add an object of any known kind; its namespace is made when it is missing."""
        kind = BY_PLURAL[plural]
        namespace = obj["metadata"].get("namespace", "default") if kind.namespaced else ""
        if namespace and not any(
            known["metadata"]["name"] == namespace for known in self.cluster.objects("namespaces")
        ):
            self.add_namespace(namespace)
        return self.cluster.create(kind, namespace, obj)

    def add_pod(self, obj: Object) -> Object:
        """Add a pod given as the API's JSON."""
        return self.add("pods", obj)

    def add_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> Object:
        """Add a namespace, with the label that every namespace has."""
        all_labels = {"kubernetes.io/metadata.name": name, **(labels or {})}
        return self.cluster.create(BY_PLURAL["namespaces"], "", {"metadata": {"name": name, "labels": all_labels}})

    def patch(self, plural: str, namespace: str, name: str, patch: Object, subresource: str = "") -> Object:
        """Merge `patch` into an object; `subresource` "status" for its status."""
        return self.cluster.patch(BY_PLURAL[plural], namespace, name, patch, subresource)

    def delete_pod(self, namespace: str, name: str) -> None:
        """Delete a pod at once."""
        self.cluster.delete(BY_PLURAL["pods"], namespace, name, grace_seconds=0)

    def fault(self, kind: str, **fields: Any) -> Fault:  # noqa: ANN401 - Fault's fields
        """Order a fault; see faults.Fault. The first one ordered that concerns a request is used."""
        ordered = Fault(kind, **fields)
        self.faults.append(ordered)
        return ordered

    def clear_faults(self) -> None:
        """All is well again."""
        self.faults.clear()

    def bookmark(self) -> None:
        """Send a bookmark with the current version to every watch that asked for them."""
        for watch in self.watches:
            watch.bookmark(self.cluster.version)

    def end_watches(self, prefix: str = "/") -> None:
        """End watches as a server does after timeoutSeconds."""
        for watch in self._watches_of(prefix):
            watch.end(Ending.PROPER)

    def cut_watches(self, prefix: str = "/", *, mid_line: bool = False) -> None:
        """Break the connections of watches, `mid_line` after half an event."""
        for watch in self._watches_of(prefix):
            watch.end(Ending.CUT, mid_line=mid_line)

    def fail_watches(self, status: int, prefix: str = "/") -> None:
        """End watches with an ERROR event."""
        for watch in self._watches_of(prefix):
            watch.refuse(Refusal(status, REASONS.get(status, "Unknown"), f"ordered by the test: {status}"))

    def freeze_watches(self, prefix: str = "/") -> None:
        """Send nothing more on the watches open now, and leave their connections open."""
        for watch in self._watches_of(prefix):
            watch.frozen = True

    def compact(self) -> None:
        """Forget the history: every version a client knows is too old, for a watch that it opens anew."""
        self.cluster.compact()

    # --- requests -----------------------------------------------------------------------------------------------

    def _watches_of(self, prefix: str) -> list[Watch]:
        return [watch for watch in self.watches if watch.path.startswith(prefix)]

    def _spawn(self, work: Any) -> None:  # noqa: ANN401 - a coroutine
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_bookmarks(self) -> None:
        while True:
            await asyncio.sleep(self._bookmark_seconds)
            self.bookmark()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._serve(Connection(reader, writer)))

    async def _serve(self, connection: Connection) -> None:
        self._connections.add(connection)
        self.connections_accepted += 1
        self.most_connections = max(self.most_connections, len(self._connections))
        try:
            while True:
                await self._answer(connection, await connection.next_request())
                if not connection.reusable():
                    return
        except (ConnectionLostError, OSError, h11.ProtocolError):
            return
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _answer(self, connection: Connection, request: Request) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.requests.append(RequestRecord(request, token, time.monotonic()))
        fault = next((f for f in self.faults if f.concerns(request.method, request.path, watch=request.is_watch)), None)
        try:
            if fault is not None:
                fault.count -= fault.count > 0
                await self._suffer(connection, fault)
            if self.tokens is not None and token not in self.tokens:
                raise Refusal(401, "Unauthorized", "Unauthorized")
            if request.path == REVIEWS:
                await connection.answer(201, review(request, self.denied))
                return
            self.denied.check(request)
            route = find_route(request)
            if request.is_watch and request.method == "GET" and not route.name:
                await self._watch(connection, request, route)
                return
            status, answer = self._route(request, route)
        except Refusal as refusal:
            wait = refusal.status["details"].get("retryAfterSeconds")
            await connection.answer(refusal.code, refusal.status, {"retry-after": str(wait)} if wait else None)
            return
        if fault is not None and fault.kind == "truncate":
            body = json.dumps(answer).encode()
            await connection.start(status, {"content-length": str(len(body))})
            await connection.send_data(body[: len(body) // 2])
            raise ConnectionLostError
        await connection.answer(status, b"<html>not JSON" if fault is not None and fault.kind == "garbage" else answer)

    async def _suffer(self, connection: Connection, fault: Fault) -> None:
        if fault.kind == "status":
            details = {} if fault.retry_after_seconds is None else {"retryAfterSeconds": fault.retry_after_seconds}
            reason = fault.reason or REASONS.get(fault.status, "Unknown")
            raise Refusal(fault.status, reason, fault.message or f"ordered by the test: {fault.status}", details)
        if fault.kind == "drop":
            raise ConnectionLostError
        if fault.kind == "hang":
            await connection.closed_by_client()
            raise ConnectionLostError
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)

    async def _watch(self, connection: Connection, request: Request, route: Route) -> None:
        query = request.query
        selection = parse_selection(
            route.kind, route.namespace, query.get("labelSelector", ""), query.get("fieldSelector", "")
        )
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        watch = Watch(request.path, route.kind, selection, wants_metadata(request), bookmarks)
        stop_listening = self.cluster.listen(watch.tell)
        self.watches.add(watch)
        try:
            watch.begin(self.cluster, query.get("resourceVersion", ""))
            seconds = query.get("timeoutSeconds", "")
            await watch.serve(connection, float(seconds) if seconds else None)
        finally:
            stop_listening()
            self.watches.discard(watch)

    def _route(self, request: Request, route: Route) -> tuple[int, Object]:
        try:
            body = json.loads(request.body) if request.body else {}
        except ValueError as error:
            raise Refusal(400, "BadRequest", f"the body is not JSON: {error}") from error
        kind, namespace, name = route.kind, route.namespace, route.name
        match request.method, bool(name):
            case "GET", True:
                found = self.cluster.get(kind, namespace, name)
                return 200, partial_metadata(found) if wants_metadata(request) else found
            case "GET", False:
                return 200, self._list(request, route)
            case "POST", False:
                return 201, self.cluster.create(kind, namespace, body)
            case "PATCH", True:
                if request.headers.get("content-type") != MERGE_PATCH:
                    raise Refusal(415, "UnsupportedMediaType", f"the double only speaks {MERGE_PATCH}")
                return 200, self.cluster.patch(kind, namespace, name, body, route.subresource)
            case "DELETE", True:
                grace = request.query.get("gracePeriodSeconds", body.get("gracePeriodSeconds"))
                return 200, self.cluster.delete(
                    kind,
                    namespace,
                    name,
                    grace_seconds=None if grace is None else int(grace),
                    preconditions=body.get("preconditions"),
                )
        raise Refusal(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _list(self, request: Request, route: Route) -> Object:
        query, kind = request.query, route.kind
        items, version, go_on, remaining = self.cluster.list_page(
            kind,
            parse_selection(kind, route.namespace, query.get("labelSelector", ""), query.get("fieldSelector", "")),
            resource_version=query.get("resourceVersion", ""),
            limit=int(query.get("limit") or 0),
            go_on=query.get("continue", ""),
        )
        metadata: Object = {"resourceVersion": str(version)}
        if go_on:
            metadata["continue"] = go_on
        if remaining is not None:
            metadata["remainingItemCount"] = remaining
        if wants_metadata(request):
            api_version, name, items = "meta.k8s.io/v1", "PartialObjectMetadata", [partial_metadata(o) for o in items]
        else:
            api_version, name = kind.api_version, kind.kind
            items = [{k: v for k, v in obj.items() if k not in ("kind", "apiVersion")} for obj in items]
        return {"kind": f"{name}List", "apiVersion": api_version, "metadata": metadata, "items": items}


@dataclass(frozen=True)
class Route:
    """What a path names."""

    kind: Kind
    namespace: str = ""
    name: str = ""
    subresource: str = ""


def find_route(request: Request) -> Route:
    """The object or collection a path names. Raises Refusal 404."""
    parts = [part for part in request.path.split("/") if part]
    group, rest = ("", parts[1:]) if parts[:1] == ["api"] else (parts[1] if len(parts) > 1 else "", parts[2:])
    version, rest = rest[0] if rest else "", rest[1:]
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] != "status":
        namespace, rest = rest[1], rest[2:]
    for kind in KINDS:
        if rest and (kind.group, kind.version, kind.plural) == (group, version, rest[0]) and len(rest) <= 3:
            return Route(kind, namespace, *rest[1:])
    raise Refusal(404, "NotFound", "the server could not find the requested resource")


def wants_metadata(request: Request) -> bool:
    """Whether the first media type accepted is PartialObjectMetadata or its list."""
    return "as=PartialObjectMetadata" in request.headers.get("accept", "").split(",")[0]
