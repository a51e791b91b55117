"""A table of a TOML file, read strictly: a missing key, a wrong type and a key that nobody asked for are errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from image.model import ImageError

_T = TypeVar("_T")
_REQUIRED: Any = object()
_NAMES = {str: "a text", int: "a number", bool: "true or false", list: "a list", dict: "a table"}


class TomlTable:
    """One table of `file`; `where` names it in errors. `close()` refuses the keys that were not read."""

    def __init__(self, data: Mapping[str, Any], file: str, where: str) -> None:
        self.file = file
        self.where = where
        self._data = data
        self._read: set[str] = set()

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """The text under `key`."""
        return self._get(key, str, default)

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        """The number under `key`."""
        return self._get(key, int, default)

    def flag(self, key: str) -> bool:
        """True or false under `key`."""
        return self._get(key, bool, _REQUIRED)

    def mode(self, key: str, default: str = _REQUIRED) -> int:
        """Permission bits, written as a text of octal digits."""
        text = self.text(key, default)
        try:
            mode = int(text, 8)
        except ValueError:
            raise self.wrong(key, "octal digits such as 0755", repr(text)) from None
        if not 0 <= mode <= 0o1777:
            raise self.wrong(key, "at most 1777", repr(text))
        return mode

    def texts(self, key: str, default: Sequence[str] = _REQUIRED) -> tuple[str, ...]:
        """The list of texts under `key`."""
        values = list(self._get(key, list, default))
        for value in values:
            if not isinstance(value, str):
                raise self.wrong(key, "a list of texts", repr(value))
        return tuple(values)

    def mapping(self, key: str, default: Mapping[str, str] = _REQUIRED) -> dict[str, str]:
        """The table of texts under `key`."""
        values = dict(self._get(key, dict, default))
        for name, value in values.items():
            if not isinstance(value, str):
                raise self.wrong(f"{key}.{name}", "a text", repr(value))
        return values

    def table(self, key: str) -> TomlTable:
        """The table under `key`."""
        return TomlTable(self._get(key, dict, _REQUIRED), self.file, self._path(key))

    def named_tables(self, key: str) -> dict[str, TomlTable]:
        """The tables `[key.NAME]`, by name."""
        within = self.table(key)
        return {name: within.table(name) for name in within._data}

    def tables(self, key: str) -> list[TomlTable]:
        """The tables `[[key]]`, in their order."""
        rows = self._get(key, list, [])
        for row in rows:
            if not isinstance(row, dict):
                raise self.wrong(key, "a list of tables", repr(row))
        return [TomlTable(row, self.file, f"{self._path(key)}[{at}]") for at, row in enumerate(rows)]

    def ignore(self, *keys: str) -> None:
        """Leave these keys to others."""
        self._read.update(keys)

    def close(self) -> None:
        """Refuse keys that were not read."""
        unknown = sorted(self._data.keys() - self._read)
        if unknown:
            raise ImageError(
                f"{self.file}: {self.where or 'the file'} has unknown keys: {', '.join(unknown)}",
                f"known there: {', '.join(sorted(self._read))}",
            )

    def wrong(self, key: str, expected: str, found: str) -> ImageError:
        """The error for a value under `key`."""
        return ImageError(f"{self.file}: {self._path(key)}: expected {expected}, found {found}", f"correct {self.file}")

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _get(self, key: str, kind: type[_T], default: Any) -> _T:  # noqa: ANN401
        self._read.add(key)
        if key not in self._data:
            if default is _REQUIRED:
                raise self.wrong(key, _NAMES[kind], "nothing")
            found: _T = default
            return found
        value = self._data[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(key, _NAMES[kind], repr(value))
        return value
