"""JSON for an interpreter without a standard library: a strict parser (RFC 8259) and a writer with Go's layout.

Imported by the plugin's fast path, so this module imports nothing but our errors.
"""

from meshcni.errors import CNI_DECODING_FAILURE, MeshCniError

MAX_DEPTH = 200  # nested arrays and objects; far above any conf, far below the interpreter's own recursion limit
MAX_INT_CHARACTERS = 600  # longer integers keep their token: CPython refuses int() from 4300 digits on, 640 at least

_WHITESPACE = " \t\n\r"
_NUMBER_CHARACTERS = "0123456789+-.eE"
_HEX_DIGITS = "0123456789abcdefABCDEF"
_SIMPLE_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS = {"t": ("true", True), "f": ("false", False), "n": ("null", None)}

# What Go's encoding/json escapes, HTML characters and the two line separators included.
_OUTPUT_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), 0x26, 0x3C, 0x3E, 0x2028, 0x2029)}
_OUTPUT_ESCAPES.update({0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"})
_REPLACEMENT = "\ufffd"


class JsonError(MeshCniError):
    """Text that is not JSON, or a value that JSON cannot express; `offset` counts characters from 0."""

    cni_code = CNI_DECODING_FAILURE

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


class NumberToken(float):
    """A number that is no (reasonably long) integer; written back as the token that was read."""

    __slots__ = ("token",)
    token: str

    def __new__(cls, token: str) -> "NumberToken":
        """Takes a valid JSON number token."""
        number = float.__new__(cls, token)
        number.token = token
        return number


def parse(data: bytes) -> object:
    """The value of a UTF-8 JSON text: dict, list, str, int, NumberToken, bool or None.

    Of equal keys the last one counts and takes the later place. Lone surrogate escapes become U+FFFD, as in Go.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is not UTF-8", error.start) from None
    # The sentinel lets every function below look at text[at] without asking whether the text is over.
    end = len(text)
    value, at = _value(text + "\0", 0, 0)
    at = _skip_whitespace(text + "\0", at)
    if at != end:
        raise JsonError(f"unexpected text after the value at offset {at}", at)
    return value


def _skip_whitespace(text: str, at: int) -> int:
    while text[at] in _WHITESPACE:
        at += 1
    return at


def _unexpected(text: str, at: int, wanted: str) -> JsonError:
    found = "the end" if at >= len(text) - 1 else repr(text[at])
    return JsonError(f"found {found} at offset {at}, expected {wanted}", at)


def _value(text: str, at: int, depth: int) -> tuple[object, int]:
    at = _skip_whitespace(text, at)
    first = text[at]
    if first == '"':
        return _string(text, at + 1)
    if first == "{":
        return _object(text, at + 1, depth + 1)
    if first == "[":
        return _array(text, at + 1, depth + 1)
    if first in _LITERALS:
        token, value = _LITERALS[first]
        if text.startswith(token, at):
            return value, at + len(token)
        raise _unexpected(text, at, token)
    if first == "-" or "0" <= first <= "9":
        return _number(text, at)
    raise _unexpected(text, at, "a value")


def _object(text: str, at: int, depth: int) -> tuple[dict[str, object], int]:
    if depth > MAX_DEPTH:
        raise JsonError(f"more than {MAX_DEPTH} nested objects and arrays", at)
    members: dict[str, object] = {}
    at = _skip_whitespace(text, at)
    if text[at] == "}":
        return members, at + 1
    while True:
        if text[at] != '"':
            raise _unexpected(text, at, "a key")
        key, at = _string(text, at + 1)
        at = _skip_whitespace(text, at)
        if text[at] != ":":
            raise _unexpected(text, at, "':'")
        value, at = _value(text, at + 1, depth)
        members.pop(key, None)
        members[key] = value
        at = _skip_whitespace(text, at)
        if text[at] == "}":
            return members, at + 1
        if text[at] != ",":
            raise _unexpected(text, at, "',' or '}'")
        at = _skip_whitespace(text, at + 1)


def _array(text: str, at: int, depth: int) -> tuple[list[object], int]:
    if depth > MAX_DEPTH:
        raise JsonError(f"more than {MAX_DEPTH} nested objects and arrays", at)
    items: list[object] = []
    at = _skip_whitespace(text, at)
    if text[at] == "]":
        return items, at + 1
    while True:
        item, at = _value(text, at, depth)
        items.append(item)
        at = _skip_whitespace(text, at)
        if text[at] == "]":
            return items, at + 1
        if text[at] != ",":
            raise _unexpected(text, at, "',' or ']'")
        at += 1


def _string(text: str, start: int) -> tuple[str, int]:
    """Reads from behind the opening quote to behind the closing one."""
    parts: list[str] = []
    at = start
    while True:
        quote = text.find('"', at)
        if quote < 0:
            raise JsonError(f"the string that begins at offset {start - 1} has no end", start - 1)
        backslash = text.find("\\", at, quote)
        stop = quote if backslash < 0 else backslash
        run = text[at:stop]
        if not run.isprintable():
            for offset, character in enumerate(run):
                if character < " ":
                    raise JsonError(f"raw control character {character!r} in a string", at + offset)
        if backslash < 0:
            if not parts:
                return run, quote + 1
            parts.append(run)
            return "".join(parts), quote + 1
        parts.append(run)
        character, at = _escape(text, backslash + 1)
        parts.append(character)


def _escape(text: str, at: int) -> tuple[str, int]:
    """Reads from behind the backslash."""
    letter = text[at]
    if letter in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[letter], at + 1
    if letter != "u":
        raise _unexpected(text, at, "an escape")
    code = _hex4(text, at + 1)
    at += 5
    if 0xD800 <= code < 0xDC00 and text.startswith("\\u", at):
        low = _hex4(text, at + 2)
        if 0xDC00 <= low < 0xE000:
            return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)), at + 6
    if 0xD800 <= code < 0xE000:
        return _REPLACEMENT, at
    return chr(code), at


def _hex4(text: str, at: int) -> int:
    digits = text[at : at + 4]
    if len(digits) < 4 or digits.strip(_HEX_DIGITS):
        raise _unexpected(text, at, "four hexadecimal digits")
    return int(digits, 16)


def _number(text: str, start: int) -> tuple[object, int]:
    at = start
    while text[at] in _NUMBER_CHARACTERS:
        at += 1
    token = text[start:at]
    if not _is_number(token):
        raise JsonError(f"{token[:40]!r} at offset {start} is no number", start)
    if token[-1].isdigit() and token.lstrip("-").isdigit() and len(token) <= MAX_INT_CHARACTERS:
        return int(token), at
    return NumberToken(token), at


def _is_number(token: str) -> bool:
    mantissa, exponent_mark, exponent = token.replace("E", "e").partition("e")
    whole, point, fraction = mantissa.removeprefix("-").partition(".")
    if exponent_mark and not (exponent[1:] if exponent[:1] in ("+", "-") else exponent).isdigit():
        return False
    if point and not fraction.isdigit():
        return False
    return whole == "0" or (whole.isdigit() and whole[0] != "0")


def compact(value: object) -> str:
    """One line without blanks."""
    parts: list[str] = []
    _write(value, parts, "", "", ":")
    return "".join(parts)


def indented(value: object) -> str:
    """Indented by four blanks, without a newline at the end: what CNI plugins in Go print."""
    parts: list[str] = []
    _write(value, parts, "\n", "    ", ": ")
    return "".join(parts)


def quoted(text: str) -> str:
    """A JSON string; what UTF-8 cannot express (undecodable bytes of the environment) becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = "".join([_REPLACEMENT if "\ud800" <= character <= "\udfff" else character for character in text])
    return '"' + text.translate(_OUTPUT_ESCAPES) + '"'


def _write(value: object, parts: list[str], newline: str, indent: str, colon: str) -> None:
    if isinstance(value, str):
        parts.append(quoted(value))
    elif value is None:
        parts.append("null")
    elif isinstance(value, bool):
        parts.append("true" if value else "false")
    elif isinstance(value, int):
        parts.append(str(value))
    elif isinstance(value, NumberToken):
        parts.append(value.token)
    elif isinstance(value, float) and value - value == 0.0:  # finite
        parts.append(repr(value))
    elif isinstance(value, dict):
        _write_members(value, parts, newline, indent, colon)
    elif isinstance(value, (list, tuple)):
        _write_items(value, parts, newline, indent, colon)
    else:
        raise JsonError(f"a {type(value).__name__} cannot be written as JSON")


def _write_members(members: dict[str, object], parts: list[str], newline: str, indent: str, colon: str) -> None:
    inner = newline + indent
    separator = "{" + inner
    for key, value in members.items():
        parts.append(separator + quoted(key) + colon)
        _write(value, parts, inner, indent, colon)
        separator = "," + inner
    parts.append(newline + "}" if members else "{}")


def _write_items(
    items: "list[object] | tuple[object, ...]", parts: list[str], newline: str, indent: str, colon: str
) -> None:
    inner = newline + indent
    separator = "[" + inner
    for item in items:
        parts.append(separator)
        _write(item, parts, inner, indent, colon)
        separator = "," + inner
    parts.append(newline + "]" if items else "[]")
