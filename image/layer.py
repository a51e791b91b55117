"""A layer of an image: entries as a tar archive whose bytes depend on nothing but the entries and one time."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable, Mapping
from datetime import datetime

from image.model import Entry, EntryKind, ImageError

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
WHITEOUT = ".wh."
_TYPES = {EntryKind.DIRECTORY: tarfile.DIRTYPE, EntryKind.FILE: tarfile.REGTYPE, EntryKind.LINK: tarfile.SYMTYPE}
_CAPABILITY_RECORD = "SCHILY.xattr.security.capability"
_VFS_CAP_REVISION_2 = 0x02000000  # linux/capability.h; the effective flag stays off


def archive(entries: Iterable[Entry], created: datetime) -> bytes:
    """The tar archive of `entries`, sorted by path, every time stamp `created`. Raises ImageError for a path twice."""
    stream = io.BytesIO()
    seconds = int(created.timestamp())
    previous = ""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for entry in sorted(entries, key=lambda one: one.path):
            if entry.path == previous:
                raise ImageError(f"/{entry.path} stands in one layer twice")
            previous = entry.path
            tar.addfile(_member(entry, seconds), io.BytesIO(entry.data))
    return stream.getvalue()


def difference(lower: Mapping[str, Entry], upper: Mapping[str, Entry]) -> list[Entry]:
    """The entries of a layer that makes `upper` of `lower`; what is gone is hidden by whiteouts."""
    changed = [entry for path, entry in upper.items() if not _same(lower.get(path), entry)]
    gone = sorted(lower.keys() - upper.keys())
    hidden = [path for path in gone if not any(parent in gone for parent in _parents(path))]
    parents = {parent for path in (*(one.path for one in changed), *hidden) for parent in _parents(path)}
    listed = {entry.path for entry in changed}
    folders = [upper[path] for path in sorted(parents - listed) if path in upper]
    return [*changed, *folders, *(_whiteout(path) for path in hidden)]


def _same(lower: Entry | None, upper: Entry) -> bool:
    """Tell whether the file system shows no difference; which component it is from is not in it."""
    return lower is not None and _shown(lower) == _shown(upper)


def _shown(entry: Entry) -> tuple[object, ...]:
    return (
        entry.kind,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.target,
        entry.permitted_capabilities,
        entry.data,
    )


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _whiteout(path: str) -> Entry:
    folder, _, name = path.rpartition("/")
    return Entry(f"{folder}/{WHITEOUT}{name}" if folder else f"{WHITEOUT}{name}", EntryKind.FILE, 0o644, "")


def _member(entry: Entry, seconds: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(entry.path)
    member.type = _TYPES[entry.kind]
    member.mode = entry.mode
    member.uid, member.gid = entry.uid, entry.gid  # numbers alone: names would be looked up where it is unpacked
    member.mtime = seconds
    member.linkname = entry.target
    member.size = len(entry.data)
    if entry.permitted_capabilities:
        member.pax_headers = {_CAPABILITY_RECORD: _capability_xattr(entry.permitted_capabilities)}
    return member


def _capability_xattr(permitted: int) -> str:
    """The value of `security.capability` as text: its bytes have to be ASCII, which PAX records keep as they are."""
    low, high = permitted & 0xFFFFFFFF, permitted >> 32
    value = struct.pack("<IIIII", _VFS_CAP_REVISION_2, low, 0, high, 0)
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        raise ImageError(f"the capabilities {permitted:#x} cannot be written into a tar archive as text") from None
