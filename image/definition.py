"""The image as data: what `image.toml` says, checked and as values."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from image.model import ImageError
from image.selection import Removal
from image.tomltable import TomlTable

CAPABILITIES = {  # linux/capability.h
    "CAP_DAC_OVERRIDE": 1,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}
PACKAGE_DATABASES = ("status.d", "dpkg")
_VERSION = re.compile(r'^__version__ = "(\d+)\.(\d+)\.(\d+)"$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Account:
    """A user with a group of the same name, or (`uid` -1) a group alone."""

    name: str
    uid: int
    gid: int
    comment: str = ""
    home: str = "/nonexistent"
    shell: str = "/usr/sbin/nologin"


@dataclass(frozen=True, slots=True)
class MadeDirectory:
    """A directory that no package brings, or that stays although it is empty."""

    path: str
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class MadeLink:
    """A symbolic link that a package's maintainer script would make; `package` is empty for what is ours."""

    path: str
    target: str
    package: str


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A small text file."""

    path: str
    mode: int
    text: str
    package: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """A choice that update-alternatives would have recorded; `followers` maps link to target."""

    name: str
    link: str
    target: str
    priority: int
    followers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Copy:
    """Files that stand in a second place too, `{python}` and so on already filled in."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the image's variants with everything that the tables say about it."""

    name: str
    extends: str  # the variant whose layers come first; empty for none
    packages: tuple[str, ...]  # groups of the lock, without the architecture
    user: str
    tag_suffix: str
    shell: str  # for the labels: empty means there is none
    package_manager: str
    package_database: str
    whole_packages: bool  # else only the libraries that something needs stay, and nothing that became pointless
    environment: Mapping[str, str]
    removals: tuple[Removal, ...]
    copies: tuple[Copy, ...]
    directories: tuple[MadeDirectory, ...]
    links: tuple[MadeLink, ...]
    files: tuple[MadeFile, ...]
    alternatives: tuple[Alternative, ...]
    accounts: tuple[Account, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """The whole of `image.toml`, and the version of the code that goes in."""

    name: str
    title: str
    description: str
    licences: str
    documentation: str
    distribution: str  # such as debian-13
    tag_suffixes: tuple[str, ...]
    entrypoint: tuple[str, ...]
    working_directory: str
    version: str
    capabilities: int  # bit set
    loaded_libraries: Mapping[str, str]  # soname to the reason
    own_removals: tuple[Removal, ...]  # what of our code and of the wheels stays out
    variants: Mapping[str, Variant]

    def variant(self, name: str) -> Variant:
        """The variant of that name. Raises ImageError that lists the known ones."""
        if name not in self.variants:
            raise ImageError(f"unknown variant {name!r}", f"known: {', '.join(self.variants)}")
        return self.variants[name]

    def tags(self, variant: Variant) -> tuple[str, ...]:
        """Every tag of a variant: major, minor and full version, each with each suffix."""
        major, minor, patch = self.version.split(".")
        versions = (major, f"{major}.{minor}", f"{major}.{minor}.{patch}")
        return tuple(f"{one}{suffix}{variant.tag_suffix}" for one in versions for suffix in self.tag_suffixes)


def read(path: Path, sources: Path) -> Definition:
    """Read `image.toml` at `path` for the package `meshcni` in the folder `sources`."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        code = (sources / "meshcni" / "__init__.py").read_text(encoding="utf-8")
    except OSError as error:
        raise ImageError(f"{error.filename}: {error.strerror}", "run this in a checkout") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ImageError(f"{path.name}: not TOML: {error}", f"correct {path.name}") from error
    return parse(data, path.name, code)


def parse(data: Mapping[str, object], file: str, code: str) -> Definition:
    """Turn the tables into a definition; `code` is the text of `meshcni/__init__.py`, which holds the version."""
    root = TomlTable(data, file, "")
    root.ignore("packages", "wheels")  # locking.py reads those
    image, config = root.table("image"), root.table("config")
    version = _VERSION.search(code)
    if version is None:
        raise ImageError('meshcni/__init__.py: expected __version__ = "X.Y.Z", found none', "state the version there")
    shared = _Shared(root)
    environment = config.mapping("environment")
    variants = {
        name: _variant(name, table, environment, shared) for name, table in root.named_tables("variants").items()
    }
    libraries = root.table("libraries")
    definition = Definition(
        name=image.text("name"),
        title=image.text("title"),
        description=image.text("description"),
        licences=image.text("licenses"),
        documentation=image.text("documentation", ""),
        distribution=image.text("distribution"),
        tag_suffixes=image.texts("tag-suffixes"),
        entrypoint=config.texts("entrypoint"),
        working_directory=config.text("working-directory"),
        version=".".join(version.groups()),
        capabilities=_capabilities(config),
        loaded_libraries=libraries.mapping("loaded"),
        own_removals=tuple(_removal(row) for row in root.tables("remove-own")),
        variants=variants,
    )
    for table in (image, config, libraries, root):
        table.close()
    shared.check(variants)
    return definition


def _capabilities(config: TomlTable) -> int:
    bits = 0
    for name in config.texts("capabilities"):
        if name not in CAPABILITIES:
            raise config.wrong("capabilities", f"names among {', '.join(CAPABILITIES)}", repr(name))
        bits |= 1 << CAPABILITIES[name]
    return bits


class _Shared:
    """The lists of rows that may name the variants they are for; without names they are for all."""

    def __init__(self, root: TomlTable) -> None:
        self.used: set[tuple[str, str]] = set()
        self._rows = {
            kind: [(row, row.texts("variants", ())) for row in root.tables(kind)]
            for kind in ("remove", "copy", "directory", "link", "file", "alternative", "account")
        }

    def of(self, kind: str, variant: str) -> list[TomlTable]:
        """The rows of a kind for a variant."""
        return [row for row, variants in self._rows[kind] if not variants or variant in variants]

    def check(self, known: Iterable[str]) -> None:
        """Refuse rows for unknown variants, and unknown keys."""
        for rows in self._rows.values():
            for row, variants in rows:
                for name in variants:
                    if name not in known:
                        raise row.wrong("variants", f"names among {', '.join(known)}", repr(name))
                row.close()


def _variant(name: str, table: TomlTable, environment: Mapping[str, str], shared: _Shared) -> Variant:
    database = table.text("package-database")
    if database not in PACKAGE_DATABASES:
        raise table.wrong("package-database", f"one of {', '.join(PACKAGE_DATABASES)}", repr(database))
    variant = Variant(
        name=name,
        extends=table.text("extends", ""),
        packages=table.texts("packages"),
        user=table.text("user"),
        tag_suffix=table.text("tag-suffix"),
        shell=table.text("shell"),
        package_manager=table.text("package-manager"),
        package_database=database,
        whole_packages=table.flag("whole-packages"),
        environment={**environment, **table.mapping("environment", {})},
        removals=tuple(_removal(row) for row in shared.of("remove", name)),
        copies=tuple(_copy(row) for row in shared.of("copy", name)),
        directories=tuple(_directory(row) for row in shared.of("directory", name)),
        links=tuple(_link(row) for row in shared.of("link", name)),
        files=tuple(_file(row) for row in shared.of("file", name)),
        alternatives=tuple(_alternative(row) for row in shared.of("alternative", name)),
        accounts=tuple(_account(row) for row in shared.of("account", name)),
    )
    table.close()
    return variant


def _removal(row: TomlTable) -> Removal:
    removal = Removal(row.texts("paths"), row.texts("except", ()), row.text("why"))
    row.ignore("variants")
    row.close()
    return removal


def _copy(row: TomlTable) -> Copy:
    row.text("why")
    return Copy(row.text("from"), row.text("to"))


def _directory(row: TomlTable) -> MadeDirectory:
    return MadeDirectory(row.text("path"), row.mode("mode", "0755"), row.integer("uid", 0), row.integer("gid", 0))


def _link(row: TomlTable) -> MadeLink:
    return MadeLink(row.text("path"), row.text("target"), row.text("package", ""))


def _file(row: TomlTable) -> MadeFile:
    return MadeFile(row.text("path"), row.mode("mode", "0644"), row.text("text"), row.text("package", ""))


def _alternative(row: TomlTable) -> Alternative:
    return Alternative(
        row.text("name"),
        row.text("link"),
        row.text("target"),
        row.integer("priority"),
        row.mapping("followers", {}),
    )


def _account(row: TomlTable) -> Account:
    return Account(
        row.text("name"),
        row.integer("uid", -1),
        row.integer("gid"),
        row.text("comment", ""),
        row.text("home", "/nonexistent"),
        row.text("shell", "/usr/sbin/nologin"),
    )
