"""How the text of a setting becomes a value: one reader for each kind, and the form that error messages name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from meshcni import pflag
from meshcni.cni.spec import MAX_AGENT_WAIT_SECONDS
from meshcni.pflag import go_bool, go_int
from meshcni.pods.ambientsettings import (
    NOTHING_WORD,
    HostIp,
    read_probe_v4,
    read_probe_v6,
    read_runtime_patterns,
)
from meshcni.pods.selectors import EnablementSelector, parse_enablement_selectors
from meshcni.pods.selectorsyntax import parse_field_text, parse_label_text
from meshcni.pods.values import read_group_selection, read_id_ranges, read_loopback

LEVELS = ("debug", "info", "warn", "error", "fatal", "none")  # pkg/log/options.go
MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un has 108 with the final zero, unix(7)
HIGHEST_UID = 2**32 - 2  # (uid_t) -1 means "no user" to the kernel


@dataclass(frozen=True, slots=True)
class Kind:
    """`read` turns text into the value (ValueError when it cannot), `show` the value into text again."""

    name: str
    form: str
    read: Callable[[str], Any]
    show: Callable[[Any], str] = str
    pflag: pflag.Kind = "string"


def _bounded(first: int, last: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = go_int(text)
        if not first <= number <= last:
            raise ValueError(f"{number} is not in {first}..{last}")
        return number

    return read


def _seconds_up_to(most: float, least: float = 0.0) -> Callable[[str], float]:
    """Above 0 and from `least` to `most`."""

    def read(text: str) -> float:
        number = float(text)
        if not (number > 0 and least <= number <= most):
            raise ValueError(f"{text} is not in {least:.0f}..{most:.0f}")
        return int(number) if number.is_integer() else number

    return read


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (item.strip() for item in text.split(",")) if name)


def _directory(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("not an absolute path")
    return text.rstrip("/") or "/"


def _socket_path(text: str) -> str:
    if not text:
        raise ValueError("it must not be empty")
    if not text.startswith("/") or text.endswith("/"):
        raise ValueError("not an absolute path of a file")
    if len(text.encode()) > MAX_SOCKET_PATH_BYTES or "\0" in text:
        raise ValueError(f"no path of a socket: it has {len(text.encode())} bytes")
    return text


def _show_probe_address(value: IPv4Address | IPv6Address | HostIp) -> str:
    return value.value if isinstance(value, HostIp) else str(value)


def _file_name(text: str) -> str:
    if "/" in text or text in (".", ".."):
        raise ValueError("a file name has no path in it")
    return text


def _conflist_name(text: str) -> str:
    if not _file_name(text).endswith(".conflist"):
        raise ValueError("does not end in .conflist")
    return text


def _levels(text: str) -> tuple[tuple[str, str], ...]:
    """`scope:level,…`; a bare level is for scope `default` (pkg/log/options.go)."""
    levels: list[tuple[str, str]] = []
    for item in _names(text):
        scope, colon, level = item.rpartition(":")
        if level not in LEVELS or (colon and not scope):
            raise ValueError(f"{item!r} names no level")
        levels.append((scope or "default", level))
    return tuple(levels)


def _selectors(text: str) -> tuple[EnablementSelector, ...]:
    """A YAML list of `{podSelector, namespaceSelector}`."""
    import yaml  # weighs 1 MiB and 15 ms; a node without ambient never needs it

    try:
        objects = yaml.safe_load(text)
        if objects is None:
            return ()
        if not isinstance(objects, list):
            raise ValueError(f"not a list but {type(objects).__name__}")
        return parse_enablement_selectors(objects)
    except Exception as error:
        raise ValueError(f"failed to parse ambient enablement selector: {error}") from None


def choice(*words: str) -> Kind:
    """A kind that takes one of `words`, an empty one included when it is among them."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError("not one of them")
        return text

    return Kind("choice", "one of " + ", ".join(word or "(empty)" for word in words), read)


def _checked(name: str, form: str, read: Callable[[str], Any]) -> Kind:
    """A kind that keeps the text, for whoever reads it later, once `read` can make something of it."""

    def check(text: str) -> str:
        read(text)
        return text

    return Kind(name, form, check)


def _show_bool(value: bool) -> str:
    return "true" if value else "false"


TEXT = Kind("text", "text", str)
BOOLEAN = Kind(
    "boolean", "true or false (also 1, t, T, TRUE, True, 0, f, F, FALSE, False)", go_bool, _show_bool, "bool"
)
INTEGER = Kind("integer", "an integer, decimal or with prefix 0x, 0o, 0b; a leading 0 means octal", go_int, pflag="int")
PORT = Kind("port", "a port, 1 to 65535", _bounded(1, 65535), pflag="int")
OPTIONAL_PORT = Kind("port", "a port up to 65535; 0 or less turns it off", _bounded(-(2**31), 65535), pflag="int")
FILE_MODE = Kind(
    "file mode", "a file mode; 0600 is octal, 384 the same in decimal", _bounded(0, 0o7777), "0{:o}".format, "int"
)
SECONDS = Kind("seconds", "a number of seconds above 0, at most 86400", _seconds_up_to(86400))
# The plugin refuses every ADD whose conf says more, that of our own pod too.
AGENT_WAIT = Kind(
    "seconds",
    f"a number of seconds above 0, at most {MAX_AGENT_WAIT_SECONDS:.0f}",
    _seconds_up_to(MAX_AGENT_WAIT_SECONDS),
)
VERIFY_SECONDS = Kind("seconds", "a number of seconds, 1 to 3600", _seconds_up_to(3600, 1))
OPTIONAL_UID = Kind(
    "user id",
    f"a user id, 0 to {HIGHEST_UID}",
    _bounded(0, HIGHEST_UID),
    lambda uid: "" if uid is None else str(uid),
)
NAMES = Kind("names", "names separated by commas", _names, ",".join)
PATTERNS = Kind(
    "patterns",
    f"names with * and ?, separated by commas; the word {NOTHING_WORD} alone for no pattern",
    read_runtime_patterns,
    lambda patterns: ",".join(patterns) or NOTHING_WORD,
)
DIRECTORY = Kind("directory", "an absolute path", _directory)
SOCKET = Kind("socket", f"an absolute path of at most {MAX_SOCKET_PATH_BYTES} bytes", _socket_path)
FILE_NAME = Kind("file name", "a file name without path", _file_name)
CONFLIST_NAME = Kind("file name", "a file name without path that ends in .conflist", _conflist_name)
LABEL_SELECTOR = _checked("label selector", "a label selector, such as app=web,tier notin (a, b)", parse_label_text)
FIELD_SELECTOR = _checked("field selector", "a field selector of pods, such as metadata.namespace!=x", parse_field_text)
LOOPBACK = _checked("prefix", "a prefix within 127.0.0.0/8, such as 127.0.0.1/32", read_loopback)
GROUPS = _checked("groups", "* or group ids like 202,1000-1999", read_group_selection)
GROUPS_EXCLUDED = _checked("groups", "group ids like 202,1000-1999", read_id_ranges)
PROBE_V4 = Kind(
    "IPv4 address or hostIP",
    "an IPv4 address, or the word hostIP for the node's own",
    read_probe_v4,
    _show_probe_address,
)
PROBE_V6 = Kind(
    "IPv6 address or hostIP",
    "an IPv6 address, or the word hostIP for the node's own",
    read_probe_v6,
    _show_probe_address,
)
LOG_LEVELS = Kind(
    "levels",
    f"SCOPE:LEVEL or LEVEL, separated by commas; levels are {', '.join(LEVELS)}",
    _levels,
    lambda levels: ",".join(f"{scope}:{level}" for scope, level in levels),
)
SELECTORS = Kind(
    "selectors",
    "a YAML list of {podSelector: …, namespaceSelector: …}",
    _selectors,
    lambda selectors: "[]" if not selectors else f"{len(selectors)} selectors",
)
TARGETS = Kind("targets", "stdout, stderr or a path; the flag may be repeated", str, ",".join, "strings")
