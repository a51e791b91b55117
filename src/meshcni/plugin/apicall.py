"""GET requests to the API server of the kubeconfig, each within a bound, over TLS and with the server verified."""

import _socket
import time

from meshcni import __version__
from meshcni.cni.jsontext import JsonError, parse
from meshcni.istio import PLUGIN_NAME
from meshcni.plugin import kubeconfig, resolver
from meshcni.plugin.agentcall import Agent
from meshcni.plugin.doubt import DoubtError

MAX_ANSWER_BYTES = 8 << 20  # etcd stores at most 1.5 MB of an object, unless it is told otherwise
MAX_SAID = 200  # characters of an error of the API server
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_DIGITS = "0123456789"
_MAX_NAME = 253

HINTS = {
    401: "the token in the kubeconfig counts until the agent's pod is deleted, or for an hour: the agent brings a new "
    "one when it starts",
    403: "may the agent's service account get pods and namespaces?",
    404: "the sandbox of a deleted pod needs nothing, the kubelet gives it up by itself",
}


class AgentIsBackError(Exception):
    """There is no need for an answer any more."""


class ApiCall:
    """Asks with the kubeconfig's credentials; no request takes longer than `seconds`."""

    def __init__(self, kubeconfig_path: str, seconds: float, agent: Agent) -> None:
        self._access = kubeconfig.read(kubeconfig_path)
        self._path = kubeconfig_path
        self._seconds = seconds
        self._agent = agent

    def pod(self, namespace: str, name: str) -> dict[str, object]:
        """A pod. Raises DoubtError when this is not what comes back, and AgentIsBackError."""
        return self._get("Pod", f"namespaces/{_name(namespace)}/pods/{_name(name)}", name)

    def namespace(self, name: str) -> dict[str, object]:
        """A namespace. Raises the same."""
        return self._get("Namespace", f"namespaces/{_name(name)}", name)

    def _get(self, kind: str, path: str, name: str) -> dict[str, object]:
        status, body = response(self._exchange(request(self._access, path)))
        if status != 200:
            said = _said(body)
            raise DoubtError(f"answered {status} to 'get {path}'{said and ': ' + said}", HINTS.get(status, ""))
        found = _object(body)
        metadata = found.get("metadata")
        if found.get("kind") != kind or not isinstance(metadata, dict) or metadata.get("name") != name:
            raise DoubtError(
                f"answered 'get {path}' with something else: {body[:MAX_SAID].decode('utf-8', 'replace')!r}"
            )
        return found

    def _exchange(self, message: bytes) -> bytes:
        """The bytes that come back. Raises DoubtError with the last address's problem."""
        access = self._access
        deadline = time.monotonic() + self._seconds
        addresses = resolver.addresses(access.host, access.port, deadline)
        problem = DoubtError(f"could not be asked: {access.host} has no address")
        for number, (family, address) in enumerate(addresses):
            share = (deadline - time.monotonic()) / (len(addresses) - number)
            try:
                return self._exchange_with(family, address, message, max(share, 0.0))
            except DoubtError as error:
                problem = error
        raise problem

    def _exchange_with(self, family: int, address: tuple[str, int], message: bytes, seconds: float) -> bytes:
        import _tls  # type: ignore[import-not-found]  # of the executable only, native/plugin/tls.c

        where = self._access.authority
        try:
            server = _socket.socket(family, _socket.SOCK_STREAM)
            try:
                return self._exchange_on(server, address, message, seconds)
            finally:
                server.close()
        except InterruptedError:
            raise AgentIsBackError from None
        except TimeoutError:
            raise DoubtError(f"did not answer within {seconds:.1f} s: {where}") from None
        except OSError as error:
            raise DoubtError(f"could not be asked: {where}: {error.strerror or error}") from None
        except _tls.TlsError as error:
            hint = f"the agent writes {self._path} anew when it starts"
            raise DoubtError(f"could not be asked safely: {where}: {error}", hint) from None

    def _exchange_on(self, server: _socket.socket, address: tuple[str, int], message: bytes, seconds: float) -> bytes:
        import _tls

        server.setblocking(False)
        server.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)  # the request follows the handshake at once
        try:
            server.connect(address)
        except BlockingIOError:
            pass  # it is waited for below
        access = self._access
        answer: bytes = _tls.exchange(
            server.fileno(),
            access.authorities,
            access.host,
            resolver.is_literal(access.host),
            message,
            MAX_ANSWER_BYTES,
            seconds,
            self._agent.is_back,
        )
        return answer


def request(access: kubeconfig.Access, path: str) -> bytes:
    """The request for one object, after which the server closes the connection."""
    lines = (
        f"GET /api/v1/{path} HTTP/1.1",
        f"Host: {access.authority}",
        f"Authorization: Bearer {access.token}",
        "Accept: application/json",
        f"User-Agent: {PLUGIN_NAME}/{__version__}",
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def response(data: bytes) -> tuple[int, bytes]:
    """Status and body of a whole HTTP/1 response. Raises DoubtError when it is none, or not whole."""
    head, end, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    code = rest[:3]
    if not end or version not in ("HTTP/1.1", "HTTP/1.0") or not _is_number(code) or len(code) != 3:
        raise DoubtError(f"answered with something that is not HTTP: {data[:40]!r}")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return int(code), _joined(body)
    length = fields.get("content-length", str(len(body)))
    if not _is_number(length) or int(length) != len(body):
        raise DoubtError(f"gave {len(body)} of {length[:20]} bytes")
    return int(code), body


def _joined(body: bytes) -> bytes:
    parts: list[bytes] = []
    while True:
        size_text, end, body = body.partition(b"\r\n")
        digits = size_text.partition(b";")[0].strip().lower()
        if not end or not digits or len(digits) > 8 or digits.strip(b"0123456789abcdef"):
            raise DoubtError("gave only a part of its answer")
        size = int(digits, 16)
        if size == 0:
            return b"".join(parts)
        if body[size : size + 2] != b"\r\n":
            raise DoubtError("gave only a part of its answer")
        parts.append(body[:size])
        body = body[size + 2 :]


def _object(body: bytes) -> dict[str, object]:
    try:
        found = parse(body)
    except JsonError as error:
        raise DoubtError(f"answered with something that is not JSON: {error.message}") from None
    if not isinstance(found, dict):
        raise DoubtError("answered with something that is no JSON object")
    return found


def _said(body: bytes) -> str:
    """The message of a Status, as far as there is one."""
    try:
        message = _object(body).get("message", "")
    except DoubtError:
        return ""
    return message[:MAX_SAID] if isinstance(message, str) else ""


def _name(text: str) -> str:
    """The name of a namespace or pod, if it is one: nothing in it means something to HTTP or to a path."""
    is_name = text and text[0] in _LETTERS and text[-1] in _LETTERS and not text.strip(_LETTERS + "-.")
    if not is_name or len(text) > _MAX_NAME:
        raise DoubtError(f"was not asked: {text[:MAX_SAID]!r} names nothing that it could know")
    return text


def _is_number(text: str) -> bool:
    return bool(text) and not text.strip(_DIGITS) and len(text) < 12
