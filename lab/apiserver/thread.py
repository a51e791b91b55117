"""The double on an event loop and thread of its own, for tests and tools that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lab.apiserver.server import ApiServer

T = TypeVar("T")


class ServerThread:
    """A running double; `do` is the only way to touch it from other threads."""

    def __init__(self, server: ApiServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self.url = server.url
        self.environment = server.environment()

    def do(self, command: Callable[[ApiServer], T]) -> T:
        """Run `command` on the double's loop: `running.do(lambda server: server.add_pod(pod))`."""

        async def run() -> T:
            return command(self._server)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def crash(self) -> None:
        """Stop listening and break all connections; the objects stay."""
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result(30)

    def restart(self) -> None:
        """Listen again on the same port."""
        asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(30)


@contextmanager
def run_in_thread(**arguments: Any) -> Iterator[ServerThread]:  # noqa: ANN401 - those of ApiServer
    """A double with ApiServer's `arguments`, listening until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="api-server-double", daemon=True)
    thread.start()
    server = ApiServer(**arguments)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        yield ServerThread(server, loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
