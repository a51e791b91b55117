"""Open watches of the double: what each hears of a change, and how it ends."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from enum import Enum

from lab.apiserver.objects import Cluster, HistoryEntry, Kind, Object, Refusal, Selection, event_of, parse_version
from lab.apiserver.wire import Connection, ConnectionLostError


class Ending(Enum):
    """How a watch ends."""

    PROPER = "the answer is finished"
    CUT = "the connection is broken off"


def partial_metadata(obj: Object) -> Object:
    """An object as PartialObjectMetadata."""
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


@dataclass(eq=False)
class Watch:
    """One open watch; `path` is that of its request."""

    path: str
    kind: Kind
    selection: Selection
    metadata_only: bool
    bookmarks: bool
    frozen: bool = False  # half-open: nothing is sent any more, the connection stays
    queue: asyncio.Queue[bytes | Ending] = field(default_factory=asyncio.Queue)

    def begin(self, cluster: Cluster, resource_version: str) -> None:
        """Queue what the client missed: changes since its version, or all objects when it names none."""
        version = parse_version(resource_version)
        if version:
            try:
                missed = cluster.since(version)
            except Refusal as refusal:  # a real server has already said 200 when it finds out
                self.refuse(refusal)
                return
            for entry in missed:
                self.tell(entry)
            return
        for obj in cluster.objects(self.kind.plural):
            if self.selection.matches(obj):
                self._put("ADDED", obj)

    def tell(self, entry: HistoryEntry) -> None:
        """Queue what this watch has to hear of a change."""
        if entry.plural == self.kind.plural and (event := event_of(entry, self.selection)) is not None:
            self._put(*event)

    def bookmark(self, version: int) -> None:
        """Queue a bookmark, if the client asked for them."""
        if self.bookmarks:
            metadata = {"resourceVersion": str(version), "creationTimestamp": None}
            self._put("BOOKMARK", {"kind": self.kind.kind, "apiVersion": self.kind.api_version, "metadata": metadata})

    def refuse(self, refusal: Refusal) -> None:
        """Queue an ERROR event and the end."""
        self._line({"type": "ERROR", "object": refusal.status})
        self.end(Ending.PROPER)

    def end(self, ending: Ending, *, mid_line: bool = False) -> None:
        """Queue the end, after half an event if `mid_line`."""
        if mid_line:
            self.queue.put_nowait(b'{"type":"ADDED","object":{"kind":"Pod","metada')
        self.queue.put_nowait(ending)

    async def serve(self, connection: Connection, timeout_seconds: float | None) -> None:
        """Send events until the end, the client's `timeout_seconds` or its going away."""
        await connection.start(200, {"transfer-encoding": "chunked"})
        gone = asyncio.ensure_future(connection.closed_by_client())
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    taken = asyncio.ensure_future(self.queue.get())
                    try:
                        await asyncio.wait((gone, taken), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        taken.cancel()
                    if gone.done():
                        raise ConnectionLostError
                    item = taken.result()
                    if isinstance(item, bytes):
                        if not self.frozen:
                            await connection.send_data(item)
                    elif item is Ending.CUT:
                        raise ConnectionLostError
                    else:
                        break
        except TimeoutError:
            pass
        finally:
            gone.cancel()
            await asyncio.wait((gone,))  # else it still waits for data when the next request is read
        await connection.finish()

    def _put(self, event_type: str, obj: Object) -> None:
        self._line({"type": event_type, "object": partial_metadata(obj) if self.metadata_only else obj})

    def _line(self, event: Object) -> None:
        self.queue.put_nowait(json.dumps(event).encode() + b"\n")
