"""A bill of materials in SPDX 2.3 (https://spdx.github.io/spdx-spec/v2.3/).

A package stands for what the image holds of it: its verification code is over those files, its checksum is that of the
package's own file. A component without a file of its own was linked into another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from image.documents import licences, purl
from image.documents.digests import FileDigest, files, identifier, slug, timestamp
from image.documents.licences import NO_ASSERTION, Licensing
from image.model import Component, Contents, Subject

PREDICATE_TYPE = "https://spdx.dev/Document"
IMAGE_ID = "SPDXRef-Image"
DOCUMENT_ID = "SPDXRef-DOCUMENT"
SUPPLIERS = {"deb": "Organization: Debian", "static": "Organization: Debian", "meshcni": "Organization: meshcni"}
DECLARED = "Declared: every licence that the component's own copyright and licence files name."


def document(contents: Contents, subject: Subject) -> dict[str, Any]:
    """The bill of materials of an image: packages, every regular file, and what was linked into what."""
    found = list(files(contents))
    by_component: dict[str, list[FileDigest]] = {key: [] for key in contents.components}
    for file in found:
        by_component[file.component].append(file)
    terms = {key: licences.of(component) for key, component in contents.components.items()}
    packages = [
        _package(component, terms[key], by_component[key]) for key, component in sorted(contents.components.items())
    ]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": DOCUMENT_ID,
        "name": f"{subject.name}-{subject.version}-{subject.variant}-{subject.architecture}",
        "documentNamespace": f"urn:uuid:{identifier('spdx', subject.name, subject.digest)}",
        "creationInfo": {
            "created": timestamp(subject.created),
            "creators": ["Organization: meshcni", f"Tool: meshcni-image-{subject.version}"],
        },
        "packages": [_image(subject), *packages],
        "files": [_file(file) for file in found],
        "hasExtractedLicensingInfos": _extracted(terms.values()),
        "relationships": _relationships(contents.components, found),
    }


def _image(subject: Subject) -> dict[str, Any]:
    algorithm, _, digest = subject.digest.partition(":")
    return {
        "SPDXID": IMAGE_ID,
        "name": subject.name,
        "versionInfo": subject.version,
        "supplier": "Organization: meshcni",
        "downloadLocation": NO_ASSERTION,
        "filesAnalyzed": False,
        "primaryPackagePurpose": "CONTAINER",
        "checksums": [{"algorithm": algorithm.upper(), "checksumValue": digest}],
        "licenseConcluded": NO_ASSERTION,
        "licenseDeclared": licences.OURS,
        "copyrightText": NO_ASSERTION,
        "comment": f"The {subject.variant} variant for linux/{subject.architecture}; the checksum is the manifest's.",
        "externalRefs": [_purl_reference(purl.oci(subject))],
    }


def _package(component: Component, terms: Licensing, found: list[FileDigest]) -> dict[str, Any]:
    package: dict[str, Any] = {
        "SPDXID": package_id(component.key),
        "name": component.name,
        "versionInfo": component.version,
        "supplier": SUPPLIERS.get(component.kind, NO_ASSERTION),
        "downloadLocation": NO_ASSERTION,
        "filesAnalyzed": bool(found),
        "primaryPackagePurpose": "APPLICATION" if component.kind == "meshcni" else "LIBRARY",
        "licenseConcluded": terms.expression if component.kind == "meshcni" else NO_ASSERTION,
        "licenseDeclared": terms.expression,
        "licenseComments": DECLARED,
        "copyrightText": "\n".join(terms.copyrights) or NO_ASSERTION,
        "externalRefs": [_purl_reference(component.purl)],
    }
    if found:
        package["packageVerificationCode"] = {"packageVerificationCodeValue": verification_code(found)}
    if component.sha256:
        package["checksums"] = [{"algorithm": "SHA256", "checksumValue": component.sha256}]
    if component.source:
        package["sourceInfo"] = f"built from Debian source package {component.source} {component.source_version}"
    return package


def _file(file: FileDigest) -> dict[str, Any]:
    return {
        "SPDXID": _file_id(file.path),
        "fileName": f"./{file.path}",
        "fileTypes": ["BINARY" if file.is_elf else "OTHER"],
        "checksums": [
            {"algorithm": "SHA1", "checksumValue": file.sha1},
            {"algorithm": "SHA256", "checksumValue": file.sha256},
        ],
        "licenseConcluded": NO_ASSERTION,
        "copyrightText": NO_ASSERTION,
    }


def _relationships(components: Mapping[str, Component], found: list[FileDigest]) -> list[dict[str, str]]:
    """The document describes the image; the image has packages; a package has files and what was linked into them."""
    linked = {inner for component in components.values() for inner in component.contains}
    inside = [key for key in sorted(components) if components[key].kind != "static" or key not in linked]
    return [
        _relationship(DOCUMENT_ID, "DESCRIBES", IMAGE_ID),
        *(_relationship(IMAGE_ID, "CONTAINS", package_id(key)) for key in inside),
        *(
            _relationship(package_id(key), "STATIC_LINK", package_id(inner))
            for key in sorted(components)
            for inner in components[key].contains
        ),
        *(_relationship(package_id(file.component), "CONTAINS", _file_id(file.path)) for file in found),
    ]


def _relationship(element: str, kind: str, related: str) -> dict[str, str]:
    return {"spdxElementId": element, "relationshipType": kind, "relatedSpdxElement": related}


def _extracted(terms: Iterable[Licensing]) -> list[dict[str, str]]:
    texts = {reference: text for licensing in terms for reference, text in licensing.references.items()}
    return [
        {"licenseId": reference, "name": reference.removeprefix("LicenseRef-"), "extractedText": text}
        for reference, text in sorted(texts.items())
    ]


def verification_code(found: Iterable[FileDigest]) -> str:
    """SPDX's code of a set of files: SHA-1 over their sorted SHA-1s (section 7.9)."""
    return hashlib.sha1("".join(sorted(file.sha1 for file in found)).encode(), usedforsecurity=False).hexdigest()


def package_id(key: str) -> str:
    """The SPDX id of a component."""
    return f"SPDXRef-Package-{slug(key)}"


def _file_id(path: str) -> str:
    return f"SPDXRef-File-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}"


def _purl_reference(locator: str) -> dict[str, str]:
    return {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": locator}
