"""What known vulnerabilities mean for an image: OpenVEX 0.2.0 (https://github.com/openvex/spec).

Debian repairs a released version by patches and keeps the upstream version, so scanners that compare upstream versions
report what is repaired. Here is the answer, from the packages' own changelogs. The status is `fixed`: that is what the
specification calls a version that holds the repair. `not_affected` with `inline_mitigations_already_exist` would say
that the flaw is there and something keeps it from being used, which nobody has shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from image.documents import changelog, purl
from image.documents.digests import identifier, timestamp
from image.model import Component, Contents, ImageError, Subject

PREDICATE_TYPE = "https://openvex.dev/ns/v0.2.0"
AUTHOR = "meshcni"
STATUSES = ("not_affected", "affected", "fixed", "under_investigation")
JUSTIFICATIONS = (
    "component_not_present",
    "vulnerable_code_not_present",
    "vulnerable_code_not_in_execute_path",
    "vulnerable_code_cannot_be_controlled_by_adversary",
    "inline_mitigations_already_exist",
)
DOCUMENT_FIELDS = ("@context", "@id", "author", "timestamp", "version", "statements")
# Cross libraries are built anew from another source package: `14.2.0-19cross1` of gcc-14-cross is gcc-14 14.2.0-19,
# and has its changelog.
CROSS_VERSION, CROSS_SOURCE = re.compile(r"(?P<version>.+)cross\d+"), "-cross"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)")


def document(contents: Contents, subject: Subject, changelogs: Mapping[str, bytes]) -> dict[str, Any]:
    """A statement for every CVE that a Debian revision of a package of the image repairs.

    `changelogs` are Debian changelogs, unpacked, by name of the source package. Raises ImageError when one is missing
    or is not of the version in the image.
    """
    statements = [
        _statement(cve, revision, origin, purls, subject)
        for (source, *origin), purls in sorted(_sources(contents).items())
        for cve, revision in changelog.repaired(_changelog(changelogs, source), *origin).items()
    ]
    return {
        "@context": PREDICATE_TYPE,
        "@id": f"urn:uuid:{identifier('openvex', subject.name, subject.digest)}",
        "author": AUTHOR,
        "timestamp": timestamp(subject.created),
        "version": 1,
        "tooling": f"meshcni-image {subject.version}",
        "statements": statements,
    }


def _sources(contents: Contents) -> dict[tuple[str, str, str], list[str]]:
    """The purls of the image's components by Debian source package, and the source and version its changelog is of."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for _, component in sorted(contents.components.items()):
        if component.source:
            purls = found.setdefault((component.source, *_origin(component)), [])
            purls += [component.purl] if component.purl not in purls else []
    return found


def _origin(component: Component) -> tuple[str, str]:
    cross = CROSS_VERSION.fullmatch(component.version)
    if cross is not None and component.source.endswith(CROSS_SOURCE):
        return component.source.removesuffix(CROSS_SOURCE), cross["version"]
    return component.source, component.source_version


def _changelog(changelogs: Mapping[str, bytes], source: str) -> bytes:
    if source not in changelogs:
        raise ImageError(f"VEX: there is no changelog of the source package {source}, which the image has code of")
    return changelogs[source]


def _statement(
    cve: str, revision: str, origin: Sequence[str], purls: Sequence[str], subject: Subject
) -> dict[str, Any]:
    source, version = origin
    product = purl.oci(subject)
    return {
        "vulnerability": {"name": cve},
        "timestamp": timestamp(subject.created),
        "products": [
            {
                "@id": product,
                "identifiers": {"purl": product},
                "hashes": {"sha-256": subject.digest.removeprefix("sha256:")},
                "subcomponents": [{"@id": name, "identifiers": {"purl": name}} for name in purls],
            }
        ],
        "status": "fixed",
        "status_notes": f"By the changelog of {source}, {revision} repaired it; the image has {version}.",
    }


def faults(vex: Mapping[str, Any]) -> list[str]:
    """What of the specification's rules a document breaks; empty when it is valid."""
    found = [f"{name} is missing" for name in DOCUMENT_FIELDS if not vex.get(name)]
    if not str(vex.get("@context", "")).startswith("https://openvex.dev/ns"):
        found.append("@context is not OpenVEX's")
    if not TIME.fullmatch(str(vex.get("timestamp"))):
        found.append("timestamp is not a time with a zone")
    for number, statement in enumerate(vex.get("statements", ()), 1):
        found += [f"statement {number}: {fault}" for fault in _statement_faults(statement)]
    return found


def _statement_faults(statement: Mapping[str, Any]) -> list[str]:
    status = statement.get("status")
    found = [] if statement.get("vulnerability", {}).get("name") else ["the vulnerability has no name"]
    if status not in STATUSES:
        found.append(f"status {status!r} is none of {', '.join(STATUSES)}")
    if status == "not_affected" and not (statement.get("justification") or statement.get("impact_statement")):
        found.append("not_affected needs a justification or an impact statement")
    if "justification" in statement and statement["justification"] not in JUSTIFICATIONS:
        found.append(f"justification {statement['justification']!r} is unknown")
    if status == "affected" and not statement.get("action_statement"):
        found.append("affected needs an action statement")
    products = statement.get("products") or []
    named = [part for product in products for part in (product, *product.get("subcomponents", ()))]
    if not products or not all(part.get("@id") or part.get("identifiers") for part in named):
        found.append("it names no product, or one without an id")
    return found
