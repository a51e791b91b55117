"""Files are replaced as a whole, keep what belongs to them, and are never taken from somebody who was faster."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from meshcni.host import files
from meshcni.host.files import FileChangedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "10-a.conflist"
    path.write_bytes(b"old")
    path.chmod(0o640)
    return path


def listing(path: Path) -> list[str]:
    return sorted(item.name for item in path.parent.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_owner_and_mode_stay(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, 1234, 4321)
    files.write_atomically(str(path), b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", 0o640)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)
    files.write_atomically(str(path), b"new", mode=0o600)
    assert mode_of(path) == 0o600


def test_a_new_file_is_private_or_like_another(path: Path) -> None:
    old = os.umask(0)
    try:
        files.write_atomically(str(path) + ".new", b"x")
        files.write_atomically(str(path) + ".like", b"x", like=str(path))
    finally:
        os.umask(old)
    assert mode_of(Path(str(path) + ".new")) == 0o600
    assert mode_of(Path(str(path) + ".like")) == 0o640


@pytest.mark.parametrize("change", ["rewritten", "replaced", "touched", "removed"])
def test_somebody_elses_version_stays(path: Path, change: str) -> None:
    _, state = files.read(str(path))

    def somebody_else() -> None:
        if change == "rewritten":
            path.write_bytes(b"theirs")
        elif change == "replaced":
            path.with_suffix(".x").write_bytes(b"old")
            path.with_suffix(".x").rename(path)
        elif change == "touched":
            os.utime(path, ns=(1, 1))
        else:
            path.unlink()

    with pytest.raises(FileChangedError, match="changed by somebody else"):
        files.write_atomically(str(path), b"ours", expected=state, before_rename=somebody_else)
    expected = {"rewritten": b"theirs", "replaced": b"old", "touched": b"old", "removed": None}[change]
    assert (path.read_bytes() if path.exists() else None) == expected
    assert listing(path) == ([path.name] if path.exists() else [])


def test_a_file_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(FileChangedError):
        files.write_atomically(
            str(path), b"ours", expected=files.ABSENT, before_rename=lambda: path.write_text("theirs") and None
        )
    assert path.read_text() == "theirs"


def test_removing_checks_too(path: Path) -> None:
    _, state = files.read(str(path))
    path.write_bytes(b"theirs")
    with pytest.raises(FileChangedError):
        files.remove(str(path), expected=state)
    assert path.read_bytes() == b"theirs"
    assert files.remove(str(path), expected=files.state_of(str(path)))
    assert not files.remove(str(path))


def test_an_interrupted_write_leaves_the_old_file_and_no_temporary_one(path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(str(path), b"new", before_rename=interrupt)
    assert path.read_bytes() == b"old"
    assert listing(path) == [path.name]


def test_only_temporary_files_of_that_name_are_stale(path: Path) -> None:
    for name in ("10-a.conflist.tmp.123", "10-a.conflist.tmp.mine", "10-b.conflist.tmp.123", "10-a.conflist.tmp"):
        (path.parent / name).touch()
    files.remove_stale_temps(str(path))
    assert listing(path) == ["10-a.conflist", "10-a.conflist.tmp", "10-a.conflist.tmp.mine", "10-b.conflist.tmp.123"]


def test_names_with_wildcards_are_only_names(tmp_path: Path) -> None:
    (tmp_path / "abc.tmp.1").touch()
    files.remove_stale_temps(str(tmp_path / "a*"))
    assert (tmp_path / "abc.tmp.1").exists()


def test_reading_has_a_limit_and_takes_regular_files_only(path: Path) -> None:
    with pytest.raises(OSError, match="more than 2 bytes") as raised:
        files.read(str(path), 2)
    assert raised.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="not a regular file"):
        files.read(str(path.parent))
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.read(str(path.parent / "pipe"))


def test_copy_only_when_content_or_mode_differs(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"\x7fELF" * 1_000_000)
    source.chmod(0o755)
    assert files.copy_by_rename(str(source), str(target))
    inode = target.stat().st_ino
    assert not files.copy_by_rename(str(source), str(target))
    assert target.stat().st_ino == inode
    target.chmod(0o644)
    assert files.copy_by_rename(str(source), str(target))
    assert (target.read_bytes(), mode_of(target)) == (source.read_bytes(), 0o755)
    target.unlink()
    target.symlink_to(source)
    assert files.copy_by_rename(str(source), str(target))
    assert not target.is_symlink()


def test_attributes_of_the_content_before_do_not_stay(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file capabilities")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    net_admin = struct.pack("<5I", 0x02000000, 1 << 12, 0, 0, 0)  # struct vfs_cap_data, linux/capability.h
    os.setxattr(target, "security.capability", net_admin)
    os.setxattr(target, "trusted.of-the-file", b"stays")
    assert files.copy_by_rename(str(source), str(target))
    assert target.read_bytes() == b"new"
    assert "trusted.of-the-file" in os.listxattr(target)
    assert "security.capability" not in os.listxattr(target)


def test_every_error_of_a_disk_has_a_hint() -> None:
    for number in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENOENT):
        assert files.hint(OSError(number, "x"))
    assert files.hint(OSError("x")) == ""
