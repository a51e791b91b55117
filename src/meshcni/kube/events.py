"""What people find with `kubectl describe pod`: core/v1 Events on the pod they are about, most of them warnings.

Events are a courtesy: posting one never delays or fails what it tells of. The chart grants `create events` only with
the repair role, so a 403 silences the recorder for a while, with one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from meshcni import istio
from meshcni.errors import KubeError
from meshcni.kube.client import Object
from meshcni.kube.failures import ApiError
from meshcni.pods.model import Pod

log = logging.getLogger("meshcni.kube.events")

MAX_QUEUED = 64
MAX_REMEMBERED = 512  # pairs of pod and reason
MAX_MESSAGE = 1024  # the API refuses longer ones
MAX_NAME_PREFIX = 230  # of an object name's 253, before our suffix
QUIET_SECONDS = 300.0  # after a post the same pod and reason is only counted; doubles with every post
QUIET_MAX_SECONDS = 3600.0
BURST = 20  # posts at once, for the whole node
REFILL_SECONDS = 3.0  # one more post in this time
REFUSED_SECONDS = 600.0  # after a 403 nothing is tried for so long; RBAC may be granted meanwhile
ATTEMPTS = 3
RETRY_SECONDS = 1.0


class CreatesEvents(Protocol):
    """What the recorder needs of KubeApi."""

    async def create_event(self, namespace: str, event: Object) -> None:
        """Post a core/v1 Event."""


@dataclass
class Stats:
    """What became of all Events, for metrics."""

    posted: int = 0
    repeated: int = 0  # counted with an earlier one of the same pod and reason
    limited: int = 0  # over the node's rate, or the queue was full
    refused: int = 0  # RBAC does not allow it
    failed: int = 0  # the API server did not take it, or not in time


@dataclass
class _Seen:
    """One pair of pod and reason."""

    first_at: datetime
    quiet_until: float
    quiet_seconds: float
    unposted: int = 0


class EventRecorder:
    """Posts Events in the background. `node` names where they come from (`source.host`)."""

    def __init__(
        self,
        api: CreatesEvents,
        *,
        node: str = "",
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._api = api
        self._node = node
        self._clock, self._now, self._sleep = clock, now, sleep
        self._seen: OrderedDict[tuple[str, str, str, str], _Seen] = OrderedDict()
        self._queue: deque[tuple[str, Object]] = deque()
        self._poster: asyncio.Task[None] | None = None
        self._allowance, self._allowance_at = float(BURST), clock()
        self._refused_until = float("-inf")
        self.stats = Stats()

    async def warn(self, pod: Pod, reason: str, message: str, *, component: str = istio.PLUGIN_NAME) -> None:
        """Queue a warning on `pod`; `reason` is one CamelCase word. Returns at once, never raises."""
        self._take(pod, reason, message, "Warning", component)

    async def note(self, pod: Pod, reason: str, message: str, *, component: str = istio.PLUGIN_NAME) -> None:
        """Queue an Event of type Normal: something is well again. Returns at once, never raises."""
        self._take(pod, reason, message, "Normal", component)

    def _take(self, pod: Pod, reason: str, message: str, kind: str, component: str) -> None:
        key = (pod.namespace, pod.name, pod.uid, reason)
        now, seen = self._clock(), self._seen.get(key)
        if now < self._refused_until:
            self.stats.refused += 1
            return
        if seen is not None and now < seen.quiet_until:
            seen.unposted += 1
            self.stats.repeated += 1
            return
        if not self._take_allowance(now) or len(self._queue) >= MAX_QUEUED:
            self.stats.limited += 1
            return
        if seen is None:
            seen = self._seen[key] = _Seen(self._now(), 0.0, QUIET_SECONDS / 2)
            while len(self._seen) > MAX_REMEMBERED:
                self._seen.popitem(last=False)
        seen.quiet_seconds = min(seen.quiet_seconds * 2, QUIET_MAX_SECONDS)
        seen.quiet_until = now + seen.quiet_seconds
        self._queue.append((pod.namespace, self._event(pod, reason, message, seen, kind, component)))
        seen.unposted = 0
        if self._poster is None or self._poster.done():
            self._poster = asyncio.get_running_loop().create_task(self._post_queued(), name="kube-events")

    async def close(self) -> None:
        """Give up what is still queued."""
        self._queue.clear()
        if self._poster is not None:
            self._poster.cancel()
            await asyncio.gather(self._poster, return_exceptions=True)

    def _take_allowance(self, now: float) -> bool:
        refilled = (now - self._allowance_at) / REFILL_SECONDS
        self._allowance, self._allowance_at = min(float(BURST), self._allowance + refilled), now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def _event(self, pod: Pod, reason: str, message: str, seen: _Seen, kind: str, component: str) -> Object:
        """The Event as JSON; `count` tells how often it happened since the last one posted."""
        last_at = self._now()
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{pod.name[:MAX_NAME_PREFIX]}.{uuid.uuid4().hex[:16]}",
                "namespace": pod.namespace,
            },
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": pod.namespace,
                "name": pod.name,
                "uid": pod.uid,
            },
            "type": kind,
            "reason": reason,
            "message": message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "...",
            "source": {"component": component, "host": self._node},
            "reportingComponent": component,
            "reportingInstance": self._node,
            "firstTimestamp": _timestamp(seen.first_at),
            "lastTimestamp": _timestamp(last_at),
            "count": seen.unposted + 1,
        }

    async def _post_queued(self) -> None:
        while self._queue:
            namespace, event = self._queue.popleft()
            try:
                await self._post(namespace, event)
            except Exception:  # an Event is not worth an exception nobody fetches
                self.stats.failed += 1
                log.exception("posting an Event failed")

    async def _post(self, namespace: str, event: Object) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._api.create_event(namespace, event)
            except KubeError as error:
                if error.status == 403:
                    self._refuse(error)
                    return
                if attempt == ATTEMPTS or (400 <= error.status < 500 and error.status not in (401, 429)):
                    self.stats.failed += 1
                    log.info(
                        "an Event on pod %s/%s was not taken: %s", namespace, event["involvedObject"]["name"], error
                    )
                    return
                asked = error.retry_after_seconds if isinstance(error, ApiError) else None
                await self._sleep(max(asked or 0.0, RETRY_SECONDS * attempt))
            else:
                self.stats.posted += 1
                return

    def _refuse(self, error: KubeError) -> None:
        self.stats.refused += 1 + len(self._queue)
        self._queue.clear()
        self._refused_until = self._clock() + REFUSED_SECONDS
        log.warning("no Events on pods for the next %d min: %s", REFUSED_SECONDS // 60, error)


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
