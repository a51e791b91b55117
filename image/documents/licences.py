"""The licences of a component, from its own copyright or licence files, as an SPDX expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from image.model import Component

NO_ASSERTION = "NOASSERTION"


@dataclass(frozen=True, slots=True)
class Licensing:
    """An SPDX licence expression, and the texts of the licences in it that SPDX has no id for, by `LicenseRef-...`."""

    expression: str = NO_ASSERTION
    references: Mapping[str, str] = field(default_factory=dict)
    copyrights: tuple[str, ...] = ()


def of(component: Component) -> Licensing:
    """What the component's own files say; NOASSERTION when it has none."""
    return Licensing()
