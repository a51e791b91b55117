"""The addresses of the API server: a literal, a line of /etc/hosts, or what the name servers of the host say.

libc's own way would load modules of the host's libc into this static executable, and cannot be given a bound. Who
answers here has no say: TLS proves that the right server was reached.
"""

import _socket
import posix
import time

from meshcni.plugin.doubt import DoubtError

HOSTS = "/etc/hosts"
RESOLV_CONF = "/etc/resolv.conf"
MAX_SERVERS = 3  # resolv.conf(5)
ANSWER_SECONDS = 1.0
TYPES = {1: _socket.AF_INET, 28: _socket.AF_INET6}  # A and AAAA, RFC 1035 and 3596
ADDRESS_BYTES = {1: 4, 28: 16}
INTERNET = 1
RECURSION_DESIRED = 0x0100
_MAX_FILE_BYTES = 1 << 16

Addresses = list[tuple[int, tuple[str, int]]]


def is_literal(host: str) -> bool:
    """Whether the host is an address and no name."""
    return _family(host) != 0


def addresses(host: str, port: int, deadline: float) -> Addresses:
    """Family and socket address of every address of a host. Raises DoubtError when there is none."""
    family = _family(host)
    if family:
        return [(family, (host, port))]
    found = _from_hosts(host) or _from_servers(host, deadline)
    if not found:
        raise DoubtError(
            f"could not be asked: {host} has no address, says neither {HOSTS} nor a server of {RESOLV_CONF}"
        )
    return [(_family(address), (address, port)) for address in found]


def _family(text: str) -> int:
    for family in TYPES.values():
        try:
            _socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return family
    return 0


def _from_hosts(host: str) -> list[str]:
    found = []
    for line in _lines(HOSTS):
        address, *names = line.split() or [""]
        if host.lower() in map(str.lower, names) and _family(address):
            found.append(address)
    return found


def _from_servers(host: str, deadline: float) -> list[str]:
    """The answers of the first server that has one; no search domains, for a server's name is given in full."""
    servers = [
        line.split()[1] for line in _lines(RESOLV_CONF) if line.startswith("nameserver") and len(line.split()) > 1
    ]
    for server in filter(_family, servers[:MAX_SERVERS]):
        found = [address for kind in TYPES for address in _ask(server, host, kind, deadline)]
        if found:
            return found
    return []


def _ask(server: str, host: str, kind: int, deadline: float) -> list[str]:
    number = int.from_bytes(_random(), "big")
    seconds = min(deadline - time.monotonic(), ANSWER_SECONDS)
    if seconds <= 0:
        return []
    connection = _socket.socket(_family(server), _socket.SOCK_DGRAM)
    try:
        connection.settimeout(seconds)
        connection.connect((server, 53))
        connection.send(query(number, host, kind))
        return answers(connection.recv(65536), number, kind)
    except (OSError, ValueError):
        return []
    finally:
        connection.close()


def _random() -> bytes:
    return posix.urandom(2)


def query(number: int, host: str, kind: int) -> bytes:
    """A question for one type of a name. Raises ValueError for what is no name."""
    labels = [label.encode("ascii") for label in host.rstrip(".").split(".")]
    if not all(0 < len(label) < 64 for label in labels) or len(host) > 253:
        raise ValueError(f"{host[:60]!r} is no name")
    header = b"".join(value.to_bytes(2, "big") for value in (number, RECURSION_DESIRED, 1, 0, 0, 0))
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return header + name + kind.to_bytes(2, "big") + INTERNET.to_bytes(2, "big")


def answers(message: bytes, number: int, kind: int) -> list[str]:
    """The addresses in an answer to `query`, also behind aliases. Raises ValueError for a message that is none."""
    if len(message) < 12 or _word(message, 0) != number or not message[2] & 0x80 or message[3] & 0x0F:
        return []
    at = 12
    for _ in range(_word(message, 4)):
        at = _behind_name(message, at) + 4
    found = []
    for _ in range(_word(message, 6)):
        at = _behind_name(message, at)
        found_kind, found_class, size = _word(message, at), _word(message, at + 2), _word(message, at + 8)
        data = message[at + 10 : at + 10 + size]
        if found_kind == kind and found_class == INTERNET and len(data) == ADDRESS_BYTES[kind]:
            found.append(_socket.inet_ntop(TYPES[kind], data))
        at += 10 + size
    return found


def _word(message: bytes, at: int) -> int:
    if at + 2 > len(message):
        raise ValueError("the message ends early")
    return int.from_bytes(message[at : at + 2], "big")


def _behind_name(message: bytes, at: int) -> int:
    while at < len(message):
        length = message[at]
        if length >= 0xC0:  # a pointer to the rest
            return at + 2
        at += 1 + length
        if length == 0:
            return at
    raise ValueError("a name has no end")


def _lines(path: str) -> list[str]:
    """The lines of a small file without comments; none when it is not there."""
    try:
        file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY)
    except OSError:
        return []
    try:
        data = posix.read(file, _MAX_FILE_BYTES)
    except OSError:
        return []
    finally:
        posix.close(file)
    return [line.partition("#")[0].strip() for line in data.decode("utf-8", "replace").split("\n")]
