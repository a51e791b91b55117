"""Hands one ADD to the node agent over `agent.sock` and waits for its reply, within a bound.

Where nobody can be connected to, the API server is asked whether the pod has to wait at all: see inquiry.
"""

import _socket
import posix
import sys
import time

from meshcni import istio
from meshcni.cni.spec import Request
from meshcni.errors import AgentUnavailableError
from meshcni.protocols.podadd import MAX_REPLY_BYTES

FIRST_PAUSE_SECONDS = 0.01
MAX_PAUSE_SECONDS = 0.25
ACCEPT_SECONDS = 1.0  # a living agent accepts well within this, also when many pods start at once
# Once connected, the agent gets this long even when the bound is nearly over: it may be programming rules by now, or
# wait for ztunnel, which looks for a restarted agent after up to 15 s.
MIN_REPLY_SECONDS = 25.0

_HINT = (
    f"is the {istio.DAEMONSET_NAME} pod of this node running? If Istio CNI is to go from this node, run "
    f"'{istio.AGENT_NAME} uninstall' in that pod, or remove the entry of type {istio.PLUGIN_NAME} from the CNI conf; "
    f"a file '{istio.UNINSTALLED_MARKER_NAME}' in the run directory lets pods pass until then"
)
_UNINSTALLED = f"the node agent was uninstalled, a conf still names {istio.PLUGIN_NAME}"


class _NoReplyError(Exception):
    """One attempt failed in a way that another one may repair.

    `was_connected` tells how far it came; `is_busy` that others wait for the agent to accept them.
    """

    def __init__(self, text: str, was_connected: bool = False, is_busy: bool = False) -> None:
        super().__init__(text)
        self.was_connected = was_connected
        self.is_busy = is_busy


def ask_agent(request: Request, message: bytes, netns: int) -> bytes | str:
    """Sends `message` with the descriptor `netns`, again and again until the agent replies or the time is over.

    While the agent restarts there is no socket, nobody accepts, or the connection ends without a reply. A text instead
    of a reply says why the pod may start without the agent: it was removed on purpose and left its marker, or it is
    down and the API server says that the pod has nothing to do with the mesh. Raises AgentUnavailableError.
    """
    conf = request.conf
    begin = time.monotonic()
    deadline = begin + conf.agent_wait_seconds
    agent = Agent(f"{conf.run_dir}/{istio.AGENT_SOCKET_NAME}")
    inquiry = None
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            agent.connect()
            return agent.converse(message, netns, max(deadline - time.monotonic(), MIN_REPLY_SECONDS))
        except _NoReplyError as error:
            problem = error
        is_absent = not problem.is_busy or time.monotonic() - begin >= ACCEPT_SECONDS
        if is_absent and not problem.was_connected:
            if _is_uninstalled(conf.run_dir):
                return _UNINSTALLED
            if inquiry is None:
                from meshcni.plugin.inquiry import Inquiry  # only ADDs without an agent need it

                inquiry = Inquiry(request, deadline, agent)
            reason = inquiry.reason_to_pass()
            if reason:
                return f"the node agent is down ({problem}), but {reason}"
        remaining = deadline - time.monotonic()
        if remaining <= 0 and not agent.is_connected:
            text, hint = f"the node agent did not answer within {conf.agent_wait_seconds:g} s: {problem}", _HINT
            if inquiry is not None:
                text, hint = f"{text}; the API server, asked instead, {inquiry.finding}", inquiry.hint + hint
            raise AgentUnavailableError(text, hint)
        if not agent.is_connected:
            time.sleep(min(pause, remaining))
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


class Agent:
    """One connection after the other to the agent's socket."""

    __slots__ = ("_connection", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: _socket.socket | None = None

    @property
    def is_connected(self) -> bool:
        """Whether a connection waits to be used."""
        return self._connection is not None

    def is_back(self) -> bool:
        """Whether it can be connected to by now, without waiting."""
        try:
            self.connect()
        except _NoReplyError:
            return False
        return True

    def connect(self) -> None:
        """Makes a connection, if there is none yet, without waiting. Raises _NoReplyError."""
        if self._connection is not None:
            return
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
        except BlockingIOError:
            connection.close()
            raise _NoReplyError(f"{self._path}: nobody accepts", is_busy=True) from None
        except OSError as error:
            connection.close()
            raise _NoReplyError(f"{self._path}: {error.strerror or error}") from None
        self._connection = connection

    def converse(self, message: bytes, netns: int, seconds: float) -> bytes:
        """The reply on the connection, which is used up. Raises _NoReplyError, and AgentUnavailableError at the end."""
        connection, self._connection = self._connection, None
        assert connection is not None
        connection.settimeout(seconds)
        try:
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, netns.to_bytes(4, sys.byteorder))]
            connection.sendmsg([message], rights, _socket.MSG_NOSIGNAL)
            reply = connection.recv(MAX_REPLY_BYTES + 1)
        except TimeoutError:
            text = f"the node agent took the ADD but sent no reply within {seconds:.0f} s"
            raise AgentUnavailableError(text, _HINT) from None
        except OSError as error:
            raise _NoReplyError(f"{self._path}: {error.strerror or error}", was_connected=True) from None
        finally:
            connection.close()
        if not reply:
            raise _NoReplyError(f"{self._path}: the agent closed the connection without a reply", was_connected=True)
        return reply


def _is_uninstalled(run_dir: str) -> bool:
    try:
        posix.stat(f"{run_dir}/{istio.UNINSTALLED_MARKER_NAME}")
    except OSError:
        return False
    return True
