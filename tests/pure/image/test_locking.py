"""What the definition asks to be locked, what a refresh changed, and which archives a machine's sources name."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from image.apt import read_uris
from image.archive import Archive, choose
from image.lockfile import Lock
from image.locking import Ask, Asks, asks, changes, require
from image.model import DebPackage, ImageError, Wheel
from image.wheels import requirements

TABLES = """
[packages]
suites = ["trixie"]
[packages.runtime]
architectures = ["amd64", "arm64"]
install = ["nftables"]
alone = ["binding"]
[packages.tools]
architecture = "amd64"
alone = ["oras"]
[wheels]
names = ["h11"]
"""
ASKS = Asks(
    ("trixie",),
    (
        Ask("runtime/amd64", "amd64", ("nftables",), ("binding",)),
        Ask("runtime/arm64", "arm64", ("nftables",), ("binding",)),
        Ask("tools", "amd64", (), ("oras",)),
    ),
    ("h11",),
)


def deb(name: str, architecture: str = "amd64", version: str = "1") -> DebPackage:
    path = f"pool/main/{name}_{version}_{architecture}.deb"
    return DebPackage(name, version, architecture, "debian", path, "ab" * 32, 1, name, version)


LOCK = Lock(
    created=datetime(2026, 1, 1, tzinfo=UTC),
    suites=("trixie",),
    packages=(deb("binding"), deb("binding", "arm64"), deb("nftables"), deb("nftables", "arm64"), deb("oras")),
    wheels=(Wheel("h11", "1", "all", "h11-1-py3-none-any.whl", "cd" * 32, 1),),
    groups={
        "runtime/amd64": ("binding:amd64", "nftables:amd64"),
        "runtime/arm64": ("binding:arm64", "nftables:arm64"),
        "tools": ("oras:amd64",),
    },
)


def test_tables_become_groups() -> None:
    assert asks(tomllib.loads(TABLES)) == ASKS


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('architecture = "amd64"', "", "takes install, alone and one of"),
        ('architecture = "amd64"', 'architecture = "amd64"\narchitectures = ["arm64"]', "takes install"),
        ('architecture = "amd64"', 'architecture = "amd64"\ninstal = []', "takes install"),
        ('architecture = "amd64"', 'architecture = "i386"', "tools is for i386"),
        ('["oras"]', '["-o Dir=/"]', "not the name of a package"),
        ('["oras"]', '"oras"', "expected a list"),
        ("[packages.tools]", "[[packages.tools]]", "expected a table"),
    ],
)
def test_other_tables_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        asks(tomllib.loads(TABLES.replace(old, new)))


def test_a_lock_answers_its_definition() -> None:
    require(LOCK, ASKS)
    more = Ask("runtime/arm64", "arm64", ("nftables", "curl"), ("binding",))
    for wanted, message in (
        (replace(ASKS, packages=(ASKS.packages[0], more, ASKS.packages[2])), "differ in runtime/arm64 curl"),
        (replace(ASKS, packages=(*ASKS.packages, Ask("dev/amd64", "amd64", ("bash",)))), "dev/amd64 bash"),
        (replace(ASKS, packages=ASKS.packages[:2]), "differ in tools"),
        (replace(ASKS, wheels=("H11", "rich")), "differ in rich"),
        (replace(ASKS, wheels=()), "differ in h11"),
        (replace(ASKS, suites=("trixie", "trixie-updates")), "differ in suites"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            require(LOCK, wanted)
        assert "make lock" in caught.value.hint


def test_what_a_refresh_changes() -> None:
    later = replace(LOCK, created=datetime(2027, 1, 1, tzinfo=UTC))
    assert changes(LOCK, later) == []
    assert changes(None, later) == ["new lock of 5 packages and 1 wheels"]
    other = replace(
        later,
        packages=(*LOCK.packages[1:4], deb("oras", version="2"), deb("zlib1g")),
        wheels=(replace(LOCK.wheels[0], version="2"),),
    )
    assert changes(LOCK, other) == [
        "binding:amd64: 1 -> gone",
        "h11:all (wheel): 1 -> 2",
        "oras:amd64: 1 -> 2",
        "zlib1g:amd64: new -> 1",
    ]
    rebuilt = replace(later, packages=(replace(LOCK.packages[0], sha256="00" * 32), *LOCK.packages[1:]))
    assert changes(LOCK, rebuilt) == ["the same versions, with other files or in other groups"]


def test_the_archives_among_a_machines_sources() -> None:
    lines = """
        http://vendor.example/linux/debian trixie stable
        http://vendor.example/apt trixie-pgdg main
        http://node.example/x nodistro main
        http://ubuntu.example/ubuntu noble main
        http://internal.example/mirrors/deb trixie main
        http://a.example/debian/ bookworm-updates main
        http://b.example/debian bookworm main
        http://internal.example/sec bookworm-security main
    """
    found = choose(lines)
    assert found == {"debian": "http://a.example/debian/", "debian-security": "http://internal.example/sec"}
    assert choose("\n".join(lines.splitlines()[:6])) == {"debian": "http://internal.example/mirrors/deb"}
    assert choose("") == {}


def test_addresses_of_an_archive() -> None:
    archive = Archive({"debian": "http://a.example/d", "debian-security": "http://a.example/d/security"})
    package = replace(deb("a"), path="pool/main/a/a_1+b~c_all.deb")
    assert archive.url(package) == "http://a.example/d/pool/main/a/a_1%2Bb~c_all.deb"
    assert archive.name_of("http://a.example/d/pool/main/a/a_1%2bb%7ec_all.deb") == "debian"
    assert archive.name_of("http://a.example/d/security/pool/a.deb") == "debian-security"
    with pytest.raises(ImageError, match="in none of the archives"):
        archive.name_of("http://a.example/dd/pool/a.deb")


def test_what_apt_prints() -> None:
    digest = "ab" * 32
    printed = f"'http://a.example/pool/l_1%3a2.deb' l_1%3a2_amd64.deb 12 SHA256:{digest}\n"
    assert read_uris(printed) == {digest: ("http://a.example/pool/l_1%3a2.deb", "l_1%3a2_amd64.deb", 12)}
    with pytest.raises(ImageError, match=r"no SHA-256 for l\.deb"):
        read_uris("'http://a.example/l.deb' l.deb 12 MD5Sum:00")


def test_pinned_requirements() -> None:
    one, two = "ab" * 32, "cd" * 32
    text = f"# made\nPy.YAML==6.0 ; x == 'y' \\\n    --hash=sha256:{one} \\\n    --hash=sha256:{two}\n    # via a\n"
    found = requirements(text + f"h11==1 \\\n    --hash=sha256:{two}\n")
    assert {name: (entry.name, entry.version, entry.hashes) for name, entry in found.items()} == {
        "py-yaml": ("Py.YAML", "6.0", (one, two)),
        "h11": ("h11", "1", (two,)),
    }
