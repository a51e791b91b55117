"""What ztunnel answers, or does not, and what that does to the connection and to who waits."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from lab.ztunnel.messages import HELLO, answer
from tests.agent.zdsworld import (
    SHORT_SECONDS,
    Netns,
    Peer,
    Run,
    World,
    add_of,
    begin,
    eventually,
    failure,
    open_descriptors,
    runner,
    ticks,
)

from meshcni.agent.ztunnel import Workload
from meshcni.errors import NetnsError
from meshcni.protocols.zds import Delete


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(tmp_path)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_refusal_reaches_the_caller_and_only_that(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        task = begin(w.server.add(w.pod("u")))
        await peer.request()
        peer.ack("Bind([::]:15006: AddrInUse)")
        error = await failure(task)
        assert error.cause == "nack"
        assert "AddrInUse" in error.message
        assert f"pid {os.getpid()}" in error.message
        assert "listens on one of ztunnel's ports" in error.hint
        assert w.server.acked("u") is None
        task = begin(w.server.add(w.pod("v")))
        await peer.serve(1)
        await task
        assert w.messages[-2:] == [("add", "nack"), ("add", "ack")]
        assert [kind for kind, seconds in w.latencies if seconds >= 0][-2:] == ["add", "add"]

    run(body)


@pytest.mark.parametrize("answer_", ["", "no"])
def test_what_is_under_way_is_not_known(run: Run, answer_: str) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b")
        peer = await w.live()
        other = Netns()
        tasks = [begin(w.server.add(w.pod("a", netns=other))), begin(w.server.delete("b"))]
        assert w.server.acked("a") == w.server.acked("b") == w.netns.inode
        for uid in "ab":
            await peer.request()
            assert w.server.acked(uid) is None
            peer.ack(answer_)
            await ticks()
        assert w.server.acked("a") == (None if answer_ else other.inode)
        assert w.server.acked("b") is None
        await asyncio.gather(*tasks, return_exceptions=True)
        other.close()

    run(body)


@pytest.mark.parametrize("size", [1000, 1504, 60000])
def test_a_long_reason_is_not_lost(run: Run, size: int) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        task = begin(w.server.add(w.pod("u")))
        await peer.request()
        peer.ack("the reason: " + "x" * size)
        error = await failure(task)
        assert error.cause == "nack"
        assert "the reason: xxx" in error.message
        assert len(error.message) < 2200
        assert len(w.statuses()) == 1

    run(body)


def test_no_answer_in_time_ends_the_connection_and_no_late_one_counts(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        late = begin(w.server.add(w.pod("late")))
        await peer.request()
        error = await failure(late)
        assert error.cause == "timeout"
        assert f"within {SHORT_SECONDS:g} s" in error.message
        assert await peer.request() is None
        assert w.closed == ["ack-timeout"]
        with pytest.raises(OSError):
            peer.ack()
        again = await w.live()
        task = begin(w.server.add(w.pod("next")))
        await again.request()
        await ticks()
        assert not task.done()  # the late ack is nobody's
        again.ack()
        await task
        assert w.server.acked("late") is None

    run(body, deadline_seconds=SHORT_SECONDS)


def test_an_ack_that_waited_for_our_loop_is_in_time(run: Run) -> None:
    """The deadline has passed when the loop looks, but so has the ack come."""

    async def body(w: World) -> None:
        peer = await w.live()
        task = begin(w.server.add(w.pod("u")))
        await peer.request()
        time.sleep(SHORT_SECONDS * 2)  # noqa: ASYNC251  # the loop stands still
        peer.ack()
        await task
        assert w.closed == []

    run(body, deadline_seconds=SHORT_SECONDS)


def test_two_acks_for_one_request_end_the_connection(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        first, second = begin(w.server.add(w.pod("first"))), begin(w.server.add(w.pod("second")))
        await peer.request()
        peer.ack()
        peer.ack()
        await first
        assert (await failure(second)).cause == "closed"
        assert w.closed == ["unsolicited"]
        assert peer.received[-1] == add_of("first")

    run(body)


def test_an_ack_that_was_there_before_the_request_is_not_its(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        peer.ack()
        error = await failure(w.server.add(w.pod("u")))  # the loop has not looked at the socket in between
        assert error.cause in ("closed", "no-connection")
        assert w.closed == ["unsolicited"]
        assert await peer.request() is None

    run(body)


WRONG = {
    "an ack": (answer(), "unsolicited"),
    "a refusal": (answer("no"), "unsolicited"),
    "a second hello": (HELLO, "second-hello"),
    "garbage": (b"\xff", "malformed"),
    "no payload": (b"\x12\x00", "malformed"),
    "more than 64 KiB": (b"x" * 65537, "oversized"),
}


IN_STATES = [
    (state, name)
    for state in ("idle", "before the snapshot", "waiting")
    for name, (_, cause) in WRONG.items()
    if (state, cause) != ("waiting", "unsolicited")  # what is waited for is not wrong
]


@pytest.mark.parametrize(("state", "name"), IN_STATES)
def test_what_ends_a_connection(run: Run, state: str, name: str) -> None:
    data, cause = WRONG[name]

    async def body(w: World) -> None:
        peer = await w.greeted() if state == "before the snapshot" else await w.live()
        task = begin(w.server.add(w.pod("u"))) if state == "waiting" else None
        if task is not None:
            await peer.request()
        peer.send(data)
        await eventually("the end", lambda: w.closed == [cause])
        assert await peer.request() is None
        if task is not None:
            assert (await failure(task)).cause == "closed"

    run(body)


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("data", [answer(), HELLO], ids=["ack", "hello"])
def test_descriptors_from_ztunnel_end_the_connection_and_are_closed(run: Run, data: bytes, count: int) -> None:
    async def body(w: World) -> None:
        before = open_descriptors()
        for hello in (HELLO, None):
            peer = w.peer(hello)
            peer.send(data, [w.netns.fd] * count)
            assert await peer.request() is None
            peer.close()
        assert w.closed == ["descriptors"] * 2
        assert open_descriptors() == before

    run(body)


def test_an_end_is_noticed_at_once(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        peer.close()
        await ticks()
        assert w.statuses() == ()
        assert w.closed == ["eof"]

    run(body)


def test_an_end_while_waiting_fails_everything_that_waits(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        tasks = [begin(w.server.add(w.pod(f"u{number}"))) for number in range(3)]
        await peer.request()
        peer.close()
        assert [(await failure(task)).cause for task in tasks] == ["closed"] * 3
        assert w.messages[-3:] == [("add", "closed")] * 3

    run(body)


async def fill(w: World, peer: Peer) -> int:
    """Have the peer's socket full of Dels that it acknowledged without having read them; returns how many."""
    count = 0
    while True:
        task = begin(w.server.delete(f"{count:0900d}"))
        await ticks()
        if w.statuses()[0].state == "live-write":
            task.cancel()
            return count
        count += 1
        peer.ack()
        await task


def test_a_ztunnel_that_does_not_read_is_given_up(run: Run) -> None:
    async def body(w: World) -> None:
        before = open_descriptors()
        peer = await w.live()
        await fill(w, peer)
        task = begin(w.server.add(w.pod("u")))
        assert (await failure(task)).cause == "closed"
        assert w.closed == ["write-timeout"]
        assert w.messages[-2:] == [("del", "timeout"), ("add", "closed")]
        peer.close()
        assert open_descriptors() == before

    run(body, deadline_seconds=SHORT_SECONDS)


def test_an_add_that_cannot_be_written_lets_go_of_its_descriptor(run: Run) -> None:
    async def body(w: World) -> None:
        before = open_descriptors()
        peer = await w.live()
        count = await fill(w, peer)
        for _ in range(count):
            await peer.request()
            await ticks()
            if w.statuses()[0].state == "live-wait":  # there is room again
                break
        peer.ack()
        long = Workload("l", "n" * 900, "shop", "default", w.netns.fd, 1)
        tasks = []
        while w.statuses()[0].state != "live-write":
            tasks.append(begin(w.server.add(long)))
            await ticks()
            if w.statuses()[0].state != "live-write":
                peer.ack()
                await tasks[-1]
        assert (await failure(tasks[-1])).cause == "timeout"
        peer.close()
        assert w.closed == ["write-timeout"]
        await ticks()
        assert open_descriptors() == before

    run(body, deadline_seconds=SHORT_SECONDS)


def test_a_packet_that_had_to_wait_for_room_is_sent(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        count = await fill(w, peer)
        for number in range(count + 1):
            assert await peer.request() == Delete(f"{number:0900d}")
        peer.ack()
        task = begin(w.server.add(w.pod("u")))
        assert await peer.serve(1) == [add_of("u")]
        await task
        assert w.closed == []

    run(body)


# --- callers that give up ---------------------------------------------------------------------------------------------


def test_what_was_not_sent_is_taken_back(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        netns = Netns()
        before = open_descriptors()
        first = begin(w.server.add(w.pod("first")))
        tasks = [begin(w.server.add(w.pod("never", netns=netns))), begin(w.server.delete("never"))]
        last = begin(w.server.add(w.pod("last")))
        await peer.request()
        assert open_descriptors() == before + 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await ticks()
        assert open_descriptors() == before + 1
        peer.ack()
        await first
        assert await peer.serve(1) == [add_of("last")]
        await last
        netns.close()

    run(body)


def test_what_was_sent_counts_although_nobody_waits(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        task = begin(w.server.add(w.pod("u")))
        await peer.request()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        peer.ack()
        await eventually("the ack", lambda: w.server.acked("u") == w.netns.inode)
        assert w.closed == []

    run(body)


def test_the_callers_descriptor_may_be_closed_at_once(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        first = begin(w.server.add(w.pod("first")))
        await peer.request()
        netns = Netns()
        second = begin(w.server.add(w.pod("second", netns=netns)))
        await ticks()
        inode = netns.inode
        netns.close()
        reused = Netns()  # most likely gets the same number
        peer.ack()
        await peer.serve(1)
        assert peer.inodes[-1] == inode
        await asyncio.gather(first, second)
        reused.close()

    run(body)


def test_descriptors_that_cannot_be_sent(run: Run) -> None:
    async def body(w: World) -> None:
        await w.live()
        for netns in (None, 1 << 20):
            with pytest.raises(NetnsError):
                await w.server.add(Workload("u", "web", "shop", "default", netns, 5))
        assert len(w.statuses()) == 1

    run(body)


def test_names_that_do_not_fit_into_a_message(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        before = open_descriptors()
        long = Workload("u", "n" * 1100, "shop", "default", w.netns.fd, w.netns.inode)
        error = await failure(w.server.add(long))
        assert error.cause == "oversized"
        assert "1024" in error.message
        assert open_descriptors() == before
        task = begin(w.server.add(w.pod("v")))
        await peer.serve(1)
        await task

    run(body)
