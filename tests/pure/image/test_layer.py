from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.layer import archive, difference
from image.model import Entry, EntryKind, ImageError

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LONG = "/".join(["d" * 60] * 4)


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path, EntryKind.DIRECTORY, mode, "c")


def file(path: str, data: bytes = b"x", mode: int = 0o644, capabilities: int = 0) -> Entry:
    return Entry(path, EntryKind.FILE, mode, "c", data=data, permitted_capabilities=capabilities)


def link(path: str, target: str) -> Entry:
    return Entry(path, EntryKind.LINK, 0o777, "c", target=target)


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar}


SAMPLE = [directory("a"), file("a/b", b"data", 0o755, 0x283002), link("c", "a/b"), file(LONG), file("ü")]


def test_members_are_sorted_and_have_fixed_fields() -> None:
    found = members(archive(reversed(SAMPLE), TIME))
    assert list(found) == sorted(entry.path for entry in SAMPLE)
    for member in found.values():
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (TIME.timestamp(), 0, 0, "", "")
    assert found["a"].isdir()
    assert found["a/b"].mode == 0o755
    assert found["c"].linkname == "a/b"


def test_the_bytes_are_the_same_in_every_version_of_python() -> None:
    """Known by heart: another tarfile module must not change published digests."""
    assert hashlib.sha256(archive(SAMPLE, TIME)).hexdigest() == (
        "af09e37275d63e3b87361f29303171528a21d4ea0281e88a36d8e53d76236bc7"
    )


def test_capabilities_are_permitted_and_not_effective() -> None:
    found = members(archive(SAMPLE, TIME))
    record = found["a/b"].pax_headers["SCHILY.xattr.security.capability"]
    assert struct.unpack("<5I", record.encode()) == (0x02000000, 0x283002, 0, 0, 0)
    assert not [name for name, member in found.items() if name != "a/b" and "SCHILY" in str(member.pax_headers)]


def test_capabilities_that_are_no_text_are_refused() -> None:
    with pytest.raises(ImageError, match="cannot be written"):
        archive([file("a", capabilities=0x80)], TIME)


def test_a_path_twice_is_refused() -> None:
    with pytest.raises(ImageError, match="/a stands in one layer twice"):
        archive([file("a"), file("a", b"y")], TIME)


def by_path(*entries: Entry) -> dict[str, Entry]:
    return {entry.path: entry for entry in entries}


def test_a_difference_holds_what_is_new_changed_or_gone() -> None:
    lower = by_path(directory("a"), file("a/same"), file("a/changed"), file("a/gone"), directory("b"), file("b/x"))
    upper = by_path(directory("a"), file("a/same"), file("a/changed", mode=0o755), file("a/new"))
    found = {entry.path for entry in difference(lower, upper)}
    assert found == {"a", "a/changed", "a/new", "a/.wh.gone", ".wh.b"}


def test_the_component_makes_no_difference() -> None:
    other = Entry("a", EntryKind.FILE, 0o644, "other", data=b"x")
    assert difference(by_path(file("a")), by_path(other)) == []


names = st.sampled_from(["a", "b", "c"])
trees = st.dictionaries(st.tuples(names, names).map("/".join), st.sampled_from([b"1", b"2"]), max_size=9)


def tree(files: dict[str, bytes]) -> dict[str, Entry]:
    folders = {path.split("/")[0] for path in files}
    return by_path(*map(directory, folders), *(file(path, data) for path, data in files.items()))


@given(trees, trees)
def test_a_layer_over_another_makes_the_upper_file_system(below: dict[str, bytes], above: dict[str, bytes]) -> None:
    lower, upper = tree(below), tree(above)
    found = dict(lower)
    for entry in sorted(difference(lower, upper), key=lambda one: one.path):
        folder, _, name = entry.path.rpartition("/")
        if name.startswith(".wh."):
            gone = f"{folder}/{name[4:]}".lstrip("/")
            found = {path: one for path, one in found.items() if path != gone and not path.startswith(f"{gone}/")}
        else:
            found[entry.path] = entry
    assert found == upper
