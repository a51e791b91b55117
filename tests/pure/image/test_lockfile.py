"""The lock's form: what is written can be read again, and an entry that cannot have been written is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.lockfile import Lock, describe_wheel, package_key, parse, render
from image.model import DebPackage, ImageError, Wheel


def deb(name: str, version: str, architecture: str, path: str, archive: str = "debian") -> DebPackage:
    return DebPackage(name, version, architecture, archive, path, "ab" * 32, 1234, name, version)


PACKAGES = (
    deb("data", "1", "all", "pool/main/d/data/data_1_all.deb"),
    deb("libc6", "2.41-12+deb13u5", "amd64", "pool/main/g/glibc/libc6_2.41-12+deb13u5_amd64.deb"),
    deb("libc6", "2.41-12+deb13u5", "arm64", "pool/main/g/glibc/libc6_2.41-12+deb13u5_arm64.deb"),
    deb("zlib1g", "1:1.3~x-1", "amd64", "pool/updates/main/z/zlib/zlib1g_1.3~x-1_amd64.deb", "debian-security"),
)
WHEELS = (
    Wheel("PyYAML", "6.0.3", "amd64", "pyyaml-6.0.3-cp313-cp313-manylinux_2_17_x86_64.whl", "cd" * 32, 9),
    Wheel("PyYAML", "6.0.3", "arm64", "pyyaml-6.0.3-cp313-cp313-manylinux_2_17_aarch64.whl", "ce" * 32, 9),
    Wheel("prometheus-client", "0.26.0", "all", "prometheus_client-0.26.0-py3-none-any.whl", "cf" * 32, 9),
)
LOCK = Lock(
    created=datetime(2026, 1, 31, 12, tzinfo=UTC),
    suites=("trixie", "trixie-security"),
    packages=PACKAGES,
    wheels=WHEELS,
    groups={"runtime/amd64": ("data:all", "libc6:amd64", "zlib1g:amd64"), "sysroot/arm64": ("data:all", "libc6:arm64")},
)


def test_what_is_written_is_read_again() -> None:
    text = render(LOCK)
    assert parse(text, "lock.json") == LOCK
    assert render(parse(text, "lock.json")) == text


def test_a_package_is_one_line() -> None:
    before, after = render(LOCK), render(replace(LOCK, packages=(replace(PACKAGES[0], size=7), *PACKAGES[1:])))
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 1
    assert '"name": "data"' in changed[0]


def test_groups_and_wheels() -> None:
    assert LOCK.group("sysroot/arm64") == (PACKAGES[0], PACKAGES[2])
    assert LOCK.wheels_for("arm64") == (WHEELS[1], WHEELS[2])
    assert LOCK.epoch == 1769860800
    with pytest.raises(ImageError, match="no group dev/arm64; it has runtime/amd64, sysroot/arm64"):
        LOCK.group("dev/arm64")


def test_the_digest_is_that_of_everything_it_says() -> None:
    others = (
        replace(LOCK, created=datetime(2026, 1, 31, 12, 0, 1, tzinfo=UTC)),
        replace(LOCK, packages=(replace(PACKAGES[0], sha256="00" * 32), *PACKAGES[1:])),
        replace(LOCK, groups={"runtime/amd64": ("data:all",)}),
        replace(LOCK, wheels=WHEELS[1:]),
        replace(LOCK, suites=("trixie",)),
    )
    assert len({LOCK.digest, *(other.digest for other in others)}) == 6


def change(*path: str | int, to: object) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return edit


def drop(*path: str | int) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return edit


def swap_packages(document: Any) -> None:
    document["packages"][0:2] = document["packages"][1::-1]


LIBC = "package libc6:amd64"
TAMPERED: list[tuple[Callable[[Any], None], str, str, str]] = [
    (change("schema", to=2), "schema", "1", "2"),
    (change("created", to="2026-01-31 12:00:00"), "created", "2026-01-31T12:00:00Z", "2026-01-31 12"),
    (change("created", to="2026-1-31T12:00:00Z"), "created", "2026-01-31T12:00:00Z", "2026-1-31"),
    (change("created", to=1769860800), "created", "a time", "1769860800"),
    (change("suites", to=[]), "suites", "not empty", "[]"),
    (change("suites", to=["trixie main"]), "suites", "text of the form", "trixie main"),
    (change("more", to=1), "the file", "created, groups", "more"),
    (drop("wheels"), "the file", "wheels", "suites"),
    (change("packages", to={}), "packages", "a list", "dict"),
    (change("packages", 0, to="data"), "packages[0]", "an object", "str"),
    (drop("packages", 1, "sha256"), "packages[1] (libc6)", "sha256", "architecture"),
    (change("packages", 1, "host", to="x"), "packages[1] (libc6)", "sha256", "host"),
    (change("packages", 1, "sha256", to="AB" * 32), "packages[1] (libc6) sha256", "[0-9a-f]{64}", "ABAB"),
    (change("packages", 1, "sha256", to="ab" * 31), "packages[1] (libc6) sha256", "[0-9a-f]{64}", "abab"),
    (change("packages", 1, "size", to=0), "packages[1] (libc6) size", "bytes", "0"),
    (change("packages", 1, "size", to="1234"), "packages[1] (libc6) size", "int", "'1234'"),
    (change("packages", 1, "size", to=True), "packages[1] (libc6) size", "int", "True"),
    (change("packages", 1, "version", to=2), "packages[1] (libc6) version", "str", "2"),
    (change("packages", 1, "architecture", to="i386"), "packages[1] (libc6) architecture", "amd64, arm64, all", "i386"),
    (change("packages", 1, "name", to="../libc6"), "package ../libc6:amd64 name", "text of the form", "../libc6"),
    (change("packages", 1, "version", to="2.41-12"), f"{LIBC} path", "libc6_2.41-12_amd64.deb", "deb13u5"),
    (change("packages", 1, "version", to="2.41 12"), f"{LIBC} version", "text of the form", "2.41 12"),
    (change("packages", 1, "source_version", to=""), f"{LIBC} version", "text of the form", "''"),
    (change("packages", 1, "source", to="G"), f"{LIBC} name", "text of the form", "'G'"),
    (change("packages", 1, "archive", to="mine"), f"{LIBC} archive", "debian, debian-security", "mine"),
    (change("packages", 1, "path", to="http://a.example/b.deb"), f"{LIBC} path", "text of the form", "http://a"),
    (
        change("packages", 1, "path", to="pool/../etc/libc6_2.41-12+deb13u5_amd64.deb"),
        f"{LIBC} path",
        "form",
        "pool/..",
    ),
    (change("packages", 1, "path", to="/pool/main/libc6_2.41-12+deb13u5_amd64.deb"), f"{LIBC} path", "form", "/pool"),
    (change("packages", 1, "architecture", to="arm64"), "package libc6:arm64 path", "_arm64.deb", "_amd64.deb"),
    (swap_packages, "packages", "sorted entries", "another order"),
    (
        lambda document: document["packages"].insert(0, document["packages"][0]),
        "packages data:all",
        "it once",
        "it twice",
    ),
    (change("wheels", 0, "filename", to="../x.whl"), "wheel PyYAML:amd64 filename", "text of the form", "../x.whl"),
    (change("wheels", 0, "version", to="6.0.4"), "wheel PyYAML:amd64 filename", "version 6.0.4", "pyyaml-6.0.3"),
    (change("wheels", 0, "name", to="Other"), "wheel Other:amd64 filename", "name other", "pyyaml-6.0.3"),
    (change("wheels", 0, "architecture", to="arm64"), "wheel PyYAML:arm64 filename", "architecture arm64", "x86_64"),
    (change("wheels", 1, to=0), "wheels[1]", "an object", "int"),
    (change("groups", to={}), "groups", "not empty", "{}"),
    (change("groups", "runtime/amd64", to=[]), "group runtime/amd64", "not empty", "[]"),
    (change("groups", "a b", to=["data:all"]), "group's name", "text of the form", "a b"),
    (
        change("groups", "sysroot/arm64", 0, to="curl:arm64"),
        "group sysroot/arm64",
        "packages that the lock has",
        "curl",
    ),
    (change("groups", "sysroot/arm64", 1, to="data:all"), "group sysroot/arm64 data:all", "it once", "it twice"),
    (
        change("groups", "sysroot/arm64", to=["libc6:arm64", "data:all"]),
        "group sysroot/arm64",
        "sorted",
        "another order",
    ),
    (change("groups", "sysroot/arm64", to=["data:all"]), "package libc6:arm64", "it in a group", "it in none"),
]


@pytest.mark.parametrize(("edit", "entry", "expected", "found"), TAMPERED)
def test_a_tampered_entry_is_named(edit: Callable[[Any], None], entry: str, expected: str, found: str) -> None:
    document = json.loads(render(LOCK))
    edit(document)
    with pytest.raises(ImageError) as caught:
        parse(json.dumps(document), "some/lock.json")
    where, _, rest = caught.value.message.removeprefix("some/lock.json: ").partition(": expected ")
    assert where == entry
    assert expected in rest.partition(", found ")[0]
    assert found in rest.partition(", found ")[2]
    assert "make lock" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, found an error"),
        ("[]", "schema: expected 1, found 'list'"),
        ('{"schema": 1, "schema": 1}', "key 'schema': expected each key once"),
        ("[" * 100_000, "nesting without end|expected JSON"),
        (render(LOCK)[:-20], "expected JSON"),
        ('{"schema": 1, "packages": NaN}', "the file: expected the keys"),
    ],
)
def test_what_is_no_lock_is_refused(text: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        parse(text, "lock.json")


@given(st.integers(0, len(render(LOCK)) - 1), st.characters(exclude_categories=("Cs",)))
def test_no_changed_character_goes_unnoticed(position: int, character: str) -> None:
    """A change is refused, or it is in what the lock says and so in its digest, or it is only white space."""
    text = render(LOCK)
    changed = text[:position] + character + text[position + 1 :]
    try:
        lock = parse(changed, "lock.json")
    except ImageError:
        return
    assert lock != LOCK or json.loads(changed) == json.loads(text)
    assert (lock.digest == LOCK.digest) == (lock == LOCK)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda of: st.lists(of), max_leaves=3))
def test_any_value_anywhere_is_refused_with_our_error(value: object) -> None:
    for path in (("created",), ("suites",), ("packages",), ("packages", 0), ("wheels", 0), ("groups",)):
        document = json.loads(render(LOCK))
        change(*path, to=value)(document)
        try:
            lock = parse(json.dumps(document), "lock.json")
        except ImageError:
            continue  # any other exception fails the test
        assert lock == replace(LOCK, suites=lock.suites)  # any names may be those of suites


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("h11-0.16.0-py3-none-any.whl", ("h11", "0.16.0", "all")),
        ("a_b-1.0+local-cp310-abi3-manylinux2014_aarch64.whl", ("a_b", "1.0+local", "arm64")),
        ("a-1-cp313-cp313-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", ("a", "1", "amd64")),
    ],
)
def test_what_a_wheels_name_says(filename: str, expected: tuple[str, str, str]) -> None:
    assert describe_wheel(filename) == expected


@pytest.mark.parametrize("filename", ["h11-0.16.0.tar.gz", "a-1-cp313-cp313-win_amd64.whl", "a-1-py3-none.whl"])
def test_other_files_are_no_wheels_of_ours(filename: str) -> None:
    with pytest.raises(ImageError, match=filename):
        describe_wheel(filename)


def test_keys_of_packages() -> None:
    assert [package_key(package) for package in PACKAGES] == ["data:all", "libc6:amd64", "libc6:arm64", "zlib1g:amd64"]
