"""The toolchain: locked packages, unpacked once, run without configuration by any user."""

from __future__ import annotations

import dataclasses
import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from image.lockfile import Lock, package_key, render
from image.model import ImageError
from image.toolchain import Job, Toolchain
from lab.checkout import opened_checkout
from tests.image import nativeroot
from tests.image.nativeroot import CACHE, ROOT, open_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
# What `env` and `true` need, and something of the other architecture.
SMALL = {
    "coreutils",
    "libacl1",
    "libattr1",
    "libc6",
    "libcap2",
    "libgmp10",
    "libpcre2-8-0",
    "libselinux1",
    "libssl3t64",
}
SMALL |= {"libsystemd0", "libzstd1", "zlib1g"}
SCRIPT = """
import sys
from pathlib import Path
from image.lockfile import parse
from image.toolchain import Job, Toolchain
toolchain = Toolchain(parse(Path(sys.argv[1]).read_text(), "the lock"), Path(sys.argv[2]))
sys.stdout.buffer.write(toolchain.run(Job({"a": b"words"}, (("cp", "a", "b"),), ("b",)))["b"])
"""


def small_lock() -> Lock:
    """A lock with the packages that copying a file takes."""
    whole = nativeroot.lock()
    native = [package for package in whole.group("toolchain") if package.name in SMALL]
    foreign = [package for package in whole.group("sysroot/arm64") if package.name == "zlib1g"]
    groups = {
        "toolchain": tuple(sorted(map(package_key, native))),
        "sysroot/arm64": tuple(sorted(map(package_key, foreign))),
    }
    packages = tuple(sorted([*native, *foreign], key=package_key))
    return dataclasses.replace(whole, packages=packages, wheels=(), groups=groups)


@pytest.fixture
def cache() -> Iterator[Path]:
    """A cache that has the small lock's packages and nothing else."""
    nativeroot.fetch(small_lock().packages, CACHE)
    folder = open_folder()
    (folder / "debs").mkdir()
    for package in small_lock().packages:
        shutil.copy(CACHE / "debs" / package.sha256, folder / "debs" / package.sha256)
    (folder / "lock.json").write_text(render(small_lock()))
    yield folder
    shutil.rmtree(folder)


def in_python(code: str, *outputs: str, **files: bytes) -> Job:
    return Job(files, (("python3.13", "-I", "-c", code),), outputs)


def files_below(folder: Path) -> dict[str, bytes]:
    found = {path: path.is_file() and not path.is_symlink() for path in folder.rglob("*")}
    return {str(path.relative_to(folder)): path.read_bytes() if regular else b"" for path, regular in found.items()}


def script(cache: Path, *prefix: str) -> subprocess.CompletedProcess[bytes]:
    command = [*prefix, sys.executable, "-c", SCRIPT, str(cache / "lock.json"), str(cache)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)


def test_gzip_says_nothing_of_time_and_name() -> None:
    data = b"the same bytes " * 1000
    packed = nativeroot.toolchain().gzip(data)
    assert gzip.decompress(packed) == data
    assert packed[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03"  # no name, no time, best compression, Unix


def test_a_job_sees_its_files_and_no_more_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    code = "import os; open('out', 'w').write(repr((sorted(os.environ), os.environ['LC_ALL'], sorted(os.listdir('.')),"
    code += " os.path.exists('/proc/self'), os.path.exists('/etc/passwd'))))"
    made = nativeroot.toolchain().run(in_python(code, "out", a=b"", b=str(os.getpid()).encode()))
    names = ["LC_ALL", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "TMPDIR", "TZ"]
    assert eval(made["out"]) == (names, "C", ["a", "b", "out"], False, False)
    assert not list((nativeroot.toolchain().root / "jobs").glob(f"*/{os.getpid()}"))


def test_results_are_kept_by_all_that_decides_on_them(tmp_path: Path) -> None:
    (tmp_path / "toolchain").symlink_to(nativeroot.toolchain().root.parent.parent)
    toolchain = Toolchain(nativeroot.lock(), tmp_path)
    code = "import os; open('out', 'wb').write(os.urandom(32))"
    first = toolchain.run(in_python(code, "out", a=b"1"))
    assert toolchain.run(in_python(code, "out", a=b"1")) == first
    assert toolchain.run(in_python(code, "out", a=b"2")) != first
    assert toolchain.run(in_python(code + " ", "out", a=b"1")) != first
    [kept] = [path for path in (tmp_path / "outputs").iterdir() if first["out"] in path.read_bytes()]
    for damaged in (kept.read_bytes()[:-1], kept.read_bytes()[:-1] + b"x", b"", b"nothing\n"):
        kept.write_bytes(damaged)
        again = toolchain.run(in_python(code, "out", a=b"1"))
        assert len(again["out"]) == 32
        assert again != first
        assert toolchain.run(in_python(code, "out", a=b"1")) == again


def test_failures_say_what_failed() -> None:
    with pytest.raises(ImageError, match=r"(?s)gcc -c broken\.c.*status 1.*broken\.c:1:.*expected"):
        nativeroot.toolchain().run(Job({"broken.c": b"int main( {"}, (("gcc", "-c", "broken.c"),), ("broken.o",)))
    with pytest.raises(ImageError, match=r"did not make .*nothing"):
        nativeroot.toolchain().run(in_python("pass", "nothing"))


def test_owner() -> None:
    toolchain = nativeroot.toolchain()
    assert package_key(toolchain.owner("/usr/lib/x86_64-linux-gnu/libc.a")) == "libc6-dev:amd64"
    assert package_key(toolchain.owner("/lib/x86_64-linux-gnu/libz.a")) == "zlib1g-dev:amd64"
    assert package_key(toolchain.owner("/sysroot/arm64/usr/lib/aarch64-linux-gnu/libc.a")) == "libc6-dev:arm64"
    assert package_key(toolchain.owner("/usr/lib/gcc/x86_64-linux-gnu/14/../14/libgcc.a")) == "libgcc-14-dev:amd64"
    for path in ("/usr/lib/nothing.a", "/../../../owners.json", "/jobs"):
        with pytest.raises(ImageError, match="no package of the toolchain"):
            toolchain.owner(path)


def test_a_killed_unpacking_is_not_taken_for_a_whole_one(cache: Path) -> None:
    whole = files_below(Toolchain(small_lock(), cache).root.parent)
    assert "root/usr/bin/env" in whole
    assert "root/sysroot/arm64/usr/lib/aarch64-linux-gnu/libz.so.1" in whole
    final = cache / "toolchain" / Toolchain(small_lock(), cache).digest
    partial = Path(f"{final}.partial")
    final.rename(partial)
    (partial / "owners.json").unlink()
    (partial / "root" / "usr" / "bin" / "env").unlink()
    (partial / "root" / "stale").write_text("of the killed one")
    assert files_below(Toolchain(small_lock(), cache).root.parent) == whole
    assert not partial.exists()


def test_an_unpacking_that_fails_leaves_no_toolchain(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = cache / "bin"
    fakes.mkdir()
    (fakes / "dpkg-deb").write_text("#!/bin/sh\ncase $1 in --extract) echo no space left >&2; exit 2;; esac\n")
    (fakes / "dpkg-deb").chmod(0o755)
    before = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{fakes}:{before}")
    with pytest.raises(ImageError, match=r":amd64: cannot be unpacked: no space left"):
        Toolchain(small_lock(), cache).root  # noqa: B018
    monkeypatch.setenv("PATH", before)
    assert (Toolchain(small_lock(), cache).root / "usr/bin/env").exists()


def test_two_builds_at_once(cache: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(cache / "lock.json"), str(cache)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=120) for process in both] == [(b"words", b"")] * 2
    assert len([path for path in (cache / "toolchain").iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="the cache cannot be written"):
        Toolchain(small_lock(), tmp_path / "file").run(Job({}, (("true",),), ()))


@as_root
def test_any_user_can_use_it(cache: Path) -> None:
    for folder, names, files in os.walk(cache):
        for name in (".", *names, *files):
            os.chown(os.path.join(folder, name), 65534, 65534, follow_symlinks=False)
    done = script(cache, *opened_checkout(), "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    assert (done.stdout, done.stderr) == (b"words", b"")
    assert (Toolchain(small_lock(), cache).root / "usr/bin/env").stat().st_uid == 65534


@as_root
def test_root_can_use_it_where_there_are_no_user_namespaces(cache: Path) -> None:
    """The kernel refuses user namespaces to whoever is in a chroot."""
    bare = cache / "bare"
    bare.mkdir()
    enter = f'mount --rbind / {bare} && cd {ROOT} && exec chroot {bare} "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", enter, "sh"]
    assert subprocess.run([*prefix, "unshare", "--user", "true"], capture_output=True).returncode != 0
    done = script(cache, *prefix, "env", f"--chdir={ROOT}")
    assert (done.stdout, done.stderr) == (b"words", b"")


@as_root
def test_who_can_do_neither_is_told_so(cache: Path) -> None:
    fakes = cache / "bin"
    fakes.mkdir()
    (fakes / "unshare").write_text("#!/bin/sh\necho not permitted >&2; exit 1\n")
    (fakes / "unshare").chmod(0o755)
    shutil.chown(cache, 65534)
    user = ("setpriv", "--reuid", "65534", "--clear-groups")
    done = script(cache, *opened_checkout(), "env", f"PATH={fakes}:/usr/bin:/bin", *user)
    assert b"cannot be entered: `unshare --user --map-root-user chroot`: not permitted" in done.stderr
