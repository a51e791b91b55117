"""Marks each test with its tier, which is the name of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

TIERS = {"pure", "kernel", "node", "cluster"}
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(HERE).parts[0]
        if tier in TIERS:
            item.add_marker(getattr(pytest.mark, tier))
