"""A bill of materials in CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from image.documents import digests, licences, purl
from image.documents.digests import FileDigest
from image.documents.licences import NO_ASSERTION, Licensing
from image.model import Component, Contents, Subject

PREDICATE_TYPE = "https://cyclonedx.org/bom/v1.6"
SUPPLIERS = {"deb": "Debian", "static": "Debian", "meshcni": "meshcni"}
SINGLE_ID = re.compile(r"(?!LicenseRef-)[A-Za-z0-9.-]+")


def document(
    contents: Contents, *, name: str, version: str, created: datetime, digest: str = "", files: bool = True
) -> dict[str, Any]:
    """The bill of materials of an image; `digest` is its manifest's, `sha256:HEX`.

    With `files=False` it names components only, without texts of licences; without `digest` it does not depend on the
    image's own digest. In that form it can be stored inside the image.
    """
    subject = Subject(name, digest, contents.architecture, contents.variant, version, created)
    inside: dict[str, list[FileDigest]] = {key: [] for key in contents.components}
    if files:
        for file in digests.files(contents):
            inside[file.component].append(file)
    components = sorted(contents.components.items())
    identity = digest or "\0".join(f"{key}={component.version}" for key, component in components)
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": "urn:uuid:"
        + digests.identifier("cyclonedx", name, version, contents.architecture, contents.variant, identity, str(files)),
        "version": 1,
        "metadata": {
            "timestamp": digests.timestamp(created),
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [{"type": "application", "name": "meshcni-image", "version": version}]},
            "component": _image(subject),
        },
        "components": [_component(component, inside[key], texts=files) for key, component in components],
        "dependencies": _dependencies(contents.components),
    }
    if files:  # nothing is left out: every regular file is in one of the components
        bom["compositions"] = [{"aggregate": "complete", "assemblies": [key for key, _ in components]}]
    return bom


def _image(subject: Subject) -> dict[str, Any]:
    image = {
        "type": "container",
        "bom-ref": "image",
        "name": subject.name,
        "version": subject.version,
        "supplier": {"name": "meshcni"},
        "properties": [
            {"name": "meshcni:architecture", "value": subject.architecture},
            {"name": "meshcni:variant", "value": subject.variant},
        ],
    }
    if subject.digest:
        image["purl"] = purl.oci(subject)
        image["hashes"] = [{"alg": "SHA-256", "content": subject.digest.removeprefix("sha256:")}]
    return image


def _component(component: Component, inside: list[FileDigest], *, texts: bool) -> dict[str, Any]:
    terms = licences.of(component)
    found: dict[str, Any] = {
        "type": "application" if component.kind == "meshcni" else "library",
        "bom-ref": component.key,
        "name": component.name,
        "version": component.version,
        "purl": component.purl,
    }
    if component.kind in SUPPLIERS:
        found["supplier"] = {"name": SUPPLIERS[component.kind]}
    if component.sha256:
        found["hashes"] = [{"alg": "SHA-256", "content": component.sha256}]
    if terms.expression != NO_ASSERTION:
        found["licenses"] = [_licence(terms.expression)]
    if texts and terms.copyrights:
        found["copyright"] = "\n".join(terms.copyrights)
    if texts and terms.references:  # an expression has no place for texts
        found["evidence"] = {"licenses": _texts(terms)}
    if inside:
        found["components"] = [_file(file) for file in inside]
    return found


def _licence(expression: str) -> dict[str, Any]:
    if SINGLE_ID.fullmatch(expression):
        return {"license": {"id": expression, "acknowledgement": "declared"}}
    return {"expression": expression, "acknowledgement": "declared"}


def _texts(terms: Licensing) -> list[dict[str, Any]]:
    return [
        {"license": {"name": reference, "text": {"contentType": "text/plain", "content": text}}}
        for reference, text in terms.references.items()
    ]


def _file(file: FileDigest) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{file.path}",
        "name": f"/{file.path}",
        "hashes": [{"alg": "SHA-1", "content": file.sha1}, {"alg": "SHA-256", "content": file.sha256}],
    }


def _dependencies(components: Mapping[str, Component]) -> list[dict[str, Any]]:
    """The image needs what is in it, and a component what was linked into it."""
    linked = {inner for component in components.values() for inner in component.contains}
    inside = [key for key in sorted(components) if components[key].kind != "static" or key not in linked]
    of_components = [{"ref": key, "dependsOn": sorted(components[key].contains)} for key in sorted(components)]
    return [{"ref": "image", "dependsOn": inside}, *of_components]
