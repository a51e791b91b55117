"""Where everything in an image came from: the components that the documents name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from image import unpack
from image.definition import Definition
from image.documents import purl
from image.model import ANY_ARCHITECTURE, Component, EntryKind
from image.parts import Parts
from image.tree import Tree
from image.unpack import Unpacked

AGENT, PLUGIN, LAUNCHER, IMAGE = "meshcni:agent", "meshcni:istio-cni", "meshcni:install-cni", "meshcni:image"


def components(
    definition: Definition, parts: Parts, debs: Sequence[Unpacked], wheels: Iterable[Component], tree: Tree
) -> dict[str, Component]:
    """The components of what is in `tree`, and what was linked into the executables, by key."""
    used = {entry.component for entry in tree.entries.values() if entry.kind is not EntryKind.DIRECTORY}
    found = [unpack.deb_component(one, unpack.copyright_of(one, debs)) for one in debs if one.key in used]
    found += [wheel for wheel in wheels if wheel.key in used]
    binaries = parts.binaries
    launcher = (binaries.launcher, binaries.trampoline, binaries.enter_userns)
    linked = {PLUGIN: binaries.plugin.linked, LAUNCHER: [package for one in launcher for package in one.linked]}
    for package in sorted({package for packages in linked.values() for package in packages}):
        unpacked = parts.linked[package]
        licences = unpack.copyright_of(unpacked, (*parts.linked.values(), *parts.notices))
        found.append(unpack.deb_component(unpacked, licences, "static"))
    for key in (AGENT, PLUGIN, LAUNCHER, IMAGE):
        contains = sorted({f"static:{package.name}" for package in linked.get(key, ())})
        found.append(_own(key, definition, parts, tuple(contains)))
    return {component.key: component for component in sorted(found, key=lambda one: one.key)}


def _own(key: str, definition: Definition, parts: Parts, contains: tuple[str, ...]) -> Component:
    name = {AGENT: "meshcni", IMAGE: definition.name}.get(key, key.removeprefix("meshcni:"))
    architecture = ANY_ARCHITECTURE if key in (AGENT, IMAGE) else parts.architecture
    return Component(
        key=key,
        kind="meshcni",
        name=name,
        version=definition.version,
        architecture=architecture,
        purl=purl.own(name, definition.version, architecture),
        licence_texts={"LICENSE": parts.own_licence},
        contains=contains,
    )
