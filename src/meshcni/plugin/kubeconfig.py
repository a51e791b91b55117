"""The kubeconfig that the agent leaves in its run directory, read as the lines that `cni.kubeconfig` writes."""

import posix

from meshcni.cni.jsontext import JsonError, parse
from meshcni.plugin.doubt import DoubtError

MAX_BYTES = 1 << 20
_SCHEME = "https://"
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class Access:
    """Where the API server is and what it is asked with; `authorities` is PEM in base64."""

    __slots__ = ("authorities", "authority", "host", "port", "token")

    def __init__(self, authority: str, host: str, port: int, authorities: str, token: str) -> None:
        self.authority = authority
        self.host = host
        self.port = port
        self.authorities = authorities
        self.token = token


def read(path: str) -> Access:
    """What the file says at this moment. Raises DoubtError when that is not enough for an answer to be trusted."""
    found = values(_text(path))
    hint = f"the agent writes {path} anew when it starts"
    for key in ("server", "token"):
        if not found.get(key):
            raise DoubtError(f"could not be asked: {path} has no {key!r}", hint)
    if not found.get("certificate-authority-data"):
        text = f"was not asked: {path} has no 'certificate-authority-data' to know the server by"
        raise DoubtError(text, "with SKIP_TLS_VERIFY nobody can tell who answers")
    host, port = _server(path, found["server"])
    if found["token"].strip(_PRINTABLE):
        raise DoubtError(f"could not be asked: the token in {path} has characters that no token has", hint)
    authority = found["server"][len(_SCHEME) :]
    return Access(authority, host, port, found["certificate-authority-data"], found["token"])


def values(text: str) -> dict[str, str]:
    """Every `key: value` of the text, wherever it stands; a value is plain, quoted, or a block of one line."""
    found: dict[str, str] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines):
        key, colon, value = line.strip().removeprefix("- ").partition(": ")
        if not colon:
            continue
        if value == "|" and number + 1 < len(lines):
            value = lines[number + 1].strip()
        elif value.startswith('"'):
            value = _unquoted(value)
        found[key] = value.strip()
    return found


def _unquoted(text: str) -> str:
    try:
        value = parse(text.encode("utf-8", "replace"))
    except JsonError:
        return ""
    return value if isinstance(value, str) else ""


def _server(path: str, url: str) -> tuple[str, int]:
    """Host and port of `https://HOST:PORT`, an IPv6 host in brackets."""
    if not url.startswith(_SCHEME):
        raise DoubtError(f"was not asked: 'server' in {path} is {url[:100]!r}, not https")
    authority = url[len(_SCHEME) :].rstrip("/")
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        port = rest.removeprefix(":") if rest else "443"
    else:
        host, bracket, port = authority.partition(":")
        port = port if bracket else "443"
        bracket = "]"
    if not host or not bracket or host.strip(_PRINTABLE) or "/" in host or not _is_port(port):
        raise DoubtError(f"was not asked: 'server' in {path} is {url[:100]!r}, not https://HOST:PORT")
    return host, int(port)


def _is_port(text: str) -> bool:
    return bool(text) and len(text) <= 5 and not text.strip("0123456789") and 0 < int(text) < 65536


def _text(path: str) -> str:
    try:
        file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY)
        try:
            parts = []
            while part := posix.read(file, 65536):
                parts.append(part)
                if len(parts) * 65536 > MAX_BYTES:
                    raise DoubtError(f"could not be asked: {path} is too large for a kubeconfig")
        finally:
            posix.close(file)
    except OSError as error:
        raise DoubtError(
            f"could not be asked: {path}: {error.strerror}", "the agent writes this file when it starts"
        ) from None
    return b"".join(parts).decode("utf-8", "replace")
