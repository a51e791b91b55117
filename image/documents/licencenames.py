"""SPDX ids of the licences that Debian's short names and well-known texts stand for.

A table, not a guess: a name or a text that is not here becomes a `LicenseRef-...` with its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Short names (lower case) of Debian's copyright format, and what else Debian's packages use for the same licences.
NAMES = {
    "0bsd": "0BSD",
    "afl-2.1": "AFL-2.1",
    "apache-2": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "artistic": "Artistic-1.0-Perl",  # the text in Debian's common-licenses is Perl's
    "artistic-2.0": "Artistic-2.0",
    "beerware": "Beerware",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-4-clause": "BSD-4-Clause",
    "bsd-4-clause-uc": "BSD-4-Clause-UC",
    "bsl-1.0": "BSL-1.0",
    "cc-by-3.0": "CC-BY-3.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "curl": "curl",
    "expat": "MIT",
    "fsfap": "FSFAP",
    "fsful": "FSFUL",
    "fsfullr": "FSFULLR",
    "gpl": "GPL-1.0-or-later",  # no version named: any that was ever published, as its own section 9 says
    "isc": "ISC",
    "latex2e": "Latex2e",
    "lgpl": "LGPL-2.0-or-later",
    "mit": "MIT",
    "mpl-1.1": "MPL-1.1",
    "mpl-2.0": "MPL-2.0",
    "ms-pl": "MS-PL",
    "openssl": "OpenSSL",
    "psf-2": "PSF-2.0",
    "psf-2.0": "PSF-2.0",
    "python-2.0": "Python-2.0",
    "sleepycat": "Sleepycat",
    "sunpro": "SunPro",
    "unicode-dfs-2016": "Unicode-DFS-2016",
    "zlib": "Zlib",
}
EXCEPTIONS = {
    ("gpl-2", "autoconf"): "Autoconf-exception-2.0",
    ("gpl-3", "autoconf"): "Autoconf-exception-3.0",
    ("gpl-3", "bison"): "Bison-exception-2.2",
    ("gpl-3", "gcc"): "GCC-exception-3.1",
    ("gpl-2", "linux-syscall-note"): "Linux-syscall-note",
    ("gpl-2", "texinfo"): "Texinfo-exception",
    ("gpl-3", "texinfo"): "Texinfo-exception",
}
GNU = re.compile(
    r"(?P<family>a?gpl|lgpl|gfdl(?:-niv)?)-(?P<version>[1-4](?:\.\d)?)(?:\.0)?(?P<later>\+|-or-later|-only)?"
)
GNU_VERSIONS = {
    "GPL": ("1.0", "2.0", "3.0"),
    "LGPL": ("2.0", "2.1", "3.0"),
    "AGPL": ("3.0",),
    "GFDL": ("1.1", "1.2", "1.3"),
}


@dataclass(frozen=True, slots=True)
class WellKnown:
    """A licence text that is recognised: what it must hold and must not, in at most how many characters.

    Length counts the text without copyright lines and with single spaces, so that nothing else hides in it.
    """

    spdx_id: str
    present: tuple[str, ...]
    absent: tuple[str, ...] = ()
    at_most: int = 1900


_REDISTRIBUTION = "redistribution and use in source and binary forms"
_ENDORSE = "to endorse or promote products"
_ADVERTISING = "all advertising materials"
WELL_KNOWN = (
    WellKnown("Apache-2.0", ("apache license version 2.0, january 2004", "end of terms and conditions"), (), 12_500),
    WellKnown(
        "MIT", ("permission is hereby granted, free of charge, to any person", "sublicense, and/or sell"), (), 1200
    ),
    WellKnown("BSD-3-Clause", (_REDISTRIBUTION, _ENDORSE, "source code must retain"), (_ADVERTISING,)),
    WellKnown("BSD-2-Clause", (_REDISTRIBUTION, "source code must retain"), (_ENDORSE, _ADVERTISING), 1500),
    WellKnown("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose",), (), 800),
    WellKnown("Zlib", ("the origin of this software must not be misrepresented", "altered source versions"), (), 1100),
)
# What a text with several licences names for certain; it says nothing about what else is in the text.
GNU_GRANT = re.compile(
    r"gnu (?P<family>lesser |library |affero )?general public license,? "
    r"as published by the free software foundation[;,]? (?P<either>either )?version (?P<version>\d(?:\.\d)?)"
)
COMMON_LICENSE = re.compile(r"/usr/share/common-licenses/(?P<name>(?:Apache|Artistic|CC0|MPL)[-.\w]*\w)")
PHRASES = {
    "python software foundation license version 2": "Python-2.0",
    "gcc runtime library exception": "GPL-3.0-or-later WITH GCC-exception-3.1",
}


def by_name(name: str) -> str | None:
    """The SPDX expression of a single short name, exception included; None when the table has none."""
    lowered = name.lower()
    base, _, exception = lowered.partition(" with ")
    plain = NAMES.get(base) or _gnu(base)
    if not exception or plain is None:
        return plain
    words = exception.removesuffix(" exception").strip()
    number = re.match(r"gpl-[23]", base)
    found = EXCEPTIONS.get((number[0], words)) if number else None
    return f"{plain} WITH {found}" if found else None


def by_text(text: str) -> str | None:
    """The SPDX id of a text that is one well-known licence and nothing more; None otherwise."""
    words = _normal("\n".join(line for line in text.splitlines() if not _is_copyright_line(line)))
    for known in WELL_KNOWN:
        fits = len(words) <= known.at_most and all(part in words for part in known.present)
        if fits and not any(part in words for part in known.absent):
            return known.spdx_id
    return None


def named_in(text: str) -> tuple[str, ...]:
    """The SPDX expressions that a text of several licences names beyond doubt."""
    words = _normal(text)
    found = [_granted(grant) for grant in GNU_GRANT.finditer(words)]
    found += [by_name(match["name"]) for match in COMMON_LICENSE.finditer(text)]
    found += [expression for phrase, expression in PHRASES.items() if phrase in words]
    return tuple(dict.fromkeys(expression for expression in found if expression))


def _gnu(name: str) -> str | None:
    match = GNU.fullmatch(name)
    if match is None:
        return None
    family = match["family"].upper()
    infix = "-no-invariants" if family == "GFDL-NIV" else ""
    family = family.removesuffix("-NIV")
    version = match["version"] if "." in match["version"] else match["version"] + ".0"
    if version not in GNU_VERSIONS[family]:
        return None
    return f"{family}-{version}{infix}-{'or-later' if match['later'] in ('+', '-or-later') else 'only'}"


def _granted(grant: re.Match[str]) -> str | None:
    prefix = {"": "gpl", "lesser": "lgpl", "library": "lgpl", "affero": "agpl"}[(grant["family"] or "").strip()]
    return _gnu(f"{prefix}-{grant['version']}{'+' if grant['either'] else ''}")


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _is_copyright_line(line: str) -> bool:
    return line.strip().lower().startswith(("copyright", "(c)", "©", "all rights reserved"))
