"""Locking with the real apt: what it takes from a small signed archive, what it refuses, what a refresh writes."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from image.apt import KEYRING
from image.locking import Asks, read_asks
from image.model import DebPackage, ImageError
from tests.image.smallarchive import SUITES, Server, Signer, locked, make_package, publish, serving, status
from tests.image.smallwheels import INDEX_VARIABLES, make_wheel, requirement

from image import archive, debfile, fetch, lockfile, locking, wheels

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not shutil.which("gpg"), reason="gpg signs the small archive")
DEFINITION = """
[packages]
suites = ["trixie", "trixie-updates", "trixie-security"]
[packages.runtime]
architectures = ["amd64", "arm64"]
install = ["app"]
alone = ["binding"]
[packages.tools]
architecture = "amd64"
alone = ["binding"]
[wheels]
names = ["Tiny"]
[other]
left = "to others"
"""


@dataclass
class World:
    """An archive in which `app` needs `libapp` and `data`, recommends `extra`, and `libapp` has a security update."""

    folder: Path
    server: Server
    signer: Signer

    @property
    def asks(self) -> Asks:
        return locking.asks(tomllib.loads(DEFINITION))

    @property
    def requirements(self) -> str:
        return (self.folder / "requirements.lock").read_text()

    def resolve(self) -> lockfile.Lock:
        source, keyring = self.server.archive, self.signer.keyring
        return locking.resolve(self.asks, self.requirements, self.folder / "cache", source, keyring)

    def main(self, *more: str) -> int:
        paths = {"definition": "image.toml", "requirements": "requirements.lock", "lock": "lock.json", "cache": "cache"}
        argv = [f"--{name}={self.folder / path}" for name, path in paths.items()]
        return locking.main([*argv, f"--keyring={self.signer.keyring}", *more])

    def publish(self, app_version: str, signer: Signer | None = None) -> None:
        """Publish everything with this version of `app`; an older file of it vanishes, as it does in Debian."""
        debian, security = self.server.folder / "debian", self.server.folder / "debian-security"
        pool, updates = debian / "pool" / "main", security / "pool" / "updates" / "main"
        for path in (pool, updates):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        packages = [make_package(pool, "data", "5", "all", "Source: data-src (4.9)"), make_package(pool, "extra")]
        newer = []
        for machine in ("amd64", "arm64"):
            lines = ("Depends: libapp (>= 1), data | extra", "Recommends: extra", "Source: app-src")
            packages.append(make_package(pool, "app", app_version, machine, *lines))
            packages.append(make_package(pool, "libapp", "1:1.0-1", machine, "Multi-Arch: same"))
            packages.append(make_package(pool, "binding", "1", machine, "Depends: missing-from-the-archive"))
            newer.append(make_package(updates, "libapp", "1:1.0-1+deb13u1", machine, "Multi-Arch: same"))
        publish(debian, "trixie", packages, signer or self.signer)
        publish(debian, "trixie-updates", [], signer or self.signer)
        publish(security, "trixie-security", newer, signer or self.signer)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    made = Signer(tmp_path_factory.mktemp("keys") / "home")
    yield made
    made.close()


@pytest.fixture
def world(tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    index = tmp_path / "index"
    index.mkdir()
    (tmp_path / "requirements.lock").write_text(requirement(make_wheel(index, "tiny", "1.0", "py3-none-any")))
    (tmp_path / "image.toml").write_text(DEFINITION)
    for name, value in INDEX_VARIABLES.items():
        monkeypatch.setenv(name, value.format(index=index))
    with serving(tmp_path / "served") as server:
        made = World(tmp_path, server, signer)
        made.publish("2.0")
        for variable, base in zip(archive.VARIABLES.values(), server.archive.bases.values(), strict=True):
            monkeypatch.setenv(variable, base + "/")
        yield made


def test_resolves_closures_of_each_architecture(world: World) -> None:
    lock = world.resolve()
    assert lock.groups == {
        f"runtime/{machine}": (f"app:{machine}", f"binding:{machine}", "data:all", f"libapp:{machine}")
        for machine in ("amd64", "arm64")
    } | {"tools": ("binding:amd64",)}
    by_key = {lockfile.package_key(package): package for package in lock.packages}
    about = by_key["libapp:arm64"]
    path = world.server.folder / "debian-security" / "pool" / "updates" / "main" / "libapp_1.0-1+deb13u1_arm64.deb"
    expected = locked(path, world.server.folder / "debian-security")
    assert about == DebPackage(
        "libapp",
        "1:1.0-1+deb13u1",
        "arm64",
        "debian-security",
        "pool/updates/main/libapp_1.0-1+deb13u1_arm64.deb",
        expected.sha256,
        expected.size,
        "libapp",
        "1:1.0-1+deb13u1",
    )
    assert (by_key["app:amd64"].source, by_key["app:amd64"].source_version) == ("app-src", "2.0")
    assert (by_key["data:all"].source, by_key["data:all"].source_version) == ("data-src", "4.9")
    assert [(wheel.name, wheel.version, wheel.architecture) for wheel in lock.wheels] == [("Tiny", "1.0", "all")]
    locking.require(lock, world.asks)


def test_the_lock_names_no_host_and_what_it_names_can_be_fetched(world: World) -> None:
    lock = world.resolve()
    text = lockfile.render(lock)
    assert "127.0.0.1" not in text
    assert "http" not in text
    assert str(world.folder) not in text
    paths = fetch.fetch(lock.group("runtime/arm64"), world.folder / "cache", world.server.archive)
    for package, path in paths.items():
        about = debfile.control(path)
        assert (about["Package"], about["Version"]) == (package.name, package.version)


def test_resolves_from_an_archive_that_is_a_folder(world: World) -> None:
    served = world.resolve()
    source = archive.Archive({name: f"file://{world.server.folder}/{name}" for name in archive.VARIABLES})
    found = locking.resolve(world.asks, world.requirements, world.folder / "other cache", source, world.signer.keyring)
    assert locking.changes(served, found) == []


def test_refuses_an_archive_without_signature(world: World) -> None:
    publish(world.server.folder / "debian", "trixie-updates", [], None)
    with pytest.raises(ImageError, match=r"trixie-updates"):
        world.resolve()


def test_refuses_an_archive_that_another_key_signed(world: World, tmp_path: Path) -> None:
    other = Signer(tmp_path / "other")
    try:
        publish(world.server.folder / "debian-security", "trixie-security", [], other)
    finally:
        other.close()
    with pytest.raises(ImageError, match=r"trixie-security.*(NO_PUBKEY|[Mm]issing key|not signed)"):
        world.resolve()
    assert KEYRING.is_file(), "by default the archive's own keyring decides"
    with pytest.raises(ImageError, match="trixie"):
        locking.resolve(world.asks, world.requirements, tmp_path / "cache 2", world.server.archive)


def test_refuses_an_index_that_was_changed_after_the_signature(world: World) -> None:
    index = world.server.folder / "debian" / "dists" / "trixie" / "main" / "binary-amd64" / "Packages"
    data = index.read_bytes()
    index.write_bytes(data.replace(b"Version: 2.0", b"Version: 9.0"))
    assert index.read_bytes() != data
    with pytest.raises(ImageError, match=r"apt-get update.*Hash Sum mismatch|unexpected size"):
        world.resolve()


def test_an_archive_that_does_not_answer_is_not_taken_from_memory(world: World) -> None:
    world.resolve()
    world.server.faults["InRelease"] = [status(503)] * 100
    with pytest.raises(ImageError, match=r"apt-get update.*503"):
        world.resolve()


def test_names_a_package_that_no_archive_has(world: World) -> None:
    text = DEFINITION.replace('install = ["app"]', 'install = ["app", "no-such-package"]')
    wanted = locking.asks(tomllib.loads(text))
    with pytest.raises(ImageError, match="no-such-package"):
        locking.resolve(wanted, world.requirements, world.folder / "cache", world.server.archive, world.signer.keyring)


def test_without_keyring_nothing_is_trusted(world: World) -> None:
    with pytest.raises(ImageError, match="signature cannot be checked"):
        locking.resolve(world.asks, world.requirements, world.folder / "cache", world.server.archive, Path("/nowhere"))


def test_a_refresh_without_news_leaves_the_file_alone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.folder / "lock.json"
    assert world.main() == 0
    assert "new lock of 7 packages and 1 wheels" in capsys.readouterr().out
    old = path.read_text().replace(lockfile.read(path).created.strftime("%Y"), "2001", 1)
    path.write_text(old)
    before = path.stat()
    assert world.main() == 0
    assert capsys.readouterr().out == "lock: nothing changed\n"
    assert path.read_text() == old
    assert path.stat().st_ino == before.st_ino
    assert world.main("--check") == 0


def test_a_refresh_says_what_is_new_and_check_only_looks(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.folder / "lock.json"
    world.main()
    old = lockfile.read(path)
    world.publish("2.1")
    capsys.readouterr()
    assert world.main("--check") == 1
    assert lockfile.read(path) == old
    with pytest.raises(ImageError, match=r"app:amd64 2.0, app:arm64 2.0") as caught:
        fetch.fetch(old.packages, world.folder / "cache", world.server.archive)
    assert "make lock" in caught.value.hint
    assert world.main() == 0
    assert capsys.readouterr().out == "lock: app:amd64: 2.0 -> 2.1\nlock: app:arm64: 2.0 -> 2.1\n" * 2
    fresh = lockfile.read(path)
    assert fresh.created >= old.created
    assert fresh.digest != old.digest
    assert len(fetch.fetch(fresh.packages, world.folder / "cache", world.server.archive)) == 7


def test_a_damaged_lock_is_made_anew(world: World) -> None:
    path = world.folder / "lock.json"
    path.write_text("{")
    assert world.main() == 0
    assert lockfile.read(path).groups


def test_settings_of_the_machine_have_no_say(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tmp_path / "machine.conf"
    settings.write_text('APT::Install-Recommends "true";\nAPT::Architecture "arm64";\nDir::Etc "/nowhere";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert "extra:amd64" not in world.resolve().groups["runtime/amd64"]


@pytest.mark.parametrize("style", ["deb822", "one line", "list of mirrors"])
def test_the_archive_is_that_of_the_machine(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in archive.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    for name in ("sources.list.d", "apt.conf.d", "preferences.d", "trusted.gpg.d"):
        (tmp_path / "etc" / name).mkdir(parents=True)
    (tmp_path / "mirrors").write_text("http://first.example.org/debian/\thttp://second.example.org/debian\n")
    base = f"mirror+file:{tmp_path}/mirrors" if style == "list of mirrors" else "http://first.example.org/debian"
    other, security = "http://other.example.org/linux/debian", "https://safe.example.org/x/debian-security/"
    if style == "deb822":
        lines = [
            f"Types: deb\nURIs: {other}\nSuites: bookworm\nComponents: stable\n",
            f"Types: deb deb-src\nURIs: {base}\nSuites: bookworm bookworm-updates\nComponents: main\n",
            f"Types: deb\nURIs: {security}\nSuites: bookworm-security\nComponents: main contrib\n",
        ]
        (tmp_path / "etc" / "sources.list.d" / "debian.sources").write_text("\n".join(lines))
    else:
        lines = [f"deb {other} trixie stable", f"deb {base} trixie main", f"deb {security} trixie-security main"]
        (tmp_path / "etc" / "sources.list").write_text("\n".join(lines) + "\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir "{tmp_path}";\nDir::Etc "etc";\nDir::State "state";\nAcquire::http::Proxy "http://proxy.example.org:3142";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    found = archive.of_machine()
    assert found.bases == {
        "debian": "http://first.example.org/debian",
        "debian-security": "https://safe.example.org/x/debian-security",
    }
    assert found.proxies == {"http": "http://proxy.example.org:3142"}
    monkeypatch.setenv("MESHCNI_SECURITY_MIRROR", "http://mine.example.org/s/")
    assert archive.of_machine().bases["debian-security"] == "http://mine.example.org/s"


def test_a_machine_without_debian_sources_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt.conf").write_text(f'Dir "{tmp_path}";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.delenv("MESHCNI_SECURITY_MIRROR", raising=False)
    monkeypatch.setenv("MESHCNI_DEBIAN_MIRROR", "http://mine.example.org/debian")
    with pytest.raises(ImageError) as caught:
        archive.of_machine()
    assert "MESHCNI_SECURITY_MIRROR" in caught.value.hint
    monkeypatch.setenv("MESHCNI_SECURITY_MIRROR", "ftp://mine.example.org/debian")
    with pytest.raises(ImageError, match=r"ftp://.* cannot be used"):
        archive.of_machine()


def test_the_real_archive(tmp_path: Path) -> None:
    """The machine's own archive, its signature by Debian's keys, and a package of it."""
    table = {
        "suites": list(SUITES),
        "real": {"architectures": ["amd64"], "install": ["netbase"], "alone": ["iptables"]},
    }
    wanted = locking.asks({"packages": table, "wheels": {"names": ["h11"]}})
    source = archive.of_machine()
    lock = locking.resolve(wanted, (ROOT / "requirements.lock").read_text(), tmp_path, source)
    assert lockfile.parse(lockfile.render(lock), "lock") == lock
    assert lock.groups == {"real/amd64": ("iptables:amd64", "netbase:all")}
    paths = fetch.fetch(lock.packages, tmp_path, source)
    assert {debfile.control(path)["Package"] for path in paths.values()} == {"iptables", "netbase"}
    assert [path.stat().st_size for path in fetch.fetch_wheels(lock.wheels, tmp_path).values()] == [lock.wheels[0].size]


def test_the_lock_of_the_repository_answers_its_definition() -> None:
    path = ROOT / "image" / "lock.json"
    lock = lockfile.read(path)
    assert lockfile.render(lock) == path.read_text()
    wanted = read_asks(ROOT / "image" / "image.toml")
    locking.require(lock, wanted)
    known = wheels.requirements((ROOT / "requirements.lock").read_text())
    for wheel in lock.wheels:
        pinned = known[lockfile.normalised(wheel.name)]
        assert pinned.version == wheel.version
        assert wheel.sha256 in pinned.hashes
    for machine in ("amd64", "arm64"):
        assert {wheel.name for wheel in lock.wheels_for(machine)} == set(wanted.wheels)
