"""Liveness and readiness: what `/healthz` and `/readyz` answer, and why."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence

from meshcni.agent.web import JSON, Handler, Request, Response

BEAT_SECONDS = 1.0

Reasons = Callable[[], Sequence[str]]  # why not; empty when all is well


class Heartbeat:
    """Beats on the event loop; a loop that stands still stops it, and it then says for how long."""

    def __init__(
        self,
        stale_seconds: float,
        on_lag: Callable[[float], None] = lambda lag: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stale_seconds = stale_seconds
        self._on_lag = on_lag
        self._clock = clock
        self._last = clock()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self.beat()

    def beat(self) -> None:
        """Note that the loop runs, and how late it is."""
        now = self._clock()
        self._on_lag(max(0.0, now - self._last - BEAT_SECONDS))
        self._last = now

    def reasons(self) -> tuple[str, ...]:
        """Why the process should be restarted."""
        age = self._clock() - self._last
        return (f"the event loop has not run for {age:.0f} s",) if age > self._stale_seconds else ()


def endpoint(sources: Sequence[Reasons], remedy: Callable[[], str] = str) -> Handler:
    """A handler that answers 200 and nothing when no source names a reason, else 503 and the reasons as JSON.

    `remedy` is what to put into the manifest, as YAML, if that is the reason.
    """

    async def answer(_request: Request) -> Response:
        reasons = [reason for source in sources for reason in source()]
        if not reasons:
            return Response()
        # Upstream's whole body is that status text.
        document: dict[str, object] = {"status": "Service Unavailable", "reasons": reasons}
        if yaml := remedy():
            document["yaml"] = yaml
        return Response(503, json.dumps(document).encode() + b"\n", JSON)

    return answer
