"""The file system of one variant for one architecture, put together from packages, wheels, our own code and tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import datetime

from image import accounts, dpkgdb, elf, inventory, pruning, selection, trustedcas, unpack
from image.definition import Definition, Variant
from image.documents import cyclonedx
from image.model import Component, Contents, Entry, EntryKind, ImageError
from image.parts import Parts
from image.tree import Tree
from image.unpack import Unpacked

PYTHON = "usr/lib/python3.13"
OWN = "usr/lib/meshcni"  # on the launcher's search path: our code and the wheels
PLUGIN = "opt/cni/bin/istio-cni"
TRAMPOLINE = "usr/local/bin/install-cni"
LAUNCHER = "usr/local/lib/meshcni/install-cni"
ENTER_USERNS = "usr/local/lib/meshcni/enter-userns"
SBOM = "usr/share/meshcni/sbom/install-cni.cdx.json"


def assemble(definition: Definition, variant: Variant, parts: Parts, created: datetime) -> Contents:
    """Put the image together."""
    return _Assembly(definition, variant, parts).contents(created)


class _Assembly:
    def __init__(self, definition: Definition, variant: Variant, parts: Parts) -> None:
        self.definition = definition
        self.variant = variant
        self.parts = parts
        self.tree = Tree()
        found = {one.package.name: one for group in variant.packages for one in parts.debs[group]}
        self.debs = [found[name] for name in sorted(found)]
        self.wheels: list[Component] = []

    def contents(self, created: datetime) -> Contents:
        self._packages()
        self._own()
        self._made()
        self._select()
        self._compile()
        self._correct_records()
        self._databases()
        self.tree.complete(inventory.IMAGE)
        self._put_bill_of_materials(created)
        self.tree.check([*(link.path for link in self.variant.links), *(row.link for row in self.variant.alternatives)])
        return self._contents()

    # --- what goes in -------------------------------------------------------------------------------------------------

    def _packages(self) -> None:
        for unpacked in self.debs:
            for entry in unpacked.entries:
                self.tree.add(entry)
        for copy in self.variant.copies:
            below = f"{copy.source}/"
            sources = [entry for path, entry in self.tree.entries.items() if f"{path}/".startswith(below)]
            if not sources:
                raise ImageError(f"image.toml: copy.from: no package has {copy.source}", "correct image.toml")
            for entry in sources:
                self.tree.put(replace(entry, path=copy.target + entry.path.removeprefix(copy.source)))

    def _own(self) -> None:
        """Our code, wheels and executables."""
        own = Tree()
        for locked, path in self.parts.wheels.items():
            component, entries = unpack.wheel(locked, path, OWN)
            self.wheels.append(component)
            for entry in entries:
                own.add(entry)
        for name, data in self.parts.own_code.items():
            own.file(f"{OWN}/{name}", data, inventory.AGENT)
        own.remove(selection.removed(list(own.entries), self.definition.own_removals))
        for entry in own.entries.values():
            self.tree.add(entry)
        version = self.definition.version
        metadata = f"Metadata-Version: 2.4\nName: meshcni\nVersion: {version}\nLicense-Expression: Apache-2.0\n"
        self.tree.file(f"{OWN}/meshcni-{version}.dist-info/METADATA", metadata.encode(), inventory.AGENT)
        binaries = self.parts.binaries
        self.tree.file(PLUGIN, binaries.plugin.data, inventory.PLUGIN, 0o755)
        self.tree.file(LAUNCHER, binaries.launcher.data, inventory.LAUNCHER, 0o755)
        self.tree.file(ENTER_USERNS, binaries.enter_userns.data, inventory.LAUNCHER, 0o755)
        self.tree.file(TRAMPOLINE, binaries.trampoline.data, inventory.LAUNCHER, 0o755)
        trampoline = self.tree.entries[TRAMPOLINE]
        self.tree.put(replace(trampoline, permitted_capabilities=self.definition.capabilities))

    def _made(self) -> None:
        """What maintainer scripts would do, and the image's own configuration."""
        variant, tree = self.variant, self.tree
        for directory in variant.directories:
            tree.put(
                Entry(
                    directory.path, EntryKind.DIRECTORY, directory.mode, inventory.IMAGE, directory.uid, directory.gid
                )
            )
        for link in variant.links:
            tree.link(link.path, link.target, _key(link.package))
        for file in variant.files:
            tree.file(file.path, file.text.encode(), _key(file.package), file.mode)
        masters = [
            tree.data(path).decode() if path in tree else "" for path in (accounts.PASSWD_MASTER, accounts.GROUP_MASTER)
        ]
        for path, (mode, text) in accounts.files(variant.accounts, *masters).items():
            tree.file(path, text.encode(), inventory.IMAGE, mode)
        certificates = trustedcas.certificates(tree.entries)
        key = unpack.deb_key("ca-certificates")
        tree.file(trustedcas.BUNDLE, trustedcas.bundle({path: tree.data(path) for path in certificates}), key)
        if variant.package_database == "dpkg":
            tree.file(trustedcas.CONFIGURATION, trustedcas.configuration(tree.entries), key)

    # --- what stays ---------------------------------------------------------------------------------------------------

    def _select(self) -> None:
        tree, variant = self.tree, self.variant
        kept = {directory.path for directory in variant.directories}
        leaving = selection.removed(tree.entries, variant.removals)
        tree.remove(path for path in leaving if path not in kept)
        if variant.whole_packages:
            return
        tree.remove(elf.unneeded_libraries(tree.entries, self.parts.architecture, self.definition.loaded_libraries))
        tree.remove(pruning.left_over_documents(tree))
        tree.remove(pruning.unmentioned_licences(tree))
        made = {*kept, *(link.path for link in variant.links)}  # what image.toml asks for is never taken out silently
        while gone := tree.pointless() - made:
            tree.remove(gone)

    # --- what is derived ----------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        """Byte code: beside our own sources, so that errors show their lines; instead of others', to save a third."""
        tree = self.tree
        folders = (OWN, PYTHON)
        paths = [one.path for one in tree.files() if one.path.endswith(".py") and one.path.startswith(folders)]
        small = (OWN,) if self.variant.whole_packages else folders
        replaced = {
            path for path in paths if path.startswith(small) and tree.entries[path].component != inventory.AGENT
        }
        compiled = self.parts.compile({path: tree.data(path) for path in paths})
        for path in paths:
            source = tree.entries[path]
            folder, _, name = path.rpartition("/")
            stem = name.removesuffix(".py")
            if path in replaced:
                tree.remove([path])
                place = f"{folder}/{stem}.pyc"
            else:
                place = f"{folder}/__pycache__/{stem}.cpython-313.pyc"
            tree.file(place, compiled[path], source.component)

    def _correct_records(self) -> None:
        """Let each wheel's RECORD list the files that are there."""
        for path in [path for path in self.tree.entries if path.endswith(".dist-info/RECORD")]:
            kept = []
            for line in self.tree.data(path).decode().splitlines():
                name = line.split(",", 1)[0].strip('"')
                if f"{OWN}/{name}" in self.tree:
                    kept.append(line)
                elif f"{OWN}/{name}c" in self.tree:
                    kept.append(f"{name}c,,")
            self.tree.put(replace(self.tree.entries[path], data="".join(f"{line}\n" for line in kept).encode()))

    def _databases(self) -> None:
        installed = [self._installed(one) for one in self.debs]
        if self.variant.package_database == "dpkg":
            for path, data in dpkgdb.database(installed).items():
                self.tree.file(path, data, inventory.IMAGE)
            files, links = dpkgdb.alternatives(self.variant.alternatives)
            for path, data in files.items():
                self.tree.file(path, data, inventory.IMAGE)
            for path, target in links.items():
                self.tree.link(path, target, inventory.IMAGE)
            return
        shipped = {(one.key, entry.path) for one in self.debs for entry in one.entries}
        sums: dict[str, dict[str, str]] = {}
        for entry in self.tree.files():
            if (entry.component, entry.path) in shipped:
                name = entry.component.removeprefix("deb:")
                sums.setdefault(name, {})[entry.path] = _md5(entry.data)
        used = {entry.component for entry in self.tree.entries.values() if entry.kind is not EntryKind.DIRECTORY}
        staying = [one for one in installed if unpack.deb_key(one.name) in used]
        for path, (name, data) in dpkgdb.status_files(staying, sums).items():
            self.tree.file(path, data, unpack.deb_key(name))

    def _installed(self, unpacked: Unpacked) -> dpkgdb.Installed:
        conffiles = {}
        data = {entry.path: entry.data for entry in unpacked.entries if entry.kind is EntryKind.FILE}
        for line in unpacked.control_files.get("conffiles", b"").decode().splitlines():
            path = line.split()[-1]
            if path.lstrip("/") in data:
                conffiles[path] = _md5(data[path.lstrip("/")])
        paths = [entry.path for entry in unpacked.entries]
        return dpkgdb.Installed(unpacked.control, unpacked.control_files, paths, conffiles)

    def _put_bill_of_materials(self, created: datetime) -> None:
        name, version = self.definition.name, self.definition.version
        bom = cyclonedx.document(self._contents(), name=name, version=version, created=created, files=False)
        self.tree.file(
            SBOM, (json.dumps(bom, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(), inventory.AGENT
        )
        self.tree.complete(inventory.AGENT)

    def _contents(self) -> Contents:
        components = inventory.components(self.definition, self.parts, self.debs, self.wheels, self.tree)
        # A directory may outlive the package that named it first; a file may not, and check() sees to that.
        entries = tuple(
            replace(entry, component=inventory.IMAGE)
            if entry.kind is EntryKind.DIRECTORY and entry.component not in components
            else entry
            for _, entry in sorted(self.tree.entries.items())
        )
        for entry in entries:
            if entry.component not in components:
                raise ImageError(f"/{entry.path} belongs to {entry.component}, which is no component of this image")
        return Contents(self.parts.architecture, self.variant.name, entries, components)


def _key(package: str) -> str:
    return unpack.deb_key(package) if package else inventory.IMAGE


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
