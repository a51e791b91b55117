"""Debian's machine-readable copyright files (copyright-format 1.0), read as leniently as real ones need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FIELD = re.compile(r"^(?P<name>[A-Za-z][A-Za-z0-9-]*):(?P<value>.*)$")


@dataclass(frozen=True, slots=True)
class Licence:
    """A License field: its first line, `GPL-2+ or Expat`, and the lines after it."""

    synopsis: str
    text: str


@dataclass(frozen=True, slots=True)
class Copyright:
    """What a file says: the licences of its Files paragraphs in order, the texts by name, the copyright holders."""

    licences: tuple[Licence, ...]
    texts: Mapping[str, str]  # by synopsis in lower case
    holders: tuple[str, ...]


def is_machine_readable(text: str) -> bool:
    """Whether the first field is Format, as the format demands."""
    return text.lstrip("﻿ \t\r\n").lower().startswith("format:")


def parse(text: str) -> Copyright:
    """The file's paragraphs. A License paragraph of its own gives a text; one with Files says what files are under."""
    licences: list[Licence] = []
    texts: dict[str, list[str]] = {}
    holders: list[str] = []
    for number, paragraph in enumerate(_paragraphs(text)):
        holders += [line.strip() for line in paragraph.get("copyright", "").splitlines() if line.strip()]
        if "license" not in paragraph:
            continue
        licence = _licence(paragraph["license"])
        if "files" in paragraph or number == 0:  # the header's licence is that of the whole
            licences.append(licence)
        if licence.text:
            known = texts.setdefault(licence.synopsis.lower(), [])
            known += [licence.text] if licence.text not in known else []
    joined = {name: "\n\n".join(parts) for name, parts in texts.items()}
    return Copyright(tuple(dict.fromkeys(licences)), joined, tuple(dict.fromkeys(holders)))


def _paragraphs(text: str) -> Iterator[dict[str, str]]:
    """Fields by name in lower case; a line that is neither field nor indented is taken as the field's next line."""
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        field = FIELD.match(line)
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif field is not None:
            name = field["name"].lower()
            fields[name] = field["value"].strip()
        elif name:
            fields[name] += "\n" + line


def _licence(value: str) -> Licence:
    synopsis, _, body = value.partition("\n")
    lines = ["" if line.strip() == "." else line.removeprefix(" ").rstrip() for line in body.split("\n")]
    return Licence(" ".join(synopsis.split()), "\n".join(lines).strip("\n"))
