"""Documents as independent tools read them: of a small image made by hand, then of each that `make image` built."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import posixpath
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from image.debfile import fields
from image.documents import all_documents, cyclonedx, openvex, provenance, spdx
from image.stored import Manifest, StoredLayout
from license_expression import get_spdx_licensing
from packageurl import PackageURL
from spdx_tools.spdx.parser.error import SPDXParsingError
from spdx_tools.spdx.parser.jsonlikedict.json_like_dict_parser import JsonLikeDictParser
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
from tests.image.samplecontents import BUILD, CONTENTS, CREATED, SUBJECT

from image import lockfile

Json = dict[str, Any]
LOCK = Path(lockfile.__file__).with_name("lock.json")
SPDX_LICENCES = get_spdx_licensing()
STATUS = "var/lib/dpkg/status.d/"
INSIDE = "usr/share/meshcni/sbom/install-cni.cdx.json"


def spdx_faults(document: Json) -> list[str]:
    try:
        parsed = JsonLikeDictParser().parse(document)
    except SPDXParsingError as error:
        return error.get_messages()
    return [message.validation_message for message in validate_full_spdx_document(parsed)]


def cyclonedx_fault(document: Json) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))


def sample(kind: str) -> Json:
    return all_documents(CONTENTS, SUBJECT, BUILD)[kind][1]


def test_the_sample_is_valid_spdx() -> None:
    assert spdx_faults(sample(spdx.PREDICATE_TYPE)) == []


def test_the_sample_is_valid_cyclonedx_in_both_forms() -> None:
    assert cyclonedx_fault(sample(cyclonedx.PREDICATE_TYPE)) is None
    inside = cyclonedx.document(CONTENTS, name="x", version="1", created=CREATED, files=False)
    assert cyclonedx_fault(inside) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda spdx: spdx["hasExtractedLicensingInfos"].clear(),
        lambda spdx: (
            spdx["packages"][1].pop("packageVerificationCode", None) and spdx["packages"][1].update(filesAnalyzed="")
        ),
        lambda spdx: spdx["files"][0]["checksums"].pop(0),
        lambda spdx: spdx["relationships"].append({**spdx["relationships"][0], "relatedSpdxElement": "SPDXRef-None"}),
        lambda spdx: spdx.update(documentNamespace="nowhere"),
    ],
)
def test_the_spdx_tools_find_what_is_wrong(damage: Callable[[Json], object]) -> None:
    document = sample(spdx.PREDICATE_TYPE)
    damage(document)
    assert spdx_faults(document)


# --- what `make image` built ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Platform:
    """One image of the layout with the statements about it."""

    name: str  # VARIANT/ARCHITECTURE
    manifest: Manifest
    predicates: dict[str, Json] = field(repr=False)
    files: dict[str, bytes] = field(repr=False)

    @property
    def variant(self) -> str:
        return self.name.split("/")[0]

    @property
    def architecture(self) -> str:
        return self.name.split("/")[1]


@pytest.fixture(scope="session")
def platforms(built_image: Path) -> dict[str, Platform]:
    layout = StoredLayout(built_image)
    indexes = {entry.digest: entry for entry in layout.tags.values()}
    referrers = layout.referrers()
    found = [
        platform(layout, layout.manifest(child), referrers)
        for index in indexes.values()
        for child in layout.manifest(index).children
    ]
    return {one.name: one for one in found}


@pytest.fixture(params=["runtime/amd64", "runtime/arm64", "dev/amd64", "dev/arm64"])
def one(platforms: dict[str, Platform], request: pytest.FixtureRequest) -> Platform:
    assert request.param in platforms, "`make image` builds every variant for every architecture"
    found = platforms[request.param]
    assert set(found.predicates) >= {kind.PREDICATE_TYPE for kind in (spdx, cyclonedx, provenance, openvex)}
    return found


def platform(layout: StoredLayout, manifest: Manifest, referrers: dict[str, list[Manifest]]) -> Platform:
    config, *layers = manifest.children
    settings = json.loads(layout.read(config))
    predicates = {}
    for referrer in referrers.get(manifest.descriptor.digest, []):
        if referrer.artifact_type == "application/vnd.in-toto+json":
            statement = json.loads(layout.read(referrer.children[1]))
            assert [one["digest"] for one in statement["subject"]] == [{"sha256": manifest.descriptor.digest[7:]}]
            predicates[statement["predicateType"]] = statement["predicate"]
    variant = manifest.annotations["io.meshcni.image.variant"]
    name = f"{variant}/{settings['architecture']}"
    return Platform(name, manifest, predicates, unpacked([layout.read(layer) for layer in layers]))


def unpacked(layers: list[bytes]) -> dict[str, bytes]:
    """The regular files that a container sees, read with nothing of ours."""
    files: dict[str, bytes] = {}
    for layer in layers:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer))) as archive:
            for member in archive:
                folder, name = posixpath.split(member.name.rstrip("/"))
                assert name != ".wh..wh..opq"
                gone = posixpath.join(folder, name.removeprefix(".wh.")) if name.startswith(".wh.") else member.name
                for path in [path for path in files if path == gone or (path + "/").startswith(gone + "/")]:
                    if not member.isdir():
                        del files[path]
                source = archive.extractfile(member) if member.isreg() and gone == member.name else None
                if source is not None:
                    files[member.name] = source.read()
    return files


def test_spdx_documents_are_valid(one: Platform) -> None:
    document = dict(one.predicates[spdx.PREDICATE_TYPE])
    if one.variant == "dev":  # the tools' time grows with files times relationships; the test below follows all of them
        rows = document["relationships"]
        of_files = [row for row in rows if row["relatedSpdxElement"].startswith("SPDXRef-File-")]
        document["relationships"] = [row for row in rows if row["relationshipType"] != "CONTAINS"] + of_files[:100]
    assert spdx_faults(document) == []


def test_relationships_are_between_elements_that_there_are(one: Platform) -> None:
    document = one.predicates[spdx.PREDICATE_TYPE]
    ids = [element["SPDXID"] for element in (document, *document["packages"], *document["files"])]
    assert len(set(ids)) == len(ids)
    ends = {row[end] for row in document["relationships"] for end in ("spdxElementId", "relatedSpdxElement")}
    assert ends == set(ids)


def test_cyclonedx_documents_are_valid(one: Platform) -> None:
    document = one.predicates[cyclonedx.PREDICATE_TYPE]
    assert cyclonedx_fault(document) is None


def test_every_file_of_the_layers_is_in_both_bills_of_materials(one: Platform) -> None:
    document = one.predicates[spdx.PREDICATE_TYPE]
    there = {path: hashlib.sha256(data).hexdigest() for path, data in one.files.items()}
    in_spdx = {
        file["fileName"].removeprefix("./"): next(
            sum["checksumValue"] for sum in file["checksums"] if sum["algorithm"] == "SHA256"
        )
        for file in document["files"]
    }
    assert in_spdx == there
    owned = {
        related["relatedSpdxElement"]
        for related in document["relationships"]
        if related["relationshipType"] == "CONTAINS" and related["spdxElementId"] != spdx.IMAGE_ID
    }
    assert owned == {file["SPDXID"] for file in document["files"]}
    in_cyclonedx = {
        file["name"].removeprefix("/"): next(sum["content"] for sum in file["hashes"] if sum["alg"] == "SHA-256")
        for component in one.predicates[cyclonedx.PREDICATE_TYPE]["components"]
        for file in component.get("components", ())
    }
    assert in_cyclonedx == there


def purls(document: Json) -> set[str]:
    return {component["purl"] for component in document["components"]}


def test_both_name_the_same_packages_and_the_image_the_same_debian_ones(one: Platform) -> None:
    document = one.predicates[cyclonedx.PREDICATE_TYPE]
    other = one.predicates[spdx.PREDICATE_TYPE]["packages"]
    image, *rest = [package["externalRefs"][0]["referenceLocator"] for package in other]
    assert set(rest) == purls(document)
    assert image == document["metadata"]["component"]["purl"]
    assert PackageURL.from_string(image).version == one.manifest.descriptor.digest
    debian = {
        (component["name"], component["version"])
        for component in document["components"]
        if component["bom-ref"].startswith("deb:")
    }
    if one.variant == "runtime":
        stanzas = [fields(data.decode()) for path, data in one.files.items() if is_status(path)]
    else:
        stanzas = [fields(text) for text in one.files["var/lib/dpkg/status"].decode().split("\n\n") if text.strip()]
    assert debian == {(stanza["Package"], stanza["Version"]) for stanza in stanzas}


def is_status(path: str) -> bool:
    return path.startswith(STATUS) and not path.endswith(".md5sums")


def test_every_package_has_a_valid_licence_with_its_texts(one: Platform) -> None:
    document = one.predicates[spdx.PREDICATE_TYPE]
    texts = {row["licenseId"] for row in document["hasExtractedLicensingInfos"] if row["extractedText"].strip()}
    for package in document["packages"]:
        where = f"{package['name']}: {package['licenseDeclared']}"
        assert package["licenseDeclared"] not in ("NOASSERTION", "NONE", ""), where
        assert set(SPDX_LICENCES.unknown_license_keys(package["licenseDeclared"])) <= texts, where


def test_executables_of_ours_say_what_is_linked_into_them(one: Platform) -> None:
    document = one.predicates[cyclonedx.PREDICATE_TYPE]
    graph = {row["ref"]: row["dependsOn"] for row in document["dependencies"]}
    plugin = {key.removeprefix("static:") for key in graph["meshcni:istio-cni"]}
    assert {"libpython3.13-dev", "libc6-dev", "zlib1g-dev"} <= plugin
    assert "static:libpython3.13-dev" in graph["meshcni:install-cni"]


def test_the_bill_of_materials_inside_is_valid_and_names_the_same(one: Platform) -> None:
    inside = json.loads(one.files[INSIDE])
    assert cyclonedx_fault(inside) is None
    assert purls(inside) == purls(one.predicates[cyclonedx.PREDICATE_TYPE])


def test_materials_are_exactly_the_locks(one: Platform) -> None:
    lock = lockfile.read(LOCK)
    groups = [f"runtime/{one.architecture}", "toolchain"]
    groups += [f"dev/{one.architecture}"] if one.variant == "dev" else []
    groups += ["sysroot/arm64"] if one.architecture == "arm64" else []
    predicate = one.predicates[provenance.PREDICATE_TYPE]
    definition = predicate["buildDefinition"]
    assert definition["externalParameters"]["lock"] == {"sha256": lock.digest}, "the image is of another lock"
    source, *rest = definition["resolvedDependencies"]
    assert set(source["digest"]) >= {"sha256"}
    expected = {package.sha256 for group in groups for package in lock.group(group)}
    expected |= {wheel.sha256 for wheel in lock.wheels_for(one.architecture)}
    assert sorted(row["digest"]["sha256"] for row in rest) == sorted(expected)


def test_every_component_from_outside_is_a_material(one: Platform) -> None:
    predicate = one.predicates[provenance.PREDICATE_TYPE]
    known = {row["digest"].get("sha256"): row["uri"] for row in predicate["buildDefinition"]["resolvedDependencies"]}
    for component in one.predicates[cyclonedx.PREDICATE_TYPE]["components"]:
        if not component["bom-ref"].startswith("meshcni:"):
            digest = component["hashes"][0]["content"]
            assert known[digest] == component["purl"], component["bom-ref"]


def test_vex_documents_follow_the_rules_and_speak_of_what_is_there(one: Platform) -> None:
    document = one.predicates[openvex.PREDICATE_TYPE]
    assert openvex.faults(document) == []
    bom = one.predicates[cyclonedx.PREDICATE_TYPE]
    for statement in document["statements"]:
        (product,) = statement["products"]
        assert product["@id"] == bom["metadata"]["component"]["purl"]
        assert {part["@id"] for part in product["subcomponents"]} <= purls(bom)
        assert statement["status"] == "fixed"
    names = " ".join(
        part["@id"]
        for row in document["statements"]
        for product in row["products"]
        for part in product["subcomponents"]
    )
    assert all(name in names for name in ("libssl3t64", "libpython3.13", "libc6"))  # all had repairs since release
