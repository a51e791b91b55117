"""JSON text with the place of each value, so that an edit leaves every other byte as it was.

Order, number tokens, unknown and duplicate keys, indentation, line ends: all of it belongs to the file's owner. What we
put in follows the file's own layout; in a file that is in the form of Go's `json.MarshalIndent` it has that form too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from meshcni.errors import ConfError

WHITESPACE = re.compile(r"[ \t\r\n]*")
# encoding/json of Go escapes these for HTML; the rest of its escapes are those of Python's encoder.
GO_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
GO_UNIT = "  "  # what the original indents with: cni/pkg/install/cniconfig.go


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it stands in the file; two are equal when their tokens are."""

    token: str


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_refuse_constant)


@dataclass(frozen=True, slots=True)
class Element:
    """A member of an object (`key` is set) or an item of an array: `text[start:end]`, key and colon included."""

    start: int
    end: int
    value: Any
    key: str = ""
    value_start: int = 0


@dataclass(frozen=True, slots=True)
class Container:
    """An object or array in a text: `text[start:end]`, brackets included."""

    start: int
    end: int
    elements: tuple[Element, ...]

    def member(self, key: str) -> Element | None:
        """The member that counts: of duplicates JSON readers take the last."""
        return next((element for element in reversed(self.elements) if element.key == key), None)


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON object in a file: its text, its decoded value, and where its members are."""

    text: str
    value: dict[str, Any]
    root: Container


def parse(data: bytes, origin: str) -> Document:
    """Read a file that must hold one JSON object. Raises ConfError that names `origin` and the place of the fault."""
    try:
        return parse_text(data.decode("utf-8"), origin)
    except UnicodeDecodeError as error:
        raise ConfError(f"{origin} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def parse_text(text: str, origin: str) -> Document:
    """`parse` for text that is decoded already."""
    if text.startswith("\ufeff"):
        raise ConfError(f"{origin} starts with a byte order mark", "CNI runtimes do not accept one; remove it")
    try:
        start = _skip(text, 0)
        value, end = _DECODER.raw_decode(text, start)
        if _skip(text, end) != len(text):
            raise ConfError(f"{origin} is not valid JSON: more text after the value, at offset {_skip(text, end)}")
    except RecursionError:
        raise ConfError(f"{origin} is nested too deeply") from None
    except ValueError as error:
        raise ConfError(f"{origin} is not valid JSON: {error}" if text.strip() else f"{origin} is empty") from None
    if not isinstance(value, dict):
        raise ConfError(f"{origin} holds a JSON {_kind(value)}, expected an object")
    return Document(text, value, object_at(text, start))


def object_at(text: str, start: int) -> Container:
    """The object that starts at `start` of a text known to be valid."""
    return _container(text, start, _member)


def array_at(text: str, start: int) -> Container:
    """The array that starts at `start` of a text known to be valid."""
    return _container(text, start, _item)


def without(text: str, container: Container, index: int) -> str:
    """The text without one element and the comma that belonged to it; the exact reverse of `with_item`."""
    elements = container.elements
    gone = elements[index]
    if index > 0:
        return text[: elements[index - 1].end] + text[gone.end :]
    if len(elements) > 1:
        return text[: gone.start] + text[elements[1].start :]
    before, after = text[container.start + 1 : gone.start], text[gone.end : container.end - 1]
    inside = "" if before and after else before + after
    return text[: container.start + 1] + inside + text[container.end - 1 :]


def with_item(text: str, array: Container, value: object) -> str:
    """The text with `value` as the array's last item, laid out as the items before it."""
    layout = Layout.of(text, array)
    item = layout.render(value)
    if array.elements:
        at = array.elements[-1].end
        return text[:at] + "," + layout.before + item + text[at:]
    inside = text[array.start + 1 : array.end - 1]
    # White space that was there goes before the item, none after it: that is how `without` finds it again.
    inside = inside + item if inside else layout.before.lstrip(" ") + item + layout.after
    return text[: array.start + 1] + inside + text[array.end - 1 :]


@dataclass(frozen=True, slots=True)
class Layout:
    """How an item of an array is laid out: white space before and after it, its own indentation, and the step of it.

    `newline` is empty when everything stands on one line; then `gap` follows colons and commas.
    """

    before: str
    after: str
    newline: str
    indent: str
    unit: str
    gap: str

    @classmethod
    def of(cls, text: str, array: Container) -> Layout:
        """The layout that a new last item of `array` should have."""
        newline, unit, gap = style(text)
        closing = _indent_of_line(text, array.end - 1)
        inside = text[array.start : array.end]
        if not newline or (array.elements and "\n" not in inside):
            return cls(gap, "", "", "", unit, gap)
        if not array.elements:
            indent = _indent_of_line(text, array.start) + unit
            return cls(newline + indent, newline + indent[: -len(unit)], newline, indent, unit, gap)
        last = array.elements[-1]
        indent = _indent_of_line(text, last.start)
        starts_line = text[: last.start].endswith("\n" + indent)
        own_unit = _difference(_first_inner_indent(text, last), indent) or _difference(indent, closing) or unit
        return cls(newline + indent if starts_line else " ", "", newline, indent, own_unit, gap)

    def render(self, value: object) -> str:
        """`value` as text in this layout, keys sorted, in Go's spelling."""
        if not self.newline:
            return go_json(value, newline="", unit="", gap=self.gap)
        return go_json(value, newline=self.newline, indent=self.indent, unit=self.unit)


def style(text: str) -> tuple[str, str, str]:
    """A file's line end (empty: all on one line), its step of indentation, and what follows a colon on one line."""
    document = WHITESPACE.sub("", text, count=1) if text[:1].isspace() else text
    document = document.rstrip()
    newline = "\r\n" if "\r\n" in document else "\n" if "\n" in document else ""
    found = re.search(r"\n([ \t]+)\S", document)
    colon = re.search(r'":([ \t]*)', document)
    return newline, found[1] if found else GO_UNIT, " " if colon and colon[1] else ""


def go_json(
    value: object, *, newline: str = "\n", indent: str = "", unit: str = GO_UNIT, gap: str = " ", sort: bool = True
) -> str:
    """`value` as Go's `json.MarshalIndent` writes it; `sort=False` keeps the order of keys, as Go does for a struct.

    With an empty `newline` everything stands on one line and `gap` follows each colon and comma.
    """
    inner = indent + unit
    lead = newline + inner if newline else ""
    join = "," + (lead or gap)
    close = newline + indent if newline else ""
    colon = ": " if newline else ":" + gap

    def nested(child: object) -> str:
        return go_json(child, newline=newline, indent=inner, unit=unit, gap=gap, sort=sort)

    match value:
        case dict() if value:
            keys = sorted(value) if sort else list(value)
            return "{" + lead + join.join(go_string(key) + colon + nested(value[key]) for key in keys) + close + "}"
        case list() | tuple() if value:
            return "[" + lead + join.join(nested(child) for child in value) + close + "]"
        case str():
            return go_string(value)
        case Number():
            return go_number(value.token)
        case float():
            return go_number(repr(value))
        case None | bool() | int() | dict() | list() | tuple():
            return json.dumps(value)
        case _:
            raise TypeError(f"{value!r} is no JSON value")


def go_string(value: str) -> str:
    """A string as Go's encoder writes it; a lone surrogate becomes the replacement character, as in Go."""
    sound = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.dumps(sound, ensure_ascii=False).translate(GO_ESCAPES)


def go_number(token: str) -> str:
    """A number that went through Go's float64: integers beyond 2^53 change, as in every file the original rewrites."""
    number = float(token)
    if number in (float("inf"), float("-inf")):
        raise ConfError(f"the number {token[:40]} does not fit into 64 bits")
    if number == 0:
        return "-0" if token.startswith("-") else "0"
    shortest = Decimal(repr(number)).normalize()
    if 1e-6 <= abs(number) < 1e21:
        return format(shortest, "f")
    sign, digits, exponent = shortest.as_tuple()
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if len(digits) > 1 else "")
    power = int(exponent) + len(digits) - 1
    return f"{'-' if sign else ''}{mantissa}e{'-' if power < 0 else '+'}{abs(power)}"


def _container(text: str, start: int, read: Callable[[str, int], Element]) -> Container:
    elements = []
    at = _skip(text, start + 1)
    while text[at] not in "]}":
        element = read(text, at)
        elements.append(element)
        at = _skip(text, element.end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return Container(start, at + 1, tuple(elements))


def _item(text: str, start: int) -> Element:
    value, end = _DECODER.raw_decode(text, start)
    return Element(start, end, value, value_start=start)


def _member(text: str, start: int) -> Element:
    key, end = _DECODER.raw_decode(text, start)
    value_start = _skip(text, _skip(text, end) + 1)  # past the colon
    value, end = _DECODER.raw_decode(text, value_start)
    return Element(start, end, value, key, value_start)


def _skip(text: str, at: int) -> int:
    found = WHITESPACE.match(text, at)
    return found.end() if found else at


def _indent_of_line(text: str, at: int) -> str:
    """The white space that the line of position `at` starts with."""
    start = text.rfind("\n", 0, at) + 1
    found = re.compile(r"[ \t]*").match(text, start)
    return found[0] if found else ""


def _first_inner_indent(text: str, element: Element) -> str:
    """The indentation of the first line inside an element; empty when it stands on one line."""
    newline = text.find("\n", element.start, element.end)
    return _indent_of_line(text, newline + 1) if newline >= 0 else ""


def _difference(inner: str, outer: str) -> str:
    """The step from `outer` to `inner`, empty when `inner` is no deeper."""
    return inner[len(outer) :] if inner.startswith(outer) else ""


def _kind(value: object) -> str:
    return {list: "array", str: "string", Number: "number", bool: "boolean"}.get(type(value), "null")
