"""OCI manifests about other manifests, as values: attestations and signatures are such referrers.

Nothing here reads or writes anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

JSON = dict[str, object]

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"


def encode(value: object) -> bytes:
    """JSON with one spelling only: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: bytes) -> str:
    """`sha256:HEX` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What an OCI document says of a blob before one opens it."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> JSON:
        """Spell the descriptor as an OCI document does."""
        value: JSON = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return value


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a referrer."""

    media_type: str
    data: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def descriptor(self) -> Descriptor:
        """Name the blob."""
        return Descriptor(self.media_type, digest_of(self.data), len(self.data), annotations=self.annotations)


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest whose `subject` is another one, with its blobs.

    The configuration is the empty object. Its media type is the artifact's type where `typed_config` is set, as tools
    from before OCI 1.1 (cosign's among them) expect.
    """

    subject: Descriptor
    artifact_type: str
    layers: Sequence[Layer]
    annotations: Mapping[str, str] = field(default_factory=dict)
    typed_config: bool = False

    @property
    def config(self) -> Layer:
        """The manifest's configuration."""
        return Layer(self.artifact_type if self.typed_config else EMPTY, b"{}")

    @property
    def manifest(self) -> bytes:
        """The manifest's bytes."""
        value: JSON = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": self.artifact_type,
            "config": self.config.descriptor.to_json(),
            "layers": [layer.descriptor.to_json() for layer in self.layers],
            "subject": Descriptor(self.subject.media_type, self.subject.digest, self.subject.size).to_json(),
        }
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return encode(value)

    @property
    def descriptor(self) -> Descriptor:
        """Name the manifest, as an index lists it."""
        manifest = self.manifest
        return Descriptor(MANIFEST, digest_of(manifest), len(manifest), self.artifact_type, self.annotations)

    @property
    def blobs(self) -> tuple[bytes, ...]:
        """Everything a store must hold: configuration, layers, then the manifest that names them."""
        return (self.config.data, *(layer.data for layer in self.layers), self.manifest)
