"""Which shared libraries programs need, read from their headers."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from image.model import Entry, EntryKind, ImageError

MAGIC = b"\x7fELF"
TRIPLETS = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
MACHINES = {"amd64": "EM_X86_64", "arm64": "EM_AARCH64"}


@dataclass(frozen=True, slots=True)
class Header:
    """What of an ELF file decides whether it can run: machine, loader, needed libraries."""

    machine: str
    interpreter: str
    needed: tuple[str, ...]


def read(path: str, data: bytes) -> Header | None:
    """Read the header of an ELF file; None for any other file."""
    if not data.startswith(MAGIC):
        return None
    try:
        file = ELFFile(io.BytesIO(data))
        interpreter, needed = "", []
        for segment in file.iter_segments():
            if isinstance(segment, InterpSegment):
                interpreter = segment.get_interp_name()
        for section in file.iter_sections():
            if isinstance(section, DynamicSection):
                needed += [str(getattr(tag, "needed")) for tag in section.iter_tags("DT_NEEDED")]  # noqa: B009
        return Header(file["e_machine"], interpreter, tuple(needed))
    except ELFError as error:
        raise ImageError(f"/{path}: not a whole ELF file: {error}", "is its package damaged?") from error


def library_folder(architecture: str) -> str:
    """The folder where the loader finds libraries of an architecture without a cache."""
    return f"usr/lib/{TRIPLETS[architecture]}"


def unneeded_libraries(entries: Mapping[str, Entry], architecture: str, loaded: Iterable[str]) -> set[str]:
    """The libraries directly in the library folder that nothing needs, not even a library in use.

    `loaded` names libraries that are opened by name while running. Raises ImageError for a needed one that is missing.
    """
    folder = library_folder(architecture)
    libraries = {path for path in entries if posixpath.dirname(path) == folder and ".so" in posixpath.basename(path)}
    wanted = [(name, "image.toml") for name in loaded]
    for path, entry in entries.items():
        if entry.kind is EntryKind.FILE and path not in libraries:
            wanted += _needs(path, entry, architecture)
    used: set[str] = set()
    while wanted:
        name, user = wanted.pop()
        path = f"{folder}/{name}"
        if path not in entries and (target := _loader(name, entries)):
            path = target
        if path not in entries:
            raise ImageError(f"{architecture}: {name}, which /{user} needs, is in no package", "add its package")
        if path in used:
            continue
        used.add(path)
        entry = entries[path]
        if entry.kind is EntryKind.LINK:
            wanted.append((posixpath.basename(entry.target), path))
        else:
            wanted += _needs(path, entry, architecture)
    return libraries - used


def _needs(path: str, entry: Entry, architecture: str) -> list[tuple[str, str]]:
    header = read(path, entry.data)
    if header is None:
        return []
    if header.machine != MACHINES[architecture]:
        raise ImageError(f"/{path}: expected an executable for {architecture}, found one for {header.machine}")
    return [(posixpath.basename(name), path) for name in (*header.needed, *filter(None, [header.interpreter]))]


def _loader(name: str, entries: Mapping[str, Entry]) -> str:
    """The loader's other place; its name is fixed by the ABI."""
    return next((path for path in (f"usr/lib64/{name}", f"usr/lib/{name}") if path in entries), "")
