"""A small image in an OCI layout, made by hand: two variants of two platforms, with attestations."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from image.lockfile import Lock, render
from image.model import DebPackage, Subject, Wheel
from image.referrers import INDEX, MANIFEST, REF_NAME, Descriptor, Referrer, digest_of, encode

from image import attestations

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
Files = list[dict[str, object]]  # of an SPDX document
FILES: Mapping[str, bytes] = {"etc/hostname": b"", "usr/bin/tool": bytes(1000)}
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

    def platform(
        self, architecture: str, files: Mapping[str, bytes], *, user: str = "", level: int = 9, diff_id: str = ""
    ) -> Descriptor:
        plain = tar(files)
        layer = self.blob(LAYER, gzip.compress(plain, level, mtime=0))
        config = self.blob(
            CONFIG,
            encode(
                {
                    "architecture": architecture,
                    "os": "linux",
                    "config": {"User": user},
                    "rootfs": {"type": "layers", "diff_ids": [diff_id or digest_of(plain)]},
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


def package(name: str, architecture: str) -> DebPackage:
    path = f"pool/main/{name[0]}/{name}/{name}_1_{architecture}.deb"
    return DebPackage(name, "1", architecture, "debian", path, sha256(path.encode()), 1, name, "1")


PACKAGES = tuple(package(name, one) for name in ("base", "shell") for one in ("amd64", "arm64"))
WHEEL = Wheel("wheel", "1", "all", "wheel-1-py3-none-any.whl", sha256(b"wheel"), 1)
LOCK = Lock(
    CREATED,
    ("trixie",),
    PACKAGES,
    (WHEEL,),
    {
        f"{variant}/{one}": tuple(f"{name}:{one}" for name in names)
        for variant, names in (("runtime", ["base"]), ("dev", ["shell"]))
        for one in ("amd64", "arm64")
    },
)


def predicates(files: Mapping[str, bytes], architecture: str, variant: str) -> dict[str, tuple[str, object]]:
    """Documents that are true of `files`, with little more in them than the checks read."""
    spdx = {
        "spdxVersion": "SPDX-2.3",
        "files": [
            {"fileName": f"./{name}", "checksums": [{"algorithm": "SHA256", "checksumValue": sha256(data)}]}
            for name, data in files.items()
        ],
    }
    cyclonedx = [
        {"type": "file", "name": f"/{name}", "hashes": [{"alg": "SHA-256", "content": sha256(data)}]}
        for name, data in files.items()
    ]
    debs = LOCK.group(f"runtime/{architecture}") + (LOCK.group(f"dev/{architecture}") if variant == "dev" else ())
    materials = {one.path.rsplit("/", 1)[-1]: one.sha256 for one in debs} | {WHEEL.filename: WHEEL.sha256}
    provenance = {
        "buildDefinition": {
            "externalParameters": {"lock": {"sha256": LOCK.digest}, "variant": variant},
            "resolvedDependencies": [
                {"name": "source", "digest": {"gitCommit": "0" * 40}},
                *({"name": name, "digest": {"sha256": digest}} for name, digest in materials.items()),
            ],
        }
    }
    return {
        attestations.SPDX: ("sbom.spdx", spdx),
        attestations.CYCLONEDX: (
            "sbom.cyclonedx",
            {
                "bomFormat": "CycloneDX",
                "specVersion": "1.6",
                "components": [{"type": "library", "components": cyclonedx}],
            },
        ),
        attestations.PROVENANCE: ("provenance", provenance),
        attestations.OPENVEX: ("vex", {"@context": attestations.OPENVEX, "statements": []}),
    }


def write(
    path: Path,
    mark: str = "",
    change: Callable[[Referrer], Referrer | None] = lambda one: one,
    files: Mapping[str, bytes] | None = None,
    **properties: Any,
) -> Path:
    """Write the layout; `mark` makes another image of it, `change` alters or leaves out attestations.

    With `files` there is one variant only, of these. `properties` are of a platform.
    """
    layout = SmallLayout(path)
    referrers: list[Referrer] = []
    variants = {"runtime": RUNTIME_TAGS} if files else {"runtime": RUNTIME_TAGS, "dev": DEV_TAGS}
    for variant, tags in variants.items():
        platforms = {}
        for architecture in ("amd64", "arm64"):
            content = files or {**FILES, "etc/hostname": f"{variant} {architecture} {mark}".encode()}
            platform = layout.platform(architecture, content, **properties)
            subject = Subject("meshcni/istio-install-cni", platform.digest, architecture, variant, "1.30.3", CREATED)
            referrers += attestations.attestations(subject, platform, predicates(content, architecture, variant))
            platforms[architecture] = platform
        layout.index(platforms, tags)
    for referrer in filter(None, map(change, referrers)):
        layout.referrer(referrer)
    layout.close()
    return path


def index_json(path: Path) -> dict[str, Any]:
    value = json.loads((path / "index.json").read_bytes())
    assert isinstance(value, dict)
    return value


def blob(path: Path, digest: str) -> Path:
    return path / "blobs" / "sha256" / digest.removeprefix("sha256:")


def platform_digest(path: Path, tag: str, architecture: str) -> str:
    """Read one platform's digest without any code of the image's builder."""
    index = next(one for one in index_json(path)["manifests"] if one.get("annotations", {}).get(REF_NAME) == tag)
    platforms = json.loads(blob(path, index["digest"]).read_bytes())["manifests"]
    return str(next(one["digest"] for one in platforms if one["platform"]["architecture"] == architecture))


def state(path: Path) -> dict[str, bytes]:
    """Everything in a layout's folder."""
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


def write_lock(path: Path) -> Path:
    path.write_text(render(LOCK))
    return path
