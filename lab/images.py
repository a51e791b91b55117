"""Images of one static program, compiled here, wrapped as OCI archives, kept in build/lab; each sandbox has `pause`."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "lab"
PAUSE_IMAGE = "meshcni.test/pause:1"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def pause_archive() -> Path:
    """Return the OCI archive of the pause image, made when there is none yet or its source is newer."""
    return static_archive(PAUSE_IMAGE, HERE / "pause.c")


def static_archive(name: str, source: Path) -> Path:
    """Return the OCI archive of the image `name` with the program of a C source as its only file and entry point."""
    archive = BUILD / f"{source.stem}.tar"
    if archive.exists() and archive.stat().st_mtime > source.stat().st_mtime:
        return archive
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:  # somebody else may be at it too
        program, partial = Path(folder) / source.stem, Path(folder) / archive.name
        subprocess.run(["gcc", "-Os", "-static", "-s", "-o", program, source], check=True)
        partial.write_bytes(oci_archive(name, {source.stem: program.read_bytes()}, [f"/{source.stem}"]))
        partial.rename(archive)
    return archive


def oci_archive(name: str, files: dict[str, bytes], command: list[str]) -> bytes:
    """Return an OCI image layout as a tar: one layer with executable `files` and `command` as entry point."""
    blobs: dict[str, bytes] = {}

    def blob(media_type: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def document(media_type: str, value: object) -> dict[str, object]:
        return blob(media_type, json.dumps(value).encode())

    layer = blob("application/vnd.oci.image.layer.v1.tar", tar(files, 0o755))
    configuration = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": command},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": document("application/vnd.oci.image.config.v1+json", configuration),
        "layers": [layer],
    }
    entry = document("application/vnd.oci.image.manifest.v1+json", manifest)
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    return tar(blobs, 0o644)


def tar(files: dict[str, bytes], mode: int) -> bytes:
    """Return `files` (name to content) as a tar archive, without times or owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
