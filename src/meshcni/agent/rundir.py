"""The run directory while the agent lives: are the sockets where plugins look for them, is their log too long?"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from meshcni.errors import MeshCniError

LOOK_SECONDS = 5.0
MAX_PLUGIN_LOG_BYTES = 10 * 1024 * 1024  # as the original's rolling file, of which one older one is kept too
OLDER_SUFFIX = ".1"


class SocketLostError(MeshCniError):
    """A socket's path was removed: plugins wait for an agent that nobody can reach."""


class SocketPaths:
    """The paths of sockets that this process listens on, each with the inode it made there."""

    def __init__(self) -> None:
        self._made: dict[Path, tuple[int, int]] = {}
        self._not_to_call: set[Path] = set()

    def add(self, path: Path, *, callable_by_us: bool = True) -> None:
        """Remember what stands at `path`, which was bound just now; see `check` for `callable_by_us`."""
        self._made[path] = _identity(path)
        if not callable_by_us:
            self._not_to_call.add(path)

    def reasons(self) -> tuple[str, ...]:
        """Why plugins do not reach us; empty when they do."""
        found = ((path, _identity(path), made) for path, made in self._made.items())
        return tuple(
            f"{path} was removed: no plugin reaches this agent" if now == ABSENT else f"another process serves {path}"
            for path, now, made in found
            if now != made
        )

    def taken(self) -> bool:
        """Whether another process serves one of the paths: an agent that started after us, which does our work now."""
        return any(_identity(path) not in (ABSENT, made) for path, made in self._made.items())

    def check(self) -> None:
        """Raise SocketLostError when a path is gone. One that another process took is left to it: a newer agent.

        Unless that one is gone, too: then nobody answers a call there. A call at ztunnel's path would count as ztunnel.
        """
        for path, made in self._made.items():
            now = _identity(path)
            if now == ABSENT:
                raise SocketLostError(f"{path} was removed", "what cleans that directory up must leave it alone")
            if now != made and path not in self._not_to_call and not _is_served(path):
                raise SocketLostError(f"{path} was left behind by another agent", "a rollout that failed on this node?")


ABSENT = (0, 0)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.lstat()
    except OSError:
        return ABSENT
    return found.st_dev, found.st_ino


def _is_served(path: Path) -> bool:
    """Whether any process listens there, on a socket of whatever kind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def rotate(path: Path, limit_bytes: int = MAX_PLUGIN_LOG_BYTES) -> bool:
    """Put the plugins' log aside when it is longer than that; a plugin that has it open finishes its line there.

    Raises OSError when that cannot be done.
    """
    try:
        if path.lstat().st_size <= limit_bytes:
            return False
        os.replace(path, f"{path}{OLDER_SUFFIX}")
    except FileNotFoundError:
        return False
    return True
