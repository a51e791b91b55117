"""Log lines in the original's two formats, with its scopes and its flags, on the standard library's logging.

A scope is a logger's first name; our own modules log as `cni-agent`, forwarded plugin lines as `cni-plugin`.
Upstream: pkg/log (options.go, config.go, scope.go).
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType

from meshcni.protocols.loglines import LogLine, printable

DEFAULT = "default"
AGENT = "cni-agent"
PLUGIN = "cni-plugin"
OWN_PACKAGE = "meshcni"
BUILT_IN = ((DEFAULT, "info"), ("grpc", "none"), ("httpx", "warn"), ("httpcore", "warn"))  # ours: the HTTP client's
NEVER = logging.CRITICAL + 10
LEVEL_NUMBERS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "none": NEVER,
}
LEVEL_NAMES = {number: name for name, number in LEVEL_NUMBERS.items()}
# A label of the same name is not printed.
JSON_KEYS = ("level", "time", "scope", "caller", "msg", "stack", "attachment")

agent_log = logging.getLogger(AGENT)
plugin_log = logging.getLogger(PLUGIN)


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels by scope; `override` is that of scope `all`, `other` that of scopes nobody names."""

    by_scope: Mapping[str, int]
    override: int | None
    other: int

    def of(self, scope: str) -> int:
        """The level from which a line of `scope` counts."""
        return self.override if self.override is not None else self.by_scope.get(scope, self.other)


@dataclass(frozen=True, slots=True)
class Format:
    """How lines look: JSON or text, scopes that name their caller, levels from which a stack is added."""

    as_json: bool = False
    callers: frozenset[str] = frozenset()
    stacks: Levels = Levels({}, None, NEVER)


def levels(pairs: Iterable[tuple[str, str]], other: int = logging.INFO) -> Levels:
    """Levels from `(scope, level)` pairs, later ones winning."""
    by_scope = {scope: LEVEL_NUMBERS[level] for scope, level in pairs}
    override = by_scope.pop("all", None)
    return Levels(by_scope, override, other)


def labels(**values: object) -> dict[str, object]:
    """The `extra` argument of a log call: key and value pairs that follow the message."""
    return {"labels": values}


def attached(text: str) -> dict[str, object]:
    """The `extra` argument of a log call whose message is followed by lines to copy, such as YAML."""
    return {"attachment": text}


def configure(
    output: Iterable[tuple[str, str]] = (),
    stacks: Iterable[tuple[str, str]] = (),
    callers: Iterable[str] = (),
    as_json: bool = False,
    targets: Iterable[str] = ("stdout",),
) -> str:
    """Set logging up for this process; returns the level name of scope `cni-plugin`, which goes into the conf.

    Raises OSError when a target file cannot be opened.
    """
    chosen = levels([*BUILT_IN, *output])
    shape = Format(as_json, frozenset(callers), levels(stacks, NEVER))
    root = logging.getLogger()
    root.handlers[:] = [_handler(target, LineFormatter(shape)) for target in targets]
    root.setLevel(chosen.of(DEFAULT))
    scopes = {AGENT, PLUGIN, *chosen.by_scope} - {DEFAULT}
    for scope in scopes:
        logging.getLogger(scope).setLevel(chosen.of(scope))
    logging.getLogger(OWN_PACKAGE).setLevel(chosen.of(AGENT))
    logging.raiseExceptions = False  # a closed standard output must not fill standard error
    # The original takes the plugin's level for the conf first and then prints forwarded lines by the agent's level.
    plugin_log.setLevel(chosen.of(AGENT))
    return LEVEL_NAMES[chosen.of(PLUGIN)]


def _handler(target: str, formatter: logging.Formatter) -> logging.Handler:
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    handler = logging.StreamHandler(streams[target]) if target in streams else logging.FileHandler(target)
    handler.setFormatter(formatter)
    return handler


def forward(line: LogLine) -> None:
    """Print a plugin's line with its own time, if scope `cni-plugin` prints its level."""
    level = LEVEL_NUMBERS[line.level]
    if plugin_log.isEnabledFor(level):
        plugin_log.log(level, "%s", line.message, extra={"labels": line.labels, "sent": line.time})


class LineFormatter(logging.Formatter):
    """One record, one line (an attachment, a stack or a traceback may follow in text format)."""

    def __init__(self, shape: Format) -> None:
        super().__init__()
        self.shape = shape

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`."""
        scope = scope_of(record.name)
        caller = f"{record.filename}:{record.lineno}" if {scope, "all"} & self.shape.callers else ""
        stack = self._stack(record, scope)
        values: Mapping[str, object] = getattr(record, "labels", {})
        time, level, message = _time(record), LEVEL_NAMES.get(record.levelno, "info"), record.getMessage()
        if self.shape.as_json:
            known: dict[str, object] = {
                "level": level,
                "time": time,
                "scope": scope,
                "caller": caller,
                "msg": message,
                "stack": stack,
                "attachment": getattr(record, "attachment", ""),
            }
            document = {key: value for key, value in known.items() if value}
            document |= {key: value for key, value in values.items() if key not in JSON_KEYS}
            return json.dumps(document, separators=(",", ":"), default=str)
        parts = [time, level, "" if scope == DEFAULT else scope, caller, printable(message)]
        parts.append(" ".join(f"{key}={printable(_text(value))}" for key, value in values.items()))
        line = "\t".join(part for part in parts if part)
        return "\n".join(filter(None, (line, getattr(record, "attachment", "").rstrip(), stack)))

    def _stack(self, record: logging.LogRecord, scope: str) -> str:
        """The traceback of an exception that is being logged, or the call stack when the level asks for it."""
        if record.exc_info:
            return self.formatException(record.exc_info)
        if record.levelno < self.shape.stacks.of(scope):
            return ""
        return "".join(traceback.format_stack(_caller_frame())).rstrip()


def _text(value: object) -> str:
    """A label's value on the console: what JSON has words of its own for in those, not in Python's."""
    return json.dumps(value) if isinstance(value, bool | list | dict | None) else str(value)


def _caller_frame() -> FrameType | None:
    """The innermost frame outside this module and the logging package."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "") in (__name__, "logging"):
        frame = frame.f_back
    return frame


def scope_of(logger_name: str) -> str:
    """The scope that a logger's lines are printed under."""
    first = logger_name.partition(".")[0]
    return {"root": DEFAULT, OWN_PACKAGE: AGENT}.get(first, first)


def _time(record: logging.LogRecord) -> str:
    """`YYYY-MM-DDTHH:MM:SS.ffffffZ` of the record, or of the plugin that sent it."""
    sent = getattr(record, "sent", "")
    try:
        moment = datetime.fromisoformat(sent).astimezone(UTC) if sent else datetime.fromtimestamp(record.created, UTC)
    except (ValueError, OverflowError):  # well-formed text, but no such day
        moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
