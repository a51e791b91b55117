"""Builds every variant of the image for every architecture, and writes them as one OCI layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from image import binaries, layer, layout, rootfs, unpack
from image.definition import Definition, Variant
from image.fetch import fetch, fetch_wheels
from image.layout import LayoutWriter
from image.lockfile import Lock
from image.model import ARCHITECTURES, Contents, Entry, EntryKind, Subject
from image.referrers import JSON, Descriptor, digest_of
from image.rootfs import Parts
from image.toolchain import Toolchain

PREFIX = "io.meshcni.image."
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_KEPT_CACHES = ("debs", "wheels")  # what came from outside is checked by hash whenever it is used


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """One platform's image in the layout."""

    subject: Subject
    contents: Contents
    manifest: Descriptor
    tags: tuple[str, ...]


Finish = Callable[[LayoutWriter, Sequence[BuiltImage]], None]


@dataclass(frozen=True, slots=True)
class Builder:
    """What a build starts from. `repository` is the checkout whose code goes in, `cache` holds what is kept."""

    definition: Definition
    lock: Lock
    repository: Path
    cache: Path

    def build(self, output: Path, variants: Sequence[str] = (), finish: Finish | None = None) -> tuple[BuiltImage, ...]:
        """Build `variants` (all of them by default) into the layout `output`, which appears whole or not at all.

        `finish` may add to the layout before it gets its name.
        """
        chosen = [self.definition.variant(name) for name in variants or self.definition.variants]
        with layout.replacing(output) as writer:
            parts = {architecture: self._parts(architecture) for architecture in ARCHITECTURES}
            built = tuple(one for variant in chosen for one in self._variant(writer, variant, parts))
            writer.finish()
            if finish:
                finish(writer, built)
        return built

    @property
    def _toolchain(self) -> Toolchain:
        return Toolchain(self.lock, self.cache)

    def _parts(self, architecture: str) -> Parts:
        groups = sorted({group for variant in self.definition.variants.values() for group in variant.packages})
        listed = {group: self.lock.group(f"{group}/{architecture}") for group in groups}
        toolchain = self._toolchain
        executables = binaries.build(toolchain, architecture, self.repository)
        linked = {one for made in (executables.plugin, executables.launcher, executables.trampoline) for one in made.linked}
        packages = {package for found in listed.values() for package in found} | linked
        unpacked = unpack.debs(fetch(packages, self.cache))
        return Parts(
            architecture=architecture,
            debs={group: [unpacked[package] for package in found] for group, found in listed.items()},
            linked={package: unpacked[package] for package in linked},
            wheels=fetch_wheels(self.lock.wheels_for(architecture), self.cache),
            binaries=executables,
            own_code=rootfs.own_code(self.repository / "src"),
            own_licence=(self.repository / "LICENSE").read_bytes(),
            compile=lambda files: binaries.compile_python(toolchain, files),
        )

    def _variant(self, writer: LayoutWriter, variant: Variant, parts: Mapping[str, Parts]) -> Iterator[BuiltImage]:
        tags = self.definition.tags(variant)
        annotations = self._annotations(variant)
        made: dict[str, tuple[Descriptor, Contents]] = {}
        for architecture in ARCHITECTURES:
            contents, layers = self._layers(variant, parts[architecture])
            blobs = [self._add_layer(writer, entries) for _, entries in layers]
            config = self._config(variant, architecture, [diff for diff, _ in blobs], [name for name, _ in layers])
            made[architecture] = writer.add_manifest(config, [blob for _, blob in blobs], annotations), contents
        writer.add_index({name: manifest for name, (manifest, _) in made.items()}, annotations, tags)
        for architecture, (manifest, contents) in made.items():
            subject = Subject(
                name=self.definition.name,
                digest=manifest.digest,
                architecture=architecture,
                variant=variant.name,
                version=self.definition.version,
                created=self.lock.created,
            )
            yield BuiltImage(subject, contents, manifest, tags)

    def _layers(self, variant: Variant, parts: Parts) -> tuple[Contents, list[tuple[str, list[Entry]]]]:
        """An image's contents, and its layers with what history says of each."""
        contents = rootfs.assemble(self.definition, variant, parts, self.lock.created)
        if not variant.extends:
            return contents, split(contents)
        below, layers = self._layers(self.definition.variant(variant.extends), parts)
        added = layer.difference({one.path: one for one in below.entries}, {one.path: one for one in contents.entries})
        return contents, [*layers, (f"packages and tools of the variant {variant.name}", added)]

    def _add_layer(self, writer: LayoutWriter, entries: Sequence[Entry]) -> tuple[str, Descriptor]:
        archive = layer.archive(entries, self.lock.created)
        return digest_of(archive), writer.add_blob(layer.MEDIA_TYPE, self._toolchain.gzip(archive))

    def _config(self, variant: Variant, architecture: str, diffs: Sequence[str], history: Sequence[str]) -> JSON:
        created = _time(self.lock.created)
        return {
            **layout.platform(architecture),
            "created": created,
            "config": {
                "User": variant.user,
                "Env": [f"{name}={value}" for name, value in sorted(variant.environment.items())],
                "Entrypoint": list(self.definition.entrypoint),
                "WorkingDir": self.definition.working_directory,
                "Labels": self._annotations(variant),
            },
            "rootfs": {"type": "layers", "diff_ids": list(diffs)},
            "history": [{"created": created, "created_by": f"meshcni image: {text}"} for text in history],
        }

    def _annotations(self, variant: Variant) -> dict[str, str]:
        definition = self.definition
        standard = {
            "title": definition.title,
            "description": definition.description,
            "licenses": definition.licences,
            "version": definition.version,
            "created": _time(self.lock.created),
        }
        own = {
            "name": definition.name,
            "variant": variant.name,
            "distribution": definition.distribution,
            "shell": variant.shell,
            "package-manager": variant.package_manager,
            "fips": "false",
            "lock": f"sha256:{self.lock.digest}",
        }
        return {
            **{f"org.opencontainers.image.{name}": value for name, value in standard.items()},
            **{f"{PREFIX}{name}": value for name, value in own.items()},
        }


def split(contents: Contents) -> list[tuple[str, list[Entry]]]:
    """The two layers of an image: what changes with the lock, then what changes with the code."""
    ours = [
        entry
        for entry in contents.entries
        if entry.kind is not EntryKind.DIRECTORY and entry.component.startswith(("meshcni:", "pypi:")) and entry.component != rootfs.IMAGE
    ]
    paths = {entry.path for entry in ours}
    theirs = [entry for entry in contents.entries if entry.path not in paths]
    base = {entry.path: entry for entry in theirs}
    return [
        ("Debian packages, accounts and folders", theirs),
        ("agent, plugin and Python packages", layer.difference(base, {**base, **{one.path: one for one in ours}})),
    ]


@contextmanager
def fresh_cache(cache: Path) -> Iterator[Path]:
    """A cache without anything that was made here, for a build that takes nothing for granted."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fresh-") as folder:
        for name in _KEPT_CACHES:
            (cache / name).mkdir(exist_ok=True)
            (Path(folder) / name).symlink_to(cache / name)
        yield Path(folder)


def free_bytes(path: Path) -> int:
    """Space left where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _time(moment: datetime) -> str:
    return moment.strftime(_TIME)
