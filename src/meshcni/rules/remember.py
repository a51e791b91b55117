"""Results remembered for rule sets of a usual size, because most pods of a node have the same parameters.

Those of pods with hundreds of ports or prefixes are made anew each time: one such rule set can take 50 MiB, and nobody
who writes annotations shall decide what the agent weighs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

REMEMBERED = 64  # results of each function; making a text takes a third of an ADD's own time
USUAL_SIZE = 400  # rules, or items in the lists of parameters; those of a pod without annotations are below 60


class Sized(Protocol):
    """What a result is made from."""

    @property
    def size(self) -> int:
        """How many items it holds."""


Subject = TypeVar("Subject", bound=Sized)
Others = ParamSpec("Others")
Result = TypeVar("Result")
Function = Callable[Concatenate[Subject, Others], Result]


def remembered(function: Function[Subject, Others, Result]) -> Function[Subject, Others, Result]:
    """Keep the last REMEMBERED results of `function` whose first argument is of USUAL_SIZE at most."""
    remembering = lru_cache(REMEMBERED)(function)

    @wraps(function)
    def call(subject: Subject, /, *arguments: Others.args, **options: Others.kwargs) -> Result:
        if subject.size > USUAL_SIZE:
            return function(subject, *arguments, **options)
        return remembering(subject, *arguments, **options)  # type: ignore[arg-type]  # all are hashable

    return call
