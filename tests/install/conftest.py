"""Coroutine tests, each on a loop of its own, and the host they install on."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.install.hosts import Host

LONGEST_SECONDS = 120


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(function).parameters}

    async def bounded() -> None:
        async with asyncio.timeout(LONGEST_SECONDS):
            await function(**arguments)

    asyncio.run(bounded())
    return True


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    old = os.umask(0o077)  # must not matter
    yield Host(tmp_path)
    os.umask(old)
