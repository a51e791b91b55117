"""Signing a finished layout: what is added, whole or not at all, and that cosign accepts it offline."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from image.model import ImageError
from image.referrers import INDEX
from image.stored import StoredLayout
from tests.image import smallimage
from tests.image.programs import cosign_verify, run
from tests.image.smallimage import state

from image import cosignfolder, keys, signing

KEY, OTHER_KEY = keys.generate(), keys.generate()
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return smallimage.write(tmp_path / "image")


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return keys.write_pair(tmp_path / "keys", KEY)[1]


def images_of(layout: Path) -> list[object]:
    return [entry for entry in smallimage.index_json(layout)["manifests"] if entry["mediaType"] == INDEX]


def test_tags_and_digests_are_the_same_with_and_without_signatures(layout: Path) -> None:
    before, tagged = state(layout), images_of(layout)
    signing.sign(layout, KEY)
    after = state(layout)
    assert images_of(layout) == tagged
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: data for name, data in before.items() if name != "index.json"
    }


def test_the_same_key_gives_the_same_bytes(layout: Path, tmp_path: Path) -> None:
    copy = smallimage.write(tmp_path / "copy")
    signing.sign(layout, KEY)
    signing.sign(copy, KEY)
    once = state(layout)
    assert once == state(copy)
    signing.sign(layout, KEY)
    assert state(layout) == once


def test_signing_with_another_key_replaces_the_first(layout: Path, tmp_path: Path) -> None:
    copy = smallimage.write(tmp_path / "copy")
    signing.sign(layout, OTHER_KEY)
    signing.sign(layout, KEY)
    signing.sign(copy, KEY)
    assert state(layout) == state(copy)  # nothing of the other key's is left, in index.json or among the blobs


def test_everything_is_signed(layout: Path) -> None:
    count = signing.sign(layout, KEY)
    # Of each variant: the index; of both platforms the manifest, four attestations and the set of envelopes.
    assert count == 2 * (1 + 2 * (1 + 4 + 1))


@pytest.mark.parametrize("tag", ["1.30.3", "1.30-dev"])
@pytest.mark.parametrize("architecture", ["", "amd64", "arm64"])
def test_cosign_verifies_an_exported_image_offline(
    layout: Path, public: Path, tmp_path: Path, tag: str, architecture: str
) -> None:
    signing.sign(layout, KEY)
    subject = cosignfolder.export(layout, tag, architecture, tmp_path / "export")
    if architecture:
        assert subject.digest == smallimage.platform_digest(layout, tag, architecture)
    done = cosign_verify(tmp_path / "export", public, tmp_path)
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    assert said["critical"]["image"]["docker-manifest-digest"] == subject.digest
    wrong = keys.write_pair(tmp_path / "other", OTHER_KEY)[1]
    assert cosign_verify(tmp_path / "export", wrong, tmp_path).returncode != 0


def test_cosign_refuses_an_exported_signature_of_another_image(layout: Path, public: Path, tmp_path: Path) -> None:
    signing.sign(layout, KEY)
    cosignfolder.export(layout, "1.30", "", tmp_path / "export")
    other = smallimage.write(tmp_path / "other", mark="other")
    index = smallimage.index_json(tmp_path / "export")
    moved = smallimage.index_json(other)["manifests"][0]
    index["manifests"][0] |= {"digest": moved["digest"], "size": moved["size"]}
    (tmp_path / "export" / "index.json").write_text(json.dumps(index))
    shutil.copytree(other / "blobs", tmp_path / "export" / "blobs", dirs_exist_ok=True)
    done = cosign_verify(tmp_path / "export", public, tmp_path)
    assert done.returncode != 0
    assert "no matching signatures" in done.stderr


def test_a_signature_can_be_checked_with_openssl_alone(layout: Path, public: Path, tmp_path: Path) -> None:
    signing.sign(layout, KEY)
    stored = StoredLayout(layout)
    image = signing.images(stored)[0]
    (referrer,) = stored.referrers()[image.index.digest]
    layer = referrer.content["layers"][0]
    (tmp_path / "sig.b64").write_text(layer["annotations"]["dev.cosignproject.cosign/signature"])
    script = 'base64 -d sig.b64 > sig && openssl dgst -sha256 -verify "$1" -signature sig "$2"'
    command = ["sh", "-ec", script, "sh", str(public), str(smallimage.blob(layout, layer["digest"]))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Verified OK", done.stderr


def test_skopeo_like_readers_still_find_tagged_images(layout: Path, tmp_path: Path) -> None:
    signing.sign(layout, KEY)
    for tag in (*smallimage.RUNTIME_TAGS, *smallimage.DEV_TAGS):
        done = run("oras", "manifest", "fetch", "--oci-layout", f"{layout}:{tag}", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["mediaType"] == INDEX


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_damaged_layout_is_not_signed(layout: Path) -> None:
    layer = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    layer.write_bytes(layer.read_bytes()[:-1] + b"\x00\x01")
    before = state(layout)
    with pytest.raises(ImageError, match=layer.name):
        signing.sign(layout, KEY)
    assert state(layout) == before


def test_a_folder_that_is_no_layout_is_not_signed(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="oci-layout"):
        signing.sign(tmp_path, KEY)


PROGRAM = """
import sys
from pathlib import Path
from image import cosignfolder, keys, signing
from image.model import ImageError
try:
    {statement}
except ImageError as error:
    sys.exit(f"ImageError: {{error.message}}")
"""
SIGN_ON_FULL_DISK = PROGRAM.format(statement="signing.sign(Path(sys.argv[1]), keys.generate())")
EXPORT_TO_FULL_DISK = PROGRAM.format(
    statement="cosignfolder.export(Path(sys.argv[1]), '1', '', Path(sys.argv[2]) / 'export')"
)

FULL_DISK = """
mount -t tmpfs -o mode=755 none "$2"
cp -r "$1" "$2/image"
mount -o remount,size=$(($(df --output=used -k "$2" | tail -1) + $3))k "$2"
"$4" -c "$5" "$2/image" 2> "$1.said" && exit 9
rm -rf "$1" && cp -r "$2/image" "$1"
"""


EXPORT = """
mount -t tmpfs -o mode=755,size="$3"k none "$2"
"$4" -c "$5" "$1" "$2" 2> "$1.said" && exit 9
ls -A "$2" > "$1.left"
"""


@pytest.mark.parametrize("kilobytes", [4, 16, 40])
def test_a_full_disk_gets_no_part_of_an_export(layout: Path, tmp_path: Path, kilobytes: int) -> None:
    signing.sign(layout, KEY)
    (tmp_path / "small").mkdir()
    arguments = [str(layout), str(tmp_path / "small"), str(kilobytes), sys.executable, EXPORT_TO_FULL_DISK]
    command = ["unshare", "--mount", "sh", "-ec", EXPORT, "sh", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.strerror(errno.ENOSPC) in Path(f"{layout}.said").read_text()
    assert Path(f"{layout}.left").read_text() == ""


@pytest.mark.parametrize("kilobytes", [0, 8, 100, 200])
def test_a_full_disk_leaves_the_layout_as_it_was(layout: Path, tmp_path: Path, kilobytes: int) -> None:
    before, mount_point = state(layout), tmp_path / "small"
    mount_point.mkdir()
    arguments = [str(layout), str(mount_point), str(kilobytes), sys.executable, SIGN_ON_FULL_DISK]
    command = ["unshare", "--mount", "sh", "-ec", FULL_DISK, "sh", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = Path(f"{layout}.said").read_text()
    assert said.startswith("ImageError: ")
    assert os.strerror(errno.ENOSPC) in said
    assert state(layout) == before


def test_an_export_over_something_is_refused(layout: Path, tmp_path: Path) -> None:
    signing.sign(layout, KEY)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("mine")
    with pytest.raises(ImageError, match="exists already"):
        cosignfolder.export(layout, "1.30", "", tmp_path / "export")
    assert (tmp_path / "export" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("tag", "architecture", "message"), [("2", "", "no image with the tag 2"), ("1", "s390x", "no architecture s390x")]
)
def test_an_export_of_nothing_says_what_there_is(
    layout: Path, tmp_path: Path, tag: str, architecture: str, message: str
) -> None:
    signing.sign(layout, KEY)
    with pytest.raises(ImageError, match=message) as caught:
        cosignfolder.export(layout, tag, architecture, tmp_path / "export")
    assert caught.value.hint.startswith("there are: ")
    assert not (tmp_path / "export").exists()


def test_an_unsigned_image_is_not_exported(layout: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected a signature"):
        cosignfolder.export(layout, "1.30", "", tmp_path / "export")


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keygen_writes_a_pair_that_nobody_else_reads_and_never_overwrites_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys.main([str(tmp_path / "pair")]) == 0
    private, public = tmp_path / "pair" / "meshcni.key", tmp_path / "pair" / "meshcni.pub"
    assert private.stat().st_mode & 0o777 == 0o600
    assert public.stat().st_mode & 0o777 == 0o644
    assert "PRIVATE" not in capsys.readouterr().out
    key = keys.read_private(str(private), {})
    assert keys.read_public(str(public)).identifier == key.public.identifier
    with pytest.raises(ImageError, match="exists already"):
        keys.main([str(tmp_path / "pair")])


def test_the_key_comes_from_a_path_or_from_the_environment(tmp_path: Path) -> None:
    private, _ = keys.write_pair(tmp_path / "plain", KEY)
    secret, _ = keys.write_pair(tmp_path / "secret", KEY, password="open sesame")
    for path, environment in (
        (str(private), {}),
        (None, {keys.KEY_VARIABLE: str(private)}),
        (None, {keys.KEY_VARIABLE: private.read_text()}),
        (str(secret), {keys.PASSWORD_VARIABLE: "open sesame"}),
        (None, {keys.KEY_VARIABLE: secret.read_text(), keys.PASSWORD_VARIABLE: "open sesame"}),
    ):
        assert keys.read_private(path, environment).public.identifier == KEY.public.identifier


def test_the_command_signs_with_the_environments_key(
    layout: Path, tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.KEY_VARIABLE, KEY.pem().decode())
    assert signing.main([str(layout)]) == 0
    cosignfolder.export(layout, "1", "", tmp_path / "export")
    assert cosign_verify(tmp_path / "export", public, tmp_path).returncode == 0
