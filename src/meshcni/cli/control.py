"""`control.sock`: how `install-cni status` and `install-cni uninstall` talk to the running agent. Root only."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from meshcni import istio
from meshcni.errors import AgentUnavailableError, MeshCniError

STATUS_PATH = "/status"
UNINSTALL_PATH = "/uninstall"
PURGE_QUERY = "purge=true"
ANSWER_SECONDS = 90.0  # an uninstall un-enrols every pod, then writes and syncs files


class AgentFailedError(MeshCniError):
    """The agent answered, but not with what was asked."""


def ask(run_dir: str, method: str, target: str) -> dict[str, Any]:
    """Ask the agent of this node; raises AgentUnavailableError when none answers, AgentFailedError for an error."""
    path = Path(run_dir, istio.CONTROL_SOCKET_NAME)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(path))
            connection.sendall(f"{method} {target} HTTP/1.0\r\nHost: agent\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError as error:
        raise AgentUnavailableError(
            f"no agent answers on {path}: {error.strerror or error}",
            "is install-cni running on this node with the same --cni-agent-run-dir, and are you root?",
        ) from None
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        text = body.decode("utf-8", "replace").strip() or "the connection was closed"
        raise AgentFailedError(f"the agent answered {method} {target} with: {text}")
    try:
        document = json.loads(body)
    except ValueError as error:
        raise AgentFailedError(f"the agent's answer is not JSON: {error}", "is it of another release?") from None
    if not isinstance(document, dict):
        raise AgentFailedError("the agent's answer is not a JSON object", "is it of another release?")
    return document
