"""Files of the host: read with their state, replaced as a whole or not at all, never over a newer version of others.

A file is replaced by writing a temporary file beside it, syncing it, checking that the target is still what was read,
and renaming. Functions block (disk) and raise OSError as it comes, FileChangedError, or DirectoryLockedError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshcni.errors import MeshCniError

NEW_FILE_MODE = 0o600
TEMP_MARK = ".tmp."  # as the original's, pkg/file: `<name>.tmp.<random>`; runtimes do not load such a name
# Privileges and signatures of the bytes before: on other bytes they would be too much, or keep them from running.
ATTRIBUTES_OF_CONTENT = frozenset({"security.capability", "security.ima", "security.evm"})
LOCK_SECONDS = 5.0
COPY_CHUNK = 1 << 20

HINTS = {
    errno.EROFS: "the file system is read-only: the node's CNI directories are probably elsewhere; set the chart's "
    "global.platform (or cniBinDir and cniConfDir) to what this node uses",
    errno.ENOSPC: "the file system is full; free some space, what was there is unchanged",
    errno.EDQUOT: "the quota is used up; what was there is unchanged",
    errno.EACCES: "the agent needs uid 0 or CAP_DAC_OVERRIDE there, and SELinux or AppArmor must allow it",
    errno.EPERM: "check the agent's capabilities, SELinux, AppArmor and the file's attributes (lsattr)",
    errno.ENOENT: "a directory on the way is missing: is the host's directory mounted into the agent's container?",
}


class FileChangedError(MeshCniError):
    """Somebody else changed a file after it was read; what they wrote is still there."""


class DirectoryLockedError(MeshCniError):
    """Another of our own processes is changing files in the directory."""


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file was like when it was read; equal states mean that nobody has touched it since."""

    inode: int
    mtime_ns: int
    size: int
    sha256: str


ABSENT = FileState(0, 0, 0, "")


def hint(error: OSError) -> str:
    """What a person can do about a failed file operation; empty when the error speaks for itself."""
    return HINTS.get(error.errno or 0, "")


def read(path: str, limit: int | None = None) -> tuple[bytes, FileState]:
    """Content and state of a regular file. Raises OSError, with EFBIG when it has more than `limit` bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes", path)
        with open(fd, "rb", closefd=False) as file:
            data = file.read()
    finally:
        os.close(fd)
    return data, FileState(found.st_ino, found.st_mtime_ns, len(data), hashlib.sha256(data).hexdigest())


def state_of(path: str) -> FileState:
    """The state of a file now, ABSENT when there is none."""
    try:
        return read(path)[1]
    except FileNotFoundError:
        return ABSENT


def write_atomically(
    path: str,
    data: bytes,
    *,
    mode: int | None = None,
    like: str | None = None,
    expected: FileState | None = None,
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Replace or create `path`: afterwards it holds `data` as a whole, or what it held before.

    Ownership, extended attributes (SELinux label) and, unless `mode` is given, the mode come from `like`, which is
    `path` itself unless given; a new file gets 0600. `expected` is the state that was read: FileChangedError when it is
    no longer so. The umask does not matter. `before_rename` is called when all is written but nothing visible yet.
    """
    model = _stat(like or path) or _stat(path)
    temp, fd = _make_temp(path)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            _take_over(fd, model, like or path, mode)
            os.fsync(fd)
        if _content(temp) != data:
            raise OSError(errno.EIO, "what was read back is not what was written", temp)
        before_rename()
        if expected is not None and state_of(path) != expected:
            raise FileChangedError(f"{path} was changed by somebody else while we were editing it", "it is read again")
        os.rename(temp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise
    sync_directory(os.path.dirname(path))


def remove(path: str, *, expected: FileState | None = None) -> bool:
    """Remove a file; False when there was none. Raises FileChangedError when it is not in the `expected` state."""
    if expected is not None and state_of(path) not in (expected, ABSENT):
        raise FileChangedError(f"{path} was changed by somebody else before we removed it", "it is read again")
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    sync_directory(os.path.dirname(path))
    return True


def same_file_content(source: str, target: str) -> bool:
    """Whether both are regular files with the same bytes and the same mode."""
    try:
        with open(source, "rb") as one, open(target, "rb") as other:
            facts = [os.fstat(file.fileno()) for file in (one, other)]
            if len({(fact.st_size, stat.S_IMODE(fact.st_mode)) for fact in facts}) != 1:
                return False
            digests = {hashlib.file_digest(file, "sha256").digest() for file in (one, other)}
            return len(digests) == 1
    except FileNotFoundError:
        return False


def copy_by_rename(source: str, target: str) -> bool:
    """Make `target` a copy of `source` with its mode, also while it is being executed; False when it is one already."""
    remove_stale_temps(target, "*")  # of an executable nobody keeps a backup by that name; upstream removes all too
    if not os.path.islink(target) and same_file_content(source, target):
        return False
    temp, fd = _make_temp(target)
    try:
        with open(source, "rb") as origin, open(fd, "wb") as copy:
            while chunk := origin.read(COPY_CHUNK):
                copy.write(chunk)
            copy.flush()
            _take_over(fd, _stat(target), target, stat.S_IMODE(os.fstat(origin.fileno()).st_mode))
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # or it counts as memory of the container
        if not same_file_content(source, temp):
            raise OSError(errno.EIO, "what was read back is not what was written", temp)
        os.rename(temp, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise
    sync_directory(os.path.dirname(target))
    return True


def remove_stale_temps(path: str, endings: str = "[0-9]*") -> list[str]:
    """Remove what a killed writer of `path` left beside it; the caller must be its only writer, or hold the lock."""
    found = glob.glob(glob.escape(path) + TEMP_MARK + endings)
    for temp in found:
        with contextlib.suppress(OSError):
            os.unlink(temp)
    return found


@contextlib.contextmanager
def locked(directory: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Keep our other processes from editing files of `directory` meanwhile; the lock is on the directory itself."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DirectoryLockedError(
                        f"{directory} has been locked by another process for {seconds:g} s",
                        "is a second agent or a meshcni conf command at work? /proc/locks has its process id",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def sync_directory(directory: str) -> None:
    """Make renames and removals in `directory` durable."""
    fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_temp(path: str) -> tuple[str, int]:
    while True:
        temp = f"{path}{TEMP_MARK}{secrets.randbelow(10**9):09d}"
        try:
            return temp, os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            continue


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _take_over(fd: int, model: os.stat_result | None, path: str, mode: int | None) -> None:
    """Give the open file the attributes, owner and mode of `model`, the state of `path`, as far as we may."""
    if model is not None:
        for name in _attributes(path):
            with contextlib.suppress(OSError):  # not here, or not permitted: the chart grants no FOWNER
                os.setxattr(fd, name, os.getxattr(path, name))
        if (model.st_uid, model.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):  # the chart grants no CHOWN
                os.fchown(fd, model.st_uid, model.st_gid)
    os.fchmod(fd, mode if mode is not None else stat.S_IMODE(model.st_mode) if model else NEW_FILE_MODE)


def _attributes(path: str) -> list[str]:
    try:
        return [name for name in os.listxattr(path) if name not in ATTRIBUTES_OF_CONTENT]
    except OSError:  # a file system without them
        return []


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
