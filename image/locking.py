"""`make lock`: asks apt what the image and its builder need now, and writes the answer into the lock."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from image import apt, archive, lockfile, wheels
from image.archive import Archive
from image.fetch import exclusive
from image.lockfile import Lock, normalised, package_key
from image.model import ARCHITECTURES, ImageError

ROOT = Path(__file__).resolve().parent.parent


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
        for package in (*ask.install, *ask.alone):
            if not lockfile.PACKAGE_NAME.fullmatch(package):
                raise ValueError(f"[packages]: {ask.group} asks for {package!r}, which is not the name of a package")
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


def require(lock: Lock, wanted: Asks) -> None:
    """Raise when the lock is not an answer to what the definition asks for, which a newer definition may."""
    members = {name: {key.partition(":")[0] for key in keys} for name, keys in lock.groups.items()}
    lacking = [
        f"{ask.group} {name}"
        for ask in wanted.packages
        for name in (*ask.install, *ask.alone)
        if name not in members.get(ask.group, ())
    ]
    lacking += sorted({*members} - {ask.group for ask in wanted.packages})
    locked_wheels = {normalised(wheel.name) for wheel in lock.wheels}
    lacking += sorted(locked_wheels ^ set(map(normalised, wanted.wheels)))
    if lacking or lock.suites != wanted.suites:
        raise ImageError(
            f"the lock is not that of the image's definition; they differ in {', '.join(lacking[:8]) or 'suites'}",
            "run `make lock`",
        )


def resolve(wanted: Asks, requirements: str, cache: Path, source: Archive, keyring: Path = apt.KEYRING) -> Lock:
    """What the archives have now for everything that is asked for."""
    folder = cache / "apt"
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock"):
        root = apt.Root(folder, source, wanted.suites, keyring)
        root.update()
        groups = {ask.group: root.resolve(ask.architecture, ask.install, ask.alone) for ask in wanted.packages}
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        found = wheels.resolve(wanted.wheels, requirements, Path(scratch))
    packages = {package for members in groups.values() for package in members}
    return Lock(
        created=datetime.now(UTC).replace(microsecond=0),
        suites=wanted.suites,
        packages=tuple(sorted(packages, key=package_key)),
        wheels=found,
        groups={name: tuple(sorted(map(package_key, members))) for name, members in groups.items()},
    )


def changes(before: Lock | None, after: Lock) -> list[str]:
    """What a refresh changes, a line each; empty when the locks say the same, whenever they were made."""
    if before is None:
        return [f"new lock of {len(after.packages)} packages and {len(after.wheels)} wheels"]
    if replace(before, created=after.created) == after:
        return []
    old, new = _versions(before), _versions(after)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    lines = [f"{key}: {old.get(key, 'new')} -> {new.get(key, 'gone')}" for key in differing]
    return lines or ["the same versions, with other files or in other groups"]


def _versions(lock: Lock) -> dict[str, str]:
    versions = {package_key(package): package.version for package in lock.packages}
    return versions | {f"{wheel.name}:{wheel.architecture} (wheel)": wheel.version for wheel in lock.wheels}


def write(path: Path, lock: Lock) -> None:
    """Write a lock, whole or not at all, and only one that can be read again."""
    text = lockfile.render(lock)
    lockfile.parse(text, str(path))
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ImageError(f"{path}: the lock cannot be written: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m image lock`."""
    parser = argparse.ArgumentParser(prog="image lock", description="Lock what the archives have now.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when the archives have other versions"
    )
    parser.add_argument("--definition", type=Path, default=ROOT / "image" / "image.toml")
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.lock")
    parser.add_argument("--lock", type=Path, default=ROOT / "image" / "lock.json")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "image")
    parser.add_argument("--keyring", type=Path, default=apt.KEYRING, help="keys that may sign the archives")
    options = parser.parse_args(argv)
    requirements = options.requirements.read_text(encoding="utf-8")
    wanted = read_asks(options.definition)
    fresh = resolve(wanted, requirements, options.cache, archive.of_machine(), options.keyring)
    try:
        before = lockfile.read(options.lock)
    except ImageError:
        before = None  # a lock that is missing or damaged is what this command repairs
    lines = changes(before, fresh)
    if lines and not options.check:
        write(options.lock, fresh)  # when nothing changed the file stays, with its old time
    sys.stdout.write("".join(f"lock: {line}\n" for line in lines or ["nothing changed"]))
    return 1 if lines and options.check else 0
