from __future__ import annotations

import pytest
from image.selection import Removal, removed, unused


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("usr/bin/*", "usr/bin/sh", True),
        ("usr/bin/*", "usr/bin", False),
        ("usr/bin/*", "usr/binx/sh", False),
        ("usr/*/sh", "usr/a/b/sh", False),
        ("usr/**/sh", "usr/a/b/sh", True),
        ("usr/lib/python3.13/trace.py", "usr/lib/python3.13/traceback.py", False),
        ("usr/lib/python3.13/trace.py", "usr/lib/python3x13/trace.py", False),
        ("usr/share/doc", "usr/share/doc", True),
        ("usr/share/doc", "usr/share/doc/a/b", True),
        ("usr/share/doc", "usr/share/doc-base/a", False),
        ("usr/share/doc/*/**", "usr/share/doc/a", False),
        ("usr/share/doc/*/**", "usr/share/doc/a/b", True),
        ("a[b]", "ab", False),
        ("a[b]", "a[b]", True),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool) -> None:
    assert Removal((pattern,), (), "w").removes(path) is matches


def test_what_a_rule_keeps_another_may_remove() -> None:
    first = Removal(("usr/bin/*",), ("usr/bin/nft",), "tools")
    second = Removal(("**/nft",), (), "nft")
    assert removed(["usr/bin/sh", "usr/bin/nft", "etc/x"], [first]) == {"usr/bin/sh": first}
    assert removed(["usr/bin/sh", "usr/bin/nft"], [first, second]) == {"usr/bin/sh": first, "usr/bin/nft": second}


def test_patterns_that_match_nothing() -> None:
    rule = Removal(("usr/bin/*", "gone/*"), ("usr/bin/nft",), "w")
    assert unused({"usr/bin/sh"}, [rule]) == ["gone/*", "usr/bin/nft"]
