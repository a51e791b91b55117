"""The lock: every package and wheel that may end in an image or work on one, by hash, and what they are for.

`parse` and `render` are pure. An entry that cannot be what `make lock` wrote stops the build and says which one it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from image.model import ANY_ARCHITECTURE, ARCHITECTURES, DebPackage, ImageError, Wheel

SCHEMA = 1
ARCHIVES = ("debian", "debian-security")
HINT = "restore the file from the repository's history, or run `make lock`"

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
PACKAGE_VERSION = re.compile(r"(?:[0-9]+:)?[0-9A-Za-z.+~-]+")
POOL_PATH = re.compile(r"pool/(?:[A-Za-z0-9][A-Za-z0-9+.~_-]*/)+[A-Za-z0-9+.~_-]+\.deb")
WHEEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
WHEEL_FILE = re.compile(r"(?P<name>\w+)-(?P<version>[A-Za-z0-9.+!_]+)-[\w.]+-[\w.]+-(?P<platform>[\w.]+)\.whl")
SUITE = re.compile(r"[a-z]+(?:-[a-z]+)*")
GROUP = re.compile(r"[a-z]+(?:/[a-z0-9]+)?")
SHA256 = re.compile(r"[0-9a-f]{64}")
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}

Row = TypeVar("Row", DebPackage, Wheel)


@dataclass(frozen=True, slots=True)
class Lock:
    """What `image/lock.json` says. `groups` maps a group's name to keys of packages, `NAME:ARCHITECTURE`, sorted."""

    created: datetime  # when `make lock` last changed something; the time of everything that is built from it
    suites: tuple[str, ...]
    packages: tuple[DebPackage, ...]
    wheels: tuple[Wheel, ...]
    groups: Mapping[str, tuple[str, ...]] = field(hash=False)

    def group(self, name: str) -> tuple[DebPackage, ...]:
        """The packages of a group such as `runtime/arm64`, sorted by name."""
        if name not in self.groups:
            raise ImageError(
                f"the lock has no group {name}; it has {', '.join(sorted(self.groups))}", "run `make lock`"
            )
        by_key = {package_key(package): package for package in self.packages}
        return tuple(by_key[key] for key in self.groups[name])

    def wheels_for(self, architecture: str) -> tuple[Wheel, ...]:
        """The wheels of an image for this architecture, those for any machine included."""
        return tuple(wheel for wheel in self.wheels if wheel.architecture in (architecture, ANY_ARCHITECTURE))

    @property
    def epoch(self) -> int:
        """`created` in seconds since 1970: SOURCE_DATE_EPOCH of everything that is built from this lock."""
        return int(self.created.timestamp())

    @property
    def digest(self) -> str:
        """SHA-256 of the lock as `make lock` writes it."""
        return hashlib.sha256(render(self).encode()).hexdigest()


def parse_time(text: str) -> datetime:
    """A time as the lock writes it."""
    return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)


def package_key(package: DebPackage) -> str:
    """How a group names a package."""
    return f"{package.name}:{package.architecture}"


def read(path: Path) -> Lock:
    """Read and check a lock."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: the lock cannot be read: {error}", HINT) from error
    return parse(text, str(path))


def render(lock: Lock) -> str:
    """The text of the file: one package per line, so that a refresh reads well as a difference."""
    parts = [
        f'  "schema": {SCHEMA}',
        f'  "created": "{lock.created.strftime(TIME_FORMAT)}"',
        f'  "suites": {json.dumps(list(lock.suites))}',
        f'  "packages": {_render_list([asdict(package) for package in lock.packages], "    ")}',
        f'  "wheels": {_render_list([asdict(wheel) for wheel in lock.wheels], "    ")}',
    ]
    groups = [f'    "{name}": {_render_list(lock.groups[name], "      ")}' for name in sorted(lock.groups)]
    parts.append('  "groups": {\n' + ",\n".join(groups) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _render_list(items: Sequence[object], indent: str) -> str:
    lines = ",\n".join(indent + json.dumps(item) for item in items)
    return f"[\n{lines}\n{indent[2:]}]" if items else "[]"


def parse(text: str, file: str) -> Lock:
    """Read the text of a lock; `file` is what errors call it."""
    return _Parser(file).lock(text)


class _Parser:
    """Checks that every value is one that `make lock` could have written."""

    def __init__(self, file: str) -> None:
        self.file = file

    def lock(self, text: str) -> Lock:
        try:
            document = json.loads(text, object_pairs_hook=self.pairs)
        except ValueError as error:
            raise self.error("the file", "JSON", f"an error: {error}") from error
        except RecursionError:
            raise self.error("the file", "JSON", "nesting without end") from None
        wanted = {"schema", "created", "suites", "packages", "wheels", "groups"}
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise self.error("schema", str(SCHEMA), repr(found))
        self.keys("the file", document, wanted)
        packages = tuple(self.package(row) for row in self.rows(document["packages"], "packages", DebPackage))
        wheels = tuple(self.wheel(row) for row in self.rows(document["wheels"], "wheels", Wheel))
        self.ordered("packages", [package_key(package) for package in packages])
        self.ordered("wheels", [f"{wheel.name}:{wheel.architecture}" for wheel in wheels])
        return Lock(
            created=self.time(document["created"]),
            suites=tuple(self.strings("suites", document["suites"], SUITE)),
            packages=packages,
            wheels=wheels,
            groups=self.groups(document["groups"], packages),
        )

    def error(self, entry: str, expected: str, found: str) -> ImageError:
        return ImageError(f"{self.file}: {entry}: expected {expected}, found {found}", HINT)

    def pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise self.error(f"key {twice!r}", "each key once", "it twice")
        return mapping

    def keys(self, entry: str, mapping: Mapping[str, object], wanted: set[str]) -> None:
        if set(mapping) != wanted:
            raise self.error(entry, f"the keys {', '.join(sorted(wanted))}", ", ".join(sorted(mapping)) or "none")

    def time(self, value: object) -> datetime:
        try:
            created = parse_time(str(value))
        except ValueError:
            raise self.error("created", "a time such as 2026-01-31T12:00:00Z", repr(value)) from None
        if created.strftime(TIME_FORMAT) != value:
            raise self.error("created", created.strftime(TIME_FORMAT), repr(value))
        return created

    def strings(self, entry: str, value: object, pattern: re.Pattern[str]) -> list[str]:
        if not isinstance(value, list) or not value:
            raise self.error(entry, "a list that is not empty", repr(value)[:80])
        return [self.matching(entry, item, pattern) for item in value]

    def matching(self, entry: str, value: object, pattern: re.Pattern[str]) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.error(entry, f"text of the form {pattern.pattern}", repr(value)[:120])
        return value

    def one_of(self, entry: str, value: str, choices: Sequence[str]) -> None:
        if value not in choices:
            raise self.error(entry, f"one of {', '.join(choices)}", repr(value))

    def ordered(self, entry: str, keys: Sequence[str]) -> None:
        for before, after in itertools.pairwise(keys):
            if before == after:
                raise self.error(f"{entry} {after}", "it once", "it twice")
        if list(keys) != sorted(keys):
            raise self.error(entry, "sorted entries", "another order")

    def rows(self, value: object, entry: str, kind: type[Row]) -> Iterator[Row]:
        """The entries of a list, each with exactly the fields of the class, of their types."""
        if not isinstance(value, list):
            raise self.error(entry, "a list", type(value).__name__)
        for number, row in enumerate(value):
            if not isinstance(row, dict):
                raise self.error(f"{entry}[{number}]", "an object", type(row).__name__)
            where = f"{entry}[{number}] ({row.get('name')})"
            self.keys(where, row, {column.name for column in fields(kind)})
            for column, cell in row.items():
                wanted = int if column == "size" else str
                if type(cell) is not wanted:
                    raise self.error(f"{where} {column}", wanted.__name__, repr(cell)[:80])
            self.matching(f"{where} sha256", row["sha256"], SHA256)
            if row["size"] <= 0:
                raise self.error(f"{where} size", "a number of bytes", repr(row["size"]))
            self.one_of(f"{where} architecture", row["architecture"], (*ARCHITECTURES, ANY_ARCHITECTURE))
            yield kind(**row)

    def package(self, package: DebPackage) -> DebPackage:
        entry = f"package {package_key(package)}"
        for name in (package.name, package.source):
            self.matching(f"{entry} name", name, PACKAGE_NAME)
        for version in (package.version, package.source_version):
            self.matching(f"{entry} version", version, PACKAGE_VERSION)
        self.one_of(f"{entry} archive", package.archive, ARCHIVES)
        self.matching(f"{entry} path", package.path, POOL_PATH)
        # A pool's file names leave the epoch out.
        wanted = f"{package.name}_{package.version.partition(':')[2] or package.version}_{package.architecture}.deb"
        if package.path.rpartition("/")[2] != wanted:
            raise self.error(f"{entry} path", f"a path that ends with {wanted}", package.path)
        return package

    def wheel(self, wheel: Wheel) -> Wheel:
        entry = f"wheel {wheel.name}:{wheel.architecture}"
        self.matching(f"{entry} name", wheel.name, WHEEL_NAME)
        self.matching(f"{entry} filename", wheel.filename, WHEEL_FILE)
        name, version, architecture = describe_wheel(wheel.filename)
        for what, expected, found in (
            ("name", normalised(wheel.name), normalised(name)),
            ("version", wheel.version, version),
            ("architecture", wheel.architecture, architecture),
        ):
            if expected != found:
                raise self.error(f"{entry} filename", f"one of {what} {expected}", wheel.filename)
        return wheel

    def groups(self, value: object, packages: Sequence[DebPackage]) -> dict[str, tuple[str, ...]]:
        if not isinstance(value, dict) or not value:
            raise self.error("groups", "an object that is not empty", repr(value)[:80])
        known = {package_key(package) for package in packages}
        groups: dict[str, tuple[str, ...]] = {}
        for name, members in value.items():
            self.matching("group's name", name, GROUP)
            groups[name] = tuple(self.strings(f"group {name}", members, re.compile(r"[^:]+:[a-z0-9]+")))
            self.ordered(f"group {name}", groups[name])
            for key in groups[name]:
                if key not in known:
                    raise self.error(f"group {name}", "packages that the lock has", key)
        unused = known.difference(*groups.values())
        if unused:
            raise self.error(f"package {min(unused)}", "it in a group", "it in none")
        return groups


def normalised(name: str) -> str:
    """A Python project's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def describe_wheel(filename: str) -> tuple[str, str, str]:
    """Name, version and our architecture of a wheel, from its file name."""
    match = WHEEL_FILE.fullmatch(filename)
    if not match:
        raise ImageError(f"{filename}: not the file name of a wheel")
    platform = match["platform"]
    found = [ours for ours, machine in MACHINES.items() if platform.endswith(machine)]
    if not found and platform != "any":
        raise ImageError(f"{filename}: a wheel for {platform}; expected {', '.join(MACHINES.values())} or any")
    return match["name"], match["version"], found[0] if found else ANY_ARCHITECTURE
