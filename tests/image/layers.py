"""A layout by tag and architecture, and the file system that an image's layers make, in memory and on disk."""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from image.model import ImageError
from image.referrers import Descriptor
from image.stored import Manifest, StoredLayout

XATTR = "SCHILY.xattr."


class Layout:
    """A finished layout, asked by tag and architecture. Everything read is compared with its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored = StoredLayout(path)

    @property
    def tags(self) -> Mapping[str, Descriptor]:
        """The index of each tag."""
        return self.stored.tags

    def index(self, tag: str) -> Manifest:
        """The image index with that tag."""
        tags = self.tags
        if tag not in tags:
            raise ImageError(f"{self.path}: no image has the tag {tag!r}", f"there are: {', '.join(sorted(tags))}")
        return self.stored.manifest(tags[tag])

    def manifest(self, tag: str, architecture: str) -> Manifest:
        """The manifest of the image with that tag for an architecture."""
        index = self.index(tag)
        for found, name in index.platforms:
            if name == architecture:
                return self.stored.manifest(found)
        raise ImageError(f"{self.path}: {tag} is not for {architecture}", "there are amd64 and arm64")

    def blob(self, descriptor: Descriptor) -> bytes:
        """The bytes that `descriptor` names."""
        return self.stored.read(descriptor)


@dataclass(frozen=True, slots=True)
class Node:
    """One path: what the archive says of it, and the bytes of a file."""

    info: tarfile.TarInfo
    data: bytes

    @property
    def xattrs(self) -> dict[str, bytes]:
        """Extended attributes."""
        headers = self.info.pax_headers.items()
        return {name.removeprefix(XATTR): value.encode() for name, value in headers if name.startswith(XATTR)}


def archives(path: Path, tag: str, architecture: str) -> list[bytes]:
    """The layers' archives, checked against their digests."""
    layout = Layout(path)
    return [gzip.decompress(layout.blob(one)) for one in layout.manifest(tag, architecture).children[1:]]


def file_system(path: Path, tag: str, architecture: str) -> dict[str, Node]:
    """All layers on top of each other, as a runtime does it."""
    found: dict[str, Node] = {}
    for archive in archives(path, tag, architecture):
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for info in tar:
                folder, name = posixpath.split(info.name)
                if name.startswith(".wh."):
                    gone = posixpath.join(folder, name.removeprefix(".wh."))
                    for one in [one for one in found if one == gone or one.startswith(f"{gone}/")]:
                        del found[one]
                    continue
                source = tar.extractfile(info) if info.isreg() else None
                found[info.name] = Node(info, source.read() if source else b"")
    return found


def unpack(nodes: dict[str, Node], folder: Path) -> None:
    """Write a file system to disk, as root with owners."""
    for path, node in sorted(nodes.items()):
        target = folder / path
        if node.info.isdir():
            target.mkdir(exist_ok=True)
        elif node.info.issym():
            target.symlink_to(node.info.linkname)
            continue
        else:
            target.write_bytes(node.data)
        if os.geteuid() == 0:
            os.chown(target, node.info.uid, node.info.gid)
        target.chmod(node.info.mode)
        for name, value in node.xattrs.items():
            if os.geteuid() == 0:
                os.setxattr(target, name, value)
