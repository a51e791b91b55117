"""A client of the API server for tests: synchronous, without a process per call, from inside any netns.

Paths are the API's own (`/api/v1/namespaces/shop/pods/cart`); `path_of` makes one of an object.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lab import namespaces
from lab.node import LabError

MANAGER = "meshcni-lab"
CALL_SECONDS = 30.0
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
ERROR_STATUS = 400
CONFLICT, NOT_FOUND = 409, 404
TEXT_SHOWN = 500

Objects = list[dict[str, Any]]


class ApiError(LabError):
    """The API server refused; `status` is that of HTTP, `reason` the API's own word, such as NotFound."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason = status, reason


class ApiClient:
    """Calls with one token; thread-safe, each thread has a connection of its own. OSError: nobody answered."""

    def __init__(self, netns: str, address: str, port: int, ca: Path, token: str) -> None:
        self._netns, self._address, self._port, self._token = netns, address, port, token
        self._tls = ssl.create_default_context(cafile=str(ca))
        self._local = threading.local()
        self._resources: dict[str, dict[str, tuple[str, bool]]] = {}

    def with_token(self, token: str) -> ApiClient:
        """Return a client with another identity."""
        other = ApiClient.__new__(ApiClient)
        other.__dict__.update(self.__dict__)
        other._token, other._local = token, threading.local()
        return other

    # --- calls --------------------------------------------------------------------------------------------------------

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Return an object."""
        found: dict[str, Any] = self.request("GET", with_query(path, query))
        return found

    def find(self, path: str) -> dict[str, Any] | None:
        """Return an object; None when there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def list(self, path: str, *, labels: str = "", fields: str = "") -> Objects:
        """Return the objects of a collection, with `kind` and `apiVersion` filled in as in a single one."""
        selectors = {"labelSelector": labels, "fieldSelector": fields}
        answer = self.get(path, **{key: value for key, value in selectors.items() if value})
        kind = {"apiVersion": answer["apiVersion"], "kind": answer["kind"].removesuffix("List")}
        return [{**kind, **item} for item in answer.get("items") or ()]

    def create(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object; its namespace is `default` unless it names one."""
        made: dict[str, Any] = self.request("POST", self.collection_of(obj), obj)
        return made

    def apply(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Create or change an object (server-side apply, by force)."""
        path = with_query(self.path_of(obj), {"fieldManager": MANAGER, "force": "true"})
        made: dict[str, Any] = self.request("PATCH", path, obj, kind=APPLY_PATCH)
        return made

    def patch(self, path: str, change: object, kind: str = MERGE_PATCH) -> dict[str, Any]:
        """Change an object; null in a merge patch removes a field."""
        made: dict[str, Any] = self.request("PATCH", path, change, kind=kind)
        return made

    def replace(self, path: str, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Put a whole object."""
        made: dict[str, Any] = self.request("PUT", path, obj)
        return made

    def delete(self, path: str, *, grace_seconds: int | None = None, missing_ok: bool = True) -> None:
        """Delete an object or a collection, what depends on it in the background."""
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            self.request("DELETE", path, options)
        except ApiError as error:
            if not (missing_ok and error.status == NOT_FOUND):
                raise

    def watch(
        self, path: str, *, labels: str = "", since: str = "", timeout_seconds: int = 60
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give (type, object) of a collection as it changes, until the time is over; without `since` first all."""
        query = {"watch": "true", "timeoutSeconds": str(timeout_seconds)}
        query |= {"labelSelector": labels} if labels else {}
        query |= {"resourceVersion": since} if since else {}
        connection = self._connect(timeout_seconds + CALL_SECONDS)
        try:
            connection.request("GET", with_query(path, query), headers=self._headers())
            response = connection.getresponse()
            if response.status >= ERROR_STATUS:
                raise api_error(response.status, response.read())
            while line := response.readline():
                event = json.loads(line)
                yield event["type"], event["object"]
        finally:
            connection.close()

    def text(self, path: str, **query: str) -> str:
        """Return what is no JSON: a pod's log, /readyz, /metrics."""
        return self.raw("GET", with_query(path, query)).decode()

    def request(self, method: str, path: str, body: object = None, *, kind: str = "application/json") -> Any:  # noqa: ANN401
        """Call and return the JSON of the answer; ApiError when refused."""
        return json.loads(self.raw(method, path, body, kind=kind))

    def raw(self, method: str, path: str, body: object = None, *, kind: str = "application/json") -> bytes:
        """Call and return the answer's bytes; ApiError when refused."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers(), **({"Content-Type": kind} if data is not None else {})}
        kept = getattr(self._local, "connection", None)
        if kept is not None:
            try:
                return self._exchange(kept, method, path, data, headers)
            except (OSError, http.client.HTTPException):  # the server may have closed it long ago
                kept.close()
                self._local.connection = None
        fresh = self._connect(CALL_SECONDS)
        try:
            answer = self._exchange(fresh, method, path, data, headers)
        except (OSError, http.client.HTTPException) as error:
            fresh.close()
            raise OSError(f"{method} {path}: {type(error).__name__}: {error}") from error
        self._local.connection = fresh
        return answer

    # --- paths --------------------------------------------------------------------------------------------------------

    def path_of(self, obj: Mapping[str, Any]) -> str:
        """Return the path of an object."""
        return f"{self.collection_of(obj)}/{obj['metadata']['name']}"

    def collection_of(self, obj: Mapping[str, Any]) -> str:
        """Return the path of the collection that an object is (to be) in."""
        version, kind = obj["apiVersion"], obj["kind"]
        prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
        plural, is_namespaced = self._resource(prefix, kind)
        if not is_namespaced:
            return f"{prefix}/{plural}"
        return f"{prefix}/namespaces/{obj['metadata'].get('namespace', 'default')}/{plural}"

    def _resource(self, prefix: str, kind: str) -> tuple[str, bool]:
        if kind not in self._resources.get(prefix, {}):
            found = self.get(prefix)["resources"]
            plain = [entry for entry in found if "/" not in entry["name"]]
            self._resources[prefix] = {entry["kind"]: (entry["name"], entry["namespaced"]) for entry in plain}
        if kind not in self._resources[prefix]:
            raise LabError(f"the API server knows no {kind} in {prefix}")
        return self._resources[prefix][kind]

    # --- connection ---------------------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}

    def _connect(self, timeout_seconds: float) -> http.client.HTTPConnection:
        plain = namespaces.connect(self._netns, self._address, self._port, timeout_seconds)
        connection = http.client.HTTPConnection(self._address, self._port)
        try:
            connection.sock = self._tls.wrap_socket(plain, server_hostname=self._address)
        except BaseException:
            plain.close()
            raise
        return connection

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> bytes:
        connection.request(method, path, body=data, headers=headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status >= ERROR_STATUS:
            raise api_error(response.status, answer)
        return answer


def objects_in(text: str) -> list[dict[str, Any]]:
    """Return the objects of YAML with several documents; Lists are taken apart."""
    found: list[dict[str, Any]] = []
    for document in yaml.safe_load_all(text):
        if document:
            found += document["items"] if document.get("kind", "").endswith("List") else [document]
    return found


def with_query(path: str, query: Mapping[str, str]) -> str:
    """Return a path with its query."""
    if not query:
        return path
    return f"{path}{'&' if '?' in path else '?'}{urllib.parse.urlencode(query)}"


def api_error(status: int, answer: bytes) -> ApiError:
    """Return the error that a refusal is."""
    try:
        document = json.loads(answer)
        return ApiError(status, document.get("reason", ""), document.get("message", ""))
    except (ValueError, AttributeError):
        return ApiError(status, "", answer.decode(errors="replace")[:TEXT_SHOWN])


def ready(pod: Mapping[str, Any]) -> bool:
    """Tell whether a pod is ready and stays."""
    conditions: Iterable[Mapping[str, Any]] = pod.get("status", {}).get("conditions") or ()
    is_ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return is_ready and "deletionTimestamp" not in pod["metadata"]
