"""Bills of materials as values: complete, connected, and the same for the same image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from image.documents import all_documents, cyclonedx, digests, openvex, purl, spdx
from image.model import Component, Contents, EntryKind, Subject
from tests.image.samplecontents import BUILD, COMPONENTS, CONTENTS, CREATED, ENTRIES, SUBJECT, deb

FILES = {entry.path: entry for entry in ENTRIES if entry.kind is EntryKind.FILE}
ZLIB, STATIC = "SPDXRef-Package-deb-zlib1g", "SPDXRef-Package-static-zlib1g-dev"


def bom(contents: Contents = CONTENTS, *, digest: str = SUBJECT.digest, files: bool = True) -> dict[str, Any]:
    return cyclonedx.document(
        contents, name=SUBJECT.name, version=SUBJECT.version, created=CREATED, digest=digest, files=files
    )


def related(document: dict[str, Any], kind: str) -> set[tuple[str, str]]:
    every = document["relationships"]
    return {(one["spdxElementId"], one["relatedSpdxElement"]) for one in every if one["relationshipType"] == kind}


def test_spdx_has_every_regular_file_with_its_digests_in_its_package() -> None:
    document = spdx.document(CONTENTS, SUBJECT)
    assert {file["fileName"] for file in document["files"]} == {f"./{path}" for path in FILES}
    contains = related(document, "CONTAINS")
    for file in document["files"]:
        entry = FILES[file["fileName"].removeprefix("./")]
        checksums = {one["algorithm"]: one["checksumValue"] for one in file["checksums"]}
        assert checksums == {name: hashlib.new(name, entry.data).hexdigest() for name in ("SHA1", "SHA256")}
        assert (spdx.package_id(entry.component), file["SPDXID"]) in contains


def test_spdx_says_what_was_linked_into_what() -> None:
    document = spdx.document(CONTENTS, SUBJECT)
    assert related(document, "STATIC_LINK") == {("SPDXRef-Package-meshcni-istio-cni", STATIC)}
    assert related(document, "DESCRIBES") == {("SPDXRef-DOCUMENT", "SPDXRef-Image")}
    inside = {package for image, package in related(document, "CONTAINS") if image == "SPDXRef-Image"}
    assert ZLIB in inside
    assert STATIC not in inside


def test_spdx_packages_say_where_they_are_from() -> None:
    packages = {package["SPDXID"]: package for package in spdx.document(CONTENTS, SUBJECT)["packages"]}
    zlib = packages[ZLIB]
    assert zlib["checksums"] == [{"algorithm": "SHA256", "checksumValue": "cd" * 32}]
    assert zlib["externalRefs"][0]["referenceLocator"] == purl.deb(deb("zlib1g"))
    assert zlib["licenseDeclared"].startswith("Zlib AND LicenseRef-custom-")
    assert zlib["copyrightText"] == "1995-2013 Ada Example\n2001 Bob Example"
    own = sorted(hashlib.sha1(entry.data).hexdigest() for entry in FILES.values() if entry.component == "deb:zlib1g")
    code = hashlib.sha1("".join(own).encode()).hexdigest()
    assert zlib["packageVerificationCode"] == {"packageVerificationCodeValue": code}
    assert (packages[STATIC]["filesAnalyzed"], "packageVerificationCode" in packages[STATIC]) == (False, False)
    assert packages["SPDXRef-Image"]["checksums"] == [{"algorithm": "SHA256", "checksumValue": "ab" * 32}]


def test_texts_of_licences_without_an_id_are_in_both() -> None:
    (extracted,) = spdx.document(CONTENTS, SUBJECT)["hasExtractedLicensingInfos"]
    assert extracted["extractedText"] == "Do as you like."
    zlib = next(one for one in bom()["components"] if one["bom-ref"] == "deb:zlib1g")
    (licence,) = zlib["evidence"]["licenses"]
    assert licence["license"]["name"] == extracted["licenseId"]
    assert licence["license"]["text"]["content"] == "Do as you like."
    assert zlib["licenses"] == [{"expression": f"Zlib AND {extracted['licenseId']}", "acknowledgement": "declared"}]


def test_cyclonedx_has_every_regular_file_below_its_component() -> None:
    found = {}
    for component in bom()["components"]:
        for file in component.get("components", ()):
            found[file["name"].removeprefix("/")] = component["bom-ref"]
            data = FILES[file["name"].removeprefix("/")].data
            hashes = {one["alg"]: one["content"] for one in file["hashes"]}
            assert hashes == {"SHA-1": hashlib.sha1(data).hexdigest(), "SHA-256": hashlib.sha256(data).hexdigest()}
    assert found == {path: entry.component for path, entry in FILES.items()}


def test_cyclonedx_says_what_depends_on_what() -> None:
    graph = {one["ref"]: one["dependsOn"] for one in bom()["dependencies"]}
    assert graph["meshcni:istio-cni"] == ["static:zlib1g-dev"]
    assert graph["image"] == ["deb:zlib1g", "meshcni:istio-cni", "pypi:pyyaml"]
    assert set(graph) == {"image", *CONTENTS.components}


def test_the_form_inside_the_image_depends_on_no_digest_and_no_bytes() -> None:
    inside = bom(digest="", files=False)
    other = replace(CONTENTS, entries=(replace(ENTRIES[1], data=b"other"),))
    assert inside == bom(other, digest="", files=False)
    text = json.dumps(inside)
    assert "file:" not in text
    assert "Do as you like" not in text
    assert "purl" not in inside["metadata"]["component"]
    assert [one["purl"] for one in inside["components"]] == [
        one.purl for one in sorted(COMPONENTS, key=lambda c: c.key)
    ]


def test_documents_differ_between_images_and_only_there() -> None:
    other = replace(SUBJECT, digest="sha256:" + "cd" * 32)
    first, again, second = (spdx.document(CONTENTS, one)["documentNamespace"] for one in (SUBJECT, SUBJECT, other))
    assert first == again != second
    assert first.startswith("urn:uuid:")
    assert bom()["serialNumber"] == bom()["serialNumber"] != bom(digest=other.digest)["serialNumber"]
    assert bom(digest="")["serialNumber"] != bom(replace(CONTENTS, architecture="arm64"), digest="")["serialNumber"]


def test_a_file_of_no_component_is_an_error() -> None:
    orphan = replace(CONTENTS, entries=(replace(ENTRIES[1], component="deb:gone"),))
    for make in (lambda: spdx.document(orphan, SUBJECT), lambda: bom(orphan)):
        with pytest.raises(KeyError, match="deb:gone"):
            make()


def test_ids_of_components_stay_apart() -> None:
    keys = ["deb:libstdc++6", "deb:libstdc--6", "deb:libstdc-6", "static:a.b", "deb:a_b", "deb:a-b"]
    assert len({digests.slug(key) for key in keys}) == len(keys)


def test_all_documents_are_those_that_an_image_has() -> None:
    documents = all_documents(CONTENTS, SUBJECT, BUILD)
    assert {kind: name for kind, (name, _) in documents.items()} == {
        "https://spdx.dev/Document": "sbom.spdx",
        "https://cyclonedx.org/bom/v1.6": "sbom.cyclonedx",
        "https://slsa.dev/provenance/v1": "provenance",
        "https://openvex.dev/ns/v0.2.0": "vex",
    }
    shuffled = replace(CONTENTS, components=dict(reversed(CONTENTS.components.items())))
    assert json.dumps(documents) == json.dumps(all_documents(shuffled, SUBJECT, BUILD))


def test_products_of_the_vex_document_are_in_the_bill_of_materials() -> None:
    documents = all_documents(CONTENTS, SUBJECT, BUILD)
    vex, materials = documents[openvex.PREDICATE_TYPE][1], documents[cyclonedx.PREDICATE_TYPE][1]
    known = {one["purl"] for one in [*materials["components"], materials["metadata"]["component"]]}
    products = [product for statement in vex["statements"] for product in statement["products"]]
    assert products
    for product in products:
        assert {product["@id"], *(part["@id"] for part in product["subcomponents"])} <= known


def test_a_component_without_anything_is_described() -> None:
    bare = Component("deb:x", "deb", "x", "1", "amd64", "pkg:deb/debian/x@1")
    contents = Contents("amd64", "dev", (), {"deb:x": bare})
    subject = Subject("i", "sha256:" + "0" * 64, "amd64", "dev", "1", CREATED)
    package = spdx.document(contents, subject)["packages"][1]
    assert (package["licenseDeclared"], package["copyrightText"], package["filesAnalyzed"]) == ("NOASSERTION",) * 2 + (
        False,
    )
    assert "licenses" not in bom(contents)["components"][0]
