"""What the parts of the builder hand to each other: locked packages, paths of an image, and what each path came from.

Nothing here reads or writes anything.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

ARCHITECTURES = ("amd64", "arm64")  # GOARCH names, which are Debian's too
ANY_ARCHITECTURE = "all"


class ImageError(Exception):
    """The build or a verification stops: what, which file, expected and found; `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True, order=True)
class DebPackage:
    """A Debian package of the lock; `architecture` is amd64, arm64 or all, `size` is of the file, in bytes.

    `path` is relative to the root of `archive` (`debian` or `debian-security`), as the index's Filename says: no host.
    """

    name: str
    version: str
    architecture: str
    archive: str
    path: str
    sha256: str
    size: int
    source: str
    source_version: str


@dataclass(frozen=True, slots=True, order=True)
class Wheel:
    """A Python wheel of the lock; `architecture` is amd64, arm64 or all."""

    name: str
    version: str
    architecture: str
    filename: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Component:
    """Something that files of the image came from: a package, our own code, or a static library inside an executable.

    `licence_texts` are the package's own copyright or licence files, by name. `contains` names components (keys of
    `Contents.components`) whose code was linked into files of this one.
    """

    key: str  # unique in an image: `deb:libc6`, `pypi:h11`, `meshcni:agent`, `meshcni:istio-cni`, `static:zlib1g-dev`
    kind: str  # deb, pypi, meshcni, static
    name: str
    version: str
    architecture: str
    purl: str
    sha256: str = ""  # of the package's file; empty for what is ours
    licence_texts: Mapping[str, bytes] = field(default_factory=dict)
    contains: tuple[str, ...] = ()
    source: str = ""  # name of the Debian source package
    source_version: str = ""


class EntryKind(enum.Enum):
    """What a path of an image is."""

    DIRECTORY = "directory"
    FILE = "file"
    LINK = "link"  # symbolic


@dataclass(frozen=True, slots=True)
class Entry:
    """A path of an image. `path` has no leading slash; `mode` holds the permission bits only."""

    path: str
    kind: EntryKind
    mode: int
    component: str  # key of the component it came from
    uid: int = 0
    gid: int = 0
    data: bytes = b""
    target: str = ""
    permitted_capabilities: int = 0  # bit set; file capabilities `+p`, not effective by themselves


@dataclass(frozen=True, slots=True)
class Contents:
    """All of an image's file system, sorted by path, and where it came from."""

    architecture: str
    variant: str
    entries: tuple[Entry, ...]
    components: Mapping[str, Component]


@dataclass(frozen=True, slots=True)
class Subject:
    """An image that documents are about: one platform's manifest. `digest` has the form `sha256:HEX`."""

    name: str
    digest: str
    architecture: str
    variant: str
    version: str
    created: datetime  # UTC; the lock's time, not the clock's
