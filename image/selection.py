"""Which files of the packages stay in the image: rules that remove, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Removal:
    """Removes what one of `paths` matches and none of `kept`.

    In a pattern `*` stands for anything within one name and `**` for anything; a pattern that matches a folder takes
    everything below it.
    """

    paths: tuple[str, ...]
    kept: tuple[str, ...]
    why: str

    def removes(self, path: str) -> bool:
        """Tell whether `path`, which has no leading slash, is removed by this rule."""
        return any(_matches(path, one) for one in self.paths) and not any(_matches(path, one) for one in self.kept)


@lru_cache(None)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    words = {"**": ".*", "*": "[^/]*"}
    return re.compile("".join(words.get(part) or re.escape(part) for part in parts) + "(?:/.*)?", re.DOTALL)


def _matches(path: str, pattern: str) -> bool:
    return _compiled(pattern).fullmatch(path) is not None


def removed(paths: Iterable[str], rules: Iterable[Removal]) -> dict[str, Removal]:
    """The paths that go, each with the first rule that removes it."""
    listed = tuple(rules)
    found: dict[str, Removal] = {}
    for path in paths:
        rule = next((one for one in listed if one.removes(path)), None)
        if rule is not None:
            found[path] = rule
    return found


def unused(paths: Collection[str], rules: Iterable[Removal]) -> list[str]:
    """The patterns that match nothing: what they were written for has moved, and may be in the image now."""
    patterns = [pattern for rule in rules for pattern in (*rule.paths, *rule.kept)]
    return [pattern for pattern in patterns if not any(_matches(path, pattern) for path in paths)]
