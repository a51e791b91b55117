"""The root in which everything of the image is compiled: locked packages, unpacked and never configured.

No bit of the image depends on the compiler, the Python or the zlib of the machine that builds it. A `Job` is files,
commands and the names of what they make; its results are kept in the cache by all of that, so nothing is made twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from image import debfile
from image.fetch import fetch
from image.lockfile import Lock, package_key
from image.model import ARCHITECTURES, DebPackage, ImageError

NATIVE = "amd64"  # what the programs of the root run on
LAYOUT = 2  # of an unpacked root; another number makes those in the caches stale
MERGED = ("bin", "sbin", "lib", "lib64")
# A root of its own is all that is needed. In a user namespace anybody may enter it; root may where there are none.
WAYS = (("unshare", "--user", "--map-root-user", "chroot"), ("chroot",))
ENVIRONMENT = ("PATH=/usr/bin", "LC_ALL=C", "TZ=UTC", "TMPDIR=.", "PYTHONHASHSEED=0", "PYTHONDONTWRITEBYTECODE=1")
MESSAGE_LINES = 30


@dataclass(frozen=True, slots=True)
class Job:
    """Commands that run one after the other in a folder that holds `files` and nothing else."""

    files: Mapping[str, bytes]
    commands: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]  # names of the files that are wanted of what the commands make

    def key(self, toolchain: str) -> str:
        """What decides on the results, as a hash."""
        names = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        decisive = [toolchain, ENVIRONMENT, names, self.commands, self.outputs]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class Toolchain:
    """The compilers, Python and gzip of the lock."""

    def __init__(self, lock: Lock, cache: Path) -> None:
        """`cache` is the folder that the builder keeps its files in."""
        self.cache = cache
        foreign = [architecture for architecture in ARCHITECTURES if sysroot(architecture)]
        groups = {sysroot(architecture).lstrip("/"): f"sysroot/{architecture}" for architecture in foreign}
        # Place in the root -> what is unpacked there.
        self.parts = {place: lock.group(group) for place, group in {"": "toolchain", **groups}.items()}
        packages = {place: [package.sha256 for package in members] for place, members in self.parts.items()}
        self.digest = hashlib.sha256(json.dumps([LAYOUT, packages]).encode()).hexdigest()

    def run(self, job: Job) -> Mapping[str, bytes]:
        """The outputs of a job, by name."""
        kept = self.cache / "outputs" / job.key(self.digest)
        found = _restore(kept, job.outputs)
        if found is None:
            with _described(self.cache):
                found = self._make(job)
                _keep(kept, found)
        return found

    def gzip(self, data: bytes) -> bytes:
        """Compressed as small as gzip can, without name or time."""
        return self.run(Job({"data": data}, (("gzip", "-9n", "data"),), ("data.gz",)))["data.gz"]

    def owner(self, path: str) -> DebPackage:
        """The package that a file of the root belongs to."""
        root = self.root.resolve()
        real = (root / path.lstrip("/")).resolve()
        key = self._owners.get(str(real.relative_to(root)) if real.is_relative_to(root) else "")
        for package in self._packages():
            if package_key(package) == key:
                return package
        raise ImageError(f"no package of the toolchain has the file {path}", f"remove {self.root.parent}")

    @functools.cached_property
    def root(self) -> Path:
        """The unpacked root; unpacks it when the cache has none. One process unpacks, others wait for it."""
        final = self.cache / "toolchain" / self.digest
        with _described(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{final}.lock", "w") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                if not final.exists():
                    self._unpack(final)
        return final / "root"

    def _packages(self) -> Iterator[DebPackage]:
        return itertools.chain.from_iterable(self.parts.values())

    def _unpack(self, final: Path) -> None:
        """Fill a folder beside the final one, which appears whole or not at all."""
        debs = fetch(set(self._packages()), self.cache)
        partial = Path(f"{final}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        tasks = []
        for place, packages in self.parts.items():
            _make_root(partial / "root" / place)
            tasks += [(partial / "root" / place, place, debs[package], package) for package in packages]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            owners = {path: key for paths, key in pool.map(_unpack_one, tasks) for path in paths}
        (partial / "root" / "jobs").mkdir()
        (partial / "owners.json").write_text(json.dumps(owners))
        os.replace(partial, final)

    @functools.cached_property
    def _owners(self) -> dict[str, str]:
        owners: dict[str, str] = json.loads((self.root.parent / "owners.json").read_text())
        return owners

    @functools.cached_property
    def _entrance(self) -> tuple[str, ...]:
        """The first way into the root that works here."""
        failures = []
        for way in WAYS if os.geteuid() == 0 else WAYS[:1]:
            done = _execute([*way, str(self.root), "/usr/bin/true"])
            if done.returncode == 0:
                return (*way, str(self.root))
            failures.append(f"`{' '.join(way)}`: {done.stderr.strip()}")
        raise ImageError(
            f"the toolchain in {self.root} cannot be entered: {'; '.join(failures)}",
            "build on an amd64 machine that lets users make user namespaces, or as root",
        )

    def _make(self, job: Job) -> dict[str, bytes]:
        with self._folder() as folder:
            for name, data in job.files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            inside = ["env", "-i", f"--chdir=/jobs/{folder.name}", *ENVIRONMENT]
            for command in job.commands:
                done = _execute([*self._entrance, *inside, *command])
                if done.returncode != 0:
                    raise _failure(command, done)
            try:
                return {name: (folder / name).read_bytes() for name in job.outputs}
            except FileNotFoundError as error:
                raise ImageError(f"`{' '.join(job.commands[-1])}` did not make {error.filename}") from error

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.root / "jobs"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sysroot(architecture: str) -> str:
    """Where in the root the headers and libraries for an architecture are; empty for the root's own."""
    return "" if architecture == NATIVE else f"/sysroot/{architecture}"


@contextlib.contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Says of an error of the file system where it happened and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space" if full else "the folder and all in it must belong to the user who builds"
        raise ImageError(f"{folder}: the cache cannot be written: {error.strerror or error}", hint) from error


def _make_root(folder: Path) -> None:
    for name in MERGED:
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")


def _unpack_one(task: tuple[Path, str, Path, DebPackage]) -> tuple[list[str], str]:
    """Unpack a package; returns its files, relative to the whole root, and its key."""
    folder, place, deb, package = task
    done = _execute(["dpkg-deb", "--extract", str(deb), str(folder)])
    if done.returncode != 0:
        raise ImageError(f"{package_key(package)}: cannot be unpacked: {done.stderr.strip()}", "free some space")
    listed = debfile.control_files(deb).get("md5sums", b"").decode().splitlines()
    files = [line.split(maxsplit=1)[1] for line in listed]
    merged = [f"usr/{name}" if name.partition("/")[0] in MERGED else name for name in files]
    return [os.path.join(place, name) for name in merged], package_key(package)


def _execute(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # chroot is in a folder that users do not have on their PATH.
    environment = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, "", f"{argv[0]}: {error.strerror}")


def _failure(command: Sequence[str], done: subprocess.CompletedProcess[str]) -> ImageError:
    # The linker says of every function of the static libc that needs files at run time that it does.
    lines = [line for line in done.stderr.splitlines() if "warning: Using '" not in line]
    message = "\n".join(lines[-MESSAGE_LINES:])
    return ImageError(f"`{' '.join(command)}` failed in the toolchain with status {done.returncode}:\n{message}")


def _keep(path: Path, outputs: Mapping[str, bytes]) -> None:
    """One file: a line that says what follows, then all bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in outputs.items()]
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        stream.write(json.dumps(table).encode() + b"\n" + b"".join(outputs.values()))
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, path)


def _restore(path: Path, names: Sequence[str]) -> dict[str, bytes] | None:
    """What was kept, or None when it is not there or damaged."""
    try:
        line, _, rest = path.read_bytes().partition(b"\n")
        found, begin = {}, 0
        for name, size, digest in json.loads(line):
            found[name] = rest[begin : begin + size]
            begin += size
            if hashlib.sha256(found[name]).hexdigest() != digest:
                return None
    except (OSError, ValueError):
        return None
    return found if tuple(found) == tuple(names) else None
