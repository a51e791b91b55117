"""What a container would see of an image's layers: its regular files by path, with their digests."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from image.model import ImageError
from image.referrers import Descriptor
from image.stored import Manifest, StoredLayout

TAR, TAR_GZIP = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
CHUNK_BYTES = 1 << 20


class _Hashed(io.RawIOBase):
    """Hashes a stream while somebody else reads it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.hash = hashlib.sha256()

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Read on."""
        data = self.stream.read(size)
        self.hash.update(data)
        return data


def members(path: Path, media_type: str, diff_id: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Read a layer's members with their contents; afterwards compare all of it with the configuration's `diff_id`."""
    if media_type not in (TAR, TAR_GZIP):
        raise ImageError(f"{path}: expected a layer of type {TAR_GZIP}, found {media_type}")
    try:
        with gzip.open(path) if media_type == TAR_GZIP else path.open("rb") as stream:
            hashed = _Hashed(stream)  # type: ignore[arg-type]
            with tarfile.open(fileobj=hashed, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isreg() else None
                    yield member, content.read() if content else b""
            while hashed.read(CHUNK_BYTES):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ImageError(f"{path}: no layer in {media_type}: {error}") from None
    found = "sha256:" + hashed.hash.hexdigest()
    if found != diff_id:
        raise ImageError(f"{path}: expected unpacked {diff_id}, as the image's configuration says, found {found}")


def layers(layout: StoredLayout, manifest: Manifest) -> tuple[tuple[Descriptor, str], ...]:
    """Name an image's layers, each with the digest that its unpacked form must have."""
    if not manifest.children:
        raise ImageError(f"{manifest.descriptor.digest}: expected a configuration and layers, found nothing")
    config, *blobs = manifest.children
    rootfs = layout.document(config).get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(blobs):
        raise ImageError(f"{config.digest}: expected {len(blobs)} diff_ids, one a layer, found {str(diff_ids)[:120]}")
    return tuple(zip(blobs, map(str, diff_ids), strict=True))


def regular_files(layout: StoredLayout, manifest: Manifest) -> dict[str, str]:
    """List an image's regular files by path without a leading slash, each with its SHA-256 in hexadecimal."""
    found: dict[str, str] = {}
    for blob, diff_id in layers(layout, manifest):
        layout.check(blob)
        lower = frozenset(found)
        for member, content in members(layout.blob_path(blob.digest), blob.media_type, diff_id):
            _apply(found, lower, member, content)
    return found


def _apply(found: dict[str, str], lower: frozenset[str], member: tarfile.TarInfo, content: bytes) -> None:
    path = member.name.removeprefix("./").strip("/")
    folder, _, name = path.rpartition("/")
    if name.startswith(WHITEOUT):
        hidden = folder if name == OPAQUE else f"{folder}/{name.removeprefix(WHITEOUT)}".lstrip("/")
        for old in [old for old in lower if old == hidden or old.startswith(f"{hidden}/")]:
            found.pop(old, None)
    elif member.isreg():
        found[path] = hashlib.sha256(content).hexdigest()
    elif member.islnk():
        found[path] = found.get(member.linkname.removeprefix("./").strip("/"), "")
    elif not member.isdir():
        found.pop(path, None)
