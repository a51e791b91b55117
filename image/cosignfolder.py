"""The folder that `cosign verify --local-image` reads: one image of a layout, marked as cosign marks its own."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from image import attestations
from image.model import ImageError
from image.referrers import INDEX, Descriptor, encode
from image.signing import SIGNATURE, SignedImage, images
from image.stored import StoredLayout

REFERRERS = {SIGNATURE: "sigs", attestations.DSSE: "atts"}
KIND = "kind"  # annotation of an entry of index.json
KINDS = {name: f"dev.cosignproject.cosign/{name}" for name in ("imageIndex", "image", "sigs", "atts")}


def export(path: Path, tag: str, architecture: str, folder: Path) -> Descriptor:
    """Write the image `tag` of a layout into a new folder: its index, or one platform's image with its attestations."""
    layout = StoredLayout(path)
    subject = _choose(layout, tag, architecture)
    kind = "imageIndex" if subject.media_type == INDEX else "image"
    signed = [
        (found.descriptor, REFERRERS[found.artifact_type])
        for found in layout.referrers().get(subject.digest, ())
        if found.artifact_type in REFERRERS
    ]
    if "sigs" not in [kind for _, kind in signed]:
        raise ImageError(f"{path}: {tag}: expected a signature, found none", "sign it with `python -m image sign`")
    if folder.exists():
        raise ImageError(f"{folder}: exists already", "name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        _write(layout, [(subject, kind), *signed], new)
        new.chmod(0o755)
        new.rename(folder)
    except OSError as error:
        raise ImageError(f"{folder}: {error.strerror}; nothing was written") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return subject


def _choose(layout: StoredLayout, tag: str, architecture: str) -> Descriptor:
    image = tagged(layout, tag)
    if not architecture:
        return image.index
    for platform in image.platforms:
        if platform.architecture == architecture:
            return platform.descriptor
    known = ", ".join(platform.architecture for platform in image.platforms)
    raise ImageError(f"{layout.path}: {tag} has no architecture {architecture}", f"there are: {known}")


def tagged(layout: StoredLayout, tag: str) -> SignedImage:
    """Find a layout's image by its tag."""
    for image in images(layout):
        if tag in image.tags:
            return image
    raise ImageError(f"{layout.path}: no image with the tag {tag}", f"there are: {', '.join(sorted(layout.tags))}")


def _write(layout: StoredLayout, entries: Sequence[tuple[Descriptor, str]], folder: Path) -> None:
    (folder / "blobs" / "sha256").mkdir(parents=True)
    for digest, blob in {one.digest: one for entry, _ in entries for one in layout.below(entry)}.items():
        layout.check(blob)
        source = layout.blob_path(digest)
        try:
            os.link(source, folder / "blobs" / "sha256" / source.name)
        except OSError:  # another file system
            shutil.copyfile(source, folder / "blobs" / "sha256" / source.name)
    listed = [{**entry.to_json(), "annotations": {KIND: KINDS[kind]}} for entry, kind in entries]
    (folder / "index.json").write_bytes(encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}))
    shutil.copyfile(layout.path / "oci-layout", folder / "oci-layout")


def main(argv: Sequence[str]) -> int:
    """`export-cosign TAG FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python -m image export-cosign", description="Write the folder that `cosign verify --local-image` reads."
    )
    parser.add_argument("tag")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", default="", help="one platform's image instead of the index of all")
    parser.add_argument("--layout", type=Path, default=Path("build/image"))
    arguments = parser.parse_args(argv)
    subject = export(arguments.layout, arguments.tag, arguments.architecture, arguments.folder)
    print(f"{arguments.folder}: {subject.digest}")  # noqa: T201
    return 0
