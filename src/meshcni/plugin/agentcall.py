"""Hands one ADD to the node agent over `agent.sock` and waits for its reply, within a bound."""

import _socket
import posix
import sys
import time

from meshcni import istio
from meshcni.errors import AgentUnavailableError
from meshcni.protocols.podadd import MAX_REPLY_BYTES

FIRST_PAUSE_SECONDS = 0.01
MAX_PAUSE_SECONDS = 0.25
# Once connected, the agent gets this long even when the bound is nearly over: it may be programming rules by now, or
# wait for ztunnel, which looks for a restarted agent after up to 15 s.
MIN_REPLY_SECONDS = 25.0

_HINT = (
    f"is the {istio.DAEMONSET_NAME} pod of this node running? If Istio CNI is to go from this node, run "
    f"'{istio.AGENT_NAME} uninstall' in that pod, or remove the entry of type {istio.PLUGIN_NAME} from the CNI conf; "
    f"a file '{istio.UNINSTALLED_MARKER_NAME}' in the run directory lets pods pass until then"
)


class _NoReplyError(Exception):
    """One attempt failed in a way that another one may repair; `was_connected` tells how far it came."""

    def __init__(self, text: str, was_connected: bool) -> None:
        super().__init__(text)
        self.was_connected = was_connected


def ask_agent(run_dir: str, message: bytes, netns: int, wait_seconds: float) -> bytes | None:
    """Sends `message` with the descriptor `netns`, again and again until the agent replies or `wait_seconds` are over.

    While the agent restarts there is no socket, nobody accepts, or the connection ends without a reply. None: the agent
    was removed on purpose and left its marker, so nobody will ever reply. Raises AgentUnavailableError.
    """
    deadline = time.monotonic() + wait_seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return _attempt(f"{run_dir}/{istio.AGENT_SOCKET_NAME}", message, netns, deadline)
        except _NoReplyError as error:
            if not error.was_connected and _is_uninstalled(run_dir):
                return None
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                text = f"the node agent did not answer within {wait_seconds:g} s: {error}"
                raise AgentUnavailableError(text, _HINT) from None
        time.sleep(min(pause, remaining))
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def _attempt(path: str, message: bytes, netns: int, deadline: float) -> bytes:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(max(deadline - time.monotonic(), FIRST_PAUSE_SECONDS))
        try:
            connection.connect(path)
        except OSError as error:
            raise _NoReplyError(f"{path}: {error.strerror or error}", was_connected=False) from None
        reply_seconds = max(deadline - time.monotonic(), MIN_REPLY_SECONDS)
        connection.settimeout(reply_seconds)
        try:
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, netns.to_bytes(4, sys.byteorder))]
            connection.sendmsg([message], rights, _socket.MSG_NOSIGNAL)
            reply = connection.recv(MAX_REPLY_BYTES + 1)
        except TimeoutError:
            text = f"the node agent took the ADD but sent no reply within {reply_seconds:.0f} s"
            raise AgentUnavailableError(text, _HINT) from None
        except OSError as error:
            raise _NoReplyError(f"{path}: {error.strerror or error}", was_connected=True) from None
    finally:
        connection.close()
    if not reply:
        raise _NoReplyError(f"{path}: the agent closed the connection without a reply", was_connected=True)
    return reply


def _is_uninstalled(run_dir: str) -> bool:
    try:
        posix.stat(f"{run_dir}/{istio.UNINSTALLED_MARKER_NAME}")
    except OSError:
        return False
    return True
