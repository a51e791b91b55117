"""Comparison of an image with one that was built again: equal, or the first difference by name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from image.model import ImageError
from image.stored import StoredLayout
from tests.image import smallimage
from tests.image.verification import KEY, signed

from image import keys, rebuild, signing, verify


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return signed(tmp_path / "image")


def test_equal_images_are_equal_signed_or_not(layout: Path, tmp_path: Path) -> None:
    again = smallimage.write(tmp_path / "again")
    assert rebuild.compare(StoredLayout(layout), StoredLayout(again)).startswith("2 images have the digests")


FILES = {"etc/hostname": b"a", "usr/bin/tool": b"b"}


@pytest.mark.parametrize(
    ("published", "rebuilt", "message"),
    [
        ({**FILES, "usr/bin/tool": b"c"}, FILES, "usr/bin/tool: expected file mode 0644 owner 0:0 time 0 sha256:3e23"),
        ({**FILES, "usr/bin/sh": b""}, FILES, "usr/bin/sh: expected no such file, found file mode 0644"),
        ({"etc/hostname": b"a"}, FILES, "usr/bin/tool: expected file mode 0644"),
        (FILES, {"etc/hostname": b"a"}, "usr/bin/tool: expected no such file"),
    ],
)
def test_the_first_file_that_differs_is_named(
    tmp_path: Path, published: Mapping[str, bytes], rebuilt: Mapping[str, bytes], message: str
) -> None:
    found = StoredLayout(smallimage.write(tmp_path / "published", files=dict(sorted(published.items()))))
    made = StoredLayout(smallimage.write(tmp_path / "rebuilt", files=rebuilt))
    with pytest.raises(ImageError) as caught:
        rebuild.compare(found, made)
    assert caught.value.message.startswith(f"1.30.3 amd64: layer 1: {message}")


def test_another_packing_of_the_same_files_is_said(tmp_path: Path) -> None:
    found = StoredLayout(smallimage.write(tmp_path / "published", level=1))
    made = StoredLayout(smallimage.write(tmp_path / "rebuilt", level=9))
    with pytest.raises(ImageError, match=r"1\.30\.3 amd64: layer 1: the same files, packed differently"):
        rebuild.compare(found, made)


def test_another_configuration_is_said(tmp_path: Path) -> None:
    found = StoredLayout(smallimage.write(tmp_path / "published", user="0"))
    made = StoredLayout(smallimage.write(tmp_path / "rebuilt", user="65532:65532"))
    with pytest.raises(ImageError) as caught:
        rebuild.compare(found, made)
    assert caught.value.message == "1.30.3 amd64: configuration: config.User: expected '65532:65532', found '0'"


@pytest.mark.timeout(900)
def test_the_built_image_is_verified_and_rebuilt_to_the_same_digests(
    built_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "image"
    shutil.copytree(built_image, copy)
    signing.sign(copy, KEY)
    public = keys.write_pair(tmp_path / "keys", KEY)[1]
    status = verify.main([str(copy), "--key", str(public), "--rebuild"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "ok      rebuild: 2 images have the digests that a build of this checkout has" in said
    assert said.count("are those of the lock") == 4
    assert said.count("files of the layers are those of") == 4 * 2
