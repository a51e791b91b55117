"""What of an image has no use left once the files around it are gone."""

from __future__ import annotations

import posixpath
import re

from image import unpack
from image.model import EntryKind
from image.tree import Tree
from image.unpack import DOCUMENTS

_LICENCE_POINTER = re.compile(rb"/usr/share/common-licenses/([A-Za-z0-9.-]*[A-Za-z0-9])")
_LICENCES = "usr/share/common-licenses/"


def left_over_documents(tree: Tree) -> list[str]:
    """The documents of packages of which nothing else is there, and to which no other's documents lead."""
    documents: dict[str, list[str]] = {}
    used = set()
    for path, entry in tree.entries.items():
        if entry.kind is EntryKind.DIRECTORY:
            continue
        if path.startswith(f"{DOCUMENTS}/"):
            documents.setdefault(entry.component, []).append(path)
        else:
            used.add(entry.component)
    for key in sorted(used):
        for path in documents.get(key, ()):
            entry = tree.entries[path]
            if entry.kind is EntryKind.LINK:  # NAME -> OTHER, or NAME/copyright -> ../OTHER/copyright
                target = posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.target))
                used.add(unpack.deb_key(target.removeprefix(f"{DOCUMENTS}/").split("/", 1)[0]))
    return [path for key, paths in documents.items() if key not in used for path in paths]


def unmentioned_licences(tree: Tree) -> list[str]:
    """The common licences that no copyright file of the image refers to."""
    texts = [entry.data for entry in tree.files() if entry.path.startswith(f"{DOCUMENTS}/")]
    names = {match.decode() for text in texts for match in _LICENCE_POINTER.findall(text)}
    for name in list(names):
        entry = tree.entries.get(_LICENCES + name)
        if entry is not None and entry.kind is EntryKind.LINK:
            names.add(entry.target)
    return [path for path in tree.entries if path.startswith(_LICENCES) and path.removeprefix(_LICENCES) not in names]
