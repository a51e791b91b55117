"""The committed reference pages are those that the tables in the code give."""

from __future__ import annotations

from pathlib import Path

import pytest

import meshcni.agent.ambientwiring
import meshcni.agent.app  # noqa: F401  # with it, whatever can be raised in an ADD
from meshcni.agent.metrics import METRICS
from meshcni.agent.reference import ERROR_CLASSES, pages
from meshcni.agent.settings import ROWS
from meshcni.errors import MeshCniError

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


# Never a cause that the agent counts: what keeps files, the run directory, the people's command line, and the question
# that the plugin asks by itself, from its end.
ELSEWHERE = {
    *("SocketLostError", "AgentFailedError", "JsonError", "FileChangedError", "DirectoryLockedError"),
    "DoubtError",
}


def test_every_error_class_is_on_its_page() -> None:
    known = {kind.__name__ for kind in subclasses(MeshCniError) if not kind.__name__.startswith("_")}
    assert {kind.__name__ for kind in ERROR_CLASSES} == known - ELSEWHERE | {"MeshCniError"}
    assert len({kind.__name__ for kind in ERROR_CLASSES}) == len(ERROR_CLASSES)


def subclasses(kind: type[MeshCniError]) -> set[type[MeshCniError]]:
    """All of them, at whatever depth, of our package."""
    direct = {one for one in kind.__subclasses__() if one.__module__.startswith("meshcni.")}
    return direct.union(*(subclasses(one) for one in direct))
