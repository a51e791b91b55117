"""Provenance: the materials are the lock's, no more and no less."""

from __future__ import annotations

from dataclasses import replace

from image.documents import provenance, purl
from tests.image.samplecontents import BUILD, SUBJECT, WHEEL, deb


def test_materials_are_the_source_and_what_the_lock_names() -> None:
    source, *materials = provenance.predicate(SUBJECT, BUILD)["buildDefinition"]["resolvedDependencies"]
    assert source == {"name": "source", "uri": "https://example.org/meshcni", "digest": {"gitCommit": "12" * 20}}
    assert [(one["uri"], one["digest"]) for one in materials] == [
        (purl.deb(deb("zlib1g")), {"sha256": "cd" * 32}),
        (purl.deb(deb("zlib1g-dev")), {"sha256": "cd" * 32}),
        (purl.pypi(WHEEL), {"sha256": "ef" * 32}),
    ]
    assert materials[0]["annotations"] == {"archive": "debian-security", "path": deb("zlib1g").path}


def test_order_and_repetition_of_what_took_part_change_nothing() -> None:
    again = replace(BUILD, packages=(*reversed(BUILD.packages), *BUILD.packages), wheels=(WHEEL, WHEEL))
    assert provenance.predicate(SUBJECT, again) == provenance.predicate(SUBJECT, BUILD)


def test_parameters_builder_and_the_run() -> None:
    predicate = provenance.predicate(SUBJECT, BUILD)
    assert predicate["buildDefinition"]["buildType"] == "urn:meshcni:image-build:v1"
    assert predicate["buildDefinition"]["externalParameters"] == {
        "architecture": "amd64",
        "definition": {"sha256": "34" * 32},
        "lock": {"sha256": "56" * 32},
        "sourceDateEpoch": 1795989600,
        "variant": "runtime",
        "version": "0.1.0",
    }
    assert predicate["runDetails"] == {"builder": {"id": "urn:example:builder"}}
    run = provenance.predicate(SUBJECT, replace(BUILD, invocation="job-7"))["runDetails"]
    assert run["metadata"] == {"invocationId": "job-7"}
