"""The two line formats, scopes and levels."""

from __future__ import annotations

import json
import logging

import pytest

from meshcni.agent.logs import NEVER, Format, LineFormatter, labels, levels, scope_of


def record(
    name: str = "cni-agent", level: int = logging.INFO, message: str = "hello", **extra: object
) -> logging.LogRecord:
    made = logging.LogRecord(name, level, "/src/meshcni/agent/app.py", 7, message, (), None)
    made.created = 1700000000.25
    made.__dict__.update(extra)
    return made


def test_text_line() -> None:
    line = LineFormatter(Format()).format(record(**labels(pod="a/b", ms=1.5)))
    assert line == "2023-11-14T22:13:20.250000Z\tinfo\tcni-agent\thello\tpod=a/b ms=1.5"


def test_default_scope_is_not_printed() -> None:
    assert LineFormatter(Format()).format(record("root")) == "2023-11-14T22:13:20.250000Z\tinfo\thello"


def test_json_line() -> None:
    line = LineFormatter(Format(as_json=True)).format(
        record(level=logging.WARNING, **labels(pod="a/b", level="x", n=1))
    )
    assert json.loads(line) == {
        "level": "warn",
        "time": "2023-11-14T22:13:20.250000Z",
        "scope": "cni-agent",
        "msg": "hello",
        "pod": "a/b",
        "n": 1,
    }


def test_caller_is_named_for_its_scopes() -> None:
    shape = Format(callers=frozenset({"cni-plugin"}))
    assert "app.py:7" not in LineFormatter(shape).format(record())
    assert "\tapp.py:7\t" in LineFormatter(shape).format(record("cni-plugin"))
    assert "app.py:7" in LineFormatter(Format(callers=frozenset({"all"}))).format(record())


def test_exception_carries_its_traceback() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        failed = record(level=logging.ERROR, exc_info=(ValueError, error, error.__traceback__))
    assert LineFormatter(Format()).format(failed).endswith("ValueError: boom")
    assert "ValueError: boom" in json.loads(LineFormatter(Format(as_json=True)).format(failed))["stack"]


@pytest.mark.parametrize("evil", ["a\nb", "a\rb", "a\x1b[31mb", "a\u2028b", "a\x00b", "a\x85b"])
@pytest.mark.parametrize("as_json", [False, True])
def test_one_record_is_one_line(evil: str, as_json: bool) -> None:
    line = LineFormatter(Format(as_json=as_json)).format(record(message=evil, **labels(pod=evil)))
    assert not set(line) & set("\n\r\x1b\x00\x85")
    assert as_json or "\u2028" not in line


@pytest.mark.parametrize(
    ("sent", "printed"),
    [
        ("2023-11-14T22:13:20Z", "2023-11-14T22:13:20.000000Z"),
        ("2023-11-14T23:13:20.123456789+01:00", "2023-11-14T22:13:20.123456Z"),
        ("2023-13-40T00:00:00Z", "2023-11-14T22:13:20.250000Z"),
    ],
)
def test_forwarded_line_keeps_its_time(sent: str, printed: str) -> None:
    assert LineFormatter(Format()).format(record("cni-plugin", sent=sent)).startswith(f"{printed}\tinfo\tcni-plugin\t")


@pytest.mark.parametrize(
    ("logger", "scope"),
    [("root", "default"), ("meshcni.kube.informer", "cni-agent"), ("cni-plugin", "cni-plugin"), ("asyncio", "asyncio")],
)
def test_scope(logger: str, scope: str) -> None:
    assert scope_of(logger) == scope


def test_levels() -> None:
    chosen = levels([("default", "info"), ("grpc", "none"), ("default", "debug")])
    assert (chosen.of("default"), chosen.of("grpc"), chosen.of("other")) == (logging.DEBUG, NEVER, logging.INFO)
    everything = levels([("cni-agent", "error"), ("all", "debug")])
    assert everything.of("cni-agent") == everything.of("anything") == logging.DEBUG
