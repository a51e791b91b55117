"""Coroutine tests, each on a loop of its own that must end clean, and the double they talk to."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest
from lab.apiserver.tls import Certificates, make_certificates
from tests.kube.connectproxy import API_ADDRESS, API_NAME

LONGEST_SECONDS = 60


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(function).parameters}

    async def run() -> None:
        async with asyncio.timeout(LONGEST_SECONDS):
            await function(**arguments)

    asyncio.run(run())
    return True


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    names = ("IP:127.0.0.1", "DNS:localhost", f"IP:{API_ADDRESS}", f"DNS:{API_NAME}")
    made = make_certificates(tmp_path_factory.mktemp("tls"), names)
    if made is None:
        pytest.skip("HTTPS is not tested: this machine has no `openssl` (apt-get install openssl)")
    return made


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """The directory of a service account."""
    return tmp_path / "serviceaccount"
