"""Checks manifests against the schemas of Kubernetes' own API, unknown fields refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import kubernetes_validate

NEWEST = "1.37"
NOT_OF_KUBERNETES = {"NetworkAttachmentDefinition"}


def complaints(objects: Iterable[Mapping[str, Any]], version: str = NEWEST) -> list[str]:
    """What is wrong, one text for each different object; objects of other projects' kinds are passed over."""
    ours = [one for one in objects if one["kind"] not in NOT_OF_KUBERNETES]
    different = {re.sub("[0-9a-f]{64}", "", json.dumps(one, sort_keys=True)): one for one in ours}
    found = []
    for one in different.values():
        try:
            checked_against = kubernetes_validate.validate(dict(one), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{one['kind']} {one['metadata']['name']}: {error.message} at {list(error.path)}")
        else:
            assert checked_against == version, f"no schemas of {version}, only of {checked_against}"
    return found
