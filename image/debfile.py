"""What is in a Debian package's file, read by dpkg-deb; nothing of it is executed or unpacked to disk."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from image.model import ImageError


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of a package in its own order, with the bytes of regular ones."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        output = cast(IO[bytes], process.stdout)
        try:
            yield from _tar(output, path)
            while output.read(1 << 16):
                pass  # what follows the archive's last block; dpkg-deb calls a pipe that closes before it an error
        finally:
            output.close()
        message = cast(IO[bytes], process.stderr).read().decode(errors="replace").strip()
    if process.returncode:
        raise _damaged(path, message)


def control_files(path: Path) -> Mapping[str, bytes]:
    """The files of a package's control part by name: control, md5sums, conffiles, postinst, triggers."""
    data = _dpkg_deb("--ctrl-tarfile", path)
    found = {}
    for member, content in _tar(io.BytesIO(data), path):
        if content is not None:
            found[member.name.removeprefix("./")] = content
    return found


def control(path: Path) -> dict[str, str]:
    """The fields of a package's control file, in its order; lines of a long field are joined with line feeds."""
    return fields(control_files(path)["control"].decode())


def fields(stanza: str) -> dict[str, str]:
    """Read one stanza of Debian's control format."""
    found: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith((" ", "\t")):
            found[name] += "\n" + line
        elif line.strip():
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def _tar(stream: IO[bytes], path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isreg() else None
                yield member, source.read() if source else None
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _dpkg_deb(option: str, path: Path) -> bytes:
    result = subprocess.run(["dpkg-deb", option, str(path)], capture_output=True, check=False)
    if result.returncode:
        raise _damaged(path, result.stderr.decode(errors="replace").strip())
    return result.stdout


def _damaged(path: Path, message: str) -> ImageError:
    return ImageError(f"{path}: not a Debian package that can be read: {message}", "remove it from the cache")
