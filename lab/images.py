"""The one image a sandbox needs: a static `pause`, compiled here and wrapped as an OCI archive, kept in build/lab."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "lab"
PAUSE_IMAGE = "meshcni.test/pause:1"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def pause_archive() -> Path:
    """Return the OCI archive of the pause image, made when there is none yet or its source is newer."""
    source, archive = HERE / "pause.c", BUILD / "pause.tar"
    if archive.exists() and archive.stat().st_mtime > source.stat().st_mtime:
        return archive
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "pause"
    subprocess.run(["gcc", "-Os", "-static", "-s", "-o", program, source], check=True)
    partial = archive.with_suffix(".partial")
    partial.write_bytes(oci_archive(PAUSE_IMAGE, {"pause": program.read_bytes()}, ["/pause"]))
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
