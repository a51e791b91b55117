"""Statements about an image: each is a referrer of the platform's manifest.

The statement is attached as it is, so that an image has the same referrers whoever signs it, or nobody. Signing adds
one more referrer with the same statements in DSSE envelopes, in the form that cosign reads attestations from.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from securesystemslib.dsse import Envelope

from image.keys import PrivateKey, PublicKey
from image.model import ImageError, Subject
from image.referrers import Descriptor, Layer, Referrer, encode

STATEMENT = "https://in-toto.io/Statement/v1"
IN_TOTO = "application/vnd.in-toto+json"
DSSE = "application/vnd.dsse.envelope.v1+json"
PREDICATE_TYPE = "in-toto.io/predicate-type"  # annotation, as BuildKit and hardened images have it
COSIGN_PREDICATE_TYPE = "predicateType"  # annotation of a layer, by which cosign chooses
COSIGN_SIGNATURE = "dev.cosignproject.cosign/signature"  # annotation of a layer
TITLE = "org.opencontainers.image.title"

SPDX = "https://spdx.dev/Document"
CYCLONEDX = "https://cyclonedx.org/bom/v1.6"
PROVENANCE = "https://slsa.dev/provenance/v1"
OPENVEX = "https://openvex.dev/ns/v0.2.0"
SHORT_TYPES = {SPDX: "SPDX", CYCLONEDX: "CycloneDX", PROVENANCE: "SLSA provenance", OPENVEX: "OpenVEX"}
DECLARED = tuple(SHORT_TYPES)  # every platform of every variant has these

PLAIN_SUFFIX, SIGNED_SUFFIX = ".intoto.json", ".dsse.json"


def statement(subject: Subject, predicate_type: str, predicate: object) -> bytes:
    """Say `predicate` of the image `subject`."""
    name, _, hexadecimal = subject.digest.partition(":")
    return encode(
        {
            "_type": STATEMENT,
            "subject": [{"name": subject.name, "digest": {name: hexadecimal}}],
            "predicateType": predicate_type,
            "predicate": predicate,
        }
    )


def attestations(
    subject: Subject, manifest: Descriptor, documents: Mapping[str, tuple[str, object]]
) -> tuple[Referrer, ...]:
    """Make a referrer of `manifest` for each document: by predicate type, a name for its file and the predicate."""
    return tuple(
        _attestation(manifest, kind, name, statement(subject, kind, predicate))
        for kind, (name, predicate) in sorted(documents.items())
    )


def _attestation(manifest: Descriptor, kind: str, name: str, data: bytes) -> Referrer:
    layer = Layer(IN_TOTO, data, {PREDICATE_TYPE: kind, TITLE: name + PLAIN_SUFFIX})
    return Referrer(manifest, IN_TOTO, (layer,), {PREDICATE_TYPE: kind})


def short_type(predicate_type: str) -> str:
    """Name a predicate type for people."""
    return SHORT_TYPES.get(predicate_type, predicate_type)


def envelope(data: bytes, key: PrivateKey) -> bytes:
    """Sign a statement."""
    unsigned = Envelope(data, IN_TOTO, {})
    signature = base64.b64encode(key.sign(unsigned.pae())).decode()
    return encode({**unsigned.to_dict(), "signatures": [{"keyid": key.public.identifier, "sig": signature}]})


def open_envelope(data: bytes, key: PublicKey, origin: str) -> bytes:
    """Give the statement in an envelope that `key` signed."""
    try:
        found = Envelope.from_dict(json.loads(data))
        signatures = [bytes.fromhex(signature.signature) for signature in found.signatures.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"{origin}: no DSSE envelope: {error!r}") from None
    if found.payload_type != IN_TOTO:
        raise ImageError(f"{origin}: expected a payload of type {IN_TOTO}, found {found.payload_type}")
    if not any(key.verifies(signature, found.pae()) for signature in signatures):
        raise ImageError(f"{origin}: expected a signature by key {key.identifier[:16]}, found none that it verifies")
    return found.payload


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement in a layout, with the predicate type and the file name that it is announced with."""

    predicate_type: str
    title: str
    data: bytes


def signed_set(manifest: Descriptor, statements: Sequence[Statement], key: PrivateKey) -> Referrer:
    """Make the referrer of `manifest` that holds `statements` in envelopes by `key`."""
    return Referrer(manifest, DSSE, [_enveloped(one, key) for one in statements], typed_config=True)


def _enveloped(said: Statement, key: PrivateKey) -> Layer:
    annotations = {
        COSIGN_PREDICATE_TYPE: said.predicate_type,
        COSIGN_SIGNATURE: "",  # cosign asks for the annotation; the signature is in the envelope
        TITLE: said.title.removesuffix(PLAIN_SUFFIX) + SIGNED_SUFFIX,
    }
    return Layer(DSSE, envelope(said.data, key), annotations)
