"""Fetching by hash: what is there, what is damaged on the way or in the cache, what is gone, and who comes second."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from image.archive import Archive
from image.fetch import fetch
from image.model import DebPackage, ImageError
from tests.image.smallarchive import Server, body, locked, make_package, serving, status

from image import debfile

NOWHERE = Archive({"debian": "http://127.0.0.1:9/debian", "debian-security": "http://127.0.0.1:9/debian-security"})
# Another process that fetches what a test wrote into a lock; the last word it prints tells how it ended.
FETCHER = """
import sys
from pathlib import Path
from image import lockfile
from image.archive import Archive
from image.fetch import fetch
from image.model import ImageError
lock, cache, url = sys.argv[1:]
try:
    fetch(lockfile.read(Path(lock)).packages, Path(cache), Archive({"debian": url}))
except ImageError as error:
    sys.exit(f"{error.message} | {error.hint}")
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture
def packages(tmp_path: Path) -> tuple[DebPackage, ...]:
    root = tmp_path / "served" / "debian"
    pool = root / "pool" / "main"
    pool.mkdir(parents=True)
    names = [("alpha", "1:2.0+b1", "amd64"), ("beta", "1~rc1", "arm64"), ("gamma", "3", "all")]
    return tuple(locked(make_package(pool, *name), root) for name in names)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def file_of(package: DebPackage) -> str:
    return package.path.rpartition("/")[2]


def left_over(cache: Path) -> set[str]:
    return {path.name for path in (cache / "debs").iterdir()} - {"lock"}


def start_fetcher(
    packages: tuple[DebPackage, ...], cache: Path, url: str, *before: str, **options: object
) -> subprocess.Popen[str]:
    from image import lockfile

    listed = tuple(sorted(packages, key=lockfile.package_key))
    lock = lockfile.Lock(
        lockfile.parse_time("2026-01-01T00:00:00Z"),
        ("trixie",),
        listed,
        (),
        {"all": tuple(map(lockfile.package_key, listed))},
    )
    path = cache.parent / "lock.json"
    path.write_text(lockfile.render(lock))
    argv = [*before, sys.executable, "-c", FETCHER, str(path), str(cache), url]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_brings_files_that_then_need_no_network(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    old = os.umask(0o077)
    try:
        paths = fetch(packages, cache, server.archive)
    finally:
        os.umask(old)
    for package, path in paths.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256 == path.name
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert fetch(packages, cache, NOWHERE) == paths
    assert left_over(cache) == {package.sha256 for package in packages}
    assert set(server.requests.values()) == {1}


def test_reads_what_a_package_says_and_holds(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    path = fetch(packages, cache, server.archive)[packages[0]]
    assert debfile.control(path)["Version"] == "1:2.0+b1"
    assert debfile.control(path)["Description"] == "a package\n of two lines"
    assert set(debfile.control_files(path)) == {"control"}
    found = {member.name: (data, member.linkname) for member, data in debfile.members(path)}
    assert found["./usr/share/alpha"] == (b"alpha 1:2.0+b1 amd64\n", "")
    assert found["./usr/share/alpha-link"] == (None, "alpha")
    stopped = debfile.members(path)
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]


def test_a_file_that_is_no_package_is_named(tmp_path: Path, packages: tuple[DebPackage, ...]) -> None:
    whole = next((tmp_path / "served").rglob("alpha*.deb")).read_bytes()
    broken = tmp_path / "broken"
    for data in (b"", b"no package", whole[: len(whole) // 2], whole[:-40]):
        broken.write_bytes(data)
        with pytest.raises(ImageError, match=f"{broken}: not a Debian package"):
            list(debfile.members(broken))


def test_replaces_a_damaged_file_of_the_cache(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    path = fetch(packages, cache, server.archive)[packages[1]]
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(ImageError, match="cannot be downloaded"):
        fetch(packages, cache, NOWHERE)
    assert fetch(packages, cache, server.archive)[packages[1]].read_bytes() == good
    assert server.requests == {file_of(package): 1 + (package is packages[1]) for package in packages}


@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer"])
def test_refuses_what_a_mirror_changed(
    damage: str, server: Server, packages: tuple[DebPackage, ...], cache: Path, tmp_path: Path
) -> None:
    package = packages[2]
    path = next((tmp_path / "served").rglob(file_of(package)))
    data = path.read_bytes()
    changed = {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-1], "longer": data + b"x"}[damage]
    path.write_bytes(changed)
    with pytest.raises(ImageError) as caught:
        fetch([package], cache, server.archive)
    assert file_of(package) in caught.value.message or package.sha256 in caught.value.message
    if damage != "longer":
        assert hashlib.sha256(changed).hexdigest() in caught.value.message
    assert "make lock" in caught.value.hint
    assert left_over(cache) == set()


def test_stops_reading_an_answer_without_end(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    cut_off = threading.Event()

    def endless(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 65536)
        except OSError:
            cut_off.set()

    server.faults[file_of(packages[0])] = [endless]
    with pytest.raises(ImageError, match="longer than the"):
        fetch(packages[:1], cache, server.archive)
    assert cut_off.wait(60)
    assert left_over(cache) == set()


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 1}, {"size": 10**9}])
def test_refuses_a_tampered_entry(
    change: dict[str, object], server: Server, packages: tuple[DebPackage, ...], cache: Path
) -> None:
    fetch(packages, cache, server.archive)
    wrong = replace(packages[0], **change)  # type: ignore[arg-type]
    with pytest.raises(ImageError) as caught:
        fetch([wrong, *packages[1:]], cache, server.archive)
    assert "alpha" in caught.value.message
    assert str(change.popitem()[1]) in caught.value.message


def test_names_packages_that_vanished(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    for package in packages[:2]:
        next(server.folder.rglob(file_of(package))).unlink()
    with pytest.raises(ImageError) as caught:
        fetch(packages, cache, server.archive)
    assert "2 of the locked packages: alpha:amd64 1:2.0+b1, beta:arm64 1~rc1" in caught.value.message
    assert "make lock" in caught.value.hint
    assert left_over(cache) == {packages[2].sha256}, "what the archive still has is kept"


def test_an_archive_may_be_a_folder(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    folder = Archive({"debian": f"file://{server.folder}/debian"})
    assert len(fetch(packages, cache, folder)) == 3
    with pytest.raises(ImageError, match="no longer has 1"):
        fetch([replace(packages[0], sha256="0" * 64, path="pool/main/gone.deb")], cache, folder)


def test_tries_again_what_may_pass(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    names = [file_of(package) for package in packages]
    server.faults[names[0]] = [status(503), status(500)]
    server.faults[names[1]] = [body(b"half", length=packages[1].size)]
    server.faults[names[2]] = [lambda handler: handler.connection.close()]
    assert len(fetch(packages, cache, server.archive)) == 3
    assert [server.requests[name] for name in names] == [3, 2, 2]


def test_says_what_does_not_pass(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    server.faults[file_of(packages[0])] = [status(403)]
    with pytest.raises(ImageError, match=r"debian/pool/main/alpha_.* HTTP 403") as caught:
        fetch(packages[:1], cache, server.archive)
    assert "MESHCNI_DEBIAN_MIRROR" in caught.value.hint
    assert server.requests[file_of(packages[0])] == 1
    server.faults[file_of(packages[1])] = [status(503)] * 9
    with pytest.raises(ImageError, match="HTTP 503"):
        fetch(packages[1:2], cache, server.archive)
    assert left_over(cache) == set()


def test_a_full_disk_leaves_nothing_half_done(
    server: Server, packages: tuple[DebPackage, ...], cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "served" / "debian" / "pool" / "big").mkdir()
    root = tmp_path / "served" / "debian"
    big = make_package(root / "pool" / "big", "big")
    big.write_bytes(os.urandom(300_000))  # never read as a package
    data = big.read_bytes()
    package = replace(
        packages[0],
        name="big",
        version="1",
        path=str(big.relative_to(root)),
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
    )
    cache.mkdir()
    listing = tmp_path / "listing"
    script = (
        f'mount -t tmpfs -o size=128k tmpfs {cache} || exit; "$@"; code=$?; ls {cache}/debs > {listing}; exit $code'
    )
    namespaces = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    fetcher = start_fetcher((package,), cache, server.archive.bases["debian"], *namespaces)
    _, message = fetcher.communicate()
    if "unshare failed" in message:
        pytest.skip("user namespaces are refused here")
    assert fetcher.returncode == 1
    assert f"{cache}/debs: the cache cannot be written: No space left on device | free some space" in message
    assert listing.read_text().split() == ["lock"]
    assert fetch([package], cache, server.archive)[package].read_bytes() == data


def waits_for_a_lock(pid: int) -> bool:
    """The kernel lists who waits for whose lock; a waiter's line has an arrow."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {pid} " in line for line in lines)


def test_of_two_fetchers_one_downloads(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    begun, over = threading.Event(), threading.Event()

    def slow(handler: SimpleHTTPRequestHandler) -> None:
        begun.set()
        over.wait(60)
        SimpleHTTPRequestHandler.do_GET(handler)

    server.faults[file_of(packages[0])] = [slow]
    first = start_fetcher(packages, cache, server.archive.bases["debian"])
    assert begun.wait(60)
    second = start_fetcher(packages, cache, server.archive.bases["debian"])
    try:
        while not waits_for_a_lock(second.pid) and second.poll() is None and server.requests[file_of(packages[0])] == 1:
            time.sleep(0.01)
    finally:
        over.set()
    both = [first, second]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0), ("", 0)]
    assert server.requests == {file_of(package): 1 for package in packages}


def test_a_killed_fetcher_leaves_no_trap(server: Server, packages: tuple[DebPackage, ...], cache: Path) -> None:
    begun, over = threading.Event(), threading.Event()

    def stall(handler: SimpleHTTPRequestHandler) -> None:
        body(b"half", length=packages[0].size)(handler)
        handler.wfile.flush()
        begun.set()
        over.wait(60)

    server.faults[file_of(packages[0])] = [stall]
    fetcher = start_fetcher(packages[:1], cache, server.archive.bases["debian"])
    assert begun.wait(60)
    fetcher.send_signal(signal.SIGKILL)
    fetcher.communicate()
    over.set()
    assert left_over(cache) <= {f"{packages[0].sha256}.partial"}
    assert len(fetch(packages, cache, server.archive)) == 3
    assert left_over(cache) == {package.sha256 for package in packages}
