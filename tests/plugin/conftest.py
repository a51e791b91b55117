"""The built executable and what it needs around it. Everything here needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tests.plugin.harness import PLUGIN, ROOT, AgentDouble

numbers = count()


@pytest.fixture(scope="session", autouse=True)
def plugin() -> Path:
    """build/istio-cni, up to date."""
    assert os.geteuid() == 0, "the plugin tier needs root: it makes network namespaces and chroots"
    subprocess.run([ROOT / "scripts" / "build-plugin"], check=True)
    return PLUGIN


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory with a path short enough for a socket address."""
    path = Path(tempfile.mkdtemp(prefix="mc-run-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def agent(run_dir: Path) -> Iterator[AgentDouble]:
    """An agent that says yes, listening in `run_dir`."""
    with AgentDouble(run_dir) as double:
        yield double


def make_netns() -> Iterator[str]:
    name = f"mc-plugin-{os.getpid()}-{next(numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "delete", name], check=True)


netns = pytest.fixture(make_netns)
host_netns = pytest.fixture(make_netns)
shared_netns = pytest.fixture(make_netns, scope="session")
