"""Why the Kubernetes API did not give what was asked, as one exception with a cause, a status and a next step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from meshcni.errors import KubeError

# What went wrong, as a short word for metric labels and tables.
STATUS = "status"  # the server answered with an HTTP error
CONNECT = "connect"  # no connection: refused, unreachable, name unknown
TLS = "tls"  # a connection, but the certificate was not accepted
TIMEOUT = "timeout"  # no answer, or no more of it, within the time allowed
SILENCE = "silence"  # an open watch on which nothing came for longer than it should
BROKEN = "broken"  # the connection ended, or the answer made no sense
CREDENTIALS = "credentials"  # our own token, CA or kubeconfig cannot be read

HINTS: Mapping[int, str] = {
    400: "the request itself was refused; this is likely a bug or an API server too old for it",
    401: "the token was refused: it may have expired, or its pod or service account been deleted; it is read again from"
    " its file, but only a new pod gets the token of an account that was made anew",
    404: "the object does not exist, or no longer",
    409: "the object was changed or created by somebody else meanwhile",
    410: "the version asked for is no longer kept; list again",
    429: "the API server is throttling; wait as long as it says",
}
CAUSE_HINTS: Mapping[str, str] = {
    CONNECT: "check that this node reaches the API server's address and port",
    TLS: "check the CA file and the name or address the server's certificate was made for",
    TIMEOUT: "the API server or the network towards it is slow or half-open; the call can be repeated",
    BROKEN: "the API server or a proxy before it ended the connection; the call can be repeated",
}


class ApiError(KubeError):
    """A failed call of the API: `status` is the HTTP status (0 without an answer), `cause` one of this module's words.

    `reason` is the API's machine-readable word (`Expired`, `NotFound` ...), `retry_after_seconds` what the server asked
    us to wait, None when it did not. A UID that is not the object's own counts as 409 Conflict: API servers know it as
    a precondition of updates and deletions only, and answer a patch with 422 because the field cannot change.
    """

    def __init__(
        self,
        status: int,
        message: str,
        hint: str = "",
        *,
        cause: str = STATUS,
        reason: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(status, message, hint)
        self.cause = cause
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


def describe(method: str, url: str) -> str:
    """A call in messages: `GET /api/v1/pods`, `WATCH /api/v1/pods`; without its query, so that retries read alike."""
    path, _, query = url.partition("?")
    return f"{'WATCH' if 'watch=true' in query.split('&') else method} {path}"


def without_answer(cause: str, call: str, detail: str) -> ApiError:
    """The error of a call (`GET /api/v1/...`) that got no answer; `detail` is what the network said."""
    return ApiError(0, f"{call}: {detail}", CAUSE_HINTS.get(cause, ""), cause=cause)


def from_answer(status: int, call: str, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The error of an answer with an HTTP status of 300 or more; `body` is a Status object when an API server spoke."""
    return from_status(call, _status_object(body), status=status, retry_after=headers.get("retry-after", ""))


def from_status(call: str, answer: Mapping[str, Any], *, status: int = 0, retry_after: str = "") -> ApiError:
    """The error of a Status object, from an answer's body or from an ERROR event of a watch."""
    code = status or _integer(answer.get("code")) or 500
    reason = str(answer.get("reason") or "")
    details = answer.get("details")
    details = details if isinstance(details, Mapping) else {}
    text = str(answer.get("message") or reason or "no explanation")
    message = f"{call}: HTTP {code}: {text[:500]}"
    if code == 422 and "metadata.uid" in _named(details, "field"):
        code, reason = 409, "Conflict"
    wait = _integer(retry_after) or _integer(details.get("retryAfterSeconds"))
    return ApiError(
        code,
        message,
        _hint(code, call),
        reason=_reason(reason, text, details),
        retry_after_seconds=float(wait) if wait else None,
    )


def _hint(code: int, call: str) -> str:
    if code == 403:
        return f"the service account needs a rule that allows {_rbac_rule(call)}"
    if code >= 500:
        return "the API server has a problem of its own; the call can be repeated"
    return HINTS.get(code, "")


def _reason(reason: str, text: str, details: Mapping[str, Any]) -> str:
    """`ResourceVersionTooLarge` comes as a cause of a Timeout from new servers and as a text only from old ones."""
    if "ResourceVersionTooLarge" in _named(details, "reason") or "Too large resource version" in text:
        return "ResourceVersionTooLarge"
    return reason


def _named(details: Mapping[str, Any], key: str) -> set[str]:
    """What the causes of a Status object say under `key`."""
    causes = details.get("causes")
    return {str(c.get(key)) for c in causes if isinstance(c, Mapping)} if isinstance(causes, list) else set()


def _rbac_rule(call: str) -> str:
    """`GET /api/v1/namespaces/a/pods/b` -> `get pods in namespace a`: the rule to add, in RBAC's own words."""
    method, _, path = call.partition(" ")
    parts = [part for part in path.split("/") if part]
    group = parts[1] if parts[:1] == ["apis"] else ""
    rest = parts[3:] if group else parts[2:]
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "WATCH": "watch"}
    verb = verbs.get(method, "get" if len(rest) > 1 else "list")
    resource = "/".join([rest[0], *rest[2:3]]) if rest else path
    where = f" in namespace {namespace}" if namespace else ""
    return f"{verb} {resource}{f' of API group {group}' if group else ''}{where}"


def _status_object(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {"message": body[:200].decode("utf-8", "replace").strip()}
    return answer if isinstance(answer, dict) else {}


def _integer(value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        return 0
