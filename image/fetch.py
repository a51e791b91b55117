"""Brings locked packages and wheels into the cache, by hash, and hands out only files whose hash was just checked.

`CACHE/debs/SHA256` and `CACHE/wheels/SHA256` are the files. A file appears there whole or not at all; of several
fetchers at once one downloads and the others wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from image import archive, wheels
from image.archive import Archive
from image.lockfile import package_key
from image.model import DebPackage, ImageError, Wheel

CONNECTIONS = 6
ATTEMPTS = 4
PAUSE_S = 0.5  # before the second attempt; doubles
TIMEOUT_S = 60.0
CHUNK = 1 << 18
CHANGED = "the mirror, or something between it and here, changed the file; if the lock is wrong, run `make lock`"

Locked = TypeVar("Locked", DebPackage, Wheel)


def fetch(packages: Iterable[DebPackage], cache: Path, source: Archive | None = None) -> Mapping[DebPackage, Path]:
    """Paths of packages' files in the cache, after downloading what was missing; `source` is else this machine's."""
    return _complete(tuple(packages), cache / "debs", lambda missing, folder: _download_all(missing, folder, source))


def fetch_wheels(wanted: Iterable[Wheel], cache: Path) -> Mapping[Wheel, Path]:
    """Paths of wheels' files in the cache, after pip downloaded what was missing from its configured index."""
    return _complete(tuple(wanted), cache / "wheels", wheels.download)


def check(path: Path, locked: DebPackage | Wheel) -> None:
    """Raise unless a file is the locked one."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    found = digest.hexdigest()
    if found != locked.sha256:
        raise ImageError(
            f"{path}: not the locked {locked.name} {locked.version} ({locked.architecture}): "
            f"expected SHA-256 {locked.sha256}, found {found} ({size} bytes, expected {locked.size})",
            CHANGED,
        )
    if size != locked.size:
        raise ImageError(f"{path}: {locked.name}: expected {locked.size} bytes, found {size}", "run `make lock`")


def _complete(
    wanted: Sequence[Locked], folder: Path, download: Callable[[Sequence[Locked], Path], None]
) -> dict[Locked, Path]:
    paths = {locked: folder / locked.sha256 for locked in wanted}
    with _described(folder):
        missing = _missing(paths)
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / "lock"):
                # Another fetcher may have brought them while this one waited.
                missing = _missing({locked: paths[locked] for locked in missing})
                if missing:
                    download(missing, folder)
                    for locked in missing:
                        check(paths[locked], locked)
    return paths


def _missing(paths: Mapping[Locked, Path]) -> list[Locked]:
    """Those that are not in the cache. A file there that is damaged is missing too, and a download takes its place."""

    def absent(item: tuple[Locked, Path]) -> bool:
        locked, path = item
        try:
            check(path, locked)
        except (FileNotFoundError, ImageError):
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [locked for locked, gone in zip(paths, pool.map(absent, paths.items()), strict=True) if gone]


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; who comes second waits."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Says of an error of the file system where it happened and what to do."""
    try:
        yield
    except OSError as error:
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise ImageError(f"{folder}: the cache cannot be written: {error.strerror or error}", hint) from error


def _download_all(packages: Sequence[DebPackage], folder: Path, source: Archive | None) -> None:
    source = source or archive.of_machine()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({**source.proxies, **urllib.request.getproxies()}))
    opener.addheaders = [("User-Agent", "meshcni-image")]
    stop = threading.Event()

    def one(package: DebPackage) -> bool:
        if stop.is_set():
            return True
        try:
            return _download(opener, source.url(package), package, folder)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        there = list(pool.map(one, packages))
    gone = [package for package, found in zip(packages, there, strict=True) if not found]
    if gone:
        listed = ", ".join(f"{package_key(package)} {package.version}" for package in gone[:8])
        more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
        raise ImageError(
            f"the archive no longer has {len(gone)} of the locked packages: {listed}{more}",
            "newer versions took their place: run `make lock`, and review what it changes",
        )


def _download(opener: urllib.request.OpenerDirector, url: str, package: DebPackage, folder: Path) -> bool:
    """Bring one file into the cache; False when the archive does not have it."""
    partial = folder / f"{package.sha256}.partial"  # whoever writes holds the folder's lock
    try:
        for attempt in range(ATTEMPTS):
            try:
                _receive(opener, url, partial, package)
                break
            except urllib.error.HTTPError as error:
                if error.code in (404, 410):
                    return False
                failure, again = f"HTTP {error.code}", error.code >= 500 or error.code == 429
            except urllib.error.URLError as error:
                if isinstance(error.reason, FileNotFoundError):
                    return False  # an archive that is a folder
                failure, again = str(error.reason), True
            except http.client.HTTPException as error:
                failure, again = f"{type(error).__name__} {error}", True
            if not again or attempt == ATTEMPTS - 1:
                raise _unreachable(package, failure)
            time.sleep(PAUSE_S * 2**attempt)
        check(partial, package)
        os.chmod(partial, 0o644)
        os.replace(partial, folder / package.sha256)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _receive(opener: urllib.request.OpenerDirector, url: str, partial: Path, package: DebPackage) -> None:
    left = package.size
    with opener.open(url, timeout=TIMEOUT_S) as response, partial.open("wb") as stream:
        # One byte more than locked shows a file that is too long, without letting it fill the disk.
        while chunk := _read(response, min(CHUNK, left + 1)):
            stream.write(chunk)
            left -= len(chunk)
            if left < 0:
                raise ImageError(
                    f"{package.archive}/{package.path}: longer than the {package.size} bytes of the lock",
                    CHANGED,
                )
        if left > 0 and getattr(response, "length", None):
            raise urllib.error.URLError(f"the connection ended {left} bytes before the file did")


def _read(response: IO[bytes], size: int) -> bytes:
    """Read from the network; its errors must not look like errors of the cache's file system."""
    try:
        return response.read(size)
    except OSError as error:
        raise urllib.error.URLError(error) from error


def _unreachable(package: DebPackage, failure: str) -> ImageError:
    variable = archive.VARIABLES[package.archive]
    return ImageError(
        f"{package.archive}/{package.path} cannot be downloaded: {failure}",
        f"check the network and apt's proxy, or set {variable} to a mirror that can be reached",
    )
