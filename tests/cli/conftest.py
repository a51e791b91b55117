"""Runs the people's command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from tests.cli.netns import Netns, new_netns

SOURCES = str(Path(__file__).parents[2] / "src")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run() -> Run:
    """`run(*arguments, env=..., prefix=..., stdin=..., program=...)`: `meshcni ARGUMENTS`, with output as text."""

    def run_it(
        *arguments: str,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        stdin: str | None = None,
        program: str = "meshcni.cli",
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": SOURCES, "HOME": "/nonexistent", **(env or {})}
        command = [*prefix, sys.executable, "-m", program, *arguments]
        return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, timeout=60)

    return run_it


@pytest.fixture
def netns() -> Iterator[Netns]:
    """A network namespace of this test's own."""
    with new_netns() as made:
        yield made


@pytest.fixture
def other_netns() -> Iterator[Netns]:
    """Another one, to compare with."""
    with new_netns() as made:
        yield made
