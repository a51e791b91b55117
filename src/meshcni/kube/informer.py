"""A local copy of some API objects, kept up to date by one list and then a watch, and told to whoever wants to know.

reducer.py decides; this module makes the requests, waits, and calls the consumers. It never ends by itself: whatever
the API server does is an entry in `state`, a log line when it begins and when it is over, and a pause with jitter.

Silence. An API server sends a bookmark about once a minute, and ends a watch after the 5 to 10 minutes we ask for.
A watch without a byte for 90 s may hang on a dead connection, so it is opened anew from where it was; on a quiet
cluster that is one cheap request in 90 s.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from meshcni.errors import KubeError
from meshcni.kube import failures
from meshcni.kube.client import Object, Page, Resource
from meshcni.kube.failures import ApiError
from meshcni.kube.reducer import (
    NEWEST_VERSION,
    Change,
    Outcome,
    Parsed,
    Pause,
    Position,
    Rejected,
    Step,
    Store,
    advance,
    parse,
)

T = TypeVar("T")
log = logging.getLogger("meshcni.kube.informer")

MAX_REMEMBERED_REJECTIONS = 1000  # UIDs already logged as malformed


@dataclass(frozen=True)
class Timing:
    """All times of an informer, in seconds."""

    list_seconds: float = 30.0  # deadline of one page of a list
    watch_min_seconds: int = 300  # a watch is asked to last a random time between these, as client-go does,
    watch_max_seconds: int = 600  # so that the watches of many nodes do not end together
    open_seconds: float = 15.0  # until a watch is answered
    silence_seconds: float = 90.0  # one and a half bookmark intervals
    short_watch_seconds: float = 1.0  # a watch that ends sooner, without an event, counts as a failure
    back_off_first_seconds: float = 0.5
    back_off_max_seconds: float = 30.0


@dataclass
class State:
    """What status and metrics show of an informer; `since` and `event_at` are seconds of `clock`."""

    connected: bool = False  # the last answer was a good one and the watch is open
    since: float = 0.0  # when `connected` last changed
    resource_version: str = ""
    last_error: str = ""  # empty once all is well again
    last_status: int = 0  # HTTP status of last_error, 0 without an answer
    lists: int = 0
    watches: int = 0
    restarts: int = 0  # watches opened again after a failure
    relists: int = 0  # lists after the first complete one: everything was read again
    events: int = 0
    bookmarks: int = 0
    rejected: int = 0  # objects that could not be projected
    callback_errors: int = 0
    event_at: float = 0.0


class ListsAndWatches(Protocol):
    """What an informer needs of KubeApi."""

    async def list_page(
        self,
        resource: Resource,
        *,
        label_selector: str,
        field_selector: str,
        resource_version: str,
        page_limit: int,
        go_on: str,
        metadata_only: bool,
        timeout: float,
    ) -> Page:
        """One page of a list."""

    def watch(
        self,
        resource: Resource,
        *,
        label_selector: str,
        field_selector: str,
        resource_version: str,
        server_timeout_seconds: int,
        open_seconds: float,
        silence_seconds: float,
        metadata_only: bool,
    ) -> AbstractAsyncContextManager[AsyncIterator[Object]]:
        """An open watch."""


class Informer(Generic[T]):
    """The objects of `resource` that the selectors choose, each as what `project` makes of its JSON.

    `metadata_only` asks for PartialObjectMetadata: `project` then sees no spec and no status.
    An object that `project` refuses (any exception) is logged once and left out. `synced` is set by the first complete
    list and stays set.
    """

    def __init__(
        self,
        api: ListsAndWatches,
        resource: Resource,
        project: Callable[[Object], T],
        *,
        field_selector: str = "",
        label_selector: str = "",
        metadata_only: bool = False,
        page_limit: int = 500,
        timing: Timing = Timing(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: random.Random | None = None,
    ) -> None:
        self._api = api
        self._resource = resource
        self._project = project
        self._selectors: dict[str, Any] = {
            "field_selector": field_selector,
            "label_selector": label_selector,
            "metadata_only": metadata_only,
        }
        self._page_limit = page_limit
        self._timing = timing
        self._clock = clock
        self._sleep = sleep
        self._chance = chance or random.Random()
        self._store: Store[T] = Store()
        self._callbacks: list[Callable[[Change[T]], None]] = []
        self._rejected_uids: set[str] = set()
        self._version = ""  # the newest version seen
        self._seen = 0  # events of the watch that is open
        self.synced = asyncio.Event()
        self.state = State(since=clock())

    @property
    def name(self) -> str:
        """The resource's plural, for labels and log lines."""
        return self._resource.plural

    def subscribe(self, callback: Callable[[Change[T]], None]) -> None:
        """Call `callback` on the event loop for every change from now on; it must not block."""
        self._callbacks.append(callback)

    def get(self, namespace: str, name: str) -> T | None:
        """One projection; cluster-wide kinds have the namespace ""."""
        return self._store.get((namespace, name))

    def items(self) -> tuple[T, ...]:
        """All projections of now."""
        return self._store.values()

    async def run(self) -> None:
        """List and watch until cancelled."""
        position = Position()
        while True:
            self._version, self._seen = position.resource_version, 0
            error: KubeError | None = None
            try:
                outcome = await self._list(position) if position.step is Step.LIST else await self._watch(position)
            except KubeError as failure:
                error, outcome = failure, _outcome(failure)
            except Exception as failure:  # ours or a library's mistake must not end the informer
                log.exception("%s: unexpected failure", self.name)
                error, outcome = KubeError(0, f"{type(failure).__name__}: {failure}"), Outcome.CUT
            if self._seen:
                position = replace(position, failures=0)
            position, pause = advance(position, outcome, self._version)
            self._note(outcome, error)
            if pause is Pause.BACK_OFF:
                await self._sleep(self._delay(position.failures, error))

    async def _list(self, position: Position) -> Outcome:
        """Read everything, page by page, keeping projections only; then tell the difference to what we had."""
        found: list[Parsed[T] | Rejected] = []
        version, go_on, limit = position.resource_version, "", self._page_limit
        while True:
            try:
                page = await self._api.list_page(
                    self._resource,
                    **self._selectors,
                    resource_version=version,
                    page_limit=limit,
                    go_on=go_on,
                    timeout=self._timing.list_seconds,
                )
            except ApiError as error:
                if error.status != 410 or not go_on:
                    raise
                # The list took longer than its versions are kept: once more, in one piece, as client-go does.
                found, version, go_on, limit = [], NEWEST_VERSION, "", 0
                continue
            found += [parse(obj, self._project) for obj in page.items]
            version, go_on = "", page.go_on  # the continue token carries the version
            if not go_on:
                break
        self._version = page.resource_version
        self.state.lists += 1
        self.state.relists += self.synced.is_set()
        self._reject(found)
        self._tell(self._store.replace_all(found))
        self.synced.set()
        return Outcome.LISTED

    async def _watch(self, position: Position) -> Outcome:
        timing = self._timing
        started = self._clock()
        self.state.watches += 1
        self.state.restarts += position.failures > 0
        async with self._api.watch(
            self._resource,
            **self._selectors,
            resource_version=position.resource_version,
            server_timeout_seconds=self._chance.randint(timing.watch_min_seconds, timing.watch_max_seconds),
            open_seconds=timing.open_seconds,
            silence_seconds=timing.silence_seconds,
        ) as events:
            self._connected()
            async for event in events:
                self._seen += 1
                self._take(event)
        short = not self._seen and self._clock() - started < timing.short_watch_seconds
        return Outcome.SHORT if short else Outcome.ENDED

    def _take(self, event: Object) -> None:
        """One event of the watch: advance the version, change the store, tell."""
        kind, obj = event.get("type"), event.get("object")
        metadata = obj.get("metadata") if isinstance(obj, dict) else None
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        self.state.event_at = self._clock()
        if kind == "BOOKMARK":
            self.state.bookmarks += 1
        else:
            self.state.events += 1
            found = parse(obj, self._project)
            if kind == "DELETED":
                self._tell(self._store.remove(found))
            else:
                self._reject([found])
                self._tell(self._store.put(found))
        if isinstance(version, str) and version:  # last: a version counts as seen when its change has been told
            self._version = self.state.resource_version = version

    def _tell(self, changes: tuple[Change[T], ...]) -> None:
        for change in changes:
            for callback in self._callbacks:
                try:
                    callback(change)
                except Exception:
                    self.state.callback_errors += 1
                    log.exception("a consumer of %s failed on %s", self.name, "/".join(change.key))

    def _reject(self, found: list[Parsed[T] | Rejected]) -> None:
        for one in found:
            if not isinstance(one, Rejected):
                continue
            self.state.rejected += 1
            if one.uid in self._rejected_uids or len(self._rejected_uids) >= MAX_REMEMBERED_REJECTIONS:
                continue
            self._rejected_uids.add(one.uid)
            log.warning("%s %s cannot be read and is left out: %s", self.name, "/".join(one.key), one.error)

    def _connected(self) -> None:
        state = self.state
        state.resource_version = self._version
        if not state.connected:
            if state.last_error:
                log.info("%s: the API server answers again", self.name)
            state.connected, state.since, state.last_error, state.last_status = True, self._clock(), "", 0

    def _note(self, outcome: Outcome, error: KubeError | None) -> None:
        """A failure is logged when it begins or changes, not at each retry."""
        if outcome in (Outcome.LISTED, Outcome.ENDED, Outcome.SILENT) or error is None:
            return
        state = self.state
        if state.connected:
            state.connected, state.since = False, self._clock()
        if (error.status, str(error)) != (state.last_status, state.last_error):
            log.warning("%s: %s", self.name, error)
        state.last_status, state.last_error = error.status, str(error)

    def _delay(self, failures_in_a_row: int, error: KubeError | None) -> float:
        """Seconds: doubling, capped, and a random part of it taken off; never sooner than a Retry-After says."""
        timing = self._timing
        grown = timing.back_off_first_seconds * 2.0 ** min(max(failures_in_a_row - 1, 0), 16)
        delay = min(grown, timing.back_off_max_seconds) * self._chance.uniform(0.5, 1.0)
        asked = error.retry_after_seconds if isinstance(error, ApiError) else None
        return delay if asked is None else max(delay, asked * self._chance.uniform(1.0, 1.1))


def _outcome(error: KubeError) -> Outcome:
    if isinstance(error, ApiError):
        if error.reason == "ResourceVersionTooLarge":
            return Outcome.TOO_NEW
        if error.cause == failures.SILENCE:
            return Outcome.SILENT
        if error.cause == failures.BROKEN:
            return Outcome.CUT
    return {410: Outcome.GONE, 401: Outcome.UNAUTHORIZED, 0: Outcome.UNREACHABLE}.get(error.status, Outcome.REFUSED)
