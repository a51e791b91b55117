"""Which proxy leads to the API server: HTTPS_PROXY and NO_PROXY, read as Go's clients read them.

Go knows no ALL_PROXY, and neither do we: an agent that replaces the original takes the ways that the original took.
What Go ignores in silence, an address that is none, is an error here: the alternative is traffic past the proxy.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from meshcni.kube import failures
from meshcni.kube.failures import ApiError

PROXY = ("HTTPS_PROXY", "https_proxy")  # the first that is not empty counts
EXCEPTIONS = ("NO_PROXY", "no_proxy")
DEFAULT_PORT = 80  # Go's, for http://
FORM = "write http://[user:password@]host[:port], user and password percent-encoded"


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy and the variable that named it. As text it has no password."""

    host: str
    port: int
    variable: str
    authorization: str = field(default="", repr=False)  # value of Proxy-Authorization; empty: none

    def __str__(self) -> str:
        return f"proxy {authority(self.host, self.port)} ({self.variable})"


def authority(host: str, port: int) -> str:
    """`10.96.0.1:443`, `[fd00::1]:443`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Of an environment, what proxy_towards reads."""
    return {name: environment[name] for name in (*PROXY, *EXCEPTIONS) if environment.get(name)}


def proxy_towards(host: str, port: int, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy for HTTPS to `host`; None: there is none, or NO_PROXY exempts it. Raises ApiError for a wrong one."""
    variable, value = _first(PROXY, environment)
    if not value or is_exempt(host, port, _first(EXCEPTIONS, environment)[1]):
        return None
    url = _parsed(variable, value)
    assert url.hostname is not None
    authorization = ""
    if url.username is not None:
        pair = b":".join(unquote_to_bytes(os.fsencode(part or "")) for part in (url.username, url.password))
        authorization = f"Basic {base64.b64encode(pair).decode()}"
    return Proxy(url.hostname, DEFAULT_PORT if url.port is None else url.port, variable, authorization)


def is_exempt(host: str, port: int, exceptions: str) -> bool:
    """Whether NO_PROXY's text exempts a destination; our own machine always is.

    Entries are `*`, addresses, CIDRs, `example.org` (and below it), `.example.org` or `*.example.org` (below it only);
    all but CIDRs may end in `:port`.
    """
    host = host.strip().lower()
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_matches(entry.strip().lower(), host, address, port) for entry in exceptions.split(","))


def _matches(entry: str, host: str, address: IPv4Address | IPv6Address | None, port: int) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        return address is not None and _is_within(address, entry)
    name, entry_port = _split_port(entry)
    if not name or entry_port not in ("", str(port)):
        return False
    if address is not None:
        return _address(name) == address
    suffix = name[1:] if name.startswith("*.") else name
    return host.endswith(suffix) if suffix.startswith(".") else host == suffix or host.endswith(f".{suffix}")


def _is_within(address: IPv4Address | IPv6Address, network: str) -> bool:
    try:
        return address in ip_network(network, strict=False)
    except ValueError:
        return False


def _split_port(entry: str) -> tuple[str, str]:
    """`a:80`, `[::1]:80` and both without a port; more than one colon outside of brackets is an IPv6 address."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":")
    if entry.count(":") == 1:
        name, _, port = entry.partition(":")
        return name, port
    return entry, ""


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address, an IPv4 one in IPv6's clothes as IPv4."""
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> tuple[str, str]:
    return next(((name, value) for name in names if (value := environment.get(name, "").strip())), ("", ""))


def _parsed(variable: str, value: str) -> SplitResult:
    """The proxy's URL, whose scheme may be left out. No message shows what stands before an @."""
    _, at, after = value.rpartition("@")
    shown = f"{variable} is {(f'***@{after}' if at else value)!r}"
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        usable = bool(url.hostname) and url.port != 0 and "@" not in f"{url.path}{url.query}{url.fragment}"
    except ValueError:  # its text may show a part of the password
        usable = False
    if not usable:
        raise _unusable(f"{shown}, which is no address of a proxy", FORM)
    if url.scheme != "http":
        raise _unusable(
            f"{shown}: proxies of {url.scheme}:// are not supported, only HTTP CONNECT through http:// ones",
            "name an http:// proxy (TLS goes through it end to end), or exempt the API server in NO_PROXY",
        )
    return url


def _unusable(message: str, hint: str) -> ApiError:
    return ApiError(0, message, hint, cause=failures.CREDENTIALS)
