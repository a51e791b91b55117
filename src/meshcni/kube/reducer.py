"""The informer without its input and output: what an event does to the store, and what to do after each outcome.

Two pure tables. `Store` takes lists and events and gives the changes a consumer has to hear of. `advance` takes where
the informer stands and how the last request ended, and says what to request next and after which kind of pause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Key = tuple[str, str]  # namespace ("" for cluster-wide kinds), name


class ChangeKind(Enum):
    """What happened to an object of the store."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """One change; `old` is None for ADDED, `new` is None for DELETED."""

    kind: ChangeKind
    key: Key
    old: T | None
    new: T | None

    @property
    def value(self) -> T:
        """The newest projection there is: the new one, or the last one of a deleted object."""
        found = self.new if self.new is not None else self.old
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """One object of a list or event, reduced to what the store keeps."""

    key: Key
    uid: str
    value: T


@dataclass(frozen=True, slots=True)
class Rejected:
    """An object that could not be projected, or has no name (`key` is then empty); the store goes on without it."""

    key: Key
    uid: str
    error: Exception


def parse(obj: object, project: Callable[[dict[str, Any]], T]) -> Parsed[T] | Rejected:
    """Reduce one API object to its projection; whatever is wrong with one object, the others go on."""
    metadata = obj.get("metadata") if isinstance(obj, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(obj, dict) or not isinstance(metadata, dict) or not isinstance(name, str) or not name:
        return Rejected(("", ""), "", ValueError("the object has no metadata.name"))
    key, uid = (str(metadata.get("namespace") or ""), name), str(metadata.get("uid") or "")
    try:
        return Parsed(key, uid, project(obj))
    except Exception as error:
        return Rejected(key, uid, error)


class Store(Generic[T]):
    """Projections by namespace and name, changed only by lists and events.

    | in the store      | comes                          | changes                          |
    |-------------------|--------------------------------|----------------------------------|
    | nothing           | ADDED, MODIFIED, in a list     | ADDED                            |
    | same UID          | the same with other content    | MODIFIED                         |
    | same UID          | the same with equal content    | none                             |
    | other UID         | ADDED, MODIFIED, in a list     | DELETED of the old, then ADDED   |
    | same UID          | DELETED                        | DELETED                          |
    | nothing, other UID| DELETED                        | none                             |
    | anything          | absent from a complete list    | DELETED                          |
    | nothing, other UID| an object that cannot be projected | Rejected (the other: DELETED) |
    | same UID          | one that cannot be projected   | Rejected; the last good one stays|
    """

    def __init__(self) -> None:
        self._entries: dict[Key, Parsed[T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> T | None:
        """The projection of one object."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def values(self) -> tuple[T, ...]:
        """All projections."""
        return tuple(entry.value for entry in self._entries.values())

    def put(self, found: Parsed[T] | Rejected) -> tuple[Change[T], ...]:
        """The changes of an ADDED or MODIFIED event, or of one object of a list."""
        key, old = found.key, self._entries.get(found.key)
        changes: list[Change[T]] = []
        if old is not None and old.uid != found.uid:  # a successor of the same name, as StatefulSets make
            changes.append(self._delete(key))
            old = None
        if isinstance(found, Rejected) or (old is not None and old.value == found.value):
            return tuple(changes)
        self._entries[key] = found
        kind = ChangeKind.ADDED if old is None else ChangeKind.MODIFIED
        changes.append(Change(kind, key, None if old is None else old.value, found.value))
        return tuple(changes)

    def remove(self, found: Parsed[T] | Rejected) -> tuple[Change[T], ...]:
        """The changes of a DELETED event; one for an earlier or later object of the same name is none."""
        entry = self._entries.get(found.key)
        return () if entry is None or entry.uid != found.uid else (self._delete(found.key),)

    def replace_all(self, found: Iterable[Parsed[T] | Rejected]) -> tuple[Change[T], ...]:
        """The changes of a complete list; what vanished comes first."""
        by_key = {one.key: one for one in found}
        changes = [self._delete(key) for key in [key for key in self._entries if key not in by_key]]
        for one in by_key.values():
            changes += self.put(one)
        return tuple(changes)

    def _delete(self, key: Key) -> Change[T]:
        return Change(ChangeKind.DELETED, key, self._entries.pop(key).value, None)


class Step(Enum):
    """What an informer requests next."""

    LIST = "list"
    WATCH = "watch"


class Outcome(Enum):
    """How a list or a watch ended."""

    LISTED = "listed"  # complete
    ENDED = "ended"  # the server ended the watch as agreed, or after some events
    SHORT = "short"  # the server ended the watch at once, with nothing in it
    SILENT = "silent"  # nothing came for longer than bookmarks take; the connection may be dead
    CUT = "cut"  # the connection broke, or what came made no sense
    GONE = "gone"  # 410: the version is too old
    TOO_NEW = "too new"  # the server is behind the version asked for (restored, or lagging)
    UNAUTHORIZED = "unauthorized"  # 401
    REFUSED = "refused"  # any other answer: 403, 404, 429, 5xx
    UNREACHABLE = "unreachable"  # no answer


class Pause(Enum):
    """How long to wait before the next step."""

    NONE = "none"
    BACK_OFF = "back-off"  # growing with the failures in a row, with jitter, and no less than a Retry-After


ANY_VERSION = "0"  # of a list: whatever the server has in its cache; cheap when every node starts at once
NEWEST_VERSION = ""  # of a list: nothing older than now


@dataclass(frozen=True, slots=True)
class Position:
    """Where an informer stands: the next request, the version it starts from, and the failures in a row."""

    step: Step = Step.LIST
    resource_version: str = ANY_VERSION
    failures: int = 0


# (step, outcome) -> (next step, forget the version, counts as failure, pause)
TRANSITIONS: Mapping[tuple[Step, Outcome], tuple[Step, bool, bool, Pause]] = {
    (Step.LIST, Outcome.LISTED): (Step.WATCH, False, False, Pause.NONE),
    (Step.LIST, Outcome.GONE): (Step.LIST, True, True, Pause.BACK_OFF),
    (Step.LIST, Outcome.TOO_NEW): (Step.LIST, True, True, Pause.BACK_OFF),
    (Step.LIST, Outcome.UNAUTHORIZED): (Step.LIST, False, True, Pause.BACK_OFF),
    (Step.LIST, Outcome.REFUSED): (Step.LIST, False, True, Pause.BACK_OFF),
    (Step.LIST, Outcome.CUT): (Step.LIST, False, True, Pause.BACK_OFF),
    (Step.LIST, Outcome.SILENT): (Step.LIST, False, True, Pause.BACK_OFF),
    (Step.LIST, Outcome.UNREACHABLE): (Step.LIST, False, True, Pause.BACK_OFF),
    (Step.WATCH, Outcome.ENDED): (Step.WATCH, False, False, Pause.NONE),
    (Step.WATCH, Outcome.SILENT): (Step.WATCH, False, False, Pause.NONE),
    (Step.WATCH, Outcome.SHORT): (Step.WATCH, False, True, Pause.BACK_OFF),
    (Step.WATCH, Outcome.CUT): (Step.WATCH, False, True, Pause.BACK_OFF),
    (Step.WATCH, Outcome.GONE): (Step.LIST, True, False, Pause.BACK_OFF),
    (Step.WATCH, Outcome.TOO_NEW): (Step.LIST, True, True, Pause.BACK_OFF),
    (Step.WATCH, Outcome.UNAUTHORIZED): (Step.WATCH, False, True, Pause.BACK_OFF),
    (Step.WATCH, Outcome.REFUSED): (Step.WATCH, False, True, Pause.BACK_OFF),
    (Step.WATCH, Outcome.UNREACHABLE): (Step.WATCH, False, True, Pause.BACK_OFF),
}


def advance(position: Position, outcome: Outcome, resource_version: str) -> tuple[Position, Pause]:
    """What comes after `outcome`; `resource_version` is where that request had got to."""
    step, forget, failed, pause = TRANSITIONS[position.step, outcome]
    version = NEWEST_VERSION if forget else resource_version
    return Position(step, version, position.failures + 1 if failed else 0), pause
