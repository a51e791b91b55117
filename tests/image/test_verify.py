"""Verification of images, good and bad: what is wrong, where, what was expected and what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from image.model import ImageError
from image.referrers import INDEX, MANIFEST, REF_NAME, Layer, Referrer, digest_of, encode
from image.stored import StoredLayout
from tests.image import smallimage
from tests.image.verification import KEY, OTHER_KEY, edit_index, failures, platform_of, signed

from image import attestations, keys, signing, verify


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return signed(tmp_path / "image")


# --- good -------------------------------------------------------------------------------------------------------------


def test_a_signed_image_is_verified_with_its_key(layout: Path) -> None:
    assert failures(layout) == []


def test_without_a_key_everything_else_is_checked(tmp_path: Path) -> None:
    assert failures(smallimage.write(tmp_path / "image"), key=None) == []


def test_the_command_says_what_it_checked(layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = keys.write_pair(tmp_path / "keys", KEY)[1]
    lock = smallimage.write_lock(tmp_path / "lock.json")
    assert verify.main([str(layout), "--key", str(public), "--lock", str(lock)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"{layout}: verified\n")
    assert said.count("is about this image, signed by key") == 2 * 2 * 4
    assert verify.main([str(layout), "--lock", str(lock)]) == 0
    assert "signatures were not checked" in capsys.readouterr().out


def test_attestations_by_others_beside_ours_do_no_harm(layout: Path) -> None:
    stored = StoredLayout(layout)
    manifest = stored.reachable()[platform_of(layout)]
    lie = Layer(attestations.IN_TOTO, b'{"predicateType": "lie"}')
    others = [
        Referrer(manifest, attestations.IN_TOTO, [lie], {attestations.PREDICATE_TYPE: kind})
        for kind in attestations.DECLARED
    ]
    stored.replace(frozenset(), others)
    assert failures(layout) == []


# --- blobs ------------------------------------------------------------------------------------------------------------


def blob_kinds(layout: Path) -> dict[str, str]:
    """A digest of each kind of blob that a signed layout has."""
    found = {}
    for digest, blob in StoredLayout(layout).reachable().items():
        found.setdefault(f"{blob.media_type} {blob.artifact_type}".strip(), digest)
    return found


SIGNED_KINDS = (
    INDEX,
    MANIFEST,
    smallimage.CONFIG,
    smallimage.LAYER,
    f"{MANIFEST} {attestations.IN_TOTO}",
    attestations.IN_TOTO,
    f"{MANIFEST} {signing.SIGNATURE}",
    signing.PAYLOAD,
    signing.SIGNATURE,
    f"{MANIFEST} {attestations.DSSE}",
    "application/vnd.oci.empty.v1+json",
)


def test_all_kinds_of_blobs_are_tried(layout: Path) -> None:
    # The envelopes' configuration is the empty object too, so one digest has three media types.
    assert set(blob_kinds(layout)) | {signing.SIGNATURE, "application/vnd.oci.empty.v1+json"} == set(SIGNED_KINDS) | {
        attestations.DSSE
    }


@pytest.mark.parametrize("kind", [*SIGNED_KINDS[:8], SIGNED_KINDS[9], attestations.DSSE])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_blob_is_named(layout: Path, tmp_path: Path, kind: str, damage: str) -> None:
    digest = blob_kinds(layout)[kind]
    path = smallimage.blob(layout, digest)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        expected = f"expected {digest}, found {digest_of(path.read_bytes())}"
    elif damage == "cut":
        path.write_bytes(data[:-1])
        expected = f"expected {len(data)} bytes, found {len(data) - 1}"
    else:
        path.unlink()
        expected = "missing"
    (failure,) = failures(layout)
    assert str(path) in failure
    assert expected in failure
    assert verify.main([str(layout)]) == 1


def test_a_damaged_blob_that_nothing_names_is_found_too(layout: Path) -> None:
    path = layout / "blobs" / "sha256" / ("0" * 64)
    path.write_bytes(b"not that")
    (failure,) = failures(layout)
    assert str(path) in failure


# --- the layout itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"manifests":3}', b"\xff"])
def test_a_truncated_layout_says_which_file(
    layout: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    path = layout / name
    path.unlink() if content is None else path.write_bytes(content)
    try:
        assert verify.main([str(layout)]) == 1
        said = capsys.readouterr().out
    except ImageError as error:
        said = error.message
    assert str(path) in said


@pytest.mark.parametrize("image", ["build/none", "/none", "./none", "none", "Not a reference:1"])
def test_what_is_no_image_at_all_is_named(image: str) -> None:
    with pytest.raises(ImageError, match=re.escape(str(Path(image) / "oci-layout"))):
        verify.main([image])


@pytest.mark.parametrize("entry", [3, {}, {"mediaType": INDEX, "digest": "sha256:../../../etc/passwd", "size": 1}])
def test_an_entry_that_is_no_descriptor_is_shown(layout: Path, entry: object) -> None:
    edit_index(layout, lambda entries: [*entries, entry])  # type: ignore[list-item]
    (failure,) = failures(layout)
    assert "expected a descriptor" in failure
    assert str(layout / "index.json") in failure


def test_a_layout_without_images_is_not_verified(layout: Path) -> None:
    edit_index(layout, lambda entries: [one for one in entries if one["mediaType"] != INDEX])
    (layout_failure,) = [one for one in failures(layout) if "expected an image index" in one]
    assert str(layout) in layout_failure


ODD = [b"", b"[]", b"3", b"{}", b'{"layers": 3, "manifests": 3}', b'{"config": []}', b"[" * 100000, b"\xff\x00"]


@pytest.mark.parametrize("content", [*ODD, b'{"manifests": [{}]}', b'{"manifests": [3]}', b'{"mediaType": "other"}'])
def test_a_tampered_index_with_its_right_digest_fails_without_a_crash(layout: Path, content: bytes) -> None:
    replace_in_index_json(layout, StoredLayout(layout).tags["1"].digest, content)
    assert failures(layout)


@pytest.mark.parametrize("content", [*ODD, b'{"config": {"mediaType": 1}}', b'{"subject": 3}', b'{"subject": {}}'])
@pytest.mark.parametrize("artifact_type", [signing.SIGNATURE, attestations.DSSE, attestations.IN_TOTO])
def test_a_tampered_referrer_with_its_right_digest_fails_without_a_crash(
    layout: Path, artifact_type: str, content: bytes
) -> None:
    digest = signatures_of(layout, artifact_type)[platform_of(layout)][0]
    replace_in_index_json(layout, digest, content)
    assert failures(layout)


def replace_in_index_json(layout: Path, digest: str, content: bytes) -> None:
    """Let everything that index.json says of a manifest be said of `content`."""
    smallimage.blob(layout, digest_of(content)).write_bytes(content)
    new = {"digest": digest_of(content), "size": len(content)}
    edit_index(layout, lambda entries: [{**one, **new} if one["digest"] == digest else one for one in entries])


# --- tags -------------------------------------------------------------------------------------------------------------


def retag(layout: Path, old: str, new: str) -> None:
    """Let `new` name the image that `old` names."""

    def edit(entries: list[dict[str, object]]) -> list[dict[str, object]]:
        (source,) = [one for one in entries if one.get("annotations", {}).get(REF_NAME) == old]  # type: ignore[attr-defined]
        others = [one for one in entries if one.get("annotations", {}).get(REF_NAME) != new]  # type: ignore[attr-defined]
        return [*others, {**source, "annotations": {REF_NAME: new}}]

    edit_index(layout, edit)


@pytest.mark.parametrize(("old", "new"), [("1-dev", "1.30.3"), ("1.30.3", "2")])
def test_a_tag_that_was_moved_or_added_is_found(layout: Path, old: str, new: str) -> None:
    retag(layout, old, new)
    (failure,) = failures(layout)
    assert f"has the tag {new}" in failure
    assert str(layout / "index.json") in failure


def test_a_tag_of_two_images_is_found(layout: Path) -> None:
    def edit(entries: list[dict[str, object]]) -> list[dict[str, object]]:
        dev = next(one for one in entries if one.get("annotations") == {REF_NAME: "1-dev"})
        return [*entries, {**dev, "annotations": {REF_NAME: "1.30"}}]

    edit_index(layout, edit)
    assert any("two images have the tag 1.30" in failure for failure in failures(layout))


# --- signatures -------------------------------------------------------------------------------------------------------


def test_a_wrong_key_verifies_nothing(layout: Path) -> None:
    failed = failures(layout, OTHER_KEY.public)
    # Of both variants the index; of each platform the manifest and four attestations.
    assert len(failed) == 2 * (1 + 2 * (1 + 4))
    for failure in failed:
        assert f"expected a signature by key {OTHER_KEY.public.identifier[:16]}" in failure
        assert "found 1 by other keys" in failure


def test_an_unsigned_image_is_not_verified_with_a_key(tmp_path: Path) -> None:
    failed = failures(smallimage.write(tmp_path / "image"))
    assert failed
    assert all("expected a signature" in failure and "found none" in failure for failure in failed)


def test_an_index_that_was_made_anew_has_no_signature(layout: Path) -> None:
    stored = StoredLayout(layout)
    index = stored.tags["1"]
    content = json.loads(stored.read(index))
    content["manifests"] = content["manifests"][:1]
    data = encode(content)
    replace_in_index_json(layout, index.digest, data)
    (failure,) = failures(layout)
    assert digest_of(data).removeprefix("sha256:") in failure
    assert "expected a signature" in failure


def signatures_of(layout: Path, artifact_type: str) -> Mapping[str, list[str]]:
    """Referrers of a type by what they are about."""
    about = StoredLayout(layout).referrers()
    return {
        subject: [one.descriptor.digest for one in found if one.artifact_type == artifact_type]
        for subject, found in about.items()
    }


@pytest.mark.parametrize("artifact_type", [signing.SIGNATURE, attestations.DSSE, attestations.IN_TOTO])
def test_each_referrer_that_is_taken_away_is_missed(layout: Path, artifact_type: str) -> None:
    whole = (layout / "index.json").read_bytes()
    envelopes = {one for found in signatures_of(layout, attestations.DSSE).values() for one in found}
    taken = 0
    for subject, digests in signatures_of(layout, artifact_type).items():
        if subject in envelopes:
            continue  # the signature of the set of envelopes is for cosign; each envelope is signed itself
        for digest in digests:
            edit_index(layout, lambda entries, digest=digest: [one for one in entries if one["digest"] != digest])  # type: ignore[misc]
            assert failures(layout), f"{digest} was not missed"
            (layout / "index.json").write_bytes(whole)
            taken += 1
    assert taken > 0
