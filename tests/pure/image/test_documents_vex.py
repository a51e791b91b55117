"""Changelogs and what they say of vulnerabilities."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.documents import changelog, openvex, purl
from image.model import Entry, EntryKind, ImageError
from tests.image.samplecontents import BUILD, CHANGELOG, CONTENTS, SHIPPED, SUBJECT, deb

VERSION = "2.0-1+deb13u2"


def log(*entries: tuple[str, str]) -> bytes:
    trailer = " -- A <a@example.org>  Thu, 01 Oct 2026 10:00:00 +0000\n"
    return "\n".join(f"x ({version}) s; urgency=low\n\n{points}\n\n{trailer}" for version, points in entries).encode()


def repaired(*entries: tuple[str, str], version: str = VERSION) -> dict[str, str]:
    return dict(changelog.repaired(log(*entries), "x", version))


def test_revisions_are_read_with_their_points() -> None:
    text = log(
        ("2:1.0-1", "  * One\n    more CVE-2026-0001\n    - below\n      it\n    - and this\n  * Two\n"),
        ("2:0.9", "  [ Ada ]\n  * Three"),
    )
    found = list(changelog.revisions(text, "x"))
    assert [(entry.version, entry.points) for entry in found] == [
        (
            "2:1.0-1",
            (
                "* One more CVE-2026-0001",
                "* One more CVE-2026-0001 - below it",
                "* One more CVE-2026-0001 - and this",
                "* Two",
            ),
        ),
        ("2:0.9", ("[ Ada ]", "* Three")),
    ]


def test_updates_of_the_release_and_revisions_of_this_upstream_version_count() -> None:
    found = repaired(
        (VERSION, "  * CVE-2026-1001"),
        ("2.0-1+deb13u1", "  * CVE-2026-1002 (Closes: #1), CVE-2026-100003"),
        ("2.0-1", "  * Patch CVE-2026-1004"),
        ("1.9-1~deb13u1", "  * CVE-2026-1005"),
        ("1.9-1", "  * New upstream version: fixes CVE-2026-1006"),
        ("1.8-1+deb12u1", "  * CVE-2026-1007"),
    )
    assert found == {
        "CVE-2026-1001": VERSION,
        "CVE-2026-1002": "2.0-1+deb13u1",
        "CVE-2026-100003": "2.0-1+deb13u1",
        "CVE-2026-1004": "2.0-1",
        "CVE-2026-1005": "1.9-1~deb13u1",
    }


def test_the_first_revision_that_repaired_it_is_named() -> None:
    first = "2.0-1+deb13u1"
    assert repaired((VERSION, "  * Improve CVE-2026-1001"), (first, "  * CVE-2026-1001")) == {"CVE-2026-1001": first}


@pytest.mark.parametrize(
    "doubt",
    [
        "  * Revert the patch for CVE-2026-1001",
        "  * These are reverted:\n    - CVE-2026-1001",
        "  * CVE-2026-1001 is not fixed by this",
        "  * The repair of CVE-2026-1001 was incomplete",
        "  * Back out CVE-2026-1001".replace("Back out", "Backed out"),
        "  * This version is unaffected by CVE-2026-1001",
        "  * CVE-2026-1001\n  * Reopen CVE-2026-1001",
    ],
)
def test_a_doubt_withdraws_a_claim(doubt: str) -> None:
    assert repaired((VERSION, doubt), ("2.0-1+deb13u1", "  * CVE-2026-1001, CVE-2026-1002")) == {
        "CVE-2026-1002": "2.0-1+deb13u1"
    }


def test_a_claim_after_the_doubt_holds() -> None:
    doubted = ("2.0-1+deb13u1", "  * Revert CVE-2026-1001")
    assert repaired((VERSION, "  * Repair CVE-2026-1001"), doubted) == {"CVE-2026-1001": VERSION}


def test_a_test_is_no_repair() -> None:
    assert repaired((VERSION, "  * Add tests for CVE-2026-1001")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "it ends inside the entry (none)"),
        (b"Version 1.0\n\n", "line 1: expected `x (VERSION) SUITE; …`, found 'Version 1.0'"),
        (log((VERSION, "  * A")).replace(b"x (", b"y ("), "line 1: expected `x (VERSION) SUITE; …`"),
        (log((VERSION, "  * A")).split(b" --")[0], f"it ends inside the entry {VERSION}"),
        (log((VERSION, "  * A")).split(b" --")[0] + log(("1", "  * B")), f"the entry {VERSION} has no trailer"),
        (log(("2.0-1", "  * A")), f"it begins with 2.0-1, the lock says {VERSION}"),
    ],
)
def test_what_is_no_changelog_of_this_package_is_refused(text: bytes, expected: str) -> None:
    with pytest.raises(ImageError) as error:
        changelog.repaired(text, "x", VERSION)
    assert expected in error.value.message
    assert "changelog of x" in error.value.message


@given(st.binary(max_size=400))
def test_bytes_after_a_good_entry_are_read_or_refused(tail: bytes) -> None:
    try:
        found = list(changelog.revisions(log((VERSION, "  * A")) + tail, "x"))
    except ImageError:
        return
    assert found[0].version == VERSION


def test_a_changelog_is_found_in_a_package_and_debians_own_is_preferred() -> None:
    assert dict(changelog.unpacked([("zlib", SHIPPED)])) == {"zlib": CHANGELOG}
    assert dict(changelog.unpacked([("zlib", SHIPPED[1:])])) == {"zlib": b"Changes in 1.3\n"}
    link = Entry("usr/share/doc/y/changelog.Debian.gz", EntryKind.LINK, 0o777, "deb:y", target="../x")
    assert dict(changelog.unpacked([("zlib", (link,)), ("zlib", SHIPPED), ("zlib", SHIPPED[1:])])) == {
        "zlib": CHANGELOG
    }


@pytest.mark.parametrize("data", [b"", b"plain", gzip.compress(b"x" * 100)[:-9]])
def test_a_changelog_that_is_no_gzip_file_is_refused(data: bytes) -> None:
    broken = replace(SHIPPED[0], data=data)
    if not data:
        assert dict(changelog.unpacked([("zlib", (broken,))])) == {"zlib": b""}  # refused when it is read
        return
    with pytest.raises(ImageError, match="of zlib cannot be unpacked"):
        changelog.unpacked([("zlib", (broken,))])


def test_a_statement_names_the_image_and_what_has_the_repair_in_it() -> None:
    vex = openvex.document(CONTENTS, SUBJECT, BUILD.changelogs)
    assert openvex.faults(vex) == []
    (statement,) = vex["statements"]
    assert statement["vulnerability"] == {"name": "CVE-2026-27171"}
    assert statement["status"] == "fixed"
    assert "1:1.3-1+deb13u1" in statement["status_notes"]
    (product,) = statement["products"]
    assert product["@id"] == purl.oci(SUBJECT)
    assert product["hashes"] == {"sha-256": "ab" * 32}
    # The static library counts as well: the plugin has the repair.
    assert [part["@id"] for part in product["subcomponents"]] == [purl.deb(deb("zlib1g")), purl.deb(deb("zlib1g-dev"))]
    assert (vex["timestamp"], vex["version"]) == ("2026-11-29T22:00:00Z", 1)


def test_a_package_without_changelog_or_with_that_of_another_version_is_an_error() -> None:
    with pytest.raises(ImageError, match="no changelog of the source package zlib"):
        openvex.document(CONTENTS, SUBJECT, {})
    with pytest.raises(ImageError, match="it begins with 9"):
        openvex.document(CONTENTS, SUBJECT, {"zlib": CHANGELOG.replace(b"1:1.3-1+deb13u1", b"9")})


def test_a_cross_library_has_the_changelog_of_what_it_is_built_from() -> None:
    cross = replace(
        CONTENTS.components["static:zlib1g-dev"],
        version="1:1.3-1+deb13u1cross2",
        source="zlib-cross",
        source_version="7",
    )
    contents = replace(CONTENTS, components={"static:zlib1g-dev": cross})
    (statement,) = openvex.document(contents, SUBJECT, {"zlib-cross": CHANGELOG})["statements"]
    assert statement["status_notes"] == (
        "By the changelog of zlib, 1:1.3-1+deb13u1 repaired it; the image has 1:1.3-1+deb13u1."
    )
    other = replace(contents, components={"static:zlib1g-dev": replace(cross, version="1:1.2-1cross2")})
    with pytest.raises(ImageError, match=r"the lock says 1:1\.2-1"):
        openvex.document(other, SUBJECT, {"zlib-cross": CHANGELOG})


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda vex: vex.pop("author"), "author is missing"),
        (lambda vex: vex.update({"@context": "https://example.org"}), "@context is not OpenVEX's"),
        (lambda vex: vex.update(timestamp="2026-11-29"), "timestamp is not a time with a zone"),
        (lambda vex: vex["statements"].clear(), "statements is missing"),
        (lambda vex: vex["statements"][0].update(status="repaired"), "statement 1: status 'repaired' is none of"),
        (lambda vex: vex["statements"][0].update(status="not_affected"), "needs a justification"),
        (lambda vex: vex["statements"][0].update(status="affected"), "needs an action statement"),
        (lambda vex: vex["statements"][0].update(justification="because"), "justification 'because' is unknown"),
        (lambda vex: vex["statements"][0]["vulnerability"].clear(), "the vulnerability has no name"),
        (lambda vex: vex["statements"][0]["products"].clear(), "it names no product"),
        (lambda vex: vex["statements"][0]["products"][0]["subcomponents"].append({}), "or one without an id"),
    ],
)
def test_the_rules_of_the_specification_are_checked(change: Change, fault: str) -> None:
    vex = copy.deepcopy(openvex.document(CONTENTS, SUBJECT, BUILD.changelogs))
    change(vex)
    assert any(fault in found for found in openvex.faults(vex)), openvex.faults(vex)
