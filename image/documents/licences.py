"""The licences of a component, from its own copyright or licence files, as an SPDX expression.

Debian's copyright files speak of the whole source package, so an expression may name more than a single binary needs:
what is declared is complete, and nothing is concluded from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser

from image.documents import dep5, licencenames
from image.model import Component

NO_ASSERTION = "NOASSERTION"
OURS = "Apache-2.0"
OPERATOR = re.compile(r"\s+(and|or)\s+", re.IGNORECASE)
CLAUSE = re.compile(r",\s+(and|or)\s+", re.IGNORECASE)  # a comma makes the operator after it bind last
COPYRIGHT_LINE = re.compile(r"^\s*(copyright\b.*\d{4}.*)$", re.IGNORECASE | re.MULTILINE)
EXPRESSION = re.compile(r"[A-Za-z0-9.+ ()-]+")


@dataclass(frozen=True, slots=True)
class Licensing:
    """An SPDX licence expression, and the texts of the licences in it that SPDX has no id for, by `LicenseRef-...`."""

    expression: str = NO_ASSERTION
    references: Mapping[str, str] = field(default_factory=dict)
    copyrights: tuple[str, ...] = ()


def of(component: Component) -> Licensing:
    """What the component's own files say; NOASSERTION when it has none.

    A wheel's METADATA decides when it has a License-Expression; else every file counts.
    """
    texts = {name: _decoded(data) for name, data in sorted(component.licence_texts.items())}
    metadata = {name for name in texts if name.rsplit("/", 1)[-1] == "METADATA"}
    found = _Found(component.source or component.name)
    declared = [expression for name in sorted(metadata) if (expression := _metadata_expression(texts[name]))]
    found.add_expressions(declared)
    for name, text in texts.items():
        if name not in metadata:
            found.add_text(text, component.kind, only_copyrights=bool(declared))
    if not found.terms and component.kind == "meshcni":
        found.add_expressions([OURS])
    return found.licensing()


class _Found:
    """Collects the terms of an expression, all of which apply, and the texts that it needs."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.terms: dict[str, None] = {}  # in order of appearance
        self.references: dict[str, str] = {}
        self.copyrights: dict[str, None] = {}

    def licensing(self) -> Licensing:
        terms = [f"({term})" if " OR " in term and len(self.terms) > 1 else term for term in self.terms]
        return Licensing(
            " AND ".join(terms) or NO_ASSERTION, dict(sorted(self.references.items())), tuple(self.copyrights)
        )

    def add_expressions(self, expressions: list[str]) -> None:
        for expression in expressions:
            terms = [expression] if " OR " in expression or "(" in expression else expression.split(" AND ")
            self.terms.update(dict.fromkeys(terms))

    def add_text(self, text: str, kind: str, *, only_copyrights: bool) -> None:
        if dep5.is_machine_readable(text) and (parsed := dep5.parse(text)).licences:
            self.copyrights.update(dict.fromkeys(parsed.holders))
            self.add_expressions([self._expression(licence, parsed, text) for licence in parsed.licences])
            return
        if kind == "pypi":
            self.copyrights.update(dict.fromkeys(line.strip() for line in COPYRIGHT_LINE.findall(text)))
        if not only_copyrights:
            self._add_free_text(text)

    def _add_free_text(self, text: str) -> None:
        """A text of one well-known licence is that licence; of any other one, only the whole is sure to be complete."""
        known = licencenames.by_text(text)
        if known is not None:
            self.add_expressions([known])
        else:
            self.add_expressions([*licencenames.named_in(text), self._reference(self.origin, text)])

    def _expression(self, licence: dep5.Licence, parsed: dep5.Copyright, whole: str) -> str:
        """`A or B, and C` is `(A OR B) AND C`; without the comma, `and` binds first, as in SPDX."""
        if not all(_is_short_name(atom) for atom in _atoms(licence.synopsis)):
            text = f"{licence.synopsis}\n{licence.text}".strip() or whole  # the terms themselves instead of a name
            return licencenames.by_text(text) or self._reference(f"{self.origin}-terms", text)

        def clause(part: str) -> str:
            names = OPERATOR.split(part)
            words = [
                self._atom(word, licence, parsed, whole) if n % 2 == 0 else word.upper() for n, word in enumerate(names)
            ]
            return " ".join(words)

        parts = CLAUSE.split(licence.synopsis)
        if len(parts) == 1:
            return clause(parts[0])
        return " ".join(f"({clause(part)})" if n % 2 == 0 else part.upper() for n, part in enumerate(parts))

    def _atom(self, name: str, licence: dep5.Licence, parsed: dep5.Copyright, whole: str) -> str:
        known = licencenames.by_name(name)
        if known is not None:
            return known
        text = parsed.texts.get(name.lower()) or licence.text
        return (licencenames.by_text(text) if text else None) or self._reference(name, text or whole)

    def _reference(self, name: str, text: str) -> str:
        """A name that two packages share only when they share the text."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:40]
        reference = f"LicenseRef-{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self.references[reference] = text
        return reference


def _atoms(synopsis: str) -> Iterator[str]:
    for part in CLAUSE.split(synopsis)[::2]:
        yield from OPERATOR.split(part)[::2]


def _is_short_name(atom: str) -> bool:
    base, *exception = re.split(r"\s+with\s+", atom.strip(), flags=re.IGNORECASE)
    return bool(base) and " " not in base and len(exception) <= 1


def _metadata_expression(metadata: str) -> str:
    expression = (HeaderParser().parsestr(metadata).get("License-Expression") or "").strip()
    return expression if EXPRESSION.fullmatch(expression) else ""


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
