"""Debian changelogs: which CVE ids the revisions of a package say they repair (deb-changelog(5))."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from image.model import Entry, EntryKind, ImageError

PLACE = re.compile(r"usr/share/doc/[^/]+/(?P<name>changelog(?:\.Debian)?\.gz)")
HEADING = re.compile(r"^(?P<source>[a-zA-Z0-9][a-zA-Z0-9+.-]*) \((?P<version>[^()\s]+)\) [^;]+;")
TRAILER = re.compile(r"^ ?--")
BULLET = re.compile(r"^\s+[*+-]\s")
CVE = re.compile(r"\bCVE-\d{4}-\d{4,}\b")
STABLE_UPDATE = re.compile(r"[+~]deb13u\d+")  # how revisions made for Debian 13 after its release are numbered
# What a point says when its CVE ids are not, or no longer, repaired: the claim is withdrawn rather than risked.
DOUBT = re.compile(
    r"\brevert|\bre-?open|\bincomplete|\bun(?:fixed|affected)|\bnot[ -](?:yet )?(?:affected|fixed|vulnerable)|"
    r"\bdoes(?:n't| not) (?:fix|address|affect)|\bback(?:ed)? out",
    re.IGNORECASE,
)
NO_CLAIM = re.compile(r"\btests? for\b", re.IGNORECASE)  # a test is no repair


@dataclass(frozen=True, slots=True)
class Revision:
    """One entry of a changelog: a version of the source package, and the points that it lists.

    A point below another one begins with the other's text, for it is read in its light.
    """

    version: str
    points: tuple[str, ...]


def unpacked(packages: Iterable[tuple[str, Iterable[Entry]]]) -> Mapping[str, bytes]:
    """The changelogs in packages' files, by source package. A pair is a source package's name and a package's entries.

    `changelog.gz` is Debian's own only in packages that have no other one, and else the upstream project's.
    Raises ImageError for one that is no gzip file.
    """
    found: dict[str, bytes] = {}
    for source, entries in packages:
        places = {place["name"]: entry for entry in entries if (place := PLACE.fullmatch(entry.path))}
        entry = places.get("changelog.Debian.gz") or places.get("changelog.gz")
        if entry is None or entry.kind is not EntryKind.FILE or source in found:
            continue  # a link leads to the changelog of another package of the same source
        try:
            found[source] = gzip.decompress(entry.data)
        except (OSError, EOFError, zlib.error) as error:
            raise ImageError(f"/{entry.path} of {source} cannot be unpacked: {error}") from error
    return found


def repaired(text: bytes, source: str, version: str) -> Mapping[str, str]:
    """The CVE ids that revisions of `version` say they repair, each with the revision that did.

    Entries count that keep `version`'s upstream version (the repair is a backport) or that are updates of Debian 13.
    Raises ImageError when the changelog does not begin with `version`.
    """
    entries = list(revisions(text, source))
    if entries[0].version != version:
        raise ImageError(
            f"changelog of {source}: it begins with {entries[0].version}, the lock says {version}",
            "take the changelog from the package that the lock names",
        )
    fixed: dict[str, str] = {}
    for entry in reversed(entries):  # oldest first: what a later revision says holds
        if _upstream(entry.version) == _upstream(version) or STABLE_UPDATE.search(entry.version):
            _apply(entry, fixed)
    return dict(sorted(fixed.items()))


def revisions(text: bytes, source: str) -> Iterator[Revision]:
    """The entries, newest first.

    Raises ImageError for what does not begin with an entry of this source package, and for an entry without its end.
    """
    version, lines = "", list[str]()
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
        heading = HEADING.match(line)
        if number == 1 and (heading is None or heading["source"] != source):
            raise ImageError(f"changelog of {source}, line 1: expected `{source} (VERSION) SUITE; …`, found {line!r}")
        if heading is not None and version:
            raise ImageError(f"changelog of {source}, line {number}: the entry {version} has no trailer before it")
        if heading is not None:
            version, lines = heading["version"], []
        elif version and TRAILER.match(line):
            yield Revision(version, tuple(_points(lines)))
            version = ""
        else:
            lines.append(line)
    if version or not text.strip():
        raise ImageError(f"changelog of {source}: it ends inside the entry {version or '(none)'}")


def _points(lines: list[str]) -> Iterator[str]:
    """Each point in one line. What is indented more continues a point, or is one below it when it has a bullet."""
    above: list[tuple[int, list[str]]] = []  # the points that are open: indentation and words
    for line in filter(str.strip, lines):
        indent = len(line.expandtabs()) - len(line.expandtabs().lstrip())
        if above and not BULLET.match(line) and indent > above[-1][0]:
            above[-1][1].append(line.strip())
            continue
        if above:
            yield _joined(above)
        above = [point for point in above if point[0] < indent] + [(indent, [line.strip()])]
    if above:
        yield _joined(above)


def _joined(points: list[tuple[int, list[str]]]) -> str:
    return " ".join(word for _, words in points for word in words)


def _apply(entry: Revision, fixed: dict[str, str]) -> None:
    """Add what the entry claims; take away what it throws doubt on, whatever its other points say."""
    doubted = {cve for point in entry.points if DOUBT.search(point) for cve in CVE.findall(point)}
    claimed = {cve for point in entry.points if not NO_CLAIM.search(point) for cve in CVE.findall(point)}
    for cve in doubted:
        fixed.pop(cve, None)
    for cve in claimed - doubted:
        fixed.setdefault(cve, entry.version)


def _upstream(version: str) -> str:
    """The upstream part of a Debian version: without epoch and Debian revision."""
    return version.split(":", 1)[-1].rsplit("-", 1)[0]
