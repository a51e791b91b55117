"""Licences from copyright files: names by the table, texts for what the table does not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.documents import dep5, licencenames, licences
from image.documents.licences import Licensing
from image.model import Component
from license_expression import get_spdx_licensing

SPDX = get_spdx_licensing()
FORMAT = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
MIT = """Copyright (c) 2016 Ada Example

Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in the Software
without restriction, including the rights to use, copy, sublicense, and/or sell copies of the Software.
"""
BSD = """Redistribution and use in source and binary forms, with or without modification, are permitted provided that:
1. Redistributions of source code must retain the above notice.
{third}
THIS SOFTWARE IS PROVIDED AS IS.
"""


def of(text: str, kind: str = "deb", name: str = "copyright", **others: str) -> Licensing:
    texts = {name: text.encode(), **{other: value.encode() for other, value in others.items()}}
    return licences.of(Component("deb:x", kind, "x", "1", "amd64", "", licence_texts=texts, source="xsource"))


def dep5_of(*synopses: str) -> Licensing:
    return of(FORMAT + "".join(f"\nFiles: {n}\nCopyright: A\nLicense: {one}\n" for n, one in enumerate(synopses)))


@pytest.mark.parametrize(
    ("synopsis", "expression"),
    [
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-2+", "GPL-2.0-or-later"),
        ("GPL-2.0+", "GPL-2.0-or-later"),
        ("GPL-2.0-only", "GPL-2.0-only"),
        ("LGPL-2.1+", "LGPL-2.1-or-later"),
        ("LGPL-2", "LGPL-2.0-only"),
        ("GPL", "GPL-1.0-or-later"),
        ("GFDL-NIV-1.3+", "GFDL-1.3-no-invariants-or-later"),
        ("Expat", "MIT"),
        ("BSD-3-clause", "BSD-3-Clause"),
        ("Artistic or GPL-1+", "Artistic-1.0-Perl OR GPL-1.0-or-later"),
        ("GPL-2 with Linux-syscall-note exception", "GPL-2.0-only WITH Linux-syscall-note"),
        (
            "GPL-2 with Linux-syscall-note exception OR BSD-3-Clause",
            "GPL-2.0-only WITH Linux-syscall-note OR BSD-3-Clause",
        ),
        ("Expat or GPL-2 and Zlib", "MIT OR GPL-2.0-only AND Zlib"),
        ("Expat or GPL-2, and Zlib", "(MIT OR GPL-2.0-only) AND (Zlib)"),
    ],
)
def test_debian_names_become_expressions(synopsis: str, expression: str) -> None:
    found = dep5_of(synopsis)
    assert found.expression == expression
    assert not found.references


def test_all_licences_of_the_files_apply_once_each_in_their_order() -> None:
    found = dep5_of("LGPL-2.1+", "GPL-2 or Expat", "LGPL-2.1+ and ISC", "ISC")
    assert found.expression == "LGPL-2.1-or-later AND (GPL-2.0-only OR MIT) AND ISC"


@pytest.mark.parametrize("number", ["GPL-4", "LGPL-1", "AGPL-1", "GPL-2.5", "MPL-9", "GPL-3+ with Foo exception"])
def test_a_name_that_the_table_lacks_keeps_a_text(number: str) -> None:
    found = of(
        FORMAT + f"\nFiles: *\nCopyright: A\nLicense: {number}\n\nLicense: {number}\n These are\n .\n the terms\n"
    )
    assert list(found.references.values()) == ["These are\n\nthe terms"]
    assert [found.expression] == list(found.references)


def test_an_unknown_name_without_text_keeps_the_whole_file() -> None:
    text = FORMAT + "\nFiles: *\nCopyright: A\nLicense: custom\n"
    assert list(of(text).references.values()) == [text]


def test_one_name_with_two_texts_keeps_both_and_two_texts_never_share_a_reference() -> None:
    paragraph = "\nFiles: {}\nCopyright: A\nLicense: public-domain\n {}\n"
    both = of(FORMAT + paragraph.format("a", "mine") + paragraph.format("b", "yours"))
    assert list(both.references.values()) == ["mine\n\nyours"]
    single = of(FORMAT + paragraph.format("a", "mine"))
    assert not set(single.references) & set(both.references)


def test_terms_in_place_of_a_name_are_a_text() -> None:
    found = of(FORMAT + "\nFiles: *\nCopyright: A\nLicense: You may use and\n copy this.\n")
    assert list(found.references.values()) == ["You may use and\ncopy this."]
    assert found.expression.startswith("LicenseRef-xsource-terms-")


def test_an_unknown_name_with_a_well_known_text_is_that_licence() -> None:
    body = "".join(f" {line}\n" if line else " .\n" for line in MIT.splitlines())
    assert of(FORMAT + f"\nFiles: *\nCopyright: A\nLicense: their-own\n{body}").expression == "MIT"


def test_copyright_holders_are_kept_once_each() -> None:
    text = (
        FORMAT
        + "\nFiles: a\nCopyright: 2001 Ada\n  2002 Bob\nLicense: ISC\n\nFiles: b\nCopyright: 2001 Ada\nLicense: ISC\n"
    )
    assert of(text).copyrights == ("2001 Ada", "2002 Bob")


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (MIT, "MIT"),
        (BSD.format(third=""), "BSD-2-Clause"),
        (BSD.format(third="Names may not be used to endorse or promote products."), "BSD-3-Clause"),
    ],
)
def test_a_licence_file_with_one_well_known_text(text: str, expression: str) -> None:
    found = of(text, kind="pypi", name="LICENSE")
    assert (found.expression, dict(found.references)) == (expression, {})


def test_a_well_known_text_with_something_added_is_not_that_licence() -> None:
    found = of(MIT + "Furthermore you owe us a beer. " * 40, kind="pypi", name="LICENSE")
    assert found.expression.startswith("LicenseRef-")


def test_the_advertising_clause_is_no_three_clause_licence() -> None:
    text = BSD.format(third="All advertising materials must display this; names not to endorse or promote products.")
    assert of(text, kind="pypi").expression.startswith("LicenseRef-")


def test_free_text_keeps_the_whole_and_names_what_is_certain() -> None:
    text = """This package is free software under the terms of the GNU General Public
License as published by the Free Software Foundation; either version 2, or later. Its data is under
/usr/share/common-licenses/Apache-2.0. Parts are under the GNU Lesser General Public License as
published by the Free Software Foundation; version 2.1 of the License. See /usr/share/common-licenses/GPL."""
    found = of(text)
    reference = next(iter(found.references))
    assert found.expression == f"GPL-2.0-or-later AND LGPL-2.1-only AND Apache-2.0 AND {reference}"
    assert found.references == {reference: text}


def test_a_wheels_declared_expression_decides() -> None:
    metadata = "Metadata-Version: 2.4\nLicense-Expression: Apache-2.0 AND BSD-2-Clause\n\nLong text"
    found = of(
        metadata, "pypi", "x.dist-info/METADATA", **{"x.dist-info/licenses/NOTICE": "Copyright 2015 The Authors"}
    )
    assert (found.expression, found.copyrights) == ("Apache-2.0 AND BSD-2-Clause", ("Copyright 2015 The Authors",))


def test_a_wheel_without_declared_expression_has_its_files_licence() -> None:
    found = of("License: whatever\n", "pypi", "METADATA", LICENSE=MIT)
    assert found.expression == "MIT"


def test_a_file_that_is_no_utf8_is_read() -> None:
    texts = {"copyright": FORMAT.encode() + b"\nFiles: *\nCopyright: 2001 Andr\xe9\nLicense: ISC\n"}
    found = licences.of(Component("deb:x", "deb", "x", "1", "amd64", "", licence_texts=texts))
    assert (found.expression, found.copyrights) == ("ISC", ("2001 André",))


def test_without_files_nothing_is_asserted_but_of_ours() -> None:
    assert licences.of(Component("deb:x", "deb", "x", "1", "amd64", "")).expression == "NOASSERTION"
    assert licences.of(Component("meshcni:x", "meshcni", "x", "1", "amd64", "")).expression == "Apache-2.0"


def test_every_id_of_the_tables_is_one_of_spdx() -> None:
    exceptions = [f"GPL-2.0-only WITH {name}" for name in licencenames.EXCEPTIONS.values()]
    known = [one.spdx_id for one in licencenames.WELL_KNOWN]
    for expression in [*licencenames.NAMES.values(), *licencenames.PHRASES.values(), *known, *exceptions]:
        assert SPDX.validate(expression).errors == [], expression


def test_every_gnu_name_is_one_of_spdx() -> None:
    for family, versions in licencenames.GNU_VERSIONS.items():
        for version in versions:
            for suffix in ("", "+", "-only", "-or-later"):
                expression = licencenames.by_name(f"{family}-{version}{suffix}")
                assert expression is not None
                assert SPDX.validate(expression).errors == [], expression


WORDS = st.sampled_from(
    ["GPL-2+", "Expat", "custom", "and", "or", ",", "with", "X exception", "", "(", "a b c", "-", "é"]
)


@given(st.lists(st.lists(WORDS, max_size=7).map(" ".join), max_size=4))
def test_whatever_a_file_says_the_expression_is_valid_and_has_its_texts(synopses: list[str]) -> None:
    found = dep5_of(*synopses)
    if found.expression == "NOASSERTION":
        return
    assert SPDX.parse(found.expression) is not None
    assert set(SPDX.unknown_license_keys(found.expression)) == set(found.references)
    assert all(text.strip() for text in found.references.values())


@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    found = of(FORMAT + text)
    assert set(found.references) <= set(SPDX.unknown_license_keys(found.expression))
    dep5.parse(text)
