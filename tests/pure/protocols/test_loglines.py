"""Bodies of `POST /log`."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import ProtocolError
from meshcni.protocols.loglines import LEVELS, LogLine, decode_lines, printable

TEXT = st.text(alphabet="ab \n\r\t\v\f\x00\x1b\x1c\x7f\x85\u2028\u2029é\U0001f600", max_size=30)
GOOD = {"level": "info", "time": "2024-01-02T03:04:05.678Z", "msg": "hi\n"}


def body(*entries: object) -> bytes:
    return json.dumps([entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]).encode()


def test_line_with_labels() -> None:
    batch = decode_lines(body(GOOD | {"pod": "a/b", "n": 1, "deep": {"x": [True, None]}}))
    labels = {"pod": "a/b", "n": 1, "deep": {"x": [True, None]}}
    assert batch.lines == (LogLine("2024-01-02T03:04:05.678Z", "info", "hi", labels),)
    assert batch.dropped == ()


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_levels_that_are_printed(level: str) -> None:
    assert decode_lines(body(GOOD | {"level": level})).lines[0].level == level


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("no json", "not JSON"),
        ("[]", "not a JSON object"),
        ({"level": "info", "msg": "x"}, "'time'"),
        ({"level": "info", "time": GOOD["time"]}, "'msg'"),
        ({"msg": "x", "time": GOOD["time"]}, "'level'"),
        (GOOD | {"msg": 5}, "'msg'"),
        (GOOD | {"level": "fatal"}, "'fatal'"),
        (GOOD | {"time": "yesterday"}, "'yesterday'"),
    ],
)
def test_bad_entry_is_dropped_alone(entry: object, why: str) -> None:
    batch = decode_lines(body(GOOD, entry, GOOD))
    assert len(batch.lines) == 2
    assert len(batch.dropped) == 1
    assert why in batch.dropped[0]


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"null", b"\xff", b"[" * 100_000, b'["a"'])
def test_bad_body(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_lines(data)
    assert caught.value.cause == "malformed"


def test_empty_array_is_fine() -> None:
    assert decode_lines(b"[]").lines == ()


@given(TEXT)
def test_printable_stays_on_one_line(text: str) -> None:
    assert len(printable(text).splitlines()) <= 1


@given(st.dictionaries(TEXT, TEXT, max_size=5), TEXT)
def test_nothing_sent_makes_a_second_line(labels: dict[str, str], message: str) -> None:
    for line in decode_lines(body(labels | GOOD | {"msg": message})).lines:
        for text in (line.message, *line.labels, *map(str, line.labels.values())):
            assert len(text.splitlines()) <= 1


@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_a_protocol_error(data: bytes) -> None:
    try:
        batch = decode_lines(data)
    except ProtocolError:
        return
    assert len(batch.lines) + len(batch.dropped) <= len(data)
