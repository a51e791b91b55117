"""A small image in an OCI layout, made by hand: two variants of two platforms, with attestations."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from image.model import Subject
from image.referrers import INDEX, MANIFEST, REF_NAME, Descriptor, Referrer, digest_of, encode

from image import attestations

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CREATED = datetime(2026, 1, 1, tzinfo=UTC)
RUNTIME_TAGS = ("1", "1.30", "1.30.3")
DEV_TAGS = ("1-dev", "1.30-dev")


def sha256(data: bytes) -> str:
    return digest_of(data).removeprefix("sha256:")


def tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


class SmallLayout:
    """Writes blobs as it makes them, index.json at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[object] = []
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, media_type: str, data: bytes) -> Descriptor:
        digest = digest_of(data)
        (self.path / "blobs" / "sha256" / sha256(data)).write_bytes(data)
        return Descriptor(media_type, digest, len(data))

    def platform(self, architecture: str, files: Mapping[str, bytes]) -> Descriptor:
        plain = tar(files)
        layer = self.blob(LAYER, gzip.compress(plain, mtime=0))
        config = self.blob(
            CONFIG,
            encode(
                {
                    "architecture": architecture,
                    "os": "linux",
                    "config": {},
                    "rootfs": {"type": "layers", "diff_ids": [digest_of(plain)]},
                }
            ),
        )
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.to_json(), "layers": [layer.to_json()]}
        return self.blob(MANIFEST, encode(document))

    def referrer(self, referrer: Referrer) -> None:
        for blob in referrer.blobs:
            self.blob("", blob)
        self.entries.append(referrer.descriptor.to_json())

    def index(self, platforms: Mapping[str, Descriptor], tags: tuple[str, ...]) -> Descriptor:
        manifests = [
            {**platform.to_json(), "platform": {"architecture": architecture, "os": "linux"}}
            for architecture, platform in platforms.items()
        ]
        index = self.blob(INDEX, encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}))
        self.entries += [{**index.to_json(), "annotations": {REF_NAME: tag}} for tag in tags]
        return index

    def close(self) -> None:
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.entries}
        (self.path / "index.json").write_bytes(encode(document))


def predicates(files: Mapping[str, bytes]) -> dict[str, tuple[str, object]]:
    """Documents that are true of `files`, with nothing in them that the checks do not read."""
    spdx = {
        "spdxVersion": "SPDX-2.3",
        "files": [
            {"fileName": f"./{name}", "checksums": [{"algorithm": "SHA256", "checksumValue": sha256(data)}]}
            for name, data in files.items()
        ],
    }
    cyclonedx = {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": []}
    return {
        attestations.SPDX: ("sbom.spdx", spdx),
        attestations.CYCLONEDX: ("sbom.cyclonedx", cyclonedx),
        attestations.PROVENANCE: ("provenance", {"buildDefinition": {"resolvedDependencies": []}}),
        attestations.OPENVEX: ("vex", {"@context": attestations.OPENVEX, "statements": []}),
    }


def write(path: Path, mark: str = "") -> Path:
    """Write the layout; `mark` makes another image of it."""
    layout = SmallLayout(path)
    referrers = []
    for variant, tags in (("runtime", RUNTIME_TAGS), ("dev", DEV_TAGS)):
        platforms = {}
        for architecture in ("amd64", "arm64"):
            files = {"etc/hostname": f"{variant} {architecture} {mark}".encode(), "usr/bin/tool": bytes(1000)}
            platform = layout.platform(architecture, files)
            subject = Subject("meshcni/istio-install-cni", platform.digest, architecture, variant, "1.30.3", CREATED)
            referrers += attestations.attestations(subject, platform, predicates(files))
            platforms[architecture] = platform
        layout.index(platforms, tags)
    for referrer in referrers:
        layout.referrer(referrer)
    layout.close()
    return path


def index_json(path: Path) -> dict[str, object]:
    value = json.loads((path / "index.json").read_bytes())
    assert isinstance(value, dict)
    return value
