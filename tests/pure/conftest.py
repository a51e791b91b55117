"""Keeps the pure tier pure: during a test, files, sockets, threads and processes are errors."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The example database is a folder; a pure test has none. Slow machines must not fail on a deadline.
# `make test` asks for more examples than a quick check does.
examples = int(os.environ.get("MESHCNI_EXAMPLES", "25"))
settings.register_profile(
    "pure", max_examples=examples, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pure")

FORBIDDEN = (
    "ctypes.dlopen",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.symlink",
    "os.system",
    "shutil.",
    "socket.",
    "subprocess.",
    "tempfile.",
)
# A module imported for the first time during a test is read from one of these; that is no effect of the code tested.
LIBRARY_FOLDERS = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {sys.base_prefix + "/lib"}
)
THREAD_STARTERS = ("_start_new_thread", "_start_joinable_thread")
armed = False


class ImpureTestError(BaseException):
    """Raised in the middle of an effect; a BaseException, so that no `except Exception` of tested code hides it."""


def forbid_effects(event: str, arguments: tuple[object, ...]) -> None:
    if not armed or any(isinstance(argument, str) and "/.hypothesis" in argument for argument in arguments):
        return  # hypothesis keeps the constants of the tested modules in a folder of its own
    if event.startswith(FORBIDDEN):
        raise ImpureTestError(f"a pure test did {event}{arguments!r}")
    if event == "open":
        path = str(arguments[0])
        again = isinstance(arguments[0], int)  # a descriptor that is open already
        reads_code = again or path.endswith((".py", ".pyc", ".so")) or path.startswith(LIBRARY_FOLDERS)
        if not reads_code:
            raise ImpureTestError(f"a pure test opened {path}")


sys.addaudithook(forbid_effects)


def forbid_thread(*_: object, **__: object) -> None:
    raise ImpureTestError("a pure test started a thread")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    global armed
    armed = item.get_closest_marker("pure") is not None
    # CPython 3.11 raises no audit event for a thread, so the function that starts one is exchanged.
    starters = {name: getattr(threading, name) for name in THREAD_STARTERS if hasattr(threading, name)}
    if armed:
        for name in starters:
            setattr(threading, name, forbid_thread)
    try:
        return (yield)
    finally:
        armed = False
        for name, starter in starters.items():
            setattr(threading, name, starter)
