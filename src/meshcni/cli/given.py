"""One text that somebody gave, by a flag or a variable, together with where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from meshcni.errors import UsageError
from meshcni.pflag import Flag, ParsedFlags

T = TypeVar("T")
DEFAULT_ORIGIN: Final = "default"


@dataclass(frozen=True, slots=True)
class Given:
    """The text of one flag or variable, and where it stands (`flag --proxy-uid`, `env PROXY_UID`)."""

    text: str
    origin: str

    def read(self, reader: Callable[[str], T]) -> T:
        """Convert the text; UsageError names the origin and the text."""
        try:
            return reader(self.text)
        except ValueError as error:
            raise UsageError(f"{self.origin} is {self.text!r}: {error}") from error


def settle(flag: Flag, parsed: ParsedFlags, environment: Mapping[str, str]) -> Given:
    """Find a flag's text as the agent finds a setting's: the command line, else a variable, else the default.

    An empty variable counts as unset. What cannot be read is an error, for whoever reads it.
    """
    typed = parsed.text(flag.name)
    if typed is not None:
        return Given(typed, f"flag {flag.spelling}")
    name = next((name for name in flag.env if environment.get(name)), "")
    return Given(environment[name], f"env {name}") if name else Given(flag.default, DEFAULT_ORIGIN)


def one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    """Return a reader that takes one of `choices`, an empty one included when it is among them."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"write {', '.join(choice or 'nothing' for choice in choices)}")
        return text

    return read
