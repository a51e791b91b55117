"""`make lock`: asks apt what the image and its builder need now, and writes the answer into the lock.

apt works in a root of its own: no installed package, no source and no setting of this machine has a say, and it checks
the archive's signature with the archive's keyring. Nothing is installed and no rights are needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from image import archive, lockfile, wheels
from image.archive import Archive
from image.debfile import fields
from image.lockfile import Lock
from image.model import ARCHITECTURES, DebPackage, ImageError

ROOT = Path(__file__).resolve().parent.parent
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_FOLDERS = (
    "etc/apt.conf.d",
    "etc/preferences.d",
    "etc/sources.list.d",
    "etc/trusted.gpg.d",
    "etc/auth.conf.d",
    "state/lists/partial",
    "cache/archives/partial",
    "tmp",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a group of the lock asks for: packages with what they depend on, and packages alone."""

    group: str
    architecture: str
    install: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asks:
    """All that the image's definition asks to be locked."""

    suites: tuple[str, ...]
    packages: tuple[Ask, ...]
    wheels: tuple[str, ...]


def read_asks(path: Path) -> Asks:
    """What the tables [packages] and [wheels] of the image's definition ask for."""
    try:
        return asks(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{path}: what to lock cannot be read: {type(error).__name__}: {error}") from error


def asks(document: Mapping[str, object]) -> Asks:
    """Read the two tables; a table of [packages] is one group, or one for each of its `architectures`."""
    tables = dict(_mapping(document["packages"]))
    suites = tuple(map(str, _list(tables.pop("suites"))))
    found = []
    for name, value in tables.items():
        table = _mapping(value)
        unknown = set(table) - {"architecture", "architectures", "install", "alone"}
        if unknown or ("architecture" in table) == ("architectures" in table):
            raise ValueError(f"[packages.{name}] takes install, alone and one of architecture, architectures")
        install, alone = (tuple(map(str, _list(table.get(key, [])))) for key in ("install", "alone"))
        if "architecture" in table:
            found.append(Ask(name, str(table["architecture"]), install, alone))
        else:
            found += [Ask(f"{name}/{each}", str(each), install, alone) for each in _list(table["architectures"])]
    for ask in found:
        if ask.architecture not in ARCHITECTURES:
            raise ValueError(f"[packages]: {ask.group} is for {ask.architecture}; expected {', '.join(ARCHITECTURES)}")
    return Asks(suites, tuple(found), tuple(map(str, _list(_mapping(document["wheels"])["names"]))))


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a table, found {value!r}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {value!r}")
    return value


class Apt:
    """apt in a root of its own under `folder`, with the given archives and nothing else."""

    def __init__(self, folder: Path, source: Archive, suites: Sequence[str], keyring: Path = KEYRING) -> None:
        self.folder = folder.resolve()
        self.source = source
        if not keyring.is_file():
            raise ImageError(f"{keyring} is missing: the archive's signature cannot be checked", "run `make setup`")
        for name in APT_FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write("status", "")
        self._write("sources.list", self._sources(suites, keyring))
        self._write("apt.conf", self._configuration())

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def _sources(self, suites: Sequence[str], keyring: Path) -> str:
        lines = []
        for suite in suites:
            base = self.source.bases["debian-security" if suite.endswith("-security") else "debian"]
            lines.append(f"deb [signed-by={keyring} arch={','.join(ARCHITECTURES)}] {base} {suite} main\n")
        return "".join(lines)

    def _configuration(self) -> str:
        settings = {
            "Dir": str(self.folder),
            "Dir::State": "state",
            "Dir::State::status": str(self.folder / "status"),
            "Dir::Cache": "cache",
            "Dir::Etc": "etc",
            "Dir::Etc::sourcelist": str(self.folder / "sources.list"),
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "Acquire::Languages": "none",
            "Acquire::ForceHash": "SHA256",
            "Acquire::Retries": "3",
            # apt's helpers keep our user: a folder that apt's own user cannot enter must do as well.
            "APT::Sandbox::User": "root",
        }
        settings |= {f"Acquire::{scheme}::Proxy": value for scheme, value in self.source.proxies.items()}
        return "".join(f'{name} "{value}";\n' for name, value in settings.items())

    def update(self) -> None:
        """Get the archives' indices; a signature that is missing or wrong is an error."""
        self._run(ARCHITECTURES[0], ["apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any"])

    def resolve(self, ask: Ask) -> tuple[DebPackage, ...]:
        """The packages that a group needs, sorted."""
        printed = ""
        if ask.install:
            printed += self._run(ask.architecture, ["apt-get", "install", "-y", "-qq", "--print-uris", *ask.install])
        if ask.alone:
            printed += self._run(ask.architecture, ["apt-get", "download", "-qq", "--print-uris", *ask.alone])
        urls = _read_uris(printed)
        specs = sorted({_spec(name) for _, name, _ in urls.values()})
        shown = self._run(ask.architecture, ["apt-cache", "show", *specs])
        stanzas = {stanza.get("SHA256", ""): stanza for stanza in map(fields, shown.split("\n\n"))}
        found = set()
        for sha256, (url, name, size) in urls.items():
            if sha256 not in stanzas:
                raise ImageError(f"apt wants {name} with SHA-256 {sha256}, but its index does not describe it")
            found.add(self._package(stanzas[sha256], self.source.name_of(url), size))
        return tuple(sorted(found))

    @staticmethod
    def _package(stanza: Mapping[str, str], archive_name: str, size: int) -> DebPackage:
        # `Source` is left out where it is the package itself; its version stands in brackets where it differs.
        source, _, source_version = stanza.get("Source", stanza["Package"]).partition(" ")
        return DebPackage(
            name=stanza["Package"],
            version=stanza["Version"],
            architecture=stanza["Architecture"],
            archive=archive_name,
            path=stanza["Filename"],
            sha256=stanza["SHA256"],
            size=size,
            source=source,
            source_version=source_version.strip("()") or stanza["Version"],
        )

    def _run(self, architecture: str, argv: Sequence[str]) -> str:
        options = ["-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"]
        if argv[1] == "update":
            options = ["-o", f"APT::Architecture={architecture}", "-o", "APT::Architectures=" + ",".join(ARCHITECTURES)]
        environ = dict(
            os.environ, APT_CONFIG=str(self.folder / "apt.conf"), TMPDIR=str(self.folder / "tmp"), LC_ALL="C"
        )
        result = subprocess.run(
            [*argv, *options], env=environ, cwd=self.folder, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise ImageError(
                f"`{' '.join(argv)}` failed for {architecture}: {(result.stderr or result.stdout).strip()}",
                "check the network, the archive that apt's sources name, and what [packages] asks for",
            )
        return result.stdout


def _read_uris(printed: str) -> dict[str, tuple[str, str, int]]:
    """Address, file name and size by SHA-256, from lines of `'ADDRESS' NAME SIZE SHA256:HASH`."""
    found = {}
    for line in printed.splitlines():
        url, name, size, digest = line.split()
        kind, _, sha256 = digest.partition(":")
        if kind != "SHA256":
            raise ImageError(f"apt gives no SHA-256 for {name}: {line}")
        found[sha256] = (url.strip("'"), name, int(size))
    return found


def _spec(name: str) -> str:
    """What apt calls the package of a file name such as `libc6_2.41-12_arm64.deb`: `libc6:arm64=2.41-12`."""
    package, version, architecture = name.removesuffix(".deb").split("_")
    version = version.replace("%3a", ":")
    return f"{package}={version}" if architecture == "all" else f"{package}:{architecture}={version}"


def lock(wanted: Asks, requirements: str, cache: Path, source: Archive, keyring: Path = KEYRING) -> Lock:
    """What the archives have now for everything that is asked for."""
    apt = Apt(cache / "apt", source, wanted.suites, keyring)
    apt.update()
    groups = {ask.group: apt.resolve(ask) for ask in wanted.packages}
    packages = {package for members in groups.values() for package in members}
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        found_wheels = wheels.resolve(wanted.wheels, requirements, Path(scratch))
    return Lock(
        created=datetime.now(UTC).replace(microsecond=0),
        suites=wanted.suites,
        packages=tuple(sorted(packages, key=lockfile.package_key)),
        wheels=found_wheels,
        groups={name: tuple(sorted(map(lockfile.package_key, members))) for name, members in groups.items()},
    )


def write(path: Path, fresh: Lock) -> bool:
    """Write a lock unless the file says the same already, whenever that was; whether something was written."""
    try:
        if replace(fresh, created=lockfile.read(path).created) == lockfile.read(path):
            return False
    except ImageError:
        pass  # a lock that cannot be read is what this command repairs
    text = lockfile.render(fresh)
    lockfile.parse(text, str(path))
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m image lock`."""
    parser = argparse.ArgumentParser(prog="image lock", description="Lock the newest packages of the archives.")
    parser.add_argument("--definition", type=Path, default=ROOT / "image" / "image.toml")
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.lock")
    parser.add_argument("--lock", type=Path, default=ROOT / "image" / "lock.json")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "image")
    options = parser.parse_args(argv)
    requirements = options.requirements.read_text(encoding="utf-8")
    fresh = lock(read_asks(options.definition), requirements, options.cache, archive.of_machine())
    written = write(options.lock, fresh)
    sys.stdout.write(f"lock: {options.lock}: {'written' if written else 'nothing changed'}\n")
    return 0
