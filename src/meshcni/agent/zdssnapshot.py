"""What is left to say of the snapshot on one connection of ztunnel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from meshcni.agent.zdsrecords import Pending, Workload, add_of
from meshcni.errors import NetnsError
from meshcni.host.netns import copy_netns
from meshcni.protocols.zds import Add, Keep, SnapshotSent

log = logging.getLogger(__name__)

Source = Callable[[], Iterable[Workload] | None]


class Snapshot:
    """Goes through the pods one at a time. `source` names them all, or is None as long as they are not known."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._entries: Iterator[Workload] | None = None
        self._forgotten: set[str] = set()
        self.counts = {"add": 0, "keep": 0, "nack": 0}

    def forget(self, uid: str) -> None:
        """Leave a pod out: it has ended, and the source may still name it."""
        self._forgotten.add(uid)

    def remember(self, uid: str) -> None:
        """Take `forget` back."""
        self._forgotten.discard(uid)

    def next(self, acked: Mapping[str, int]) -> Pending | None:
        """The next pod that is not in `acked` as it is now, SnapshotSent after the last; None while none is known.

        Raises what the source raises.
        """
        if self._entries is None:
            source = self._source()
            if source is None:
                return None
            self._entries = iter(source)
        for entry in self._entries:
            inode = acked.get(entry.uid)
            is_known = inode is not None and (entry.netns is None or inode == entry.inode)
            if not is_known and entry.uid not in self._forgotten:
                return _named(entry)
        return Pending(SnapshotSent())

    def resolved(self, pending: Pending, is_acked: bool) -> bool:
        """Count an answer; True when that was the last."""
        if isinstance(pending.request, SnapshotSent):
            self.end()
            return True
        self.counts[pending.kind if is_acked else "nack"] += 1
        return False

    def end(self) -> None:
        """Let go of everything."""
        self._entries = None
        self._forgotten.clear()


def without_netns(pending: Pending) -> Pending | None:
    """What names the pod all the same when its Add cannot be sent."""
    return Pending(Keep(pending.request.uid)) if isinstance(pending.request, Add) else None


def _named(entry: Workload) -> Pending:
    """Add with a copy of the descriptor, Keep where there is none: every pod must be named."""
    if entry.netns is not None:
        try:
            return Pending(add_of(entry), None, copy_netns(entry.netns), entry.inode)
        except NetnsError as error:
            log.warning("ztunnel gets no netns for pod %s/%s: %s", entry.namespace, entry.name, error)
    return Pending(Keep(entry.uid))
