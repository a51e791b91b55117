"""Attestations of a layout, as oras and cosign see them, with a key and without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.image import smallimage
from tests.image.programs import cosign_key, run

from image import attestations, cosignfolder, keys, signing

KEY, OTHER_KEY = keys.generate(), keys.generate()
IN_TOTO, DSSE = "application/vnd.in-toto+json", "application/vnd.dsse.envelope.v1+json"
SIGNATURE = "application/vnd.dev.cosign.artifact.sig.v1+json"
TYPES = {  # predicate type: names by which cosign knows it, and the file's
    "https://spdx.dev/Document": (["spdxjson", "https://spdx.dev/Document"], "sbom.spdx"),
    "https://cyclonedx.org/bom/v1.6": (["https://cyclonedx.org/bom/v1.6"], "sbom.cyclonedx"),
    "https://slsa.dev/provenance/v1": (["slsaprovenance1", "https://slsa.dev/provenance/v1"], "provenance"),
    "https://openvex.dev/ns/v0.2.0": (["https://openvex.dev/ns/v0.2.0"], "vex"),
}


@pytest.fixture
def unsigned(tmp_path: Path) -> Path:
    return smallimage.write(tmp_path / "image")


@pytest.fixture
def layout(unsigned: Path) -> Path:
    signing.sign(unsigned, KEY)
    return unsigned


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return keys.write_pair(tmp_path / "keys", KEY)[1]


def discover(layout: Path, tag: str, architecture: str, home: Path) -> list[dict[str, str]]:
    """What oras lists as referring to a platform's image, without our code."""
    options = ["--oci-layout", "--platform", f"linux/{architecture}", "--format", "json"]
    done = run("oras", "discover", *options, f"{layout}:{tag}", home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["manifests"]
    assert isinstance(found, list)
    return sorted(found, key=lambda one: str(one["digest"]))


def test_the_declared_types_are_those_of_the_issue() -> None:
    assert set(attestations.DECLARED) == set(TYPES)


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
@pytest.mark.parametrize("tag", ["1.30.3", "1.30-dev"])
def test_oras_lists_every_attestation_with_its_type_signed_or_not(
    unsigned: Path, tmp_path: Path, tag: str, architecture: str
) -> None:
    before = discover(unsigned, tag, architecture, tmp_path)
    assert {one["annotations"]["in-toto.io/predicate-type"] for one in before} == set(TYPES)  # type: ignore[index]
    assert {one["artifactType"] for one in before} == {IN_TOTO}
    signing.sign(unsigned, KEY)
    after = discover(unsigned, tag, architecture, tmp_path)
    assert [one for one in after if one["artifactType"] == IN_TOTO] == before
    assert sorted(one["artifactType"] for one in after if one not in before) == sorted([SIGNATURE, DSSE])


@pytest.mark.parametrize(("name", "file"), [(name, file) for names, file in TYPES.values() for name in names])
def test_cosign_verifies_an_envelope_against_the_manifest_it_is_about(
    layout: Path, public: Path, tmp_path: Path, name: str, file: str
) -> None:
    (envelopes,) = [one for one in discover(layout, "1.30", "amd64", tmp_path) if one["artifactType"] == DSSE]
    reference = f"{layout}@{envelopes['digest']}"
    assert run("oras", "pull", "--oci-layout", reference, "-o", tmp_path / "out", home=tmp_path).returncode == 0
    manifest = smallimage.blob(layout, smallimage.platform_digest(layout, "1.30", "amd64"))
    wrong_key = keys.write_pair(tmp_path / "other", OTHER_KEY)[1]
    arguments = ["--type", name, "--signature", tmp_path / "out" / f"{file}.dsse.json"]

    def verify(key: Path, subject: Path) -> int:
        command = ["verify-blob-attestation", *cosign_key(key), *arguments, subject]
        return run("cosign", *command, home=tmp_path).returncode

    assert verify(public, manifest) == 0
    assert verify(wrong_key, manifest) != 0
    other = smallimage.blob(layout, smallimage.platform_digest(layout, "1.30", "arm64"))
    assert verify(public, other) != 0  # the statement is about another image


@pytest.mark.parametrize("name", [name for names, _ in TYPES.values() for name in names])
def test_cosign_verifies_attestations_of_an_exported_image(
    layout: Path, public: Path, tmp_path: Path, name: str
) -> None:
    cosignfolder.export(layout, "1.30", "arm64", tmp_path / "export")
    arguments = ["--local-image", "--type", name, tmp_path / "export"]
    done = run("cosign", "verify-attestation", *cosign_key(public), *arguments, home=tmp_path)
    assert done.returncode == 0, done.stderr
    other = keys.write_pair(tmp_path / "other", OTHER_KEY)[1]
    assert run("cosign", "verify-attestation", *cosign_key(other), *arguments, home=tmp_path).returncode != 0
    shutil.rmtree(tmp_path / "export")


def test_a_type_that_is_not_attested_is_not_verified(layout: Path, public: Path, tmp_path: Path) -> None:
    cosignfolder.export(layout, "1.30", "arm64", tmp_path / "export")
    arguments = ["--local-image", "--type", "https://example.com/other", tmp_path / "export"]
    done = run("cosign", "verify-attestation", *cosign_key(public), *arguments, home=tmp_path)
    assert done.returncode != 0
    assert "none of the attestations matched" in done.stderr
