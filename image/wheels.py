"""Python wheels of the lock: which ones requirements.lock means for CPython of the image, and pip to download them.

pip uses the index that is configured for it; that a file is the locked one is checked by hash, by pip and by us.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from image.lockfile import MACHINES, describe_wheel, normalised
from image.model import ANY_ARCHITECTURE, ImageError, Wheel

ROOT = Path(__file__).resolve().parent.parent
PYTHON_VERSION = "3.13"
NEWEST_GLIBC = 41  # 2.41, that of the suites in the lock
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)")
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A pinned project and the hashes of its files."""

    name: str
    version: str
    hashes: tuple[str, ...]


def requirements(text: str) -> Mapping[str, Requirement]:
    """The entries of a requirements file with hashes, by normalised name."""
    found: dict[str, Requirement] = {}
    for entry in re.sub(r"\\\n", " ", text).splitlines():
        match = REQUIREMENT.match(entry)
        if match:
            hashes = tuple(HASH.findall(entry))
            found[normalised(match["name"])] = Requirement(match["name"], match["version"], hashes)
    return found


def resolve(names: Sequence[str], text: str, scratch: Path) -> tuple[Wheel, ...]:
    """The wheels of projects for each architecture: those of the image's Python among the files that hashes allow."""
    known = requirements(text)
    wanted = []
    for name in names:
        if normalised(name) not in known:
            raise ImageError(f"requirements.lock has no {name}, which [wheels] asks for", "add it to pyproject.toml")
        wanted.append((name, known[normalised(name)]))
    found: set[Wheel] = set()
    for architecture in MACHINES:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            _pip([requirement for _, requirement in wanted], architecture, Path(folder))
            by_name = {normalised(describe_wheel(path.name)[0]): path for path in Path(folder).iterdir()}
            for name, requirement in wanted:
                path = by_name[normalised(name)]
                content = path.read_bytes()
                _, version, machine = describe_wheel(path.name)
                digest = hashlib.sha256(content).hexdigest()
                if digest not in requirement.hashes:
                    raise ImageError(f"{path.name}: SHA-256 {digest} is none that requirements.lock has for {name}")
                found.add(Wheel(name, version, machine, path.name, digest, len(content)))
    return tuple(sorted(found, key=lambda wheel: f"{wheel.name}:{wheel.architecture}"))


def download(missing: Sequence[Wheel], folder: Path) -> None:
    """Bring wheels into a folder, each under its SHA-256."""

    def pip_architecture(wheel: Wheel) -> str:
        return next(iter(MACHINES)) if wheel.architecture == ANY_ARCHITECTURE else wheel.architecture

    for architecture, group in groupby(sorted(missing, key=pip_architecture), key=pip_architecture):
        wheels = list(group)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _pip(
                [Requirement(wheel.name, wheel.version, (wheel.sha256,)) for wheel in wheels],
                architecture,
                Path(scratch),
            )
            for wheel in wheels:
                path = Path(scratch, wheel.filename)
                if not path.is_file():
                    raise ImageError(f"pip brought no {wheel.filename}", "run `make lock`")
                os.chmod(path, 0o644)
                os.replace(path, folder / wheel.sha256)


def _pip(wanted: Sequence[Requirement], architecture: str, folder: Path) -> None:
    machine = MACHINES[architecture]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(NEWEST_GLIBC, 4, -1)]
    platforms += [f"{generation}_{machine}" for generation in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    options = ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    options += [option for abi in (f"cp{PYTHON_VERSION.replace('.', '')}", "abi3", "none") for option in ("--abi", abi)]
    options += [option for platform in platforms for option in ("--platform", platform)]
    lines = [
        f"{each.name}=={each.version} " + " ".join(f"--hash=sha256:{digest}" for digest in each.hashes)
        for each in wanted
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=folder.parent) as listing:
        listing.write("\n".join(lines) + "\n")
        listing.flush()
        argv = [
            *_pip_command(),
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--only-binary",
            ":all:",
            *options,
        ]
        result = subprocess.run(
            [*argv, "--dest", str(folder), "--requirement", listing.name], capture_output=True, text=True, check=False
        )
    if result.returncode:
        names = ", ".join(f"{each.name}=={each.version}" for each in wanted)
        raise ImageError(
            f"pip found no wheels for CPython {PYTHON_VERSION} on {machine} of {names} with the locked hashes: "
            f"{result.stderr.strip()}",
            "check the network and pip's index; when a version was withdrawn, run `scripts/lock` and `make lock`",
        )


def _pip_command() -> list[str]:
    """The pip of the tools' environment, which `make setup` makes, else that of this Python."""
    tools = ROOT / ".tools" / "bin" / "python"
    return [str(tools) if tools.exists() else sys.executable, "-m", "pip"]
