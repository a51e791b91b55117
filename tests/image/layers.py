"""The file system that an image's layers make, in memory and on disk."""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path

from image.layout import Layout

XATTR = "SCHILY.xattr."


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
