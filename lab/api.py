"""The API-server double (lab.apiserver) on the loopback interface of a lab node, driven from this process."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import namespaces
from lab.apiserver import ApiServer, ServerThread
from lab.apiserver.tls import Certificates, make_certificates
from lab.images import BUILD
from lab.node import LabError, Node

TOKEN = "lab-token"


@contextmanager
def api_server_in(node: Node, service_account: Path) -> Iterator[ServerThread]:
    """Run the double inside the node, with TLS and one token, and write the files of a service account."""
    loop = asyncio.new_event_loop()
    server = ApiServer(certificates=certificates(), tokens={TOKEN}, bookmark_seconds=5.0)

    def work() -> None:
        namespaces.enter(node.netns, namespaces.CLONE_NEWNET)  # so that its sockets are the node's
        loop.run_forever()

    thread = threading.Thread(target=work, name="api-server", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        server.write_service_account(service_account, TOKEN)
        yield ServerThread(server, loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def certificates() -> Certificates:
    """Return the double's certificates, made when there are none yet."""
    folder = BUILD / "tls"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if make_certificates(folder) is None:
            raise LabError("not installed: openssl, which makes the certificates of the API server")
        done.touch()
    return Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
