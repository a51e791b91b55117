"""What documents need from outside: the checkout's digest, materials of the lock, changelogs."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from image.lockfile import Lock, package_key
from image.model import DebPackage
from tests.image.samplecontents import WHEEL, deb

from image import evidence


def checkout(folder: Path) -> Path:
    for name in ("image/image.toml", "native/plugin/main.c", "src/meshcni/agent/app.py", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_equal_sources_have_an_equal_digest_wherever_they_are(tmp_path: Path) -> None:
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "some" / "where")
    os.utime(other / "image" / "image.toml", (0, 0))
    generated = other / "src" / "meshcni" / "__pycache__"
    generated.mkdir()
    (generated / "app.cpython-311.pyc").write_bytes(b"code")
    (other / "README.md").write_text("nothing of it is in the image")
    assert evidence.source(one) == evidence.source(other)


@pytest.mark.parametrize("name", ["image/image.toml", "native/plugin/main.c", "src/meshcni/agent/app.py"])
def test_a_change_of_what_decides_on_the_image_changes_the_digest(tmp_path: Path, name: str) -> None:
    folder = checkout(tmp_path)
    before = evidence.source(folder)
    (folder / name).write_text("other")
    changed = evidence.source(folder)
    (folder / name).rename(folder / f"{name}.new")
    assert len({one.digest["sha256"] for one in (before, changed, evidence.source(folder))}) == 3


def test_the_commit_is_named_only_when_it_is_given(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    assert set(evidence.source(folder).digest) == {"sha256"}
    assert evidence.source(folder, "ab" * 20).digest == {**evidence.source(folder).digest, "gitCommit": "ab" * 20}


def lock_of(groups: dict[str, list[DebPackage]]) -> Lock:
    packages = {package for members in groups.values() for package in members}
    keys = {name: tuple(map(package_key, members)) for name, members in groups.items()}
    return Lock(datetime(2026, 11, 29, tzinfo=UTC), ("trixie",), tuple(sorted(packages)), (WHEEL,), keys)


def test_materials_are_those_of_the_image_and_of_its_tool_chain() -> None:
    groups = {
        "runtime/amd64": [deb("a"), deb("b")],
        "runtime/arm64": [deb("a", "arm64")],
        "dev/amd64": [deb("c"), deb("b")],
        "toolchain": [deb("gcc"), deb("b")],
        "sysroot/arm64": [deb("libc6-dev", "arm64")],
        "tools": [deb("cosign")],
    }
    lock = lock_of(groups)

    def names(groups: list[str], architecture: str) -> list[str]:
        return [package.name for package in evidence.materials(lock, groups, architecture)]

    assert names(["runtime"], "amd64") == ["a", "b", "gcc"]
    assert names(["runtime", "dev"], "amd64") == ["a", "b", "c", "gcc"]
    assert names(["runtime"], "arm64") == ["a", "b", "gcc", "libc6-dev"]
