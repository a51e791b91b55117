"""The file system of an image while it is put together."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator

from image.model import Entry, EntryKind, ImageError


class Tree:
    """Entries by path. Two different things at one path are an error; a directory may be named by many."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def __contains__(self, path: str) -> bool:
        return path in self.entries

    def add(self, entry: Entry) -> None:
        """Add a path that is new, or a directory that is there already."""
        there = self.entries.get(entry.path)
        if there is None:
            self.entries[entry.path] = entry
        elif there.kind is not EntryKind.DIRECTORY or entry.kind is not EntryKind.DIRECTORY:
            raise ImageError(
                f"/{entry.path} comes from {there.component} as {there.kind.value} and from {entry.component} as "
                f"{entry.kind.value}",
                "remove one of them in image.toml",
            )

    def put(self, entry: Entry) -> None:
        """Add a path or replace what is there."""
        self.entries[entry.path] = entry

    def file(self, path: str, data: bytes, component: str, mode: int = 0o644) -> None:
        """Put a regular file of root's."""
        self.put(Entry(path, EntryKind.FILE, mode, component, data=data))

    def link(self, path: str, target: str, component: str) -> None:
        """Put a symbolic link."""
        self.put(Entry(path, EntryKind.LINK, 0o777, component, target=target))

    def remove(self, paths: Iterable[str]) -> None:
        """Take paths out."""
        for path in paths:
            del self.entries[path]

    def data(self, path: str) -> bytes:
        """The bytes of a regular file. Raises ImageError when there is none."""
        entry = self.entries.get(path)
        if entry is None or entry.kind is not EntryKind.FILE:
            raise ImageError(f"expected a file /{path} in the packages, found none", "is its package in image.toml?")
        return entry.data

    def files(self) -> Iterator[Entry]:
        """The regular files."""
        return (entry for entry in self.entries.values() if entry.kind is EntryKind.FILE)

    def pointless(self) -> set[str]:
        """Directories in which nothing is, and links that lead nowhere."""
        parents = {posixpath.dirname(path) for path in self.entries}
        return {
            path
            for path, entry in self.entries.items()
            if (entry.kind is EntryKind.DIRECTORY and path not in parents)
            or (entry.kind is EntryKind.LINK and not self.resolves(path))
        }

    def complete(self, component: str) -> None:
        """Add the directories that lead to an entry and that nobody added."""
        for path in list(self.entries):
            parent = posixpath.dirname(path)
            while parent and parent not in self.entries:
                self.put(Entry(parent, EntryKind.DIRECTORY, 0o755, component))
                parent = posixpath.dirname(parent)

    def check(self, links: Iterable[str]) -> None:
        """Refuse an entry below something that is no directory, and one of `links` that leads nowhere."""
        for path in self.entries:
            parent = posixpath.dirname(path)
            if parent and self.entries[parent].kind is not EntryKind.DIRECTORY:
                raise ImageError(f"/{path} lies below /{parent}, which is no directory")
        for path in links:
            if not self.resolves(path):
                raise ImageError(
                    f"the link /{path} to {self.entries[path].target} leads nowhere",
                    "correct or remove it in image.toml",
                )

    def resolves(self, path: str) -> bool:
        """Tell whether `path` exists when links are followed; what runs or mounts put below /proc counts as there."""
        return self._walk(path, 0)

    def _walk(self, path: str, depth: int) -> bool:
        if depth > 40:
            return False
        at = ""
        parts = [part for part in path.split("/") if part]
        for index, part in enumerate(parts):
            if part == "..":
                at = posixpath.dirname(at)
                continue
            at = f"{at}/{part}".lstrip("/")
            entry = self.entries.get(at)
            if at in ("proc", "dev", "sys") and index < len(parts) - 1:
                return True
            if entry is None:
                return False
            if entry.kind is EntryKind.LINK:
                target = posixpath.normpath(posixpath.join("/", posixpath.dirname(at), entry.target))
                return self._walk("/".join([target, *parts[index + 1 :]]), depth + 1)
        return True
