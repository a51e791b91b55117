"""An image from an OCI layout folder, such as `make image` makes, as an archive of one platform for a runtime."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.images import ARCHITECTURES
from lab.node import LabError

LAYOUT = Path(os.environ.get("MESHCNI_TEST_IMAGE") or Path(__file__).parent.parent / "build" / "image")
REF_NAME = "org.opencontainers.image.ref.name"
REPOSITORY = "meshcni.test/install-cni"
DEV = "-dev"


@dataclass(frozen=True, slots=True)
class Image:
    """One platform of one tag of a layout."""

    layout: Path
    tag: str
    architecture: str
    manifest: Mapping[str, Any]
    descriptor: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name it gets where it is imported."""
        return f"{REPOSITORY}:{self.tag}"

    @property
    def config(self) -> dict[str, Any]:
        """The image's configuration."""
        found: dict[str, Any] = read_json(self.layout, self.manifest["config"])["config"]
        return found

    @property
    def layers(self) -> list[Path]:
        """The files of its layers, lowest first."""
        return [blob_path(self.layout, layer["digest"]) for layer in self.manifest["layers"]]

    def write_archive(self, target: Path) -> Path:
        """Write it as an OCI archive of this platform alone."""
        blobs = [self.descriptor, self.manifest["config"], *self.manifest["layers"]]
        entry = {**self.descriptor, "annotations": {"io.containerd.image.name": self.name, REF_NAME: self.name}}
        with tarfile.open(target, "w") as archive:
            add(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
            add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
            for digest in dict.fromkeys(blob["digest"] for blob in blobs):
                archive.add(blob_path(self.layout, digest), f"blobs/{digest.replace(':', '/')}")
        return target

    def unpack(self, target: Path) -> Path:
        """Unpack its layers into a folder, lowest first; a layer of ours removes nothing of those below it."""
        target.mkdir(parents=True, exist_ok=True)
        for layer in self.layers:
            subprocess.run(["tar", "-C", target, "-xpf", layer, "--xattrs-include=security.*"], check=True)
        return target


def find_image(*, dev: bool = False, architecture: str = "", layout: Path | None = None) -> Image:
    """Return the runtime or the dev variant for an architecture, this machine's by default."""
    folder = layout or LAYOUT
    wanted = architecture or ARCHITECTURES.get(platform.machine(), platform.machine())
    if not (folder / "index.json").exists():
        raise LabError(f"no image in {folder} (make image; MESHCNI_TEST_IMAGE names another layout)")
    for tag, descriptor in tagged(folder):
        if tag.endswith(DEV) != dev:
            continue
        for one in read_json(folder, descriptor)["manifests"]:
            if one.get("platform", {}).get("architecture") == wanted:
                return Image(folder, tag, wanted, read_json(folder, one), one)
    raise LabError(f"{folder} has no {'dev' if dev else 'runtime'} image for {wanted}")


def tagged(layout: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the tags of a layout with the descriptors of their image indexes."""
    for descriptor in json.loads((layout / "index.json").read_text())["manifests"]:
        tag = descriptor.get("annotations", {}).get(REF_NAME, "")
        if tag and descriptor["mediaType"].endswith("image.index.v1+json"):
            yield tag, descriptor


def blob_path(layout: Path, digest: str) -> Path:
    """Return the file of a blob."""
    return layout / "blobs" / digest.replace(":", "/")


def read_json(layout: Path, descriptor: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Read a JSON blob."""
    return json.loads(blob_path(layout, descriptor["digest"]).read_text())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
