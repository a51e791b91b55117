"""Builds every variant of the image for every architecture, and writes them as one OCI layout."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from image import binaries, inventory, layer, layout, lockfile, locking, rootfs, unpack
from image.definition import Definition, Variant
from image.fetch import fetch, fetch_wheels
from image.layout import LayoutWriter
from image.lockfile import Lock
from image.model import ARCHITECTURES, Contents, Entry, EntryKind, Subject
from image.parts import Parts, own_code
from image.referrers import JSON, Descriptor, digest_of
from image.toolchain import Toolchain
from image.unpack import Unpacked

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


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer as it is stored; `text` says in the image's history what it holds."""

    text: str
    diff_id: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Packed:
    """One platform's image before anything of it is written."""

    contents: Contents
    layers: tuple[PackedLayer, ...]


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
            with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
                packed = dict(zip(ARCHITECTURES, pool.map(partial(self._pack, chosen), ARCHITECTURES), strict=True))
            built = tuple(one for variant in chosen for one in self._write(writer, variant, packed))
            writer.finish()
            if finish:
                finish(writer, built)
        return built

    def _pack(self, variants: Sequence[Variant], architecture: str) -> dict[str, Packed]:
        """The variants and those whose layers they begin with, by name, for one architecture."""
        toolchain = Toolchain(self.lock, self.cache)
        parts = self._parts(toolchain, architecture)
        made: dict[str, Packed] = {}

        def pack(variant: Variant) -> Packed:
            if variant.name not in made:
                contents = rootfs.assemble(self.definition, variant, parts, self.lock.created)
                below = pack(self.definition.variant(variant.extends)) if variant.extends else None
                layers = below.layers if below else ()
                for text, entries in split(contents, below.contents if below else None):
                    archive = layer.archive(entries, self.lock.created)
                    layers = (*layers, PackedLayer(text, digest_of(archive), toolchain.gzip(archive)))
                made[variant.name] = Packed(contents, layers)
            return made[variant.name]

        for variant in variants:
            pack(variant)
        return made

    def _parts(self, toolchain: Toolchain, architecture: str) -> Parts:
        groups = sorted({group for variant in self.definition.variants.values() for group in variant.packages})
        listed = {group: self.lock.group(f"{group}/{architecture}") for group in groups}
        executables = binaries.build(toolchain, architecture, self.repository)
        made = (executables.plugin, executables.launcher, executables.trampoline, executables.enter_userns)
        linked = {package for one in made for package in one.linked}
        packages = {package for found in listed.values() for package in found} | linked
        unpacked = unpack.debs(fetch(packages, self.cache))
        notices = self._notices([unpacked[package] for package in linked])
        return Parts(
            architecture=architecture,
            debs={group: [unpacked[package] for package in found] for group, found in listed.items()},
            linked={package: unpacked[package] for package in linked},
            notices=notices,
            wheels=fetch_wheels(self.lock.wheels_for(architecture), self.cache),
            binaries=executables,
            own_code=own_code(self.repository / "src"),
            own_licence=(self.repository / "LICENSE").read_bytes(),
            compile=lambda files: binaries.compile_python(toolchain, files),
        )

    def _notices(self, linked: Sequence[Unpacked]) -> list[Unpacked]:
        """The packages of the toolchain that hold the licences of those that are linked."""
        toolchain = {package.name: package for package in self.lock.group("toolchain")}
        found: dict[str, Unpacked] = {}
        wanted = {unpack.documented_in(one) for one in linked}
        while missing := {toolchain[name] for name in wanted if name in toolchain and name not in found}:
            more = unpack.debs(fetch(missing, self.cache))
            found |= {package.name: one for package, one in more.items()}
            wanted = {unpack.documented_in(one) for one in more.values()}
        return [found[name] for name in sorted(found)]

    def _write(
        self, writer: LayoutWriter, variant: Variant, packed: Mapping[str, Mapping[str, Packed]]
    ) -> Iterator[BuiltImage]:
        tags = self.definition.tags(variant)
        annotations = self._annotations(variant)
        manifests = {}
        for architecture in ARCHITECTURES:
            layers = packed[architecture][variant.name].layers
            blobs = [writer.add_blob(layer.MEDIA_TYPE, one.data) for one in layers]
            manifests[architecture] = writer.add_manifest(
                self._config(variant, architecture, layers), blobs, annotations
            )
        writer.add_index(manifests, annotations, tags)
        for architecture, manifest in manifests.items():
            subject = Subject(
                name=self.definition.name,
                digest=manifest.digest,
                architecture=architecture,
                variant=variant.name,
                version=self.definition.version,
                created=self.lock.created,
            )
            yield BuiltImage(subject, packed[architecture][variant.name].contents, manifest, tags)

    def _config(self, variant: Variant, architecture: str, layers: Sequence[PackedLayer]) -> JSON:
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
            "rootfs": {"type": "layers", "diff_ids": [one.diff_id for one in layers]},
            "history": [{"created": created, "created_by": f"meshcni image: {one.text}"} for one in layers],
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


def split(contents: Contents, below: Contents | None = None) -> list[tuple[str, list[Entry]]]:
    """The layers of an image: what is more than in the image `below`; without one, first what changes with the lock,
    then what changes with the code.
    """
    whole = {entry.path: entry for entry in contents.entries}
    if below is not None:
        added = layer.difference({entry.path: entry for entry in below.entries}, whole)
        return [(f"more packages for the variant {contents.variant}", added)]
    base = {path: entry for path, entry in whole.items() if entry.kind is EntryKind.DIRECTORY or not _is_code(entry)}
    return [
        ("Debian packages, accounts and folders", list(base.values())),
        ("agent, plugin and Python packages", layer.difference(base, whole)),
    ]


def _is_code(entry: Entry) -> bool:
    return entry.component.startswith(("meshcni:", "pypi:")) and entry.component != inventory.IMAGE


def lock_of(repository: Path) -> Lock:
    """The lock of a checkout. Raises ImageError also when its definition asks for something else by now."""
    lock = lockfile.read(repository / "image" / "lock.json")
    locking.require(lock, locking.read_asks(repository / "image" / "image.toml"))
    return lock


@contextmanager
def fresh_cache(cache: Path) -> Iterator[Path]:
    """A cache without anything that was made here, for a build that takes nothing for granted."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fresh-") as folder:
        for name in _KEPT_CACHES:
            (cache / name).mkdir(exist_ok=True)
            (Path(folder) / name).symlink_to(cache / name)
        yield Path(folder)


def _time(moment: datetime) -> str:
    return moment.strftime(_TIME)
