"""Facts about processes, read from a procfs tree: this machine's /proc, or the host's where a container has it mounted.

Plain system calls instead of `open`: a walk reads a thousand files, and the buffered layers would double its cost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

# Enough for a cgroup file of cgroup v1 (a dozen hierarchies, a path each), where a page is not.
_READ_BYTES = 1 << 16
_FIELDS_TO_START = 20  # behind the name: fields 3 (state) to 22 (start time) of man 5 proc
GONE = (FileNotFoundError, ProcessLookupError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says: name (at most 15 bytes), the state's letter, start in clock ticks since boot."""

    comm: str
    state: str
    start: int


def pids(proc_root: str) -> list[int]:
    """Return the numbers of all processes, ascending; threads are not among them. Raises OSError."""
    return sorted(int(name) for name in os.listdir(proc_root) if name.isdecimal())


def read(path: str) -> bytes:
    """Return a procfs file; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, _READ_BYTES)
        while len(data) % _READ_BYTES == 0 and (more := os.read(descriptor, _READ_BYTES)):
            data += more
        return data
    finally:
        os.close(descriptor)


def read_stat(process: str) -> Stat:
    """Read PROCESS/stat; `process` is a process's folder. Raises OSError, and ValueError for what is no such file."""
    return parse_stat(read(f"{process}/stat"))


def parse_stat(data: bytes) -> Stat:
    """Parse a stat file; the name may hold blanks and parentheses, so only the last one ends it."""
    head, bracket, rest = data.rpartition(b")")
    fields = rest.split(None, _FIELDS_TO_START)
    if not bracket or len(fields) < _FIELDS_TO_START:
        raise ValueError(f"no process status: {data[:100]!r}")
    return Stat(_text(head.partition(b"(")[2]), _text(fields[0]), int(fields[_FIELDS_TO_START - 1]))


def read_comm(process: str) -> str:
    """Return the name of a process. Raises OSError."""
    return _text(read(f"{process}/comm").removesuffix(b"\n"))


def read_arguments(process: str) -> tuple[str, ...]:
    """Return the command line of a process, empty for a kernel thread. Raises OSError."""
    return tuple(_text(part) for part in read(f"{process}/cmdline").split(b"\0") if part)


def namespace_of(process: str, kind: str = "net") -> tuple[int, int]:
    """Return device and inode of a process's namespace. Raises OSError."""
    status = os.stat(f"{process}/ns/{kind}")
    return status.st_dev, status.st_ino


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
