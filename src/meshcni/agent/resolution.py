"""From command line and environment to `Settings`: flag before variable before default, and never a silent guess.

Upstream resolves with viper, where text that cannot be parsed becomes false or 0 and an empty variable counts as set;
here the first is an error that names setting, value and origin, and an empty variable means the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshcni.agent.settings import ROWS, Row, Settings
from meshcni.errors import SettingError, UsageError
from meshcni.pflag import Flag, ParsedFlags, parse


@dataclass(frozen=True, slots=True)
class Shown:
    """A setting as people see it: value and default as text, and where the value came from."""

    row: Row
    value: str
    default: str
    origin: str

    def as_object(self) -> dict[str, object]:
        """The JSON form."""
        return {
            "name": self.row.name,
            "value": self.value,
            "origin": self.origin,
            "default": self.default,
            "flag": f"--{self.row.flag}" if self.row.flag else "",
            "variables": list(self.row.variables),
            "effect": self.row.effect.value,
            "meaning": self.row.meaning,
        }


def _flag(row: Row) -> Flag:
    return Flag(row.flag, kind=row.kind.pflag, default=row.kind.show(row.default), env=row.variables, help=row.meaning)


FLAGS: tuple[Flag, ...] = tuple(_flag(row) for row in ROWS if row.flag)


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settle every setting. Raises UsageError for a command line that cannot be read, SettingError for a value."""
    parsed = parse(FLAGS, arguments)
    if parsed.rest:
        raise UsageError(f"unknown command {parsed.rest[0]!r}", "install-cni help lists the commands")
    return settle(parsed, environment)


def settle(parsed: ParsedFlags, environment: Mapping[str, str]) -> Settings:
    """Settle every setting from flags that are parsed already."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for row in ROWS:
        given = parsed.values.get(row.flag) if row.flag else None
        if isinstance(given, list):
            values[row.name] = tuple(_read(row, text, f"flag --{row.flag}") for text in given)
            origins[row.name] = f"flag --{row.flag}"
        elif given is not None:
            values[row.name] = _read(row, given, f"flag --{row.flag}")
            origins[row.name] = f"flag --{row.flag}"
        else:
            variable = next((name for name in row.variables if environment.get(name)), "")
            if variable:
                values[row.name] = _read(row, environment[variable], f"environment variable {variable}")
                origins[row.name] = f"environment variable {variable}"
    return Settings(**values, origins=origins)


def _read(row: Row, text: str, origin: str) -> Any:  # noqa: ANN401  (the type is that of the row's field)
    try:
        return row.kind.read(text)
    except ValueError as error:
        detail = "" if str(error).startswith(repr(text)) else f": {error}"  # pflag's readers repeat text and form
        raise SettingError(
            f"setting {row.name} cannot be {text!r}, given by {origin}{detail}", f"write {row.kind.form}"
        ) from None


def show(settings: Settings) -> tuple[Shown, ...]:
    """Every setting in the order of the table."""
    return tuple(
        Shown(
            row,
            row.kind.show(getattr(settings, row.name)),
            row.kind.show(row.default),
            settings.origins.get(row.name, "default"),
        )
        for row in ROWS
    )
