"""Edits leave other bytes alone, whatever the text looks like; canonical text stays canonical."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cni.conftext import Number, array_at, go_json, go_number, go_string, parse, with_item, without
from meshcni.errors import ConfError

WHITE = st.text(" \t\r\n", max_size=4)
KEYS = st.sampled_from(["a", "b", "name", "type", "mtu", "ä", "\u2028", "<&>", "", "plugins2"])
NUMBERS = st.sampled_from(
    ["0", "-0", "1500", "9007199254740993", "1e400", "1.0", "1.50e-3", "-12E+5", "123456789012345678901234567890"]
)
SCALARS = st.one_of(
    NUMBERS,
    st.sampled_from(["true", "false", "null", r'"\ud800"', r'"\u003c\/"', '"\\""']),
    st.text(max_size=6).filter(lambda text: text.isprintable()).map(json.dumps),
)


@st.composite
def spread(draw: st.DrawFn, opening: str, parts: list[str], closing: str) -> str:
    """Parts between brackets with arbitrary white space around each."""
    if not parts:
        return opening + draw(WHITE) + closing
    return opening + ",".join(draw(WHITE) + part + draw(WHITE) for part in parts) + closing


@st.composite
def member(draw: st.DrawFn, key: str, value: str) -> str:
    return json.dumps(key, ensure_ascii=draw(st.booleans())) + draw(WHITE) + ":" + draw(WHITE) + value


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> str:
    """Any JSON text."""
    kind = draw(st.integers(0, 3)) if depth else 0
    if kind == 1:
        return draw(spread("[", [draw(values(depth - 1)) for _ in range(draw(st.integers(0, 3)))], "]"))
    if kind == 2:
        return draw(objects(depth - 1))
    return draw(SCALARS)


@st.composite
def objects(draw: st.DrawFn, depth: int = 1, extra: tuple[str, ...] = ()) -> str:
    """An object, keys possibly twice, with `extra` members among its own."""
    members = [draw(member(draw(KEYS), draw(values(depth)))) for _ in range(draw(st.integers(0, 3)))]
    members += extra
    return draw(spread("{", draw(st.permutations(members)), "}"))


@st.composite
def lists(draw: st.DrawFn) -> str:
    """A document with a list `plugins`, perhaps a second one."""
    extra = []
    for _ in range(draw(st.integers(1, 2))):
        items = [draw(objects()) for _ in range(draw(st.integers(0, 3)))]
        extra.append(draw(member("plugins", draw(spread("[", items, "]")))))
    return draw(WHITE) + draw(objects(2, tuple(extra))) + draw(WHITE)


def plugins(text: str) -> tuple[int, int, int]:
    """Start, end and count of the array that counts."""
    found = parse(text.encode(), "x").root.member("plugins")
    assert found is not None
    array = array_at(text, found.value_start)
    return array.start, array.end, len(array.elements)


@given(lists(), st.dictionaries(st.sampled_from(["type", "<", "k"]), st.sampled_from(["v", 1, True, None, [], {}])))
def test_an_item_put_in_and_taken_out_leaves_every_byte(text: str, value: dict[str, object]) -> None:
    start, end, count = plugins(text)
    put_in = with_item(text, array_at(text, start), value)
    grown = len(put_in) - len(text)
    assert put_in[:start] + put_in[end + grown :] == text[:start] + text[end:]  # nothing outside the array moved
    array = array_at(put_in, start)
    assert len(array.elements) == count + 1
    assert json.loads(put_in[array.elements[-1].start : array.elements[-1].end]) == value
    assert without(put_in, array, count) == text


@given(lists(), st.integers(0, 3))
def test_any_item_can_be_taken_out_and_the_others_stay(text: str, index: int) -> None:
    start, _, count = plugins(text)
    if index >= count:
        return
    array = array_at(text, start)
    taken_out = without(text, array, index)
    kept = [text[e.start : e.end] for i, e in enumerate(array.elements) if i != index]
    after = array_at(taken_out, start)
    assert [taken_out[e.start : e.end] for e in after.elements] == kept
    json.loads(taken_out)


@given(st.binary(max_size=40) | st.text('{}[]",:\\ \n\u20281e-.tfn', max_size=30).map(str.encode))
def test_no_input_makes_anything_but_a_document_or_an_error_that_names_the_file(data: bytes) -> None:
    try:
        document = parse(data, "10-x.conf")
    except ConfError as error:
        outcome = error.message
    else:
        assert document.value.keys() == json.loads(data).keys()
        outcome = document.text
    assert "10-x.conf" in outcome or outcome.encode() == data


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3), st.lists(st.dictionaries(st.text(), JSON_VALUES)))
def test_canonical_text_stays_canonical(rest: dict[str, object], items: list[object]) -> None:
    value = {"type": "istio-cni", "list": [], "text": "<&>"}
    before = go_json({**rest, "plugins": items}) + "\n"
    start, _, _ = plugins(before)
    assert with_item(before, array_at(before, start), value) == go_json({**rest, "plugins": [*items, value]}) + "\n"


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a":"\xff"}', "not UTF-8: byte 0xff at offset 6"),
        (b"[]", "holds a JSON array"),
        (b"1", "holds a JSON number"),
        (b"null", "holds a JSON null"),
        (b"{} x", "more text after the value, at offset 3"),
        (b'{"a": NaN}', "NaN is no JSON value"),
        (b'{"a": 1,}', "line 1 column"),
        (b'{"a": "\n"}', "control character"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_object_is_refused_with_the_place(data: bytes, part: str) -> None:
    with pytest.raises(ConfError, match=part):
        parse(data, "file")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("1", "1"),
        ("1.0", "1"),
        ("-0", "-0"),
        ("0.000001", "0.000001"),
        ("0.0000001", "1e-7"),
        ("1.5e-10", "1.5e-10"),
        ("1e20", "100000000000000000000"),
        ("1e21", "1e+21"),
        ("-1.25e300", "-1.25e+300"),
        ("9007199254740993", "9007199254740992"),
    ],
)
def test_numbers_in_the_form_of_go(token: str, expected: str) -> None:
    assert go_number(token) == expected
    assert go_json(Number(token)) == expected


def test_a_number_beyond_64_bits_has_no_such_form() -> None:
    with pytest.raises(ConfError, match="does not fit"):
        go_number("1e400")


def test_strings_in_the_form_of_go() -> None:
    assert go_string('<a href="x">&\u2028\x1f\ud800ä') == '"\\u003ca href=\\"x\\"\\u003e\\u0026\\u2028\\u001f\ufffdä"'


LAYOUTS = {  # before: after, with {"t": "x"} put in; `|` is an end of line
    '{"plugins":[{"a":1}]}': '{"plugins":[{"a":1},{"t":"x"}]}',
    '{"plugins": [{"a": 1}]}|': '{"plugins": [{"a": 1}, {"t": "x"}]}|',
    '{|\t"plugins": [|\t\t{|\t\t\t"a": 1|\t\t}|\t]|}': (
        '{|\t"plugins": [|\t\t{|\t\t\t"a": 1|\t\t},|\t\t{|\t\t\t"t": "x"|\t\t}|\t]|}'
    ),
    '{| "plugins": [{|  "a": 1| }]|}|': '{| "plugins": [{|  "a": 1| }, {|  "t": "x"| }]|}|',
    '{|    "plugins": [|        {"a": 1}|    ]|}': (
        '{|    "plugins": [|        {"a": 1},|        {|            "t": "x"|        }|    ]|}'
    ),
    '{|  "plugins": []|}': '{|  "plugins": [|    {|      "t": "x"|    }|  ]|}',
    '{|  "plugins": [{"a": 1}]|}': '{|  "plugins": [{"a": 1}, {"t": "x"}]|}',
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("before", LAYOUTS)
def test_an_item_follows_the_layout_of_the_file(before: str, newline: str) -> None:
    text = before.replace("|", newline)
    start, _, _ = plugins(text)
    assert with_item(text, array_at(text, start), {"t": "x"}) == LAYOUTS[before].replace("|", newline)
