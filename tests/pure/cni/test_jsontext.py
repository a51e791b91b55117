"""The plugin's own JSON, against the standard library's as oracle."""

# ruff: noqa: RUF005
from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cni.jsontext import MAX_DEPTH, MAX_INT_CHARACTERS, JsonError, NumberToken, compact, indented, parse

# Characters that some part of a JSON reader or writer treats specially, and some that none does.
ALPHABET = "aZ09 _-./:;,<>&'\"\\{}[]\0\x1f\x7f\n\t\r\b\fé߀\u2028\u2029\ufeff\uffff😀\U0010ffff"
TEXTS = st.text(ALPHABET)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
VALUES.validate()  # reads hypothesis's character tables now, because no file may be read during a pure test
# Text that is often nearly JSON.
NEARLY = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", ",", ":", '"', "\\", "a", "u00e9", "ud83d", "\\ude00", "0", "1", "-", "+", ".", "e", "E"]
        + ["true", "false", "null", " ", "\n", "\t", "\x00", "\x1f", "\x7f", "é", '"k":', '"v"', "1.5e3", "[]", "{}"]
    ),
    max_size=12,
).map("".join)


def refuse_constant(name: str) -> object:
    raise ValueError(name)


def reference(text: str) -> object:
    """The standard library's answer; lone surrogates become U+FFFD, as in Go."""
    value = json.loads(text, parse_constant=refuse_constant)
    return json.loads(
        json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


@given(VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    assert parse(compact(value).encode()) == value
    assert parse(indented(value).encode()) == value


@given(VALUES)
def test_the_standard_library_reads_the_same(value: object) -> None:
    assert json.loads(compact(value)) == value
    assert json.loads(indented(value)) == value


@given(VALUES)
def test_reads_what_the_standard_library_writes(value: object) -> None:
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False, indent=1).encode()) == value


@given(NEARLY)
def test_accepts_exactly_what_the_standard_library_accepts(text: str) -> None:
    try:
        wanted = reference(text)
    except ValueError:
        with pytest.raises(JsonError):
            parse(text.encode())
    else:
        assert parse(text.encode()) == wanted


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_an_error(data: bytes) -> None:
    try:
        parse(data)
    except JsonError:
        pass


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (' \t\r\n{"a" : [ 1 , 2 ] } \n', {"a": [1, 2]}),
        ("-0", 0),
        ("123456789012345678901234567890", 123456789012345678901234567890),
        (r'"\u0041\n\/\"\\\b\f\r\t"', 'A\n/"\\\b\f\r\t'),
        (r'"\ud83d\ude00"', "😀"),
        (r'"\ud83d"', "�"),
        (r'"\ude00\ud83dx"', "��x"),
        (r'"\ud83dA"', "�A"),
        ('"\x7f\u2028"', "\x7f\u2028"),
    ],
)
def test_reads(text: str, value: object) -> None:
    assert parse(text.encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "[",
        '"',
        '{"a"',
        '{"a":',
        '{"a":1',
        '{"a":1,',
        '{"a":1,}',
        "[1,]",
        "[,1]",
        "[1 2]",
        '{"a" 1}',
        "{1:2}",
    ]
    + ["{'a':1}", "tru", "nul", "NaN", "Infinity", "-Infinity", "01", "-", "-01", "1.", ".5", "1e", "1e+", "+1", "0x10"]
    + ["1_000", "--1", "1.2.3", "1e5e5", '"\x01"', '"\n"', r'"\x"', r'"\u12"', r'"\u12g4"', '"\\', '"\\u', r'"\u+123"']
    + ["[1]]", "{}x", "{}\x00", "\x00", "\ufeff{}", "[1]//", "/**/1", "1\x00", "٣", "1٣"],
)
def test_refuses(text: str) -> None:
    with pytest.raises(JsonError):
        parse(text.encode())


@pytest.mark.parametrize("data", [b"\xff", b'"\xc3"', b'"\xed\xa0\x80"', b"\xff\xfe{\x00}\x00", b'{"a":"\xc0\xaf"}'])
def test_refuses_what_is_not_utf_8(data: bytes) -> None:
    with pytest.raises(JsonError, match="UTF-8"):
        parse(data)


def test_says_where() -> None:
    with pytest.raises(JsonError) as caught:
        parse(b'{"a": 1, "b" 2}')
    assert caught.value.offset == 13
    assert caught.value.message == "found '2' at offset 13, expected ':'"


@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_depth_is_limited(brackets: str) -> None:
    opening, closing = brackets[:-1], brackets[-1]
    deepest = opening * MAX_DEPTH + ("1" if opening != "[" else "") + closing * MAX_DEPTH
    assert parse(compact(parse(deepest.encode())).encode()) == parse(deepest.encode())
    with pytest.raises(JsonError, match="nested"):
        parse((opening * (MAX_DEPTH + 1)).encode())
    with pytest.raises(JsonError, match="nested"):
        parse(opening.encode() * 100_000)


@pytest.mark.parametrize("token", ["1.0", "-0.10", "1e3", "1E+400", "-1e-400", "123456789.123456789123456789"])
def test_numbers_keep_their_token(token: str) -> None:
    value = parse(token.encode())
    assert isinstance(value, NumberToken)
    assert compact([value]) == f"[{token}]"


def test_very_long_integers_keep_their_token() -> None:
    digits = "9" * MAX_INT_CHARACTERS
    assert parse(digits.encode()) == int(digits)
    assert compact(parse((digits * 20).encode())) == digits * 20


def test_the_last_of_equal_keys_counts_and_takes_its_place() -> None:
    value = parse(b'{"a":1,"A":2,"a":3}')
    assert list(value.items()) == [("A", 2), ("a", 3)]  # type: ignore[attr-defined]


def test_layout() -> None:
    value = {"a": [], "b": {}, "c": [1, {"d": None}], "e": True}
    assert indented(value) == (
        '{\n    "a": [],\n    "b": {},\n    "c": [\n        1,\n        {\n            "d": null\n        }\n    ],\n'
        '    "e": true\n}'
    )
    assert compact(value) == '{"a":[],"b":{},"c":[1,{"d":null}],"e":true}'


def test_escapes_as_go_does() -> None:
    assert compact('<&>"\\\n\x01\x7f\u2028é') == r'"\u003c\u0026\u003e\"\\\n\u0001' + "\x7f" + r'\u2028é"'
    assert compact("a\udc80\ud800b") == '"a\ufffd\ufffdb"'


@pytest.mark.parametrize("value", [math.nan, math.inf, {1}, b"x", {"a": object()}])
def test_refuses_to_write(value: object) -> None:
    with pytest.raises(JsonError, match="cannot be written"):
        compact(value)
