"""The store and the table of steps, without a server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.kube.reducer import (
    ANY_VERSION,
    NEWEST_VERSION,
    TRANSITIONS,
    Change,
    ChangeKind,
    Outcome,
    Pause,
    Position,
    Rejected,
    Step,
    Store,
    advance,
    parse,
)

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


def thing(name: str, uid: str, value: int | str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "x", "uid": uid}, "value": value}


def project(obj: dict[str, Any]) -> int:
    return int(obj["value"])


def store_with(*things: dict[str, Any]) -> Store[int]:
    store: Store[int] = Store()
    store.replace_all([parse(one, project) for one in things])
    return store


BEFORE = thing("a", "u1", 1)
# what the store holds, the event, the object of the event, the changes, what the store holds afterwards
EVENTS: list[
    tuple[list[dict[str, Any]], str, dict[str, Any], list[tuple[ChangeKind, int | None, int | None]], list[int]]
]
EVENTS = [
    ([], "ADDED", thing("a", "u1", 1), [(ADDED, None, 1)], [1]),
    ([], "MODIFIED", thing("a", "u1", 1), [(ADDED, None, 1)], [1]),
    ([], "DELETED", thing("a", "u1", 1), [], []),
    ([], "ADDED", thing("a", "u1", "broken"), [], []),
    ([BEFORE], "MODIFIED", thing("a", "u1", 2), [(MODIFIED, 1, 2)], [2]),
    ([BEFORE], "ADDED", thing("a", "u1", 2), [(MODIFIED, 1, 2)], [2]),
    ([BEFORE], "MODIFIED", thing("a", "u1", 1), [], [1]),
    ([BEFORE], "MODIFIED", thing("a", "u1", "broken"), [], [1]),
    ([BEFORE], "DELETED", thing("a", "u1", 3), [(DELETED, 1, None)], []),
    ([BEFORE], "DELETED", thing("a", "u1", "broken"), [(DELETED, 1, None)], []),
    ([BEFORE], "DELETED", thing("a", "u2", 3), [], [1]),
    ([BEFORE], "ADDED", thing("a", "u2", 2), [(DELETED, 1, None), (ADDED, None, 2)], [2]),
    ([BEFORE], "MODIFIED", thing("a", "u2", 1), [(DELETED, 1, None), (ADDED, None, 1)], [1]),
    ([BEFORE], "ADDED", thing("a", "u2", "broken"), [(DELETED, 1, None)], []),
    ([BEFORE], "ADDED", thing("b", "u2", 2), [(ADDED, None, 2)], [1, 2]),
]


@pytest.mark.parametrize(("held", "kind", "obj", "changes", "left"), EVENTS)
def test_an_event_changes_the_store(
    held: list[dict[str, Any]],
    kind: str,
    obj: dict[str, Any],
    changes: list[tuple[ChangeKind, int | None, int | None]],
    left: list[int],
) -> None:
    store = store_with(*held)
    found = parse(obj, project)

    told = store.remove(found) if kind == "DELETED" else store.put(found)

    assert [(change.kind, change.old, change.new) for change in told] == changes
    assert sorted(store.values()) == left


def test_a_list_deletes_what_vanished_before_it_adds() -> None:
    store = store_with(
        thing("gone", "u1", 1), thing("kept", "u2", 2), thing("changed", "u3", 3), thing("reborn", "u4", 4)
    )

    told = store.replace_all(
        [parse(one, project) for one in (thing("kept", "u2", 2), thing("changed", "u3", 33), thing("reborn", "u5", 5))]
    )

    assert [(change.key[1], change.kind) for change in told] == [
        ("gone", DELETED),
        ("changed", MODIFIED),
        ("reborn", DELETED),
        ("reborn", ADDED),
    ]
    assert store.get(("x", "reborn")) == 5
    assert store.get(("x", "gone")) is None


def test_a_list_keeps_the_last_good_projection_of_an_object_that_broke() -> None:
    store = store_with(thing("a", "u1", 1))

    assert store.replace_all([parse(thing("a", "u1", "broken"), project)]) == ()
    assert store.get(("x", "a")) == 1


@pytest.mark.parametrize(
    "obj",
    [None, [], "pod", {}, {"metadata": None}, {"metadata": []}, {"metadata": {"name": ""}}, {"metadata": {"name": 7}}],
)
def test_an_object_without_a_name_is_rejected(obj: object) -> None:
    found = parse(obj, project)

    assert isinstance(found, Rejected)
    assert found.key == ("", "")


# A small world: few names, so that objects are deleted and made again under the same name.
NAMES = st.sampled_from(["a", "b", "c"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.one_of(st.integers(0, 3), st.just("broken"))),
        st.tuples(st.just("delete"), NAMES, st.just(0)),
        st.tuples(st.just("lose"), NAMES, st.integers(0, 3)),  # changes nobody hears of: the watch was too old
        st.tuples(st.just("relist"), NAMES, st.just(0)),
        st.tuples(st.just("replay"), NAMES, st.just(0)),  # the last event once more
    ),
    max_size=40,
)


class Truth:
    """What the API server has, and the events it tells."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.made = 0

    def write(self, name: str, value: int | str) -> tuple[str, dict[str, Any]]:
        kind = "MODIFIED" if name in self.objects else "ADDED"
        if kind == "ADDED":
            self.made += 1
        uid = self.objects[name]["metadata"]["uid"] if kind == "MODIFIED" else f"u{self.made}"
        self.objects[name] = thing(name, uid, value)
        return kind, self.objects[name]

    def delete(self, name: str) -> tuple[str, dict[str, Any]] | None:
        return ("DELETED", self.objects.pop(name)) if name in self.objects else None


@given(OPERATIONS)
def test_consumers_and_store_follow_the_server(operations: list[tuple[str, str, int | str]]) -> None:
    truth, store = Truth(), store_with()
    consumer: dict[tuple[str, str], int | None] = {}
    last: tuple[str, dict[str, Any]] | None = None

    def hear(changes: tuple[Change[int], ...]) -> None:
        for change in changes:
            assert (change.key in consumer) is (change.kind is not ADDED)
            assert consumer.get(change.key) == change.old
            if change.kind is DELETED:
                del consumer[change.key]
            else:
                assert change.new != change.old
                consumer[change.key] = change.new

    def deliver(event: tuple[str, dict[str, Any]]) -> None:
        found = parse(event[1], project)
        hear(store.remove(found) if event[0] == "DELETED" else store.put(found))

    for operation, name, value in operations:
        if operation == "write":
            deliver(last := truth.write(name, value))
        elif operation == "delete" and (event := truth.delete(name)):
            deliver(last := event)
        elif operation == "lose":
            truth.delete(name)
            truth.write(name, value)
            last = None
        elif operation == "relist":
            hear(store.replace_all([parse(obj, project) for obj in truth.objects.values()]))
        elif operation == "replay" and last:
            deliver(last)
        assert {key: store.get(key) for key in consumer} == consumer
        assert len(store) == len(consumer)

    hear(store.replace_all([parse(obj, project) for obj in truth.objects.values()]))
    readable = {("x", name): obj["value"] for name, obj in truth.objects.items() if obj["value"] != "broken"}
    assert readable.items() <= consumer.items()
    assert {key[1] for key in consumer} <= truth.objects.keys()


IMPOSSIBLE = {(Step.LIST, Outcome.ENDED), (Step.LIST, Outcome.SHORT), (Step.WATCH, Outcome.LISTED)}


def test_the_table_says_something_for_every_outcome() -> None:
    assert {(step, outcome) for step in Step for outcome in Outcome} - IMPOSSIBLE == set(TRANSITIONS)


# position, outcome, version that came last -> next position, pause
STEPS = [
    (Position(), Outcome.LISTED, "7", Position(Step.WATCH, "7", 0), Pause.NONE),
    (Position(Step.LIST, ANY_VERSION, 2), Outcome.LISTED, "7", Position(Step.WATCH, "7", 0), Pause.NONE),
    (Position(), Outcome.REFUSED, ANY_VERSION, Position(Step.LIST, ANY_VERSION, 1), Pause.BACK_OFF),
    (Position(), Outcome.TOO_NEW, "9", Position(Step.LIST, NEWEST_VERSION, 1), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 0), Outcome.ENDED, "9", Position(Step.WATCH, "9", 0), Pause.NONE),
    (Position(Step.WATCH, "7", 3), Outcome.SILENT, "7", Position(Step.WATCH, "7", 0), Pause.NONE),
    (Position(Step.WATCH, "7", 0), Outcome.CUT, "9", Position(Step.WATCH, "9", 1), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 1), Outcome.CUT, "7", Position(Step.WATCH, "7", 2), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 0), Outcome.SHORT, "7", Position(Step.WATCH, "7", 1), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 0), Outcome.GONE, "7", Position(Step.LIST, NEWEST_VERSION, 0), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 0), Outcome.TOO_NEW, "7", Position(Step.LIST, NEWEST_VERSION, 1), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 0), Outcome.UNAUTHORIZED, "7", Position(Step.WATCH, "7", 1), Pause.BACK_OFF),
    (Position(Step.WATCH, "7", 0), Outcome.UNREACHABLE, "7", Position(Step.WATCH, "7", 1), Pause.BACK_OFF),
]


@pytest.mark.parametrize(("position", "outcome", "version", "expected", "pause"), STEPS)
def test_steps(position: Position, outcome: Outcome, version: str, expected: Position, pause: Pause) -> None:
    assert advance(position, outcome, version) == (expected, pause)
