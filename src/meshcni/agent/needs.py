"""How much the agent needs a thing that only its manifest can give: a mount or a right."""

from __future__ import annotations

from enum import Enum


class Weight(Enum):
    """What the want of it means."""

    STOPS = "the agent cannot do its work and touches nothing"
    DEGRADES = "a part of its work is not done, which is a warning"
    HELPS = "nothing of note; granted with the rest"
