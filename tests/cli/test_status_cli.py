"""`meshcni status` and `install-cni status` as processes, asking an agent that answers from a document."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Run
from tests.pure.cli.test_statustext import DOCUMENT

from meshcni import istio
from meshcni.cli.statustext import as_text

PROGRAMS = {"meshcni": ("meshcni.cli", "--format"), "install-cni": ("meshcni.agent", "--output")}


@contextmanager
def agent(run_dir: Path, status: str, body: bytes) -> Iterator[list[bytes]]:
    """Answer every request on control.sock alike; gives the requests' first lines."""
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / istio.CONTROL_SOCKET_NAME))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the test is over
                    return
                with connection:
                    asked.append(connection.recv(65536).split(b"\r\n")[0])
                    connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode() + body)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> tuple[str, str]:
    return PROGRAMS[request.param]


def answer(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize("ready", [True, False])
def test_text_and_json(run: Run, tmp_path: Path, program: tuple[str, str], ready: bool) -> None:
    document = DOCUMENT | {"ready": ready, "notReady": [] if ready else ["the host's probe rules are not in place"]}
    name, form = program
    with agent(tmp_path, "200 OK", answer(document)) as asked:
        text = run("status", "--cni-agent-run-dir", str(tmp_path), program=name)
        shown = run("status", f"{form}=json", program=name, env={"CNI_AGENT_RUN_DIR": str(tmp_path)})
    assert asked == [b"GET /status HTTP/1.0"] * 2
    assert (text.returncode, text.stdout, text.stderr) == (0 if ready else 1, as_text(document) + "\n", "")
    assert (shown.returncode, json.loads(shown.stdout), shown.stderr) == (0 if ready else 1, document, "")
    assert "shop/till" in text.stdout


def test_no_agent(run: Run, tmp_path: Path, program: tuple[str, str]) -> None:
    result = run("status", "--cni-agent-run-dir", str(tmp_path), program=program[0])
    assert (result.returncode, result.stdout) == (1, "")
    assert f"no agent answers on {tmp_path}/control.sock" in result.stderr
    assert "is install-cni running on this node" in result.stderr


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        ("500 Internal Server Error", b"it is ill", "the agent answered GET /status with: it is ill"),
        ("404 Not Found", b"", "with: the connection was closed"),
        ("200 OK", b"[]", "the agent's answer is not a JSON object"),
        ("200 OK", b"<html>", "the agent's answer is not JSON"),
        ("200 OK", b"", "the agent's answer is not JSON"),
    ],
)
def test_an_agent_that_answers_something_else(
    run: Run, tmp_path: Path, program: tuple[str, str], status: str, body: bytes, message: str
) -> None:
    with agent(tmp_path, status, body):
        result = run("status", "--cni-agent-run-dir", str(tmp_path), program=program[0])
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--format=xml"], 2), (["all"], 2), (["--nonsense"], 2), (["--help"], 0)]
)
def test_command_lines(run: Run, arguments: list[str], status: int) -> None:
    result = run("status", *arguments)
    assert (result.returncode, bool(result.stdout), "Traceback" in result.stderr) == (status, status == 0, False)
