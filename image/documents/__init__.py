"""Documents about an image: what is in it, its licences, how it was made, what known vulnerabilities mean for it.

Pure functions from values to JSON values. No clock, no file and no randomness: equal inputs give equal documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from image.documents import cyclonedx, openvex, provenance, spdx
from image.documents.provenance import Build, Source
from image.model import Contents, Subject

__all__ = ["Build", "Source", "all_documents"]


def all_documents(contents: Contents, subject: Subject, build: Build) -> Mapping[str, tuple[str, dict[str, Any]]]:
    """The predicates to attest for one platform's image: by predicate type, a name for the file and the predicate."""
    bom = cyclonedx.document(
        contents, name=subject.name, version=subject.version, created=subject.created, digest=subject.digest
    )
    return {
        spdx.PREDICATE_TYPE: ("sbom.spdx", spdx.document(contents, subject)),
        cyclonedx.PREDICATE_TYPE: ("sbom.cyclonedx", bom),
        provenance.PREDICATE_TYPE: ("provenance", provenance.predicate(subject, build)),
        openvex.PREDICATE_TYPE: ("vex", openvex.document(contents, subject, build.changelogs)),
    }
