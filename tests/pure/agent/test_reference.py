"""The committed reference pages are those that the tables in the code give."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshcni.agent.metrics import METRICS
from meshcni.agent.reference import pages
from meshcni.agent.settings import ROWS

FOLDER = Path(__file__).parents[3] / "docs" / "reference"
COMMITTED = {path.name: path.read_text() for path in FOLDER.glob("*.md")}


@pytest.mark.parametrize("name", pages())
def test_page_is_up_to_date(name: str) -> None:
    assert COMMITTED.get(name) == pages()[name], f"docs/reference/{name} is stale: run scripts/reference"


def test_no_page_is_left_over() -> None:
    assert set(COMMITTED) == set(pages())


def test_every_setting_is_on_its_page() -> None:
    for row in ROWS:
        assert all(f"`{name}`" in pages()["settings.md"] for name in row.variables)
        assert f"`--{row.flag}`" in pages()["settings.md"] or not row.flag


def test_every_metric_is_on_its_page() -> None:
    assert all(f"| `{metric.name}` |" in pages()["metrics.md"] for metric in METRICS)
