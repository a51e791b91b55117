"""Builds an image again and compares: equal digests, or the first thing that differs by name."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from image import definition, layercontents, tools
from image.build import Builder, lock_of
from image.model import ImageError
from image.referrers import Descriptor, digest_of
from image.signing import Platform, SignedImage, images
from image.stored import StoredLayout

ROOT = Path(__file__).resolve().parent.parent
NOT_EQUAL = "check out the commit that the image is of; if it is that one, the image was not built from it"


def compare_with_new(published: StoredLayout, folder: Path) -> str:
    """Build everything into `folder` with this checkout's code and lock, and compare."""
    defined = definition.read(ROOT / "image" / "image.toml", ROOT / "src")
    Builder(defined, lock_of(ROOT), ROOT, tools.CACHE).build(folder)
    return compare(published, StoredLayout(folder))


def compare(published: StoredLayout, rebuilt: StoredLayout) -> str:
    """Compare every image of `published` with the one that has its tags; raise at the first difference."""
    ours = images(rebuilt)
    compared = images(published)
    for image in compared:
        name = max(image.tags, key=len, default=image.index.digest)
        other = next((one for one in ours if one.index.digest == image.index.digest or _same_tags(one, image)), None)
        if other is None:
            known = ", ".join(tag for one in ours for tag in one.tags)
            raise ImageError(
                f"{name}: nothing that was rebuilt has its digest or tags; there are: {known}",
                NOT_EQUAL,
            )
        _compare_indexes(name, published, image, rebuilt, other)
    return f"{len(compared)} images have the digests that a build of this checkout has"


def _same_tags(one: SignedImage, other: SignedImage) -> bool:
    return bool(other.tags) and set(other.tags) <= set(one.tags)


def _compare_indexes(
    name: str, published: StoredLayout, image: SignedImage, rebuilt: StoredLayout, other: SignedImage
) -> None:
    if image.index.digest == other.index.digest:
        return
    ours = {one.architecture: one for one in other.platforms}
    for platform in image.platforms:
        where = f"{name} {platform.architecture}"
        if platform.architecture not in ours:
            raise ImageError(f"{where}: expected an image for one of {', '.join(ours)}", NOT_EQUAL)
        _compare_platforms(where, published, platform, rebuilt, ours[platform.architecture])
    _compare_documents(f"{name}: index", published, image.index, rebuilt, other.index)


def _compare_platforms(
    where: str, published: StoredLayout, image: Platform, rebuilt: StoredLayout, other: Platform
) -> None:
    if image.descriptor.digest == other.descriptor.digest:
        return
    theirs, ours = published.manifest(image.descriptor), rebuilt.manifest(other.descriptor)
    pairs = zip_longest(layercontents.layers(published, theirs), layercontents.layers(rebuilt, ours))
    for number, (published_layer, rebuilt_layer) in enumerate(pairs, start=1):
        if published_layer is None or rebuilt_layer is None:
            found, expected = len(theirs.children) - 1, len(ours.children) - 1
            raise ImageError(f"{where}: expected {expected} layers, found {found}", NOT_EQUAL)
        if published_layer[0].digest != rebuilt_layer[0].digest:
            place = f"{where}: layer {number}"
            for mine, other_one in zip_longest(
                _listing(rebuilt, *rebuilt_layer), _listing(published, *published_layer)
            ):
                if mine != other_one:
                    raise ImageError(f"{place}: {_difference(mine, other_one)}", NOT_EQUAL)
            raise ImageError(
                f"{place}: the same files, packed differently: expected {rebuilt_layer[0].digest}, "
                f"found {published_layer[0].digest}",
                NOT_EQUAL,
            )
    _compare_documents(f"{where}: configuration", published, theirs.children[0], rebuilt, ours.children[0])
    _compare_documents(f"{where}: manifest", published, image.descriptor, rebuilt, other.descriptor)


Member = tuple[str, str]  # a path and all that a layer says of it


def _listing(layout: StoredLayout, blob: Descriptor, diff_id: str) -> Iterator[Member]:
    for member, content in layercontents.members(layout.blob_path(blob.digest), blob.media_type, diff_id):
        said = f"{_kind(member)} mode {member.mode:04o} owner {member.uid}:{member.gid} time {int(member.mtime)}"
        extended = {name: value for name, value in sorted(member.pax_headers.items()) if name.startswith("SCHILY")}
        yield member.name, f"{said}{f' {extended}' if extended else ''} {member.linkname or digest_of(content)}"


def _kind(member: tarfile.TarInfo) -> str:
    kinds = {
        tarfile.REGTYPE: "file",
        tarfile.DIRTYPE: "directory",
        tarfile.SYMTYPE: "link",
        tarfile.LNKTYPE: "hard link",
    }
    return kinds.get(member.type, f"member of type {member.type!r}")


def _difference(expected: Member | None, found: Member | None) -> str:
    if expected is None or (found is not None and found[0] < expected[0]):
        assert found is not None
        return f"{found[0]}: expected no such file, found {found[1]}"
    if found is None or expected[0] < found[0]:
        return f"{expected[0]}: expected {expected[1]}, found no such file"
    return f"{expected[0]}: expected {expected[1]}, found {found[1]}"


def _compare_documents(
    where: str, published: StoredLayout, found: Descriptor, rebuilt: StoredLayout, expected: Descriptor
) -> None:
    if found.digest == expected.digest:
        return
    values = [json.loads(layout.read(one)) for layout, one in ((rebuilt, expected), (published, found))]
    path, mine, theirs = first_difference(*values)
    raise ImageError(f"{where}: {path or 'bytes'}: expected {mine!r}, found {theirs!r}", NOT_EQUAL)


def first_difference(expected: object, found: object, path: str = "") -> tuple[str, object, object]:
    """Find the first place where two JSON values differ; without one, the path is empty."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                return first_difference(expected.get(key), found.get(key), f"{path}.{key}".lstrip("."))
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
            if mine != theirs:
                return first_difference(mine, theirs, f"{path}[{number}]")
    return path, expected, found
