"""The connection to ztunnel as a state machine: the table is whole, and no sequence of events breaks its promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import ProtocolError
from meshcni.protocols.zds import (
    Ack,
    Add,
    Delete,
    Hello,
    Keep,
    Request,
    SnapshotSent,
    decode_request,
    encode_ack,
    encode_hello,
)
from meshcni.protocols.zdslink import (
    GREETED,
    OPEN,
    REMOTE,
    REQUESTS,
    TABLE,
    TIMED,
    WAITS,
    WRITES,
    Cause,
    Close,
    Effect,
    Greet,
    Input,
    Link,
    LinkError,
    Output,
    Resolve,
    Result,
    Send,
    State,
)

HELLO, ACK, NACK = encode_hello(Hello(1)), encode_ack(Ack()), encode_ack(Ack("no such netns"))
ADD, DELETE, KEEP = Add("u", "web", "shop", "web"), Delete("u"), Keep("u")
LOCAL = tuple(REQUESTS.values())


def greeted() -> Link:
    link = Link()
    assert link.receive(HELLO) == (Greet(1),)
    return link


def ask(link: Link, request: Request) -> None:
    (send,) = link.request(request)
    assert isinstance(send, Send)
    assert send.with_netns == isinstance(request, Add)
    assert decode_request(send.data) == request
    assert link.written() == ()


def live() -> Link:
    link = greeted()
    ask(link, SnapshotSent())
    assert link.receive(ACK) == (Resolve(Result.ACK),)
    assert link.state is State.LIVE
    return link


def waiting() -> Link:
    link = live()
    ask(link, ADD)
    return link


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_state_has_a_row_for_whatever_a_peer_can_do() -> None:
    missing = {
        (state, kind)
        for state in State
        for kind in REMOTE
        if (state, kind) not in TABLE and kind not in (Input.WRITTEN, Input.DEADLINE)
    }
    assert missing == set()


def test_timers_and_writes_have_rows_where_they_can_happen_only() -> None:
    assert {state for state, kind in TABLE if kind is Input.DEADLINE} == TIMED | {State.CLOSED}
    assert {state for state, kind in TABLE if kind is Input.WRITTEN} == WRITES | {State.CLOSED}


def test_requests_have_rows_where_they_may_be_sent_only() -> None:
    allowed = {(state, kind) for state, kind in TABLE if kind in LOCAL}
    assert allowed == {
        (State.SYNCING, Input.ADD),
        (State.SYNCING, Input.DELETE),
        (State.SYNCING, Input.KEEP),
        (State.SYNCING, Input.FINISH),
        (State.LIVE, Input.ADD),
        (State.LIVE, Input.DELETE),
    }


def test_nothing_leads_back_before_the_snapshot() -> None:
    after: set[State] = {State.FINISHING_WRITE}
    while True:
        reached = {row.state for (state, _), row in TABLE.items() if state in after} | after
        if reached == after:
            break
        after = reached
    assert after.isdisjoint({State.AWAITING_HELLO, State.SYNCING, State.SYNCING_WRITE, State.SYNCING_WAIT})
    assert State.LIVE in after


def test_every_state_can_be_reached_and_left() -> None:
    assert {row.state for row in TABLE.values()} | {State.AWAITING_HELLO} == set(State)
    assert {state for state, _ in TABLE} == set(State)


def test_closing_rows_close_and_name_a_cause() -> None:
    for (_, kind), row in TABLE.items():
        assert (row.effect is Effect.CLOSE) == (row.state is State.CLOSED and row.effect is not Effect.NOTHING)
        if row.effect is Effect.CLOSE and kind in (Input.HELLO, Input.ACK, Input.DEADLINE):
            assert row.cause is not None


def test_the_states_are_divided() -> None:
    assert set(OPEN) == {State.AWAITING_HELLO} | GREETED
    assert WRITES.isdisjoint(WAITS)
    assert {State.AWAITING_HELLO} | WRITES | WAITS == TIMED


# --- life -------------------------------------------------------------------------------------------------------------


def test_a_whole_life() -> None:
    link = greeted()
    for request in (ADD, KEEP, DELETE):
        ask(link, request)
        assert link.receive(ACK) == (Resolve(Result.ACK),)
    ask(link, SnapshotSent())
    assert link.receive(ACK) == (Resolve(Result.ACK),)
    ask(link, ADD)
    assert link.receive(NACK) == (Resolve(Result.NACK, "no such netns"),)
    ask(link, DELETE)
    assert link.receive(ACK) == (Resolve(Result.ACK),)
    assert link.eof() == (Close(Cause.EOF, "ztunnel closed it"),)
    assert link.state is State.CLOSED


def test_a_refused_snapshot_is_sent_all_the_same() -> None:
    link = greeted()
    ask(link, SnapshotSent())
    assert link.receive(NACK) == (Resolve(Result.NACK, "no such netns"),)
    assert link.state is State.LIVE


@pytest.mark.parametrize("kind", [Keep, SnapshotSent])
def test_after_the_snapshot_some_things_cannot_be_said(kind: type[Request]) -> None:
    link = live()
    assert not link.may(kind)
    with pytest.raises(LinkError):
        link.request(KEEP if kind is Keep else SnapshotSent())
    assert link.state is State.LIVE


@pytest.mark.parametrize("request_", [ADD, DELETE, KEEP, SnapshotSent()])
def test_one_request_at_a_time_and_none_before_hello(request_: Request) -> None:
    for link in (Link(), waiting()):
        assert not link.may(type(request_))
        with pytest.raises(LinkError):
            link.request(request_)


def test_a_request_that_makes_no_packet_changes_nothing() -> None:
    link = live()
    with pytest.raises(ProtocolError, match="1024"):
        link.request(Add("u", "n" * 2000, "s", "a"))
    assert link.state is State.LIVE
    ask(link, ADD)


# --- endings ----------------------------------------------------------------------------------------------------------

ENDINGS: dict[str, tuple[Callable[[], Link], Callable[[Link], tuple[Output, ...]], Cause, Result | None]] = {
    "no hello in time": (Link, Link.deadline, Cause.HELLO_TIMEOUT, None),
    "ack instead of hello": (Link, lambda link: link.receive(ACK), Cause.MALFORMED, None),
    "garbage instead of hello": (Link, lambda link: link.receive(b"\xff"), Cause.MALFORMED, None),
    "end instead of hello": (Link, lambda link: link.receive(b""), Cause.EOF, None),
    "hello again when idle": (live, lambda link: link.receive(HELLO), Cause.SECOND_HELLO, None),
    "hello as an answer": (waiting, lambda link: link.receive(HELLO), Cause.SECOND_HELLO, Result.CLOSED),
    "ack when idle": (live, lambda link: link.receive(ACK), Cause.UNSOLICITED, None),
    "ack before the snapshot": (greeted, lambda link: link.receive(ACK), Cause.UNSOLICITED, None),
    "no ack in time": (waiting, Link.deadline, Cause.ACK_TIMEOUT, Result.TIMEOUT),
    "garbage as an answer": (waiting, lambda link: link.receive(b"\xff"), Cause.MALFORMED, Result.CLOSED),
    "descriptors with the answer": (waiting, lambda link: link.receive(ACK, 1), Cause.DESCRIPTORS, Result.CLOSED),
    "descriptors with nothing": (live, lambda link: link.receive(b"", 2), Cause.DESCRIPTORS, None),
    "end instead of an answer": (waiting, Link.eof, Cause.EOF, Result.CLOSED),
    "socket fails": (waiting, lambda link: link.failed("reset"), Cause.TRANSPORT, Result.CLOSED),
    "too long": (
        waiting,
        lambda link: link.broken(ProtocolError("oversized", "longer")),
        Cause.OVERSIZED,
        Result.CLOSED,
    ),
    "we stop": (waiting, lambda link: link.stop(Cause.STOPPED, "the agent stops"), Cause.STOPPED, Result.CLOSED),
}


@pytest.mark.parametrize(("make", "happen", "cause", "result"), ENDINGS.values(), ids=ENDINGS)
def test_endings(
    make: Callable[[], Link], happen: Callable[[Link], tuple[Output, ...]], cause: Cause, result: Result | None
) -> None:
    link = make()
    *before, close = happen(link)
    assert isinstance(close, Close)
    assert close.cause is cause
    assert close.text
    assert [output.result for output in before if isinstance(output, Resolve)] == ([result] if result else [])
    assert link.state is State.CLOSED
    assert link.receive(ACK) == link.eof() == link.written() == link.deadline() == ()


def test_a_packet_that_is_not_taken_in_time() -> None:
    link = live()
    link.request(ADD)
    resolve, close = link.deadline()
    assert isinstance(resolve, Resolve)
    assert isinstance(close, Close)
    assert (resolve.result, close.cause) == (Result.TIMEOUT, Cause.WRITE_TIMEOUT)


def test_an_ack_for_what_was_not_written_yet_is_nobodys() -> None:
    link = live()
    link.request(ADD)
    resolve, close = link.receive(ACK)
    assert isinstance(resolve, Resolve)
    assert isinstance(close, Close)
    assert (resolve.result, close.cause) == (Result.CLOSED, Cause.UNSOLICITED)


# --- any sequence at all ----------------------------------------------------------------------------------------------

EVENTS: dict[str, Callable[[Link], tuple[Output, ...]]] = {
    "hello": lambda link: link.receive(HELLO),
    "ack": lambda link: link.receive(ACK),
    "nack": lambda link: link.receive(NACK),
    "garbage": lambda link: link.receive(b"\xff\x01"),
    "empty": lambda link: link.receive(b""),
    "descriptor": lambda link: link.receive(ACK, 1),
    "eof": Link.eof,
    "failed": lambda link: link.failed("reset"),
    "deadline": Link.deadline,
    "written": Link.written,
    "add": lambda link: link.request(ADD),
    "delete": lambda link: link.request(DELETE),
    "keep": lambda link: link.request(KEEP),
    "finish": lambda link: link.request(SnapshotSent()),
    "stop": lambda link: link.stop(Cause.STOPPED, "stop"),
}
# Mostly what a good peer and driver do, so that sequences get far.
STEPS = st.lists(
    st.sampled_from([*EVENTS, *(["hello", "ack", "ack", "ack", "written", "written", "add", "delete", "keep"] * 4)]),
    max_size=60,
)


@given(STEPS)
def test_any_sequence_keeps_the_promises(steps: list[str]) -> None:
    link = Link()
    sent: list[Request] = []
    open_requests = greets = closes = 0
    for step in ["hello", *steps]:
        state = link.state
        try:
            outputs = EVENTS[step](link)
        except LinkError:
            assert link.state is state  # ours, refused: nothing has happened
            assert step in ("add", "delete", "keep", "finish", "written", "deadline")
            continue
        assert closes == 0 or outputs == ()
        for output in outputs:
            match output:
                case Send(data):
                    sent.append(decode_request(data))
                    open_requests += 1
                case Resolve():
                    open_requests -= 1
                case Greet():
                    greets += 1
                case Close():
                    closes += 1
        assert open_requests in (0, 1)
        assert (open_requests == 1) == (link.state in WRITES | WAITS)
    assert greets <= 1
    assert closes <= 1
    assert sum(isinstance(request, SnapshotSent) for request in sent) <= 1
    if SnapshotSent() in sent:
        assert not any(isinstance(request, Keep) for request in sent[sent.index(SnapshotSent()) :])
    if closes:
        assert open_requests == 0
