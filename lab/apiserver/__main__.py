"""The double as a program: `python -m lab.apiserver --listen 127.0.0.1:0 --control 127.0.0.1:0 --token secret`.

It prints one line of JSON with its addresses and files when it is ready, and runs until SIGTERM or SIGINT.
The control address takes `POST /<command>` with a JSON object of arguments, for the commands below, and answers JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h11

from lab.apiserver.objects import Refusal
from lab.apiserver.server import ApiServer
from lab.apiserver.tls import make_certificates
from lab.apiserver.wire import Connection, ConnectionLostError


def _requests(server: ApiServer) -> list[dict[str, Any]]:
    return [
        {"method": r.request.method, "path": r.request.path, "query": dict(r.request.query), "watch": r.is_watch}
        for r in server.requests
    ]


COMMANDS: Mapping[str, Callable[..., Any]] = {
    "add": ApiServer.add,
    "add_pod": ApiServer.add_pod,
    "add_namespace": ApiServer.add_namespace,
    "patch": ApiServer.patch,
    "delete_pod": ApiServer.delete_pod,
    "fault": ApiServer.fault,
    "clear_faults": ApiServer.clear_faults,
    "bookmark": ApiServer.bookmark,
    "end_watches": ApiServer.end_watches,
    "cut_watches": ApiServer.cut_watches,
    "fail_watches": ApiServer.fail_watches,
    "freeze_watches": ApiServer.freeze_watches,
    "compact": ApiServer.compact,
    "requests": _requests,
}


async def serve_control(server: ApiServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of the control address."""
    connection = Connection(reader, writer)
    try:
        while True:
            request = await connection.next_request()
            command = COMMANDS.get(request.path.strip("/"))
            if command is None:
                await connection.answer(
                    404, {"error": f"no such command: {request.path}", "commands": sorted(COMMANDS)}
                )
            else:
                try:
                    arguments = json.loads(request.body or b"{}")
                    result = command(server, **arguments)
                    await connection.answer(200, {"result": result if isinstance(result, dict | list) else None})
                except (Refusal, TypeError, ValueError, KeyError) as error:
                    await connection.answer(400, {"error": f"{type(error).__name__}: {error}"})
            if not connection.reusable():
                return
    except (ConnectionLostError, OSError, h11.ProtocolError):
        return
    finally:
        writer.close()


async def run(options: argparse.Namespace) -> None:
    """Serve until a signal."""
    host, port = _address(options.listen)
    certificates = None
    if options.tls_dir:
        certificates = make_certificates(Path(options.tls_dir), (f"IP:{host}", "DNS:localhost"))
        if certificates is None:
            raise SystemExit("--tls-dir needs the openssl program, which this machine does not have")
    async with ApiServer(
        host=host,
        port=port,
        tokens=options.token or None,
        certificates=certificates,
        bookmark_seconds=options.bookmark_seconds,
    ) as server:
        for path in options.load:
            for item in json.loads(Path(path).read_text())["items"]:
                server.add(item["kind"].lower() + "s", item)
        said = {"url": server.url, "environment": server.environment(), "control": ""}
        control = None
        if options.control:
            control = await asyncio.start_server(lambda r, w: serve_control(server, r, w), *_address(options.control))
            control_host, control_port = control.sockets[0].getsockname()[:2]
            said["control"] = f"http://{control_host}:{control_port}"
        if options.service_account_dir:
            server.write_service_account(Path(options.service_account_dir), (options.token or [""])[0])
        print(json.dumps(said), flush=True)
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        await stopped.wait()
        if control is not None:
            control.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m lab.apiserver", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:0", help="address and port of the API")
    parser.add_argument("--control", default="", help="address and port of the control endpoint")
    parser.add_argument("--token", action="append", help="a bearer token to accept; none means everybody is let in")
    parser.add_argument("--tls-dir", default="", help="serve HTTPS, with certificates made in this directory")
    parser.add_argument("--service-account-dir", default="", help="write token, ca.crt and namespace here")
    parser.add_argument("--bookmark-seconds", type=float, default=60.0)
    parser.add_argument("--load", action="append", default=[], help="a JSON List of objects to begin with")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
