"""Verification of what is said about an image: attestations, bills of materials, provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from image.referrers import Referrer
from tests.image import smallimage
from tests.image.smallimage import Files
from tests.image.verification import KEY, changed, edited, failures, platform_of, signed

from image import attestations, keys, signing


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return signed(tmp_path / "image")


@pytest.mark.parametrize("kind", attestations.DECLARED)
@pytest.mark.parametrize("key", [KEY.public, None])
def test_a_missing_attestation_is_named(tmp_path: Path, kind: str, key: keys.PublicKey | None) -> None:
    layout = changed(tmp_path, lambda one: None if one.annotations[attestations.PREDICATE_TYPE] == kind else one)
    failed = failures(layout, key)
    assert len([one for one in failed if f"expected an attestation {kind}, found none" in one]) == 4
    assert platform_of(layout) in " ".join(failed)


@pytest.mark.parametrize("kind", attestations.DECLARED)
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


def files(predicate: dict[str, Any]) -> Files:
    """The list of files in either kind of bill of materials."""
    found: Files = predicate["files"] if "files" in predicate else predicate["components"][0]["components"]
    return found


def other_hash(predicate: dict[str, Any]) -> None:
    files(predicate)[0] |= {
        "checksums": [{"algorithm": "SHA256", "checksumValue": "0" * 64}],
        "hashes": [{"alg": "SHA-256", "content": "0" * 64}],
    }


def one_more(predicate: dict[str, Any]) -> None:
    files(predicate).append({**files(predicate)[0], "fileName": "./bin/sh", "name": "/bin/sh"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other_hash, f"etc/hostname: expected SHA-256 {'0' * 64}, as NAME says, found "),
        (lambda predicate: files(predicate).pop(), "1 files are in the layers, but not in NAME: usr/bin/tool"),
        (one_more, "1 files are in NAME, but not in the layers: bin/sh"),
        (dict.clear, "NAME: no list of files"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), [(attestations.SPDX, "SPDX"), (attestations.CYCLONEDX, "CycloneDX")])
def test_an_sbom_that_does_not_fit_the_layers_is_found(
    tmp_path: Path, edit: Callable[[dict[str, object]], object], message: str, kind: str, name: str
) -> None:
    failed = failures(changed(tmp_path, edited(kind, edit)))
    assert len(failed) == 4  # both variants, both architectures
    assert all(message.replace("NAME", name) in failure for failure in failed)


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
    assert len(failed) == 4 * 2  # for both bills of materials
    assert all(f"expected unpacked sha256:{'3' * 64}" in failure for failure in failed)
