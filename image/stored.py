"""An OCI layout that is there already: every blob is checked when it is read, referrers are added all or none."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image.model import ImageError
from image.referrers import INDEX, MANIFEST, REF_NAME, Descriptor, Referrer, digest_of, encode

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
CHUNK_BYTES = 1 << 20
AGAIN = "the layout is damaged or was changed: fetch it again, or build it with `make image`"


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest or index, read and checked."""

    descriptor: Descriptor
    content: Mapping[str, Any]

    @property
    def children(self) -> tuple[Descriptor, ...]:
        """Everything that the document names below itself; its subject is not below it."""
        config = self.content.get("config")
        named = [*([] if config is None else [config]), *self._list("layers"), *self._list("manifests")]
        return tuple(descriptor(one, self.descriptor.digest) for one in named)

    def _list(self, name: str) -> list[Any]:
        found = self.content.get(name, [])
        if not isinstance(found, list):
            raise ImageError(f"{self.descriptor.digest}: {name}: expected a list, found {str(found)[:120]}", AGAIN)
        return found

    @property
    def platforms(self) -> tuple[tuple[Descriptor, str], ...]:
        """An index's images, each with its architecture."""
        rows = self._list("manifests")
        platforms = [row.get("platform") if isinstance(row, dict) else None for row in rows]
        named = [str(one.get("architecture", "")) if isinstance(one, dict) else "" for one in platforms]
        return tuple((descriptor(row, self.descriptor.digest), name) for row, name in zip(rows, named, strict=True))

    @property
    def artifact_type(self) -> str:
        """What kind of artifact this is; not every tool that copies a layout repeats it in index.json."""
        config = self.content.get("config")
        configured = config.get("mediaType", "") if isinstance(config, dict) else ""
        return str(self.content.get("artifactType") or configured)

    @property
    def annotations(self) -> Mapping[str, str]:
        """The document's own annotations."""
        found = self.content.get("annotations")
        return found if isinstance(found, dict) else {}

    @property
    def subject(self) -> str:
        """Digest of the manifest that this one is about, or nothing."""
        found = self.content.get("subject")
        return descriptor(found, self.descriptor.digest).digest if found is not None else ""


def descriptor(value: object, origin: str) -> Descriptor:
    """Read a descriptor of the document `origin`."""
    fields = value if isinstance(value, dict) else {}
    annotations = fields.get("annotations") or {}
    match fields:
        case {"mediaType": str(media_type), "digest": str(digest), "size": int(size)} if DIGEST.fullmatch(digest):
            if isinstance(annotations, dict):
                return Descriptor(media_type, digest, size, str(fields.get("artifactType", "")), annotations)
    raise ImageError(
        f"{origin}: expected a descriptor with mediaType, digest and size, found {str(value)[:120]}", AGAIN
    )


class StoredLayout:
    """The OCI layout at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        marker = self._document(path / "oci-layout")
        if marker.get("imageLayoutVersion") != "1.0.0":
            raise ImageError(
                f"{path / 'oci-layout'}: expected imageLayoutVersion 1.0.0, found {str(marker)[:120]}", AGAIN
            )

    def _document(self, path: Path) -> Mapping[str, Any]:
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ImageError(f"{path}: missing; expected an OCI layout", "`make image` writes build/image") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ImageError(f"{path}: {error}", AGAIN) from None
        if not isinstance(value, dict):
            raise ImageError(f"{path}: expected a JSON object, found {str(value)[:120]}", AGAIN)
        return value

    @property
    def entries(self) -> tuple[Descriptor, ...]:
        """What index.json names: tagged images and untagged referrers."""
        path = self.path / "index.json"
        found = self._document(path).get("manifests")
        if not isinstance(found, list):
            raise ImageError(f"{path}: expected a list of manifests, found {str(found)[:120]}", AGAIN)
        return tuple(descriptor(one, str(path)) for one in found)

    @property
    def tags(self) -> dict[str, Descriptor]:
        """The layout's images by tag."""
        found: dict[str, Descriptor] = {}
        for entry in self.entries:
            tag = entry.annotations.get(REF_NAME)
            if tag and found.setdefault(tag, entry).digest != entry.digest:
                raise ImageError(f"{self.path / 'index.json'}: two images have the tag {tag}", AGAIN)
        return found

    def blob_path(self, digest: str) -> Path:
        """Say where a blob is."""
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def check(self, blob: Descriptor) -> None:
        """Compare a blob with what names it."""
        path = self.blob_path(blob.digest)
        try:
            size = path.stat().st_size
            if size != blob.size:
                raise ImageError(f"{path}: expected {blob.size} bytes, found {size}", AGAIN)
            with path.open("rb") as file:
                found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise ImageError(f"{path}: missing; expected {blob.media_type} of {blob.size} bytes", AGAIN) from None
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}", AGAIN) from None
        if found != blob.digest:
            raise ImageError(f"{path}: expected {blob.digest}, found {found}", AGAIN)

    def read(self, blob: Descriptor) -> bytes:
        """Read a blob that is what its name says."""
        self.check(blob)
        data = self.blob_path(blob.digest).read_bytes()
        if digest_of(data) != blob.digest:
            raise ImageError(f"{self.blob_path(blob.digest)}: changed while it was read", AGAIN)
        return data

    def document(self, named: Descriptor) -> Mapping[str, Any]:
        """Read a blob that is a JSON object."""
        try:
            content = json.loads(self.read(named))
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{self.blob_path(named.digest)}: no JSON: {error}", AGAIN) from None
        if not isinstance(content, dict):
            raise ImageError(
                f"{self.blob_path(named.digest)}: expected a JSON object, found {str(content)[:120]}", AGAIN
            )
        return content

    def manifest(self, named: Descriptor) -> Manifest:
        """Read an image manifest or index."""
        if named.media_type not in (MANIFEST, INDEX):
            raise ImageError(
                f"{self.path}: {named.digest}: expected an image or an index, found {named.media_type}", AGAIN
            )
        content = self.document(named)
        if content.get("mediaType", named.media_type) != named.media_type:
            raise ImageError(f"{self.blob_path(named.digest)}: expected a document of type {named.media_type}", AGAIN)
        return Manifest(named, content)

    def below(self, named: Descriptor) -> Iterator[Descriptor]:
        """Walk over `named` and all that it names, each as often as it is named."""
        yield named
        if named.media_type in (MANIFEST, INDEX):
            for child in self.manifest(named).children:
                yield from self.below(child)

    def reachable(self) -> dict[str, Descriptor]:
        """Everything that index.json leads to, by digest."""
        return {found.digest: found for entry in self.entries for found in self.below(entry)}

    def referrers(self) -> dict[str, list[Manifest]]:
        """The layout's referrers by the digest of what they are about, each once, sorted by digest."""
        found: dict[str, list[Manifest]] = {}
        unique = {entry.digest: entry for entry in self.entries if entry.media_type == MANIFEST}
        for _, entry in sorted(unique.items()):
            manifest = self.manifest(entry)
            if manifest.subject:
                found.setdefault(manifest.subject, []).append(manifest)
        return found

    def check_all(self) -> int:
        """Compare everything that index.json leads to, and whatever else lies among the blobs, with its name; count."""
        named = self.reachable()
        for blob in named.values():
            self.check(blob)
        for path in sorted((self.path / "blobs" / "sha256").iterdir()):
            digest = f"sha256:{path.name}"
            if digest not in named:
                self.check(Descriptor("a blob that nothing names", digest, path.stat().st_size))
                named[digest] = Descriptor("", digest, 0)
        return len(named)

    def replace(self, gone: frozenset[str], added: Sequence[Referrer]) -> None:
        """Drop the referrers with a digest in `gone` and add others, all or none: index.json is renamed in last."""
        with self._locked():
            before = self.reachable()
            kept = [entry for entry in self.entries if entry.digest not in gone]
            new = {referrer.descriptor.digest: referrer.descriptor for referrer in added}
            entries = [entry for entry in kept if entry.digest not in new] + list(new.values())
            content = {**self._document(self.path / "index.json"), "manifests": [entry.to_json() for entry in entries]}
            written: list[Path] = []
            try:
                for data in {digest_of(blob): blob for referrer in added for blob in referrer.blobs}.items():
                    written += self._store(*data)
                self._write(self.path / "index.json", encode(content))
            except BaseException as error:
                for path in written:
                    path.unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise ImageError(f"{self.path}: {error.strerror}; the layout is as it was before") from None
                raise
            for digest in before.keys() - self.reachable().keys():
                self.blob_path(digest).unlink(missing_ok=True)

    def _store(self, digest: str, data: bytes) -> list[Path]:
        path = self.blob_path(digest)
        if path.exists():
            return []
        self._write(path, data)
        return [path]

    def _write(self, path: Path, data: bytes) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=".new-")
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)
