"""An OCI layout: written beside its final place and exchanged for it as a whole."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from image.model import ImageError
from image.referrers import INDEX, JSON, MANIFEST, REF_NAME, Descriptor, digest_of, encode

CONFIG = "application/vnd.oci.image.config.v1+json"
CPU_VARIANTS = {"arm64": "v8"}  # the platform's variant, which runtimes compare
_NEW, _OLD = ".new", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


class LayoutWriter:
    """Writes blobs into the folder `path`; `finish` makes it a layout. Use `replacing` to get one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tagged: list[Descriptor] = []
        (path / "blobs" / "sha256").mkdir(parents=True)

    def add_blob(self, media_type: str, data: bytes, annotations: Mapping[str, str] | None = None) -> Descriptor:
        """Store `data` and name it."""
        digest = digest_of(data)
        self._write(self.path / "blobs" / "sha256" / digest.removeprefix("sha256:"), data)
        return Descriptor(media_type, digest, len(data), annotations=annotations or {})

    def add_manifest(self, config: JSON, layers: Sequence[Descriptor], annotations: Mapping[str, str]) -> Descriptor:
        """Store an image's configuration and its manifest."""
        content: JSON = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add_blob(CONFIG, encode(config)).to_json(),
            "layers": [layer.to_json() for layer in layers],
            "annotations": dict(annotations),
        }
        return self.add_blob(MANIFEST, encode(content))

    def add_index(
        self, manifests: Mapping[str, Descriptor], annotations: Mapping[str, str], tags: Sequence[str]
    ) -> Descriptor:
        """Store the index of an image's manifests by architecture, and give it `tags`."""
        content: JSON = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{**one.to_json(), "platform": platform(name)} for name, one in sorted(manifests.items())],
            "annotations": dict(annotations),
        }
        index = self.add_blob(INDEX, encode(content))
        self._tagged += [Descriptor(INDEX, index.digest, index.size, annotations={REF_NAME: tag}) for tag in tags]
        return index

    def finish(self) -> None:
        """Write what makes the folder a layout."""
        index: JSON = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [one.to_json() for one in self._tagged],
        }
        self._write(self.path / "index.json", encode(index))
        self._write(self.path / "oci-layout", encode({"imageLayoutVersion": "1.0.0"}))

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.write_bytes(data)
            path.chmod(0o644)
        except OSError as error:
            raise ImageError(
                f"{path.name}: cannot be written ({len(data)} bytes): {error.strerror}",
                f"free some space below {self.path.parent}; nothing was left under the final name",
            ) from error


def platform(architecture: str) -> JSON:
    """An OCI platform."""
    variant = CPU_VARIANTS.get(architecture)
    return {"os": "linux", "architecture": architecture, **({"variant": variant} if variant else {})}


@contextmanager
def replacing(output: Path) -> Iterator[LayoutWriter]:
    """A writer whose folder takes the place of `output` at the end; after an error `output` is as it was.

    A process that is killed leaves either the old layout or the new one, and perhaps a folder, which the next removes.
    """
    new, old = output.with_name(output.name + _NEW), output.with_name(output.name + _OLD)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output.parent, output.name):
            _recover(output, new, old)
            try:
                yield LayoutWriter(new)
                new.chmod(0o755)
                _exchange(new, output, old)
            finally:
                shutil.rmtree(new, ignore_errors=True)
                if output.exists():
                    shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ImageError(
            f"{error.filename or output}: {error.strerror}", "nothing was left under the final name"
        ) from error


def _recover(output: Path, new: Path, old: Path) -> None:
    """Clear what a killed build left."""
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists() and not (output / "oci-layout").is_file() and any(output.iterdir()):
        raise ImageError(
            f"{output}: expected nothing or an OCI layout there, found something else", "name another --output"
        )


def _exchange(new: Path, output: Path, old: Path) -> None:
    """Put `new` under the name of `output`; what was there ends up as `new` or `old`."""
    if not output.exists():
        new.rename(output)
    elif not _renamed_both(new, output):  # a file system without exchange
        output.rename(old)
        new.rename(output)


def _renamed_both(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One build at a time for one output; the lock ends with its process."""
    with open(folder / f".{name}.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
