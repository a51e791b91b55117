"""Debian packages and wheels as entries of an image; nothing of them is executed."""

from __future__ import annotations

import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from image import debfile
from image.documents import purl
from image.model import Component, DebPackage, Entry, EntryKind, ImageError, Wheel

DOCUMENTS = "usr/share/doc"
_MERGED = ("bin", "lib", "lib64", "sbin")  # links to the same name below /usr
_SAFE_MODE = 0o755  # nothing is setuid, setgid or writable for others, whatever a package says


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A package, or what of it is used."""

    package: DebPackage
    control: Mapping[str, str]
    control_files: Mapping[str, bytes]
    entries: tuple[Entry, ...]

    @property
    def key(self) -> str:
        """The key of its component."""
        return deb_key(self.package.name)


def deb_key(name: str) -> str:
    """The key of a Debian package's component."""
    return f"deb:{name}"


def debs(paths: Mapping[DebPackage, Path]) -> dict[DebPackage, Unpacked]:
    """Read all packages, some at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(lambda item: deb(*item), paths.items()), strict=True))


def deb(package: DebPackage, path: Path) -> Unpacked:
    """Read a package. Raises ImageError when it is another one than the lock says."""
    control_files = debfile.control_files(path)
    control = debfile.control(path)
    found = tuple(control.get(name, "") for name in ("Package", "Version", "Architecture"))
    expected = (package.name, package.version, package.architecture)
    if found != expected:
        raise ImageError(f"{path}: expected {' '.join(expected)}, found {' '.join(found)}", "run `make lock`")
    entries: dict[str, Entry] = {}
    for member, data in debfile.members(path):
        name = _place(member.name)
        if name:
            entries[name] = _entry(name, member, data, entries, package)
    return Unpacked(package, control, control_files, tuple(entries.values()))


def _place(name: str) -> str:
    """Where a path of a package ends up: `/lib/x` is `/usr/lib/x`."""
    path = posixpath.normpath(name).lstrip("/")
    if path == ".":
        return ""
    if path.startswith("../"):
        raise ImageError(f"a package has the path {name!r}")
    top, _, rest = path.partition("/")
    return f"usr/{path}" if rest and top in _MERGED else path


def _entry(
    path: str, member: tarfile.TarInfo, data: bytes | None, before: Mapping[str, Entry], package: DebPackage
) -> Entry:
    kind, mode, content, target = EntryKind.FILE, member.mode & _SAFE_MODE, data, ""
    if member.isdir():
        kind, content = EntryKind.DIRECTORY, b""
    elif member.issym():
        kind, mode, content, target = EntryKind.LINK, 0o777, b"", member.linkname
    elif member.islnk():
        content = before[_place(member.linkname)].data
    if content is None:
        raise ImageError(f"{package.name}: /{path} is neither file, directory nor link", "remove its package")
    return Entry(path, kind, mode, deb_key(package.name), member.uid, member.gid, content, target)


def deb_component(unpacked: Unpacked, licences: Mapping[str, bytes], kind: str = "deb") -> Component:
    """The component of a package, or of a static library that another file contains."""
    package = unpacked.package
    return Component(
        key=f"{kind}:{package.name}",
        kind=kind,
        name=package.name,
        version=package.version,
        architecture=package.architecture,
        purl=purl.deb(package),
        sha256=package.sha256,
        licence_texts=licences,
        source=package.source,
        source_version=package.source_version,
    )


def copyright_of(unpacked: Unpacked, others: Iterable[Unpacked]) -> dict[str, bytes]:
    """The copyright file of a package, perhaps that of another one to which its folder of documents leads."""
    files = {entry.path: entry for one in (*others, unpacked) for entry in one.entries if DOCUMENTS in entry.path}
    path = f"{DOCUMENTS}/{unpacked.package.name}"
    for _ in range(4):
        if path in files and files[path].kind is EntryKind.LINK:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), files[path].target)).lstrip("/")
        elif f"{path}/copyright" in files:
            found = files[f"{path}/copyright"]
            if found.kind is EntryKind.FILE:
                return {"copyright": found.data}
            path = posixpath.dirname(posixpath.normpath(posixpath.join(path, found.target)).lstrip("/"))
    return {}


def documented_in(unpacked: Unpacked) -> str:
    """The name of the package whose folder of documents serves for this one too; empty when it has its own."""
    path = f"{DOCUMENTS}/{unpacked.package.name}"
    return next((entry.target for entry in unpacked.entries if entry.path == path and entry.target), "")


def wheel(locked: Wheel, path: Path, folder: str) -> tuple[Component, list[Entry]]:
    """The files of a wheel below `folder`."""
    key = f"pypi:{locked.name.lower()}"
    entries, licences = [], {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = posixpath.normpath(member.filename)
                if member.is_dir():
                    continue
                if name.startswith(("/", "../")) or ".data/" in name:
                    raise ImageError(f"{locked.filename}: {name} would be installed outside of {folder}")
                data = archive.read(member)
                entries.append(Entry(f"{folder}/{name}", EntryKind.FILE, 0o644, key, data=data))
                if ".dist-info/" in name and "licen" in name.lower():
                    licences[name] = data
                elif name.endswith(".dist-info/METADATA"):
                    licences.setdefault(name, data)
    except zipfile.BadZipFile as error:
        raise ImageError(f"{path}: {locked.filename} cannot be read: {error}", "remove it from the cache") from error
    component = Component(
        key=key,
        kind="pypi",
        name=locked.name,
        version=locked.version,
        architecture=locked.architecture,
        purl=purl.pypi(locked),
        sha256=locked.sha256,
        licence_texts=licences,
    )
    return component, entries
