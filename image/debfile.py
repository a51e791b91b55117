"""What is in a Debian package's file, read by dpkg-deb; nothing of it is executed or unpacked to disk."""

from __future__ import annotations

import contextlib
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from image.model import ImageError


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of a package in its own order, with the bytes of regular ones."""
    with _dpkg_deb("--fsys-tarfile", path) as output:
        yield from _tar(output, path)


def control_files(path: Path) -> Mapping[str, bytes]:
    """The files of a package's control part by name: control, md5sums, conffiles, postinst, triggers."""
    with _dpkg_deb("--ctrl-tarfile", path) as output:
        files = [(member.name.removeprefix("./"), content) for member, content in _tar(output, path)]
    return {name: content for name, content in files if content is not None}


def control(path: Path) -> dict[str, str]:
    """The fields of a package's control file, in its order; lines of a long field are joined with line feeds."""
    files = control_files(path)
    if "control" not in files:
        raise _damaged(path, "it has no control file")
    return fields(files["control"].decode())


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


@contextlib.contextmanager
def _dpkg_deb(option: str, path: Path) -> Iterator[IO[bytes]]:
    """What dpkg-deb writes; it is an error when dpkg-deb ends with one after everything was read."""
    argv = ["dpkg-deb", option, str(path)]
    try:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise ImageError("dpkg-deb is missing: the image is built on a Debian machine", "run `make setup`") from error
    with process:
        output, errors = cast(IO[bytes], process.stdout), cast(IO[bytes], process.stderr)
        try:
            yield output
            while output.read(1 << 16):
                pass  # what follows the archive's last block: dpkg-deb calls a pipe that closes before it an error
        finally:
            output.close()  # dpkg-deb ends when nobody reads on
        message = errors.read().decode(errors="replace").strip()
    if process.returncode:
        raise _damaged(path, message)


def _damaged(path: Path, message: str) -> ImageError:
    return ImageError(f"{path}: not a Debian package that can be read: {message}", "remove it from the cache")
