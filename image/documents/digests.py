"""What both bills of materials say of a file, and ids that depend on nothing but what they name."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from image.model import Contents, EntryKind

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:meshcni:image-documents:v1")


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A regular file of the image: its path without leading slash, its component's key, hexadecimal digests."""

    path: str
    component: str
    sha1: str
    sha256: str
    is_elf: bool


def files(contents: Contents) -> Iterator[FileDigest]:
    """Every regular file, in the order of the contents."""
    for entry in contents.entries:
        if entry.kind is EntryKind.FILE:
            sha1 = hashlib.sha1(entry.data, usedforsecurity=False).hexdigest()
            sha256 = hashlib.sha256(entry.data).hexdigest()
            yield FileDigest(entry.path, entry.component, sha1, sha256, entry.data.startswith(b"\x7fELF"))


def identifier(*parts: str) -> str:
    """A UUID that is the same for the same parts."""
    return str(uuid.uuid5(NAMESPACE, "\0".join(parts)))


def slug(key: str) -> str:
    """A component's key in the letters that ids of SPDX may have, still unique."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", key)
    return plain if plain == key.replace(":", "-", 1) else f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def timestamp(moment: datetime) -> str:
    """A UTC time in the form that all documents take, in whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
