"""Programs that distributing an image needs, from the lock's group `tools`: unpacked into the cache, not installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from image import fetch, lockfile
from image.model import ImageError

GROUP = "tools"
LOCK = Path(__file__).parent / "lock.json"
CACHE = Path(__file__).parent.parent / ".cache" / "image"


def find(name: str, lock: lockfile.Lock | None = None, cache: Path = CACHE) -> Path:
    """Say where the program `name` is, after unpacking the package of that name if need be."""
    packages = (lock or lockfile.read(LOCK)).group(GROUP)
    package = next((package for package in packages if package.name == name), None)
    if package is None:
        raise ImageError(f"the lock's group {GROUP} has no {name}", f"there are: {', '.join(p.name for p in packages)}")
    folder = cache / "tools" / package.sha256
    if not folder.exists():
        _unpack(fetch.fetch([package], cache)[package], folder)
    program = folder / "usr" / "bin" / name
    if not program.is_file():
        raise ImageError(f"{program}: missing; {package.name} {package.version} has no such program")
    return program


def _unpack(package: Path, folder: Path) -> None:
    """Unpack a package beside `folder` and rename it: the folder is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
        unpacked = Path(temporary) / "root"
        command = ["dpkg-deb", "-x", str(package), str(unpacked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ImageError(f"{package}: cannot be unpacked: {done.stderr.strip()}")
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was as fast
                raise
            shutil.rmtree(unpacked)
