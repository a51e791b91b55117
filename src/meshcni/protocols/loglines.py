"""Body of `POST /log` on `log.sock`: a JSON array of strings, each one a log line of a plugin as a JSON object.

Upstream: cni/pkg/log/uds.go (server), cni/pkg/plugin/plugin.go (client). Text from a plugin carries names that users
choose, so control characters are escaped before anything is printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from meshcni.errors import ProtocolError

LEVELS = frozenset({"debug", "info", "warn", "error"})  # upstream drops every other level, `fatal` too
MAX_MESSAGE_CHARACTERS = 8192
MAX_LABELS = 32
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # lone surrogates: no stream takes them


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a plugin: `time` is RFC 3339 as sent, `labels` are the remaining keys with any JSON value.

    Message, keys and text values are printable; text inside a list or object is as sent, and escaped as JSON.
    """

    time: str
    level: str
    message: str
    labels: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogBatch:
    """The usable lines of one request in order, and why each of the others was dropped."""

    lines: tuple[LogLine, ...]
    dropped: tuple[str, ...]


def printable(text: str) -> str:
    """Return `text` on one line: control characters, line separators and lone surrogates as backslash escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def decode_lines(body: bytes) -> LogBatch:
    """Take one request's body apart; raises ProtocolError (`malformed`) when it is no JSON array of strings."""
    try:
        entries = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("malformed", f"log request is not JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ProtocolError("malformed", "log request is not a JSON array of strings")
    lines: list[LogLine] = []
    dropped: list[str] = []
    for entry in entries:
        line = _decode_line(entry)
        if isinstance(line, LogLine):
            lines.append(line)
        else:
            dropped.append(line)
    return LogBatch(tuple(lines), tuple(dropped))


def _decode_line(entry: str) -> LogLine | str:
    """Return the line, or why it is dropped."""
    try:
        values = json.loads(entry, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return "entry is not JSON"
    if not isinstance(values, dict):
        return "entry is not a JSON object"
    for key in ("msg", "level", "time"):
        if not isinstance(values.get(key), str):
            return f"entry has no text in {key!r}"
    if values["level"] not in LEVELS:
        return f"level {printable(values['level'])[:40]!r} is none of {', '.join(sorted(LEVELS))}"
    if not _RFC3339.fullmatch(values["time"]):
        return f"time {printable(values['time'])[:40]!r} is not RFC 3339"
    rest = [(key, value) for key, value in values.items() if key not in ("msg", "level", "time")][:MAX_LABELS]
    labels = {printable(key)[:200]: _label(value) for key, value in rest}
    message = printable(values["msg"].strip())[:MAX_MESSAGE_CHARACTERS]
    return LogLine(values["time"], values["level"], message, labels)


def _label(value: object) -> object:
    """A value that prints on one line: as sent, or the beginning of its text when that is too long for a line."""
    if isinstance(value, str):
        return printable(value)[:MAX_MESSAGE_CHARACTERS]
    text = json.dumps(value)
    return value if len(text) <= MAX_MESSAGE_CHARACTERS else text[:MAX_MESSAGE_CHARACTERS]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
