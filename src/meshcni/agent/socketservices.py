"""The two sockets of the original's plugin: `log.sock` takes its log lines, `pluginevent.sock` its ambient events."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from meshcni.agent import logs
from meshcni.agent import metrics as m
from meshcni.agent.metrics import Metrics
from meshcni.agent.web import Request, Response
from meshcni.errors import MeshCniError, ProtocolError
from meshcni.protocols.cmdadd import PodAdded, decode_pod_added
from meshcni.protocols.loglines import decode_lines

log = logging.getLogger(__name__)

LINES_PER_SECOND = 200.0  # a plugin sends a few lines an ADD, at debug about fifty
LINES_AT_ONCE = 2000.0
MAX_LOGGED_CHARACTERS = 200  # of a message, so that a line stays below 400 bytes
MAX_NAME_CHARACTERS = 63 + 1 + 253  # of a pod and its namespace
MAX_ANSWER_CHARACTERS = 2000
MAX_EVENTS = 512  # at once: after a reboot every pod of a node asks in the same moment; as many as wait for agent.sock
WARNING_SECONDS = 60.0  # between two lines that say that lines are dropped


class Allowance:
    """A bucket of tokens: `per_second` come in, at most `at_once` are kept."""

    def __init__(self, per_second: float, at_once: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._at_once, self._clock = per_second, at_once, clock
        self._tokens, self._last = at_once, clock()

    def take(self) -> bool:
        """Take one token if there is one."""
        now = self._clock()
        self._tokens = min(self._at_once, self._tokens + (now - self._last) * self._per_second)
        self._last = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class LogService:
    """Prints plugins' lines; the answer is always 200, as upstream's, since plugins do nothing about another."""

    def __init__(self, metrics: Metrics, allowance: Allowance | None = None) -> None:
        self._metrics = metrics
        self._allowance = allowance or Allowance(LINES_PER_SECOND, LINES_AT_ONCE)
        self._warning = Allowance(1 / WARNING_SECONDS, 1)

    async def handle(self, request: Request) -> Response:
        """`POST /log`; the method is not looked at. One batch is printed in one piece."""
        try:
            batch = decode_lines(request.body)
        except ProtocolError as error:
            log.error("dropped a log request of a plugin: %s", error.message)
            self._metrics.count(m.LOG_LINES, result="malformed")
            return Response()
        for line in batch.lines:
            allowed = self._allowance.take()
            if allowed:
                logs.forward(line)
            elif self._warning.take():
                log.warning("plugins send more than %.0f log lines a second; some are dropped", LINES_PER_SECOND)
            self._metrics.count(m.LOG_LINES, result="printed" if allowed else "limited")
        for why in batch.dropped:
            log.debug("dropped a log line of a plugin: %s", why)
            self._metrics.count(m.LOG_LINES, result="malformed")
        return Response()


Enroll = Callable[[PodAdded], Awaitable[None]]


class EventService:
    """Answers `POST /cmdadd` of the original's plugin, which sends it for ambient pods only. Errors fail its ADD.

    `enroll` is None when ambient mode is off on this node.
    """

    def __init__(self, metrics: Metrics, enroll: Enroll | None) -> None:
        self._metrics = metrics
        self._enroll = enroll

    async def handle(self, request: Request) -> Response:
        """400 for what cannot be read, 500 for what cannot be done; the body is plain text. Any method."""
        begin = time.monotonic()
        response = await self._answer(request, begin)
        self._metrics.count(m.PLUGIN_REQUESTS, response_code=str(response.status))
        return response

    async def _answer(self, request: Request, begin: float) -> Response:
        try:
            event = decode_pod_added(request.body)
        except ProtocolError as error:
            return _refusal(400, error.message)
        pod = f"{event.pod_namespace}/{event.pod_name}"[:MAX_NAME_CHARACTERS]
        try:
            if self._enroll is None:
                raise MeshCniError("ambient is not enabled on this node", "set AMBIENT_ENABLED on the agent")
            await self._enroll(event)
        except MeshCniError as error:
            self._metrics.count(m.ERRORS, error=type(error).__name__)
            log.error("refused ambient pod: %s", str(error)[:MAX_LOGGED_CHARACTERS], extra=logs.labels(pod=pod))
            return _refusal(500, f"pod {pod}: {error}")
        except Exception as error:
            log.exception("enrolling %s failed unexpectedly", pod)
            return _refusal(500, f"pod {pod}: {type(error).__name__}: {error}")
        milliseconds = round((time.monotonic() - begin) * 1000, 2)
        log.info("enrolled for the original's plugin", extra=logs.labels(pod=pod, total_ms=milliseconds))
        return Response()


def _refusal(status: int, text: str) -> Response:
    """The plugin passes the text on to people; values of any length and of no Unicode may be quoted in it."""
    return Response(status, text[:MAX_ANSWER_CHARACTERS].encode("utf-8", "replace") + b"\n")
