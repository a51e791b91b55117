"""What can be asked of an image in a layout: each check returns what it saw, or raises."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from image import attestations, evidence, layercontents, signing
from image.attestations import CYCLONEDX, DSSE, PROVENANCE, SPDX, short_type
from image.keys import PublicKey
from image.lockfile import Lock
from image.model import ImageError
from image.referrers import Descriptor, digest_of
from image.signing import Platform, SignedImage
from image.stored import Manifest, StoredLayout

SOURCE = "source"  # the one material that no lock has
SHOWN = 3  # of a list of differences
UNSIGNED = "the image was changed, or signed with another key: get image and key from the same place"

Referrers = Mapping[str, Sequence[Manifest]]


def blobs(layout: StoredLayout) -> str:
    """Every blob has the size and the digest that it is named with."""
    return f"{layout.check_all()} blobs have the digests and sizes that they are named with"


def signature(layout: StoredLayout, about: Referrers, signed: Descriptor, key: PublicKey) -> Mapping[str, Any]:
    """`key` signed the manifest; give what it said beside the digest."""
    tried = 0
    for referrer in about.get(signed.digest, ()):
        if referrer.artifact_type == signing.SIGNATURE:
            for layer in referrer.children[1:]:
                tried += 1
                encoded = layer.annotations.get(attestations.COSIGN_SIGNATURE, "")
                said = signing.open_payload(layout.read(layer), encoded, key, signed.digest)
                if said is not None:
                    return said
    found = f"{tried} by other keys or of other digests" if tried else "none"
    raise ImageError(
        f"{layout.blob_path(signed.digest)}: expected a signature by key {key.identifier[:16]}, found {found}", UNSIGNED
    )


def tags(layout: StoredLayout, about: Referrers, image: SignedImage, key: PublicKey) -> str:
    """`key` signed the image's index, for every tag that it has."""
    said = signature(layout, about, image.index, key).get(signing.TAGS, "")
    signed = set(str(said).split(","))
    moved = sorted(set(image.tags) - signed)
    if moved:
        raise ImageError(
            f"{layout.path / 'index.json'}: {image.index.digest} has the tag {', '.join(moved)}; "
            f"expected only those it was signed for: {', '.join(sorted(signed))}",
            "a tag that was moved, or given after signing: refer to the image by its digest, or sign it again",
        )
    return f"index {image.index.digest} signed by key {key.identifier[:16]} for {said}"


def platform(layout: StoredLayout, about: Referrers, image: Platform, key: PublicKey) -> str:
    """`key` signed a platform's manifest."""
    signature(layout, about, image.descriptor, key)
    return f"manifest {image.descriptor.digest} signed by key {key.identifier[:16]}"


def accepted(
    layout: StoredLayout, about: Referrers, image: Platform, predicate_type: str, key: PublicKey | None
) -> tuple[Manifest, Any]:
    """Find the attestation of this type that is about this image and, where there is a key, signed by it.

    Anybody who may write to a registry can attach others; they count for nothing.
    """
    failure = ImageError(
        f"{layout.path}: {image.descriptor.digest}: expected an attestation {predicate_type}, found none",
        "the image was changed or not copied as a whole: copy it with its referrers (`oras cp -r`), or build it again",
    )
    for manifest in image.attestations:
        if manifest.annotations.get(attestations.PREDICATE_TYPE) == predicate_type:
            try:
                data, predicate = _statement(layout, image, manifest, predicate_type)
                if key is not None:
                    signature(layout, about, manifest.descriptor, key)
                    _enveloped(layout, about, image, predicate_type, data, key)
                return manifest, predicate
            except ImageError as error:
                failure = error
    raise failure


def _statement(layout: StoredLayout, image: Platform, manifest: Manifest, predicate_type: str) -> tuple[bytes, Any]:
    if len(manifest.children) != 2:
        path = layout.blob_path(manifest.descriptor.digest)
        raise ImageError(f"{path}: expected an attestation of one layer, found {len(manifest.children) - 1}")
    layer = manifest.children[1]
    data, path = layout.read(layer), layout.blob_path(layer.digest)
    try:
        content = json.loads(data)
        kind, digests = content["predicateType"], [subject["digest"]["sha256"] for subject in content["subject"]]
        predicate = content["predicate"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageError(f"{path}: no in-toto statement: {error!r}") from None
    if kind != predicate_type:
        raise ImageError(f"{path}: expected a statement of type {predicate_type}, found {kind}")
    if digests != [image.descriptor.digest.removeprefix("sha256:")]:
        found = ", ".join(f"sha256:{digest}" for digest in digests)
        raise ImageError(
            f"{path}: expected a statement about {image.descriptor.digest}, found one about {found}",
            "an attestation of another image was attached to this one",
        )
    return data, predicate


def _enveloped(
    layout: StoredLayout, about: Referrers, image: Platform, predicate_type: str, data: bytes, key: PublicKey
) -> None:
    """See that an envelope by `key` holds the same statement."""
    failure = ImageError(
        f"{layout.path}: {image.descriptor.digest}: expected a DSSE envelope of {predicate_type}, found none", UNSIGNED
    )
    for envelopes in (one for one in about.get(image.descriptor.digest, ()) if one.artifact_type == DSSE):
        for layer in envelopes.children[1:]:
            if layer.annotations.get(attestations.COSIGN_PREDICATE_TYPE) == predicate_type:
                origin = str(layout.blob_path(layer.digest))
                try:
                    if attestations.open_envelope(layout.read(layer), key, origin) == data:
                        return
                    failure = ImageError(f"{origin}: expected the statement {digest_of(data)}, found another")
                except ImageError as error:
                    failure = error
    raise failure


def attestation(
    layout: StoredLayout, about: Referrers, image: Platform, predicate_type: str, key: PublicKey | None
) -> str:
    """The attestation is there, about this image, and signed twice: as a manifest and in its envelope."""
    manifest, _ = accepted(layout, about, image, predicate_type, key)
    signed = f", signed by key {key.identifier[:16]}" if key else ""
    return f"{short_type(predicate_type)} {manifest.descriptor.digest} is about this image{signed}"


def _spdx_files(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for file in document["files"]:
        for checksum in file["checksums"]:
            if checksum["algorithm"] == "SHA256":
                yield file["fileName"], checksum["checksumValue"]


def _cyclonedx_files(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for component in document["components"]:
        if component["type"] == "file":
            for checksum in component["hashes"]:
                if checksum["alg"] == "SHA-256":
                    yield component["name"], checksum["content"]
        elif "components" in component:
            yield from _cyclonedx_files(component)


BILLS_OF_MATERIALS = {SPDX: _spdx_files, CYCLONEDX: _cyclonedx_files}


def bill_of_materials(
    layout: StoredLayout, about: Referrers, image: Platform, predicate_type: str, key: PublicKey | None
) -> str:
    """The document lists exactly the files of the layers, with their digests."""
    name, where = short_type(predicate_type), f"{layout.path}: {image.descriptor.digest}"
    _, predicate = accepted(layout, about, image, predicate_type, key)
    try:
        files = BILLS_OF_MATERIALS[predicate_type](predicate)
        listed = {path.removeprefix(".").lstrip("/"): digest for path, digest in files}
    except (KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{where}: {name}: no list of files: {error!r}") from None
    found = layercontents.regular_files(layout, layout.manifest(image.descriptor))
    for problem, paths in (
        (f"in the layers, but not in {name}", found.keys() - listed.keys()),
        (f"in {name}, but not in the layers", listed.keys() - found.keys()),
    ):
        if paths:
            raise ImageError(f"{where}: {len(paths)} files are {problem}: {_first(paths)}")
    for path in sorted(found):
        if found[path] != listed[path]:
            raise ImageError(f"{where}: {path}: expected SHA-256 {listed[path]}, as {name} says, found {found[path]}")
    return f"{len(found)} files of the layers are those of {name}"


@dataclass(frozen=True, slots=True)
class Locked:
    """What images are said to be made of: the lock, and by variant the lock's groups that it is built from."""

    lock: Lock
    groups: Mapping[str, Sequence[str]]

    def materials(self, variant: str, architecture: str) -> dict[str, str]:
        """Files of the lock by name, with their SHA-256."""
        if variant not in self.groups:
            raise ImageError(f"unknown variant {variant!r}", f"known: {', '.join(self.groups)}")
        packages = evidence.materials(self.lock, self.groups[variant], architecture)
        wheels = self.lock.wheels_for(architecture)
        return {one.path.rsplit("/", 1)[-1]: one.sha256 for one in packages} | {
            one.filename: one.sha256 for one in wheels
        }


def materials(layout: StoredLayout, about: Referrers, image: Platform, key: PublicKey | None, locked: Locked) -> str:
    """The provenance names this lock, and as materials the source and exactly what the lock has for this image."""
    _, predicate = accepted(layout, about, image, PROVENANCE, key)
    where = f"{layout.path}: {image.descriptor.digest}: provenance"
    try:
        definition = predicate["buildDefinition"]
        named = definition["externalParameters"]["lock"]["sha256"]
        variant = str(definition["externalParameters"]["variant"])
        found = {str(row["name"]): str(row["digest"].get("sha256")) for row in definition["resolvedDependencies"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{where}: expected SLSA provenance v1 of our builds: {error!r}") from None
    if named != locked.lock.digest:
        hint = "check out the commit that the image is of"
        raise ImageError(f"{where}: expected the lock {locked.lock.digest}, found {named}", hint)
    found.pop(SOURCE, None)
    expected = locked.materials(variant, image.architecture)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ImageError(
                f"{where}: {name}: expected {expected.get(name, 'no such material')}, as the lock says, "
                f"found {found.get(name, 'no such material')}"
            )
    return f"{len(found)} materials are those of the lock"


def _first(names: set[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (" ..." if len(names) > SHOWN else "")
