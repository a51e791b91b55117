"""Watches directories through inotify on the event loop: no thread, nothing to do while nothing happens.

watchfiles looks at its queue in steps: 5 ms steps cost 1.4 % of a CPU when idle, 50 ms steps took up to 90 ms to tell
of a change. A descriptor that the loop waits for costs nothing and tells at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator

# linux/inotify.h. No IN_MODIFY: a file is looked at when its writer has closed it.
IN_ATTRIB, IN_CLOSE_WRITE = 0x4, 0x8
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
IN_ONLYDIR = 0x1000000
WATCHED = (
    IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF
)
ENDED = IN_IGNORED | IN_MOVE_SELF
HEADER = struct.Struct("iIII")
READ_BYTES = 64 * 1024
_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Calls `changed(directory, name)` for each change; name is empty when it is the directory, or may be any file."""

    def __init__(self, changed: Callable[[str, str], None]) -> None:
        self._changed = changed
        self._fd = -1
        self._directories: dict[int, str] = {}  # watch descriptor -> directory

    def ensure(self, directories: list[str]) -> dict[str, OSError]:
        """Watch these that are not watched yet; returns why those that could not be are not."""
        watched = set(self._directories.values())
        failed = {}
        for directory in directories:
            if directory not in watched:
                try:
                    self._add(directory)
                except OSError as error:
                    failed[directory] = error
        return failed

    def close(self) -> None:
        """Stop watching; `ensure` would start again."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._fd = -1
        self._directories.clear()

    def _add(self, directory: str) -> None:
        if self._fd < 0:
            self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
            asyncio.get_running_loop().add_reader(self._fd, self._read)
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(directory), WATCHED | IN_ONLYDIR)
        self._directories[_checked(watch, directory)] = directory

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._fd, READ_BYTES)
            for watch, mask, name in _events(data):
                self._tell(watch, mask, name)

    def _tell(self, watch: int, mask: int, name: str) -> None:
        if mask & IN_Q_OVERFLOW:
            for directory in list(self._directories.values()):
                self._changed(directory, "")
            return
        directory = self._directories.get(watch, "")
        if mask & ENDED and directory:
            # Removed, moved away or unmounted: whatever stands at that path next is watched anew by `ensure`.
            del self._directories[watch]
            if not mask & IN_IGNORED:
                _libc.inotify_rm_watch(self._fd, watch)
        if directory:
            self._changed(directory, name)


def _events(data: bytes) -> Iterator[tuple[int, int, str]]:
    at = 0
    while at < len(data):
        watch, mask, _cookie, length = HEADER.unpack_from(data, at)
        at += HEADER.size
        yield watch, mask, os.fsdecode(data[at : at + length].rstrip(b"\0"))
        at += length


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
