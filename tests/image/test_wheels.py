"""Wheels of the lock, with the real pip and a folder as its index."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from image.fetch import fetch_wheels
from image.model import ImageError, Wheel
from tests.image.smallwheels import INDEX_VARIABLES, make_wheel, requirement

from image import wheels

X86, ARM = "manylinux_2_17_x86_64.manylinux2014_x86_64", "manylinux_2_28_aarch64"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in INDEX_VARIABLES.items():
        monkeypatch.setenv(name, value.format(index=folder))
    return folder


@pytest.fixture
def native(index: Path) -> list[Path]:
    tags = [f"cp312-cp312-{X86}", f"cp313-cp313-{X86}", f"cp313-cp313-{ARM}", "cp313-cp313-musllinux_1_2_x86_64"]
    return [make_wheel(index, "native", "2.1", tag) for tag in tags]


def test_takes_the_wheels_of_the_images_python(index: Path, native: list[Path], tmp_path: Path) -> None:
    pure, stable = (
        make_wheel(index, "pure_one", "1", "py3-none-any"),
        make_wheel(index, "stable", "3", f"cp310-abi3-{X86}"),
    )
    stable_arm = make_wheel(index, "stable", "3", f"cp39-abi3-{ARM}")
    make_wheel(index, "native", "9.9", f"cp313-cp313-{X86}")  # a newer version is not what the lock pins
    text = requirement(pure) + requirement(stable, stable_arm) + requirement(*native)
    found = wheels.resolve(["Pure.One", "stable", "native"], text, tmp_path)
    assert [(wheel.name, wheel.architecture, wheel.filename) for wheel in found] == [
        ("Pure.One", "all", pure.name),
        ("native", "amd64", native[1].name),
        ("native", "arm64", native[2].name),
        ("stable", "amd64", stable.name),
        ("stable", "arm64", stable_arm.name),
    ]
    paths = fetch_wheels(found, tmp_path / "cache")
    for wheel, path in paths.items():
        assert path.read_bytes() == (index / wheel.filename).read_bytes()
        assert path.stat().st_mode & 0o777 == 0o644
    for path in index.iterdir():
        path.unlink()
    assert fetch_wheels(found, tmp_path / "cache") == paths, "the cache needs no index"
    assert {path.name for path in (tmp_path / "cache" / "wheels").iterdir()} == {w.sha256 for w in found} | {"lock"}


def test_only_locked_hashes_are_taken(index: Path, native: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"aarch64 of native==2\.1 with the locked hashes"):
        wheels.resolve(["native"], requirement(native[1]), tmp_path)
    with pytest.raises(ImageError, match=r"requirements\.lock has no absent"):
        wheels.resolve(["absent"], requirement(native[1]), tmp_path)


def test_refuses_a_wheel_that_an_index_changed(index: Path, native: list[Path], tmp_path: Path) -> None:
    found = wheels.resolve(["native"], requirement(*native), tmp_path)
    make_wheel(index, "native", "2.1", f"cp313-cp313-{X86}").write_bytes(native[1].read_bytes() + b"x")
    with pytest.raises(ImageError, match=r"native==2\.1 with the locked hashes"):
        fetch_wheels(found, tmp_path / "cache")


def test_refuses_a_tampered_entry(index: Path, tmp_path: Path) -> None:
    path = make_wheel(index, "tiny", "1", "py3-none-any")
    digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    good = Wheel("tiny", "1", "all", path.name, digest, size)
    for wrong in (replace(good, sha256="0" * 64), replace(good, size=size + 1)):
        with pytest.raises(ImageError, match="tiny"):
            fetch_wheels([wrong], tmp_path / "cache")
    assert fetch_wheels([good], tmp_path / "cache")[good].stat().st_size == size


def test_replaces_a_damaged_wheel_of_the_cache(index: Path, tmp_path: Path) -> None:
    path = make_wheel(index, "tiny", "1", "py3-none-any")
    (wheel,) = wheels.resolve(["tiny"], requirement(path), tmp_path)
    kept = fetch_wheels([wheel], tmp_path / "cache")[wheel]
    os.truncate(kept, 10)
    assert fetch_wheels([wheel], tmp_path / "cache")[wheel].read_bytes() == path.read_bytes()
