"""Signatures in cosign's simple-signing format, as referrers of what they sign: indexes, platforms, attestations."""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image import attestations
from image.attestations import COSIGN_SIGNATURE, Statement
from image.keys import PrivateKey, PublicKey, read_private
from image.model import ImageError
from image.referrers import INDEX, Descriptor, Layer, Referrer, encode
from image.stored import Manifest, StoredLayout

SIGNATURE = "application/vnd.dev.cosign.artifact.sig.v1+json"
PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
PAYLOAD_TYPE = "cosign container image signature"
TAGS = "tags"  # in the payload's optional part: under which tags the index was signed, so that none can be moved


def payload(digest: str, tags: Sequence[str] = ()) -> bytes:
    """Say what is signed. No repository is named: the image keeps its signature wherever it is copied."""
    critical = {"identity": {"docker-reference": ""}, "image": {"docker-manifest-digest": digest}, "type": PAYLOAD_TYPE}
    return encode({"critical": critical, "optional": {TAGS: ",".join(sorted(tags))} if tags else None})


def signature(signed: Descriptor, key: PrivateKey, tags: Sequence[str] = ()) -> Referrer:
    """Sign a manifest."""
    said = payload(signed.digest, tags)
    encoded = base64.b64encode(key.sign(said)).decode()
    return Referrer(signed, SIGNATURE, (Layer(PAYLOAD, said, {COSIGN_SIGNATURE: encoded}),), typed_config=True)


def open_payload(said: bytes, encoded: str, key: PublicKey, signed: str) -> dict[str, Any] | None:
    """Give the payload's optional part if `key` signed it for the digest `signed`, else nothing."""
    try:
        if not key.verifies(base64.b64decode(encoded, validate=True), said):
            return None
        content = json.loads(said)
        critical = content["critical"]
        if critical["type"] != PAYLOAD_TYPE or critical["image"]["docker-manifest-digest"] != signed:
            return None
        optional = content.get("optional") or {}
        return optional if isinstance(optional, dict) else None
    except (binascii.Error, ValueError, KeyError, TypeError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class Platform:
    """One platform's image in a layout, and the attestations about it."""

    descriptor: Descriptor
    architecture: str
    attestations: tuple[Manifest, ...]


@dataclass(frozen=True, slots=True)
class SignedImage:
    """An image index of a layout: what there is to sign."""

    index: Descriptor
    tags: tuple[str, ...]
    platforms: tuple[Platform, ...]


def images(layout: StoredLayout) -> tuple[SignedImage, ...]:
    """List a layout's images, each once, in the order of index.json."""
    tags: dict[str, list[str]] = {}
    for tag, entry in layout.tags.items():
        tags.setdefault(entry.digest, []).append(tag)
    unique = {entry.digest: entry for entry in layout.entries if entry.media_type == INDEX}
    about = layout.referrers()
    found = []
    for digest, entry in unique.items():
        platforms = tuple(_platforms(layout.manifest(entry), about))
        found.append(SignedImage(entry, tuple(sorted(tags.get(digest, ()))), platforms))
    if not found:
        raise ImageError(f"{layout.path}: expected an image index, found none", "`make image` writes build/image")
    return tuple(found)


def _platforms(index: Manifest, about: dict[str, list[Manifest]]) -> Iterator[Platform]:
    for child, architecture in index.platforms:
        mine = [one for one in about.get(child.digest, ()) if one.artifact_type == attestations.IN_TOTO]
        yield Platform(child, architecture, tuple(mine))


def statements(layout: StoredLayout, platform: Platform) -> tuple[Statement, ...]:
    """Read a platform's statements, sorted by predicate type."""
    found = []
    for manifest in platform.attestations:
        layers = manifest.children[1:]
        if len(layers) != 1:
            raise ImageError(f"{manifest.descriptor.digest}: expected an attestation of 1 layer, found {len(layers)}")
        kind = manifest.annotations.get(attestations.PREDICATE_TYPE, "")
        title = layers[0].annotations.get(attestations.TITLE, "")
        found.append(Statement(kind, title, layout.read(layers[0])))
    return tuple(sorted(found, key=lambda one: one.predicate_type))


def referrers_to_add(layout: StoredLayout, key: PrivateKey) -> tuple[Referrer, ...]:
    """Sign everything of a layout: indexes with their tags, platforms, statements, and the manifests of those."""
    made = []
    for image in images(layout):
        made.append(signature(image.index, key, image.tags))
        for platform in image.platforms:
            made.append(signature(platform.descriptor, key))
            made += [signature(manifest.descriptor, key) for manifest in platform.attestations]
            if platform.attestations:
                envelopes = attestations.signed_set(platform.descriptor, statements(layout, platform), key)
                made += [envelopes, signature(envelopes.descriptor, key)]
    return tuple(made)


def earlier(layout: StoredLayout) -> frozenset[str]:
    """Name the referrers that an earlier signing added."""
    kinds = (SIGNATURE, attestations.DSSE)
    found = (one for about in layout.referrers().values() for one in about)
    return frozenset(one.descriptor.digest for one in found if one.artifact_type in kinds)


def sign(path: Path, key: PrivateKey) -> int:
    """Sign the layout at `path` in place of whoever signed it before, and say how many signatures there are now."""
    layout = StoredLayout(path)
    layout.check_all()  # what is signed is what was looked at
    added = referrers_to_add(layout, key)
    layout.replace(earlier(layout), added)
    return sum(referrer.artifact_type == SIGNATURE for referrer in added)


def main(argv: Sequence[str]) -> int:
    """`sign [--key PATH] [LAYOUT]`."""
    parser = argparse.ArgumentParser(prog="python -m image sign", description="Sign an image and its attestations.")
    parser.add_argument("layout", nargs="?", type=Path, default=Path("build/image"))
    parser.add_argument("--key", help="private key (PEM); the default is what MESHCNI_SIGNING_KEY holds or names")
    arguments = parser.parse_args(argv)
    key = read_private(arguments.key, os.environ)
    count = sign(arguments.layout, key)
    print(f"{arguments.layout}: {count} signatures by key {key.public.identifier[:16]}")  # noqa: T201
    return 0
