"""The plugin asks the agent to put one pod into the mesh: one request, one reply, over `agent.sock` (SOCK_SEQPACKET).

The request travels with exactly one file descriptor (SCM_RIGHTS): the pod's netns. Both messages are JSON objects with
a `version`; unknown keys are ignored, so that either side may be the newer one. Imported by the plugin's fast path.
"""

from meshcni.cni.jsontext import JsonError, compact, parse
from meshcni.errors import ProtocolError

VERSION = 1
OPERATION = "add"
MAX_REQUEST_BYTES = 65536
MAX_REPLY_BYTES = 65536
VERDICTS = ("sidecar", "ambient", "skip")  # of a successful reply; failures carry a CNI error code instead

_HINT = "the plugin on the node and the agent may be of different releases: wait for the rollout to finish"


class AddRequest:
    """What the plugin tells the agent about one ADD.

    `netns` is the path the runtime gave, for messages only (the descriptor is what counts); `pod_uid` may be empty;
    `ips` are the pod's addresses with prefix length, as prevResult names them, possibly none.
    """

    __slots__ = ("cni_version", "container_id", "ifname", "ips", "netns", "pod_name", "pod_namespace", "pod_uid")

    def __init__(
        self,
        *,
        cni_version: str,
        container_id: str,
        ifname: str,
        netns: str,
        pod_namespace: str,
        pod_name: str,
        pod_uid: str = "",
        ips: tuple[str, ...] = (),
    ) -> None:
        self.cni_version = cni_version
        self.container_id = container_id
        self.ifname = ifname
        self.netns = netns
        self.pod_namespace = pod_namespace
        self.pod_name = pod_name
        self.pod_uid = pod_uid
        self.ips = ips


class AddReply:
    """What the agent answers: a verdict with its reason, or a CNI error code with message and hint (`details`)."""

    __slots__ = ("code", "details", "message", "ok", "reason", "verdict")

    def __init__(
        self, *, ok: bool, verdict: str = "", reason: str = "", code: int = 0, message: str = "", details: str = ""
    ) -> None:
        self.ok = ok
        self.verdict = verdict
        self.reason = reason
        self.code = code
        self.message = message
        self.details = details


def accepted(verdict: str, reason: str, message: str = "") -> AddReply:
    """The pod may start; `verdict` is one of VERDICTS, `reason` the code of the reason."""
    return AddReply(ok=True, verdict=verdict, reason=reason, message=message)


def refused(code: int, message: str, details: str = "") -> AddReply:
    """The pod must not start now; `code` is the CNI error code that the plugin answers."""
    return AddReply(ok=False, code=code, message=message, details=details)


def encode_request(request: AddRequest) -> bytes:
    """The message of a request. Raises ProtocolError (cause `oversized`) above MAX_REQUEST_BYTES."""
    fields: dict[str, object] = {
        "version": VERSION,
        "operation": OPERATION,
        "cniVersion": request.cni_version,
        "containerID": request.container_id,
        "ifName": request.ifname,
        "netns": request.netns,
        "podNamespace": request.pod_namespace,
        "podName": request.pod_name,
        "podUID": request.pod_uid,
        "ips": request.ips,
    }
    return _encode(fields, MAX_REQUEST_BYTES, "request")


def decode_request(data: bytes) -> AddRequest:
    """The request in a message. Raises ProtocolError with cause `oversized`, `malformed` or `version`."""
    fields = _decode(data, MAX_REQUEST_BYTES, "request")
    operation = _text(fields, "operation", "request")
    if operation != OPERATION:
        raise ProtocolError("malformed", f"request asks for operation {operation!r}, known is {OPERATION!r}", _HINT)
    ips = fields.get("ips", [])
    if not isinstance(ips, list) or not all(isinstance(address, str) for address in ips):
        raise ProtocolError("malformed", "key 'ips' of the request must be a list of strings", _HINT)
    return AddRequest(
        cni_version=_text(fields, "cniVersion", "request"),
        container_id=_text(fields, "containerID", "request"),
        ifname=_text(fields, "ifName", "request"),
        netns=_text(fields, "netns", "request"),
        pod_namespace=_text(fields, "podNamespace", "request", required=True),
        pod_name=_text(fields, "podName", "request", required=True),
        pod_uid=_text(fields, "podUID", "request"),
        ips=tuple(ips),
    )


def encode_reply(reply: AddReply) -> bytes:
    """The message of a reply. Raises ProtocolError (cause `oversized`) above MAX_REPLY_BYTES."""
    fields: dict[str, object] = {"version": VERSION, "ok": reply.ok}
    if reply.ok:
        fields.update({"verdict": reply.verdict, "reason": reply.reason, "message": reply.message})
    else:
        fields.update({"code": reply.code, "message": reply.message, "details": reply.details})
    return _encode(fields, MAX_REPLY_BYTES, "reply")


def decode_reply(data: bytes) -> AddReply:
    """The reply in a message. Raises ProtocolError with cause `oversized`, `malformed` or `version`."""
    fields = _decode(data, MAX_REPLY_BYTES, "reply")
    ok = fields.get("ok")
    if not isinstance(ok, bool):
        raise ProtocolError("malformed", "key 'ok' of the reply must be true or false", _HINT)
    if ok:
        verdict = _text(fields, "verdict", "reply", required=True)
        if verdict not in VERDICTS:  # a verdict this plugin does not know may mean "capture it", so it is no success
            raise ProtocolError("malformed", f"reply has unknown verdict {verdict!r}", _HINT)
        return accepted(verdict, _text(fields, "reason", "reply"), _text(fields, "message", "reply"))
    code = fields.get("code")
    if not isinstance(code, int) or isinstance(code, bool) or not 0 < code < 1 << 31:
        raise ProtocolError("malformed", f"key 'code' of the reply is no CNI error code: {str(code)[:40]}", _HINT)
    return refused(code, _text(fields, "message", "reply", required=True), _text(fields, "details", "reply"))


def _encode(fields: dict[str, object], limit_bytes: int, name: str) -> bytes:
    data = compact(fields).encode()
    if len(data) > limit_bytes:
        raise ProtocolError("oversized", f"{name} has {len(data)} bytes, at most {limit_bytes} are allowed")
    return data


def _decode(data: bytes, limit_bytes: int, name: str) -> dict[str, object]:
    if len(data) > limit_bytes:
        raise ProtocolError("oversized", f"{name} has more than the allowed {limit_bytes} bytes", _HINT)
    try:
        fields = parse(data)
    except JsonError as error:
        raise ProtocolError("malformed", f"{name} is not JSON: {error.message}", _HINT) from None
    if not isinstance(fields, dict):
        raise ProtocolError("malformed", f"{name} is no JSON object", _HINT)
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ProtocolError("version", f"{name} has protocol version {str(version)[:40]}, known is {VERSION}", _HINT)
    return fields


def _text(fields: dict[str, object], key: str, name: str, required: bool = False) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str) or (required and not value):
        wanted = "a non-empty string" if required else "a string"
        raise ProtocolError("malformed", f"key {key!r} of the {name} must be {wanted}", _HINT)
    return value
