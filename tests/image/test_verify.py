"""Verification of images, good and bad: what is wrong, where, what was expected and what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from image.checks import Locked
from image.model import ImageError
from image.referrers import INDEX, MANIFEST, REF_NAME, Layer, Referrer, digest_of, encode
from image.stored import StoredLayout
from tests.image import smallimage
from tests.image.smallimage import Files

from image import attestations, keys, rebuild, signing, verify

KEY, OTHER_KEY = keys.generate(), keys.generate()
LOCKED = Locked(smallimage.LOCK, {"runtime": ["runtime"], "dev": ["runtime", "dev"]})
Change = Callable[[Referrer], Referrer | None]


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    path = smallimage.write(tmp_path / "image")
    signing.sign(path, KEY)
    return path


def failures(layout: Path, key: keys.PublicKey | None = KEY.public, locked: Locked = LOCKED) -> list[str]:
    """Verify, and give the lines of what failed."""
    lines: list[str] = []
    report = verify.Report(lines.append)
    verify.verify(StoredLayout(layout), key, locked, report)
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == report.failures
    return failed


def changed(tmp_path: Path, change: Change, name: str = "changed") -> Path:
    """A layout whose maker changed attestations before signing it with the right key."""
    path = smallimage.write(tmp_path / name, change=change)
    signing.sign(path, KEY)
    return path


def edit_index(layout: Path, edit: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    content = smallimage.index_json(layout)
    content["manifests"] = edit(content["manifests"])
    (layout / "index.json").write_bytes(encode(content))


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
    manifest = stored.manifest(
        next(one for one in stored.reachable().values() if one.digest == platform_of(layout))
    ).descriptor
    lie = Layer("application/vnd.in-toto+json", b'{"predicateType": "lie"}')
    stored.replace(
        frozenset(),
        [Referrer(manifest, attestations.IN_TOTO, [lie], {attestations.PREDICATE_TYPE: kind}) for kind in kinds()],
    )
    assert failures(layout) == []


def platform_of(layout: Path) -> str:
    return smallimage.platform_digest(layout, "1.30.3", "amd64")


def kinds() -> tuple[str, ...]:
    return attestations.DECLARED


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
    # Of both variants the index; of each platform the manifest, four attestations, SBOM and provenance.
    assert len(failed) == 2 * (1 + 2 * (1 + 4 + 2))
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
    smallimage.blob(layout, digest_of(data)).write_bytes(data)

    def edit(entries: list[dict[str, object]]) -> list[dict[str, object]]:
        new = {"digest": digest_of(data), "size": len(data)}
        return [{**one, **new} if one["digest"] == index.digest else one for one in entries]

    edit_index(layout, edit)
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


# --- attestations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("key", [KEY.public, None])
def test_a_missing_attestation_is_named(tmp_path: Path, kind: str, key: keys.PublicKey | None) -> None:
    layout = changed(tmp_path, lambda one: None if one.annotations[attestations.PREDICATE_TYPE] == kind else one)
    failed = failures(layout, key)
    assert len([one for one in failed if f"expected an attestation {kind}, found none" in one]) >= 4
    assert platform_of(layout) in " ".join(failed)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("key", [KEY.public, None])
def test_an_attestation_of_another_image_is_found(tmp_path: Path, kind: str, key: keys.PublicKey | None) -> None:
    others: dict[str, Referrer] = {}

    def remember(one: Referrer) -> Referrer:
        others.setdefault(one.annotations[attestations.PREDICATE_TYPE], one)
        return one

    smallimage.write(tmp_path / "other", mark="other", change=remember)

    def move(one: Referrer) -> Referrer:
        mine = one.annotations[attestations.PREDICATE_TYPE]
        return replace(one, layers=others[mine].layers) if mine == kind else one

    layout = changed(tmp_path, move)
    failed = failures(layout, key)
    expected = f"expected a statement about {platform_of(layout)}, found one about {others[kind].subject.digest}"
    assert any(expected in failure for failure in failed)


def edited(kind: str, edit: Callable[[dict[str, object]], object]) -> Change:
    """Change a predicate of the attestations of this type."""

    def change(one: Referrer) -> Referrer:
        if one.annotations[attestations.PREDICATE_TYPE] != kind:
            return one
        (layer,) = one.layers
        content = json.loads(layer.data)
        edit(content["predicate"])
        return replace(one, layers=[replace(layer, data=encode(content))])

    return change


def other_hash(predicate: dict[str, object]) -> None:
    files: Files = predicate["files"]  # type: ignore[assignment]
    files[0]["checksums"] = [{"algorithm": "SHA256", "checksumValue": "0" * 64}]


def one_less(predicate: dict[str, object]) -> None:
    files: Files = predicate["files"]  # type: ignore[assignment]
    files.pop()


def one_more(predicate: dict[str, object]) -> None:
    files: Files = predicate["files"]  # type: ignore[assignment]
    files.append({**files[0], "fileName": "./bin/sh"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other_hash, f"etc/hostname: expected SHA-256 {'0' * 64}, as the SBOM says, found "),
        (one_less, "1 files are in the layers, but not in the SBOM: usr/bin/tool"),
        (one_more, "1 files are in the SBOM, but not in the layers: bin/sh"),
        (lambda predicate: predicate.pop("files"), "SPDX document without files"),
    ],
)
def test_an_sbom_that_does_not_fit_the_layers_is_found(
    tmp_path: Path, edit: Callable[[dict[str, object]], object], message: str
) -> None:
    failed = failures(changed(tmp_path, edited(attestations.SPDX, edit)))
    assert len(failed) == 4  # both variants, both architectures
    assert all(message in failure for failure in failed)


def materials(predicate: dict[str, object]) -> list[dict[str, object]]:
    return predicate["buildDefinition"]["resolvedDependencies"]  # type: ignore[index,no-any-return]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda one: materials(one).append({"name": "x.deb", "digest": {"sha256": "0"}}), "x.deb: expected no such"),
        (lambda one: materials(one).pop(), "wheel-1-py3-none-any.whl: expected "),
        (lambda one: materials(one)[1].update(digest={"sha256": "1" * 64}), f"as the lock says, found {'1' * 64}"),
        (lambda one: one["buildDefinition"]["externalParameters"].update(lock={"sha256": "2"}), "found 2"),
        (lambda one: one["buildDefinition"]["externalParameters"].update(variant="x"), "unknown variant 'x'"),
        (lambda one: one.pop("buildDefinition"), "expected SLSA provenance v1"),
    ],
)
def test_a_provenance_that_does_not_fit_the_lock_is_found(
    tmp_path: Path, edit: Callable[[dict[str, object]], object], message: str
) -> None:
    failed = failures(changed(tmp_path, edited(attestations.PROVENANCE, edit)))
    assert len(failed) == 4
    assert all(message in failure for failure in failed)


def test_a_layer_that_is_not_what_the_configuration_says_is_found(tmp_path: Path) -> None:
    layout = smallimage.write(tmp_path / "image", diff_id="sha256:" + "3" * 64)
    signing.sign(layout, KEY)
    failed = failures(layout)
    assert len(failed) == 4
    assert all(f"expected unpacked sha256:{'3' * 64}" in failure for failure in failed)


# --- comparison with an image that was built again --------------------------------------------------------------------


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
