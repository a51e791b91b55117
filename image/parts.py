"""What the images of one architecture are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.binaries import Binaries
from image.model import DebPackage, Wheel
from image.unpack import Unpacked

Compiler = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What an image of one architecture is made of, all variants of it."""

    architecture: str
    debs: Mapping[str, Sequence[Unpacked]]  # by group of the lock, without the architecture
    linked: Mapping[DebPackage, Unpacked]  # packages whose code was linked into the executables
    notices: Sequence[Unpacked]  # packages to which folders of documents of those lead
    wheels: Mapping[Wheel, Path]
    binaries: Binaries
    own_code: Mapping[str, bytes]  # by path below OWN
    own_licence: bytes
    compile: Compiler  # sources to byte code, both by the path they get


def own_code(sources: Path) -> dict[str, bytes]:
    """Our package by path below OWN."""
    files = sorted((sources / "meshcni").rglob("*"))
    return {
        path.relative_to(sources).as_posix(): path.read_bytes()
        for path in files
        if path.is_file() and path.suffix in (".py", ".typed", ".json", ".txt")
    }
