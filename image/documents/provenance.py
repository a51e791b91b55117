"""How an image was made: SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance).

The materials are exactly what the lock names for this image, and the source tree. Builds on a person's own machine are
SLSA Build L1, and L2 when a hosted builder signs; nothing here claims more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from image.documents import purl
from image.model import DebPackage, Subject, Wheel

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:meshcni:image-build:v1"


@dataclass(frozen=True, slots=True)
class Source:
    """The tree that was built: `{"gitCommit": HEX}` of a clean checkout, or `{"sha256": HEX}` over the files."""

    uri: str
    digest: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Build:
    """What took part in a build: everything that the image's bytes depend on, and who ran it.

    `packages` and `wheels` are those of the lock that took part: of the image and of its tool chain. `changelogs` are
    the Debian changelogs of `packages`, unpacked, by name of the *source* package. Digests are hexadecimal SHA-256.
    """

    packages: tuple[DebPackage, ...]
    wheels: tuple[Wheel, ...]
    source: Source
    builder: str  # a URI
    definition_sha256: str
    lock_sha256: str
    changelogs: Mapping[str, bytes]
    invocation: str = ""  # the caller's name for this run, such as a CI job; empty where a rebuild must give the same


def predicate(subject: Subject, build: Build) -> dict[str, Any]:
    """The predicate, without times of start and end: two builds of the same bytes say the same."""
    metadata = {"metadata": {"invocationId": build.invocation}} if build.invocation else {}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "architecture": subject.architecture,
                "definition": {"sha256": build.definition_sha256},
                "lock": {"sha256": build.lock_sha256},
                "sourceDateEpoch": int(subject.created.timestamp()),
                "variant": subject.variant,
                "version": subject.version,
            },
            "internalParameters": {},
            "resolvedDependencies": [_source(build.source), *_materials(build)],
        },
        "runDetails": {"builder": {"id": build.builder}, **metadata},
    }


def _source(source: Source) -> dict[str, Any]:
    return {"name": "source", "uri": source.uri, "digest": dict(source.digest)}


def _materials(build: Build) -> list[dict[str, Any]]:
    debs = [
        {
            "name": package.path.rsplit("/", 1)[-1],
            "uri": purl.deb(package),
            "digest": {"sha256": package.sha256},
            "annotations": {"archive": package.archive, "path": package.path},
        }
        for package in sorted(set(build.packages))
    ]
    wheels = [
        {"name": wheel.filename, "uri": purl.pypi(wheel), "digest": {"sha256": wheel.sha256}}
        for wheel in sorted(set(build.wheels))
    ]
    return [*debs, *wheels]
