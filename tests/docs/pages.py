"""The operators' pages as tests read them: sections, links, fenced blocks, names in code spans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OPERATIONS = ROOT / "docs" / "operations"
PAGES = tuple(sorted(OPERATIONS.glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Section:
    """One heading with the text below it, up to the next heading of any level."""

    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """One page."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def prose(self) -> str:
        return FENCE.sub("", self.text)

    def blocks(self, kind: str) -> list[str]:
        """The fenced blocks of that kind: empty for commands, status, output, log, yaml."""
        return [body for found, body in FENCE.findall(self.text) if found == kind]

    def kinds(self) -> set[str]:
        return {kind for kind, _ in FENCE.findall(self.text)}

    def commands(self) -> list[str]:
        """Every line of a block of commands, and every code span that begins with a program of ours."""
        lines = [line for body in self.blocks("") for line in body.splitlines() if line.strip()]
        spans = [span for span in SPAN.findall(self.prose) if re.match(r"(install-cni|meshcni|kubectl|helm) ", span)]
        return [*lines, *spans]

    def spans(self) -> list[str]:
        return SPAN.findall(self.prose)

    def links(self) -> list[str]:
        return [link for link in LINK.findall(self.prose) if "://" not in link]

    def sections(self) -> Iterator[Section]:
        text = FENCE.sub(lambda match: match.group(0).replace("\n#", "\n\0"), self.text)  # a comment is no heading
        found = list(HEADING.finditer(text))
        for heading, following in zip(found, [*found[1:], None], strict=True):
            body = text[heading.end() : following.start() if following else len(text)]
            yield Section(heading.group(2), body.replace("\0", "#"))

    def anchors(self) -> set[str]:
        return {anchor(section.title) for section in self.sections()}


def anchor(title: str) -> str:
    """The anchor that repository hosts make of a heading."""
    plain = re.sub(r"[^\w\- ]", "", title.replace("`", "").lower())
    return plain.replace(" ", "-")


def pages() -> list[Page]:
    return [Page(path) for path in PAGES]
