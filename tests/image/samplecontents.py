"""A small image as a value, with every kind of component: what documents are made of."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime

from image.documents import Build, Source, changelog, purl
from image.model import Component, Contents, DebPackage, Entry, EntryKind, Subject, Wheel

CREATED = datetime(2026, 11, 29, 22, 0, tzinfo=UTC)
SUBJECT = Subject("meshcni/install-cni", "sha256:" + "ab" * 32, "amd64", "runtime", "0.1.0", CREATED)

COPYRIGHT = b"""Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 1995-2013 Ada Example
License: Zlib

Files: contrib/*
Copyright: 2001 Bob Example
License: custom
 Do as you like.
"""
CHANGELOG = b"""zlib (1:1.3-1+deb13u1) trixie-security; urgency=medium

  * Check lengths (CVE-2026-27171) (Closes: #1)

 -- Ada Example <ada@example.org>  Thu, 01 Oct 2026 10:00:00 +0000

zlib (1:1.3-1) unstable; urgency=medium

  * New upstream release.

 -- Ada Example <ada@example.org>  Thu, 01 Jan 2026 10:00:00 +0000
"""
DOCUMENTS = "usr/share/doc/zlib1g"


def deb(name: str, architecture: str = "amd64") -> DebPackage:
    version = "1:1.3-1+deb13u1"
    path = f"pool/main/z/zlib/{name}_1.3-1+deb13u1_{architecture}.deb"
    return DebPackage(name, version, architecture, "debian-security", path, "cd" * 32, 1000, "zlib", version)


WHEEL = Wheel("PyYAML", "6.0.3", "amd64", "pyyaml-6.0.3-cp313-cp313-manylinux_2_28_x86_64.whl", "ef" * 32, 2000)


def of_deb(package: DebPackage, kind: str = "deb") -> Component:
    return Component(
        key=f"{kind}:{package.name}",
        kind=kind,
        name=package.name,
        version=package.version,
        architecture=package.architecture,
        purl=purl.deb(package),
        sha256=package.sha256,
        licence_texts={"copyright": COPYRIGHT},
        source=package.source,
        source_version=package.source_version,
    )


COMPONENTS = (
    of_deb(deb("zlib1g")),
    of_deb(deb("zlib1g-dev"), "static"),
    Component(
        key="pypi:pyyaml",
        kind="pypi",
        name=WHEEL.name,
        version=WHEEL.version,
        architecture=WHEEL.architecture,
        purl=purl.pypi(WHEEL),
        sha256=WHEEL.sha256,
        licence_texts={"pyyaml.dist-info/METADATA": b"Name: PyYAML\nLicense-Expression: MIT\n\nText"},
    ),
    Component(
        key="meshcni:istio-cni",
        kind="meshcni",
        name="istio-cni",
        version="0.1.0",
        architecture="amd64",
        purl=purl.own("istio-cni", "0.1.0", "amd64"),
        contains=("static:zlib1g-dev",),
    ),
)
ENTRIES = (
    Entry("opt", EntryKind.DIRECTORY, 0o755, "meshcni:istio-cni"),
    Entry("opt/cni/bin/istio-cni", EntryKind.FILE, 0o755, "meshcni:istio-cni", data=b"\x7fELF plugin"),
    Entry("usr/lib/libz.so.1", EntryKind.LINK, 0o777, "deb:zlib1g", target="libz.so.1.3"),
    Entry("usr/lib/libz.so.1.3", EntryKind.FILE, 0o644, "deb:zlib1g", data=b"\x7fELF zlib"),
    Entry("usr/lib/meshcni/yaml/__init__.py", EntryKind.FILE, 0o644, "pypi:pyyaml", data=b"yes = True\n"),
    Entry(f"{DOCUMENTS}/copyright", EntryKind.FILE, 0o644, "deb:zlib1g", data=COPYRIGHT),
)
CONTENTS = Contents("amd64", "runtime", ENTRIES, {component.key: component for component in COMPONENTS})
SHIPPED = (
    Entry(f"{DOCUMENTS}/changelog.Debian.gz", EntryKind.FILE, 0o644, "deb:zlib1g", data=gzip.compress(CHANGELOG)),
    Entry(f"{DOCUMENTS}/changelog.gz", EntryKind.FILE, 0o644, "deb:zlib1g", data=gzip.compress(b"Changes in 1.3\n")),
)
BUILD = Build(
    packages=(deb("zlib1g"), deb("zlib1g-dev")),
    wheels=(WHEEL,),
    source=Source("https://example.org/meshcni", {"gitCommit": "12" * 20}),
    builder="urn:example:builder",
    definition_sha256="34" * 32,
    lock_sha256="56" * 32,
    changelogs=changelog.unpacked([("zlib", SHIPPED)]),
)
