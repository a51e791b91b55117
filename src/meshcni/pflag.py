"""Command lines as Go's pflag reads them, from a table of flags; and Go's way of reading booleans, integers, durations.

The contract's programs are Go programs whose command lines people and charts already use, so spelling matters:
`--name VALUE`, `--name=VALUE`, `-b VALUE`, `-bVALUE`, `-b=VALUE`; a boolean is `--name` or `--name=BOOL`, never
`--name BOOL`; the last occurrence wins; `--` ends the flags. Source: github.com/spf13/pflag, `flag.go`.

Values stay text here. What an unset, empty or unreadable environment variable means is the caller's policy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from meshcni.errors import UsageError

Kind = Literal["string", "bool", "int", "duration", "strings"]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: `name` without dashes, one-letter `short`, `default` as the text a person would type.

    `env` names the environment variables that set it, strongest first. Kind "strings" collects every occurrence.
    """

    name: str
    short: str = ""
    kind: Kind = "string"
    default: str = ""
    env: tuple[str, ...] = ()
    help: str = ""

    @property
    def spelling(self) -> str:
        """`-b, --name` as help and messages show it."""
        return f"-{self.short}, --{self.name}" if self.short else f"--{self.name}"


@dataclass(frozen=True, slots=True)
class ParsedFlags:
    """What a command line said: raw text by flag name (a list for kind "strings"), the positional rest, help or not."""

    values: Mapping[str, str | list[str]]
    rest: list[str] = field(default_factory=list)
    help: bool = False

    def text(self, name: str) -> str | None:
        """Return the text given for a single-valued flag, None when it was not given."""
        value = self.values.get(name)
        return value if isinstance(value, str) else None


class _Reader:
    """The state of one reading: where we are, what was found."""

    def __init__(self, flags: Sequence[Flag], arguments: Sequence[str]) -> None:
        self.by_name = {flag.name: flag for flag in flags}
        self.by_short = {flag.short: flag for flag in flags if flag.short}
        self.pending = list(arguments)
        self.values: dict[str, str | list[str]] = {}
        self.help = False

    def set(self, flag: Flag, text: str) -> None:
        if flag.kind == "strings":
            collected = self.values.setdefault(flag.name, [])
            assert isinstance(collected, list)
            collected.append(text)
        else:
            self.values[flag.name] = text

    def next_value(self, flag: Flag, typed: str) -> str:
        if not self.pending:
            raise UsageError(f"flag {typed} needs a value", f"write --{flag.name}=VALUE")
        return self.pending.pop(0)

    def read_long(self, argument: str) -> None:
        name, equals, text = argument[2:].partition("=")
        flag = self.by_name.get(name)
        if flag is None:
            if name == "help":
                self.help = True
                return
            raise UsageError(f"unknown flag: {argument.partition('=')[0]}", "--help lists the flags")
        if equals:
            self.set(flag, text)
        elif flag.kind == "bool":
            self.set(flag, "true")
        else:
            self.set(flag, self.next_value(flag, f"--{name}"))

    def read_short(self, argument: str) -> None:
        letters = argument[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            flag = self.by_short.get(letter)
            if flag is None:
                if letter == "h":
                    self.help = True
                    return
                raise UsageError(f"unknown shorthand flag: {letter!r} in {argument}", "--help lists the flags")
            if letters.startswith("=") and len(letters) > 1:
                self.set(flag, letters[1:])
                return
            if flag.kind == "bool":
                self.set(flag, "true")
                continue
            self.set(flag, letters or self.next_value(flag, f"-{letter}"))
            return


def parse(flags: Sequence[Flag], arguments: Sequence[str], *, interspersed: bool = True) -> ParsedFlags:
    """Read `arguments` (without the program's name) against `flags`; UsageError for what pflag refuses.

    Values are raw text and not checked against their kind. With `interspersed` false the first positional argument
    ends the flags, so that a sub-command reads its own.
    """
    reader = _Reader(flags, arguments)
    rest: list[str] = []
    while reader.pending:
        argument = reader.pending.pop(0)
        if argument == "--":
            rest += reader.pending
            break
        if len(argument) < 2 or not argument.startswith("-"):
            rest.append(argument)
            if not interspersed:
                rest += reader.pending
                break
        elif argument.startswith(("---", "--=")):
            raise UsageError(f"bad flag syntax: {argument}", "--help lists the flags")
        elif argument.startswith("--"):
            reader.read_long(argument)
        else:
            reader.read_short(argument)
    return ParsedFlags(reader.values, rest, reader.help)


# --- values as Go reads them ------------------------------------------------------------------------------------------

_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_INTEGER: Final = re.compile(
    r"(?P<sign>[+-]?)(?:0[xX](?P<hex>(?:_?[0-9a-fA-F])+)|0[bB](?P<bin>(?:_?[01])+)|0[oO](?P<oct>(?:_?[0-7])+)"
    r"|0(?P<old>(?:_?[0-7])+)|(?P<dec>0|[1-9](?:_?[0-9])*))",
    re.ASCII,
)
_BASES: Final = {"hex": 16, "bin": 2, "oct": 8, "old": 8, "dec": 10}
_UNIT_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART: Final = re.compile(r"(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)(?P<unit>ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_INT64: Final = range(-(2**63), 2**63)


def go_bool(text: str) -> bool:
    """Read a boolean like Go's strconv.ParseBool; ValueError for anything else, the empty text included."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{text!r} is not a boolean: write true or false (1, t, T, TRUE, True, 0, f, F, FALSE, False)")


def go_int(text: str) -> int:
    """Read an integer like Go's strconv.ParseInt with base 0: prefix 0x, 0o or 0b; a leading 0 alone means octal."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an integer: decimal, or with prefix 0x, 0o, 0b; a leading 0 means octal")
    base_name, digits = next((name, match[name]) for name in _BASES if match[name] is not None)
    number = int(match["sign"] + digits.replace("_", ""), _BASES[base_name])
    if number not in _INT64:
        raise ValueError(f"{text!r} does not fit into 64 bits")
    return number


def go_duration(text: str) -> float:
    """Read a duration like Go's time.ParseDuration ("5s", "1m30s", "-1.5h", "0"), in seconds."""
    unsigned = text[1:] if text[:1] in ("+", "-") else text
    sign = -1.0 if text.startswith("-") else 1.0
    if unsigned == "0":
        return 0.0
    seconds, end = 0.0, 0
    while end < len(unsigned):
        part = _DURATION_PART.match(unsigned, end)
        if part is None:
            break
        seconds += float(part["number"]) * _UNIT_SECONDS[part["unit"]]
        end = part.end()
    if not unsigned or end < len(unsigned):
        raise ValueError(f"{text!r} is not a duration: numbers with units ns, us, ms, s, m, h, such as 5s or 1m30s")
    return sign * seconds


READERS: Final[Mapping[Kind, Callable[[str], object]]] = {
    "string": str,
    "strings": str,
    "bool": go_bool,
    "int": go_int,
    "duration": go_duration,
}


def help_text(usage: str, flags: Sequence[Flag]) -> str:
    """Lay out the help of a command: the usage line, then one entry for each flag with default and variables."""
    lines = [usage, "", "Flags:"]
    for flag in flags:
        placeholder = "" if flag.kind == "bool" else f" {flag.kind.upper()}"
        notes = [f"default {flag.default}"] if flag.default and flag.default != "false" else []
        notes += [f"env {', '.join(flag.env)}"] if flag.env else []
        lines.append(f"  {flag.spelling}{placeholder}")
        lines.append(f"        {flag.help}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "\n".join(lines)
