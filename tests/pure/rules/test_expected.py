"""The committed rule files say what the code does, and cover every parameter."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from tests.pure.rules.cases import CASES, texts

from meshcni.pods.interception import Interception

FOLDER = Path(__file__).parent / "expected"
COMMITTED = {
    folder.name: {path.name: path.read_text() for path in folder.iterdir()} for folder in sorted(FOLDER.iterdir())
}


@pytest.mark.parametrize("name", CASES)
def test_the_committed_files_are_up_to_date(name: str) -> None:
    assert texts(CASES[name]) == COMMITTED.get(name), "run `make expected` and look at the difference"


def test_there_are_no_files_of_forgotten_cases() -> None:
    assert set(COMMITTED) == set(CASES)


def test_every_parameter_that_makes_rules_has_a_case() -> None:
    # The netns' families are what dual stack comes to; no rule depends on the parameter itself.
    names = {field.name for field in fields(Interception)} - {"dual_stack"}
    default = Interception()
    changed = {
        name for case in CASES.values() for name in names if getattr(case.parameters, name) != getattr(default, name)
    }
    assert changed == names


def test_every_case_differs_from_every_other() -> None:
    # Two cases may give the same rules only where that is what the case shows.
    shown = {
        "dns-without-resolvers": "default",
        "dns-all-not-redirected": "default",
    }
    seen: dict[str, str] = {}
    for name in CASES:
        text = repr(COMMITTED[name])
        if text in seen:
            assert shown.get(name) == seen[text]
        seen.setdefault(text, name)
    assert all(COMMITTED[name] == COMMITTED[other] for name, other in shown.items())
