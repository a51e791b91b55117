"""What a build has to show for itself: documents about each platform's image, attached to it as attestations.

Here is what the documents need from outside, files of packages and of the checkout; `documents` makes them of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from image import attestations, unpack
from image.build import Builder, BuiltImage, Finish
from image.documents import Build, Source, all_documents, changelog
from image.fetch import fetch
from image.layout import LayoutWriter
from image.lockfile import Lock
from image.model import DebPackage
from image.referrers import Referrer
from image.stored import StoredLayout

LOCAL_BUILDER = "urn:meshcni:builder:local"  # somebody's own machine, of which nothing is claimed
SOURCE_URI = "urn:meshcni:source"
TREES = ("image", "native", "src")  # of the checkout: everything of it that decides on the image's bytes
GENERATED = "__pycache__"


def attach(builder: Builder, builder_id: str = LOCAL_BUILDER, commit: str = "") -> Finish:
    """What completes a build: every platform's documents as referrers of its manifest, in the same layout.

    `commit` is the commit that a clean checkout is at, if the provenance is to name it. Without it, builds of equal
    sources have equal provenance, with git and without.
    """

    def finish(writer: LayoutWriter, built: Sequence[BuiltImage]) -> None:
        shared = source(builder.repository, commit)
        logs = changelogs(builder.lock, builder.cache, {name for one in built for name in sources(one)})
        added: list[Referrer] = []
        for one in built:
            described = describe(builder, one, shared, builder_id, logs)
            added += attestations.attestations(
                one.subject, one.manifest, all_documents(one.contents, one.subject, described)
            )
        StoredLayout(writer.path).replace(frozenset(), added)

    return finish


def describe(builder: Builder, built: BuiltImage, source: Source, builder_id: str, logs: Mapping[str, bytes]) -> Build:
    """What took part in the build of one image."""
    lock, architecture = builder.lock, built.subject.architecture
    definition = builder.repository / "image" / "image.toml"
    return Build(
        packages=materials(lock, builder.definition.variant(built.subject.variant).packages, architecture),
        wheels=lock.wheels_for(architecture),
        source=source,
        builder=builder_id,
        definition_sha256=hashlib.sha256(definition.read_bytes()).hexdigest(),
        lock_sha256=lock.digest,
        changelogs=logs,
    )


def materials(lock: Lock, groups: Sequence[str], architecture: str) -> tuple[DebPackage, ...]:
    """The packages of the lock that an image is made of or made with."""
    names = [f"{group}/{architecture}" for group in groups]
    names += [name for name in ("toolchain", f"sysroot/{architecture}") if name in lock.groups]
    return tuple(sorted({package for name in names for package in lock.group(name)}))


def sources(built: BuiltImage) -> set[tuple[str, str]]:
    """The Debian source packages, with their versions, that an image has code of."""
    components = built.contents.components.values()
    return {(component.source, component.source_version) for component in components if component.source}


def changelogs(lock: Lock, cache: Path, wanted: set[tuple[str, str]]) -> Mapping[str, bytes]:
    """Changelogs by source package, each from the smallest locked package that has it."""
    found: dict[str, bytes] = {}
    candidates = [package for package in lock.packages if (package.source, package.source_version) in wanted]
    for package in sorted(candidates, key=lambda one: (one.size, one)):
        if package.source not in found:
            entries = unpack.deb(package, fetch([package], cache)[package]).entries
            found.update(changelog.unpacked([(package.source, entries)]))
    return found


def source(repository: Path, commit: str = "") -> Source:
    """The checkout: a digest over the trees that decide on the image, and the commit if it is given."""
    lines = []
    for tree in TREES:
        for path in (repository / tree).rglob("*"):
            if path.is_file() and GENERATED not in path.parts:
                name = path.relative_to(repository).as_posix()
                lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n")
    digest = {"sha256": hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()}
    return Source(SOURCE_URI, {**digest, **({"gitCommit": commit} if commit else {})})
