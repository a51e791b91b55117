"""The conf directory on disk: read as a whole for a decision, and one change of it carried out."""

from __future__ import annotations

import os
from collections.abc import Mapping

from meshcni.cni import conf
from meshcni.cni.confplan import Change, ConfDir
from meshcni.host import files
from meshcni.host.files import FileState

MAX_CONF_BYTES = 1 << 20


def read_conf_dir(path: str, also: str = "") -> tuple[ConfDir, dict[str, FileState]]:
    """The candidates in `path` and the file named `also`, with their states; a missing directory is an empty one."""
    found: dict[str, bytes] = {}
    states: dict[str, FileState] = {}
    unreadable: dict[str, str] = {}
    folders: set[str] = set()
    for entry in entries(path):
        if entry.is_dir(follow_symlinks=False):
            if any(conf.suffix(inner.name) == ".conf" for inner in entries(entry.path)):
                folders.add(entry.name)
        elif conf.suffix(entry.name) in conf.SUFFIXES or entry.name == also:
            try:
                found[entry.name], states[entry.name] = files.read(entry.path, MAX_CONF_BYTES)
            except FileNotFoundError:
                if goal := _link_goal(entry.path):
                    unreadable[entry.name] = f"it is a link to {goal}, and nothing is there as seen from here"
                continue  # else it was removed since the directory was listed
            except OSError as error:
                unreadable[entry.name] = error.strerror or str(error)
    return ConfDir(path, found, unreadable, frozenset(folders)), states


def _link_goal(path: str) -> str:
    """Where a symbolic link leads; empty for what is none, or no longer there."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def carry_out(path: str, change: Change, states: Mapping[str, FileState], *, mode: int | None = None) -> str:
    """Carry out one change in `path`; returns what was done, as a sentence.

    A written file keeps its own mode and owner, a new one gets those of `change.like`; `mode` goes before both.
    Raises OSError, and FileChangedError when the file is no longer in the state that was read.
    """
    target = os.path.join(path, change.name)
    expected = states.get(change.name, files.ABSENT)
    if change.data is None:
        files.remove(target, expected=expected)
        return f"removed {target}"
    files.remove_stale_temps(target)
    model = os.path.join(path, change.like) if change.like and change.name not in states else None
    files.write_atomically(target, change.data, mode=mode, like=model, expected=expected)
    return f"wrote {target}"


def entries(path: str) -> list[os.DirEntry[str]]:
    """The entries of a directory by name; none when it does not exist."""
    try:
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
