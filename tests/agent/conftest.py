from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.ztunnel.client import Program
from tests.agent.ambientscene import AmbientScene, new_ambient_scene
from tests.agent.contract import Node
from tests.agent.scene import Scene, new_scene


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with new_scene(tmp_path) as made:
        yield made


@pytest.fixture
def node(scene: Scene) -> Node:
    return Node(scene)


@pytest.fixture
def ambient(scene: Scene) -> Iterator[AmbientScene]:
    with new_ambient_scene(scene) as made:
        yield made


@pytest.fixture
def ztunnel(ambient: AmbientScene) -> Program:
    """A stand-in that connects as soon as there is an agent."""
    return ambient.ztunnel()
