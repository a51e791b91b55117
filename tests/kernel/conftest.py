"""Pods for the kernel tier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.kernel.world import VARIANTS, Netns, make_pod

from meshcni.rules.model import Family

HERE = Path(__file__).parent
PodMaker = Callable[..., Netns]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="the kernel tier needs root"))


@pytest.fixture
def new_pod() -> Iterator[PodMaker]:
    made: list[Netns] = []

    def make(families: frozenset[Family] = frozenset(Family)) -> Netns:
        made.append(make_pod(families))
        return made[-1]

    yield make
    for pod in made:
        pod.close()


@pytest.fixture
def pod(new_pod: PodMaker) -> Netns:
    """A dual-stack pod."""
    return new_pod()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each way of programming rules."""
    return str(request.param)
