"""The ZDS server over real sockets: who is told what, in which order, and what ends a connection."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.ztunnel.behaviour import Behaviour, Options, parse_fault
from lab.ztunnel.client import Program
from lab.ztunnel.messages import HELLO, answer
from lab.ztunnel.standin import StandIn
from tests.agent.scene import answer_to_nobody
from tests.agent.zdsworld import Netns, Peer, World, eventually, own_netns, world

from meshcni.agent.zdsadmission import BEGINS, MAX_SILENT
from meshcni.agent.ztunnel import Workload
from meshcni.errors import CNI_TRY_AGAIN_LATER, NetnsError, ZtunnelError
from meshcni.host.sockets import listen_seqpacket
from meshcni.protocols.zds import Add, Delete, Keep, SnapshotSent

SHORT_SECONDS = 0.2  # a deadline that is meant to pass
Body = Callable[[World], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run a test's coroutine against a server."""

    def start(body: Body, **settings: Any) -> None:
        async def main() -> None:
            async with world(tmp_path, **settings) as made:
                await body(made)

        asyncio.run(main())

    return start


def add_of(uid: str) -> Add:
    return Add(uid, f"name-{uid}", "shop", "default")


def begin(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(coroutine)


async def failure(task: Awaitable[None]) -> ZtunnelError:
    with pytest.raises(ZtunnelError) as raised:
        await task
    assert raised.value.cni_code == CNI_TRY_AGAIN_LATER
    return raised.value


async def ticks() -> None:
    """Let everything happen that does not wait for something."""
    for _ in range(10):
        await asyncio.sleep(0)


# --- the bytes --------------------------------------------------------------------------------------------------------


def test_recorded_bytes_of_a_ztunnel(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.server.snapshot_ready.set()
        w.enrol("u")
        peer = w.peer(bytes.fromhex("0801"))
        packet = await peer.packet()
        assert packet.data == bytes.fromhex("0a1c 0a0175 1217 0a066e616d652d75 120473686f70 1a0764656661756c74")
        (descriptor,) = packet.descriptors
        assert os.fstat(descriptor).st_ino == w.netns.inode
        os.close(descriptor)
        peer.send(bytes.fromhex("0a00"))
        packet = await peer.packet()
        assert (packet.data, packet.descriptors) == (bytes.fromhex("1a00"), ())
        peer.send(bytes.fromhex("0a00"))
        await eventually("the snapshot", lambda: w.server.settled)

    run(body)


# --- who is told ------------------------------------------------------------------------------------------------------


def test_without_a_connection(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        error = await failure(w.server.add(w.pod("u")))
        assert error.cause == "no-connection"
        assert "shop/name-u" in str(error)
        await w.server.delete("u")
        assert not w.server.has_connection
        assert not w.server.settled
        assert w.server.acked("u") is None
        assert not await w.server.wait_connected(0.01)
        waiting = asyncio.create_task(w.server.wait_connected(20))
        peer = await w.greeted()
        assert await waiting
        assert await w.server.wait_connected(0)
        peer.close()
        await eventually("the end", lambda: not w.server.has_connection)
        assert not await w.server.wait_connected(0.01)

    run(body)


def test_adds_and_dels_do_not_wait_for_the_snapshot(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("old", "new")
        peer = await w.greeted()
        task = begin(w.server.add(w.pod("new")))
        assert await peer.serve(1) == [add_of("new")]
        await task
        assert w.server.acked("new") == w.netns.inode
        task = begin(w.server.delete("gone"))
        assert await peer.serve(1) == [Delete("gone")]
        await task
        await ticks()
        assert peer.is_quiet()  # no SnapshotSent
        assert not w.server.settled
        w.server.snapshot_ready.set()
        await peer.serve_snapshot()
        assert peer.received[2:] == [add_of("old"), SnapshotSent()]  # `new` is acked as it is
        await eventually("the snapshot", lambda: w.server.settled)

    run(body)


def test_an_add_goes_to_the_newest_a_del_to_all(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        old, new = await w.live(), await w.live()
        task = begin(w.server.add(w.pod("u")))
        assert await new.serve(1) == [add_of("u")]
        await task
        await ticks()
        assert old.is_quiet()
        task = begin(w.server.delete("u"))
        assert await old.request() == await new.request() == Delete("u")  # neither has answered yet
        new.ack()
        await ticks()
        assert not task.done()
        old.ack()
        await task

    run(body)


def test_when_the_older_goes_adds_go_to_the_newer(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        old, new = await w.live(), await w.live()
        changes = w.changes
        old.close()
        await eventually("the end", lambda: len(w.statuses()) == 1)
        task = begin(w.server.add(w.pod("u")))
        assert await new.serve(1) == [add_of("u")]
        await task
        assert w.changes == changes  # the newest is the same

    run(body)


def test_when_the_newest_goes_the_older_is_back_with_what_it_acked(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("both")
        old = await w.live()
        task = begin(w.server.add(w.pod("early")))
        await old.serve(1)
        await task
        new = await w.live()
        task = begin(w.server.add(w.pod("late")))
        await new.serve(1)
        await task
        assert [w.server.acked(uid) is not None for uid in ("both", "early", "late")] == [True, False, True]
        changes = w.changes
        new.close()
        await eventually("the older", lambda: w.changes == changes + 1)
        assert [w.server.acked(uid) is not None for uid in ("both", "early", "late")] == [True, True, False]
        assert w.server.settled
        task = begin(w.server.add(w.pod("late")))
        assert await old.serve(1) == [add_of("late")]
        await task

    run(body)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_connections_may_end_in_any_order(run: Callable[..., None], order: tuple[int, ...]) -> None:
    async def body(w: World) -> None:
        peers = {number: await w.live() for number in range(3)}
        for number in order:
            newest = peers[max(peers)]
            task = begin(w.server.add(w.pod(f"before-{number}")))
            assert await newest.serve(1) == [add_of(f"before-{number}")]
            await task
            peers.pop(number).close()
            await eventually("the end", lambda: len(w.statuses()) == len(peers))
        assert not w.server.has_connection
        assert w.connected[-1] == 0
        assert w.closed == ["eof"] * 3

    run(body)


def test_a_connection_without_hello_takes_no_add(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        good = await w.live()
        silent = w.peer(hello=None)
        await eventually("the second", lambda: len(w.statuses()) == 2)
        task = begin(w.server.add(w.pod("u")))
        assert await good.serve(1) == [add_of("u")]
        await task
        task = begin(w.server.delete("u"))
        assert await good.serve(1) == [Delete("u")]
        await task
        assert silent.is_quiet()
        assert [status.newest for status in w.statuses()] == [True, False]

    run(body)


def test_a_connection_that_ends_during_a_del_is_done_with_it(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        old, new = await w.live(), await w.live()
        task = begin(w.server.delete("u"))
        await new.serve(1)
        await old.request()
        old.close()
        await task

    run(body)


def test_a_refused_del_is_done(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        task = begin(w.server.delete("u"))
        await peer.request()
        peer.ack("no such thing")
        await task

    run(body)


def test_what_is_asked_first_is_sent_first(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        tasks = []
        expected = []
        for number in range(25):
            tasks.append(begin(w.server.add(w.pod(f"u{number}"))))
            tasks.append(begin(w.server.delete(f"u{number}")))
            expected += [add_of(f"u{number}"), Delete(f"u{number}")]
        for request in expected:
            assert await peer.request() == request
            await ticks()
            assert peer.is_quiet()  # one at a time
            peer.ack()
        await asyncio.gather(*tasks)

    run(body)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_refusal_reaches_the_caller_and_only_that(run: Callable[..., None]) -> None:
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
def test_what_is_under_way_is_not_known(run: Callable[..., None], answer_: str) -> None:
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
def test_a_long_reason_is_not_lost(run: Callable[..., None], size: int) -> None:
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


def test_no_answer_in_time_ends_the_connection_and_no_late_one_counts(run: Callable[..., None]) -> None:
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


def test_an_ack_that_waited_for_our_loop_is_in_time(run: Callable[..., None]) -> None:
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


def test_two_acks_for_one_request_end_the_connection(run: Callable[..., None]) -> None:
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


def test_an_ack_that_was_there_before_the_request_is_not_its(run: Callable[..., None]) -> None:
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
def test_what_ends_a_connection(run: Callable[..., None], state: str, name: str) -> None:
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
def test_descriptors_from_ztunnel_end_the_connection_and_are_closed(
    run: Callable[..., None], data: bytes, count: int
) -> None:
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


def test_an_end_is_noticed_at_once(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        peer.close()
        await ticks()
        assert w.statuses() == ()
        assert w.closed == ["eof"]

    run(body)


def test_an_end_while_waiting_fails_everything_that_waits(run: Callable[..., None]) -> None:
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


def test_a_ztunnel_that_does_not_read_is_given_up(run: Callable[..., None]) -> None:
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


def test_an_add_that_cannot_be_written_lets_go_of_its_descriptor(run: Callable[..., None]) -> None:
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


def test_a_packet_that_had_to_wait_for_room_is_sent(run: Callable[..., None]) -> None:
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


def test_what_was_not_sent_is_taken_back(run: Callable[..., None]) -> None:
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


def test_what_was_sent_counts_although_nobody_waits(run: Callable[..., None]) -> None:
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


def test_the_callers_descriptor_may_be_closed_at_once(run: Callable[..., None]) -> None:
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


def test_descriptors_that_cannot_be_sent(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        await w.live()
        for netns in (None, 1 << 20):
            with pytest.raises(NetnsError):
                await w.server.add(Workload("u", "web", "shop", "default", netns, 5))
        assert len(w.statuses()) == 1

    run(body)


def test_names_that_do_not_fit_into_a_message(run: Callable[..., None]) -> None:
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


# --- the snapshot -----------------------------------------------------------------------------------------------------


def test_the_snapshot_is_add_keep_and_the_end_once(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b")
        w.enrol("c", "d", known=False)
        peer = await w.live()
        assert peer.received == [add_of("a"), add_of("b"), Keep("c"), Keep("d"), SnapshotSent()]
        assert peer.inodes[:2] == [w.netns.inode] * 2
        assert [w.server.acked(uid) for uid in "abcd"] == [w.netns.inode] * 2 + [None] * 2
        task = begin(w.server.add(w.pod("c")))  # now its netns is known
        assert await peer.serve(1) == [add_of("c")]
        await task
        w.server.snapshot_ready.set()
        await ticks()
        assert peer.is_quiet()

    run(body)


def test_a_pod_that_is_acked_needs_no_keep(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b", known=False)
        peer = await w.greeted()
        task = begin(w.server.add(w.pod("a")))
        await peer.serve(1)
        await task
        w.server.snapshot_ready.set()
        await peer.serve_snapshot()
        assert peer.received == [add_of("a"), Keep("b"), SnapshotSent()]
        assert w.server.acked("a") == w.netns.inode

    run(body)


def test_the_snapshot_is_read_entry_by_entry(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        taken: list[str] = []

        def source() -> Iterator[Workload]:
            for uid in "abc":
                taken.append(uid)
                yield w.pod(uid)

        w.source = source
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        for count in (1, 2, 3):
            await peer.request()
            await ticks()
            assert len(taken) == count
            peer.ack()
        await peer.serve_snapshot()

    run(body)


def test_one_bad_pod_among_ten(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol(*(f"u{number}" for number in range(10)))
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        await ticks()
        changes = w.changes
        while True:
            request = await peer.request()
            peer.ack("Too many open files" if request == add_of("u4") else "")
            if request == SnapshotSent():
                break
            await ticks()
            assert w.changes == changes + (isinstance(request, Add) and int(request.uid[1:]) >= 4)
        await eventually("the snapshot", lambda: w.server.settled)
        acked = {f"u{number}" for number in range(10) if w.server.acked(f"u{number}") is not None}
        assert acked == {f"u{number}" for number in range(10)} - {"u4"}
        await eventually("the change", lambda: w.changes == changes + 2)
        assert "u4" in w.statuses()[0].last_error
        task = begin(w.server.add(w.pod("u4")))
        await peer.serve(1)
        await task

    run(body)


def test_live_requests_go_before_the_rest_of_the_snapshot(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b", "c")
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        await peer.request()
        tasks = [begin(w.server.add(w.pod("c"))), begin(w.server.add(w.pod("x")))]
        await ticks()
        peer.ack()
        await peer.serve_snapshot()
        await asyncio.gather(*tasks)
        assert peer.received == [add_of("a"), add_of("c"), add_of("x"), add_of("b"), SnapshotSent()]

    run(body)


def test_a_pod_that_ends_during_the_snapshot_is_left_out(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b", "c")
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        await peer.request()
        task = begin(w.server.delete("b"))
        await ticks()
        peer.ack()
        await peer.serve_snapshot()
        await task
        assert peer.received == [add_of("a"), Delete("b"), add_of("c"), SnapshotSent()]

    run(body)


def test_a_pod_that_ends_before_the_hello_is_left_out_unless_it_comes_back(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "back", "b")
        peer = w.peer(hello=None)
        await eventually("the connection", lambda: len(w.statuses()) == 1)
        await w.server.delete("b")
        await w.server.delete("back")
        with pytest.raises(ZtunnelError):
            await w.server.add(w.pod("back"))
        peer.send(HELLO)
        w.server.snapshot_ready.set()
        await peer.serve_snapshot()
        assert peer.received == [add_of("a"), add_of("back"), SnapshotSent()]

    run(body)


def test_a_del_that_was_taken_back_leaves_the_pod_in_the_snapshot(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b")
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        await peer.request()
        task = begin(w.server.delete("b"))
        await ticks()
        task.cancel()
        peer.ack()
        await peer.serve_snapshot()
        assert peer.received == [add_of("a"), add_of("b"), SnapshotSent()]

    run(body)


def test_a_pod_that_comes_back_during_the_snapshot_is_named(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a")
        peer = await w.greeted()
        other = Netns()
        tasks = [begin(w.server.delete("x")), begin(w.server.delete("a"))]
        tasks.append(begin(w.server.add(w.pod("a", netns=other))))  # before its Del was sent
        await peer.serve(3)
        await asyncio.gather(*tasks)
        w.server.snapshot_ready.set()
        await peer.serve_snapshot()
        # Its entry has another netns than the one acked: it is sent, for the snapshot is what is to be.
        assert peer.received[1:] == [Delete("a"), add_of("a"), add_of("a"), SnapshotSent()]
        assert peer.inodes == [None, None, other.inode, w.netns.inode, None]
        other.close()

    run(body)


def test_a_snapshot_that_cannot_be_made_is_never_said_to_be_whole(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        def source() -> Iterator[Workload]:
            yield w.pod("a")
            raise RuntimeError("no more")

        w.source = source
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        assert await peer.serve(1) == [add_of("a")]
        assert await peer.request() is None
        assert w.closed == ["snapshot"]
        w.source = lambda: [w.pod("a")]
        await w.live()

    run(body)


def test_a_pod_whose_descriptor_is_of_no_use_is_kept(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.source = lambda: [
            Workload("gone", "web", "shop", "default", 1 << 20, 5),
            Workload("long", "n" * 1100, "shop", "default", w.netns.fd, 5),
            w.pod("a"),
        ]
        peer = await w.live()
        assert peer.received == [Keep("gone"), Keep("long"), add_of("a"), SnapshotSent()]

    run(body)


def test_every_connection_gets_its_own_snapshot(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b")
        w.server.snapshot_ready.set()
        first, second = await w.greeted(), await w.greeted()
        for peer in (second, first):
            await peer.serve_snapshot()
            assert peer.received == [add_of("a"), add_of("b"), SnapshotSent()]
        first.close()
        second.close()
        third = await w.live()
        assert third.received == [add_of("a"), add_of("b"), SnapshotSent()]

    run(body)


def test_no_answer_during_the_snapshot_ends_the_connection(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b")
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        await peer.request()
        assert await peer.request() is None
        assert w.closed == ["ack-timeout"]
        assert w.server.acked("a") is None

    run(body, deadline_seconds=SHORT_SECONDS)


def test_a_refused_end_of_the_snapshot_is_not_said_again(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        assert await peer.request() == SnapshotSent()
        peer.ack("no")
        await eventually("the snapshot", lambda: w.server.settled)
        await ticks()
        assert peer.is_quiet()

    run(body)


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_no_hello_in_time(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        peer = w.peer(hello=None)
        assert await peer.request() is None
        assert w.closed == ["hello-timeout"]
        assert w.connected == [0, 1, 0]
        assert not w.server.has_connection

    run(body, deadline_seconds=SHORT_SECONDS)


def test_200_silent_connections_do_not_delay_a_ztunnel(run: Callable[..., None], tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.server.snapshot_ready.set()
        w.enrol("old")
        silent = [w.peer(hello=None) for _ in range(100)]
        with Program(tmp_path, w.path, "--fault", "nack:uid/old=fake descriptor") as program:
            assert await w.server.wait_connected(20)
            silent += [w.peer(hello=None) for _ in range(100)]
            await eventually("the crowd", lambda: w.closed.count("crowded") == 200 - MAX_SILENT)
            await eventually("the snapshot", lambda: w.server.settled)
            newest = next(status for status in w.statuses() if status.newest)
            assert newest.pid == program.process.pid
            assert len(w.statuses()) == MAX_SILENT + 1
            with own_netns() as netns:
                await w.server.add(Workload("u", "web", "shop", "default", netns, 7))
            assert w.server.acked("u") == 7
            await w.server.delete("u")
        assert [await peer.request() for peer in silent[:100]] == [None] * 100

    run(body, window_seconds=1.0)


def test_a_process_that_connects_again_and_again_is_slowed_and_nobody_else(
    run: Callable[..., None], tmp_path: Path
) -> None:
    window = 0.5

    async def body(w: World) -> None:
        with Program(tmp_path, w.path, "--storm", "17") as program:
            await eventually("the storm", lambda: len(w.closed) >= BEGINS)
            begun = time.monotonic()
            mine = await w.greeted()
            assert time.monotonic() >= begun  # it did not have to wait for the other's turn:
            assert len(w.closed) < 17
            mine.close()
            w.server.snapshot_ready.set()
            await eventually("calm", lambda: w.server.settled)
            assert program.state()["connections"] == 18
            storm = [at for at, cause in zip(w.closed_at, w.closed, strict=True) if cause == "eof"]
            gaps = [later - earlier for earlier, later in zip(storm, storm[BEGINS + 1 :], strict=False)]
            assert min(gaps) > window * 0.9  # one of those is our own connection

    run(body, window_seconds=window)


def test_only_root_and_the_agents_own_user_may_connect(run: Callable[..., None], tmp_path: Path) -> None:
    async def body(w: World) -> None:
        for path in (tmp_path, *tmp_path.parents[:3]):
            path.chmod(0o755)
        got = await asyncio.to_thread(answer_to_nobody, w.path, socket.SOCK_SEQPACKET, HELLO)
        assert got == b""
        assert w.refused == ["peer"]
        assert w.connected == [0]
        await w.live()

    run(body, mode=0o666)


# --- life -------------------------------------------------------------------------------------------------------------


def test_stopping_closes_everything_and_takes_the_path_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            peer = await w.live()
            silent = w.peer(hello=None)
            await eventually("both", lambda: len(w.statuses()) == 2)
            task = begin(w.server.add(w.pod("u")))
            await peer.request()
        assert (await failure(task)).cause == "closed"
        assert w.closed == ["stopped"] * 2
        assert w.statuses() == ()
        assert not w.path.exists()
        del silent

    asyncio.run(main())


def test_stopping_leaves_a_successors_path(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            successor = listen_seqpacket(w.path)
        assert w.path.exists()
        Peer(w.path, HELLO).close()
        successor.close()

    asyncio.run(main())


def test_what_people_are_told(run: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def body(w: World) -> None:
        w.enrol("a", "b")
        w.enrol("c", known=False)
        peer = await w.live()
        task = begin(w.server.add(w.pod("d")))
        await eventually("the request", lambda: w.statuses()[0].pending == 1)
        (status,) = w.statuses()
        assert (status.pid, status.version, status.newest, status.acked) == (os.getpid(), 1, True, 2)
        assert status.state == "live-wait"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status.since)
        await peer.serve(1)
        await task
        peer.close()
        await eventually("the end", lambda: not w.statuses())
        connected, disconnected = [record for record in caplog.records if record.name.startswith("meshcni.agent.zds")]
        assert connected.getMessage() == "ztunnel connected"
        values = vars(connected)["labels"]
        assert {key: values[key] for key in ("pid", "version", "adds", "keeps", "nacks")} == {
            "pid": os.getpid(),
            "version": 1,
            "adds": 2,
            "keeps": 1,
            "nacks": 0,
        }
        assert disconnected.getMessage() == "ztunnel disconnected: ztunnel closed it"
        assert vars(disconnected)["labels"]["cause"] == "eof"

    run(body)


def test_descriptors_stay_as_many(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        w.enrol(*(f"s{number}" for number in range(20)))

        async def round_of() -> int:
            peer = await w.live()
            tasks = [begin(w.server.add(w.pod(f"u{number}"))) for number in range(40)]
            await ticks()
            for task in tasks[20:30]:
                task.cancel()
            for number in range(15):
                await peer.request()
                peer.ack("no" if number % 3 else "")
            await peer.request()
            peer.close()
            await asyncio.gather(*tasks, return_exceptions=True)
            await ticks()
            gc.collect()
            return open_descriptors()

        first = await round_of()
        assert [await round_of() for _ in range(10)] == [first] * 10

    run(body)


# --- with the stand-in ------------------------------------------------------------------------------------------------


def standing_in(w: World, *faults: str) -> StandIn:
    return StandIn(Options(str(w.path), behaviour=Behaviour(faults=tuple(parse_fault(fault) for fault in faults))))


async def ended(task: asyncio.Task[Any], stand_in: StandIn) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    stand_in.close()


def test_fifty_pods_with_two_overlapping_ztunnels(run: Callable[..., None]) -> None:
    async def body(w: World) -> None:
        with own_netns() as netns:
            inode = os.fstat(netns).st_ino

            def pod(uid: str) -> Workload:
                return Workload(uid, uid, "shop", "default", netns, inode)

            w.pods = {f"s{number}": pod(f"s{number}") for number in range(50)}
            w.server.snapshot_ready.set()
            old = standing_in(w)
            old_running = asyncio.create_task(old.run())
            await eventually("the old one", lambda: old.workloads.ready)
            assert len(old.workloads.running) == 50
            new = standing_in(w)
            new_running = asyncio.create_task(new.run())
            adds = [begin(w.server.add(pod(f"n{number}"))) for number in range(50)]
            await eventually("the new one", lambda: new.workloads.ready)
            await asyncio.gather(*adds, return_exceptions=True)
            await asyncio.gather(*(w.server.add(pod(f"n{number}")) for number in range(50)))
            await asyncio.gather(*(w.server.delete(f"s{number}") for number in range(50)))
            assert set(new.workloads.running) == {f"n{number}" for number in range(50)}
            assert not any(uid.startswith("s") for uid in old.workloads.running)
            assert {new.workloads.running["n0"].inode} == {inode}
            await ended(new_running, new)
            await eventually("the old one again", lambda: len(w.statuses()) == 1)
            await w.server.add(pod("last"))
            assert "last" in old.workloads.running
            await ended(old_running, old)
            assert set(w.closed) == {"eof"}
            assert not [record for record in old.record.records + new.record.records if "error" in record["event"]]

    run(body)


FAULTS = {
    "two answers": ("twice:uid/u", "ack", "unsolicited"),
    "an answer with a descriptor": ("descriptor:uid/u", "closed", "descriptors"),
    "a malformed answer": ("malformed:uid/u", "closed", "malformed"),
    "an answer too late": ("delay:uid/u=0.5", "timeout", "ack-timeout"),
    "no answer": ("mute:uid/u", "timeout", "ack-timeout"),
    "hello instead": ("hello:uid/u", "closed", "second-hello"),
    "an end instead": ("close:uid/u", "closed", "eof"),
    "an end afterwards": ("hang-up:uid/u", "ack", "eof"),
}


@pytest.mark.parametrize(("fault", "result", "cause"), FAULTS.values(), ids=FAULTS)
def test_a_ztunnel_with_a_fault_is_back_with_its_pods(
    run: Callable[..., None], fault: str, result: str, cause: str
) -> None:
    async def body(w: World) -> None:
        with own_netns() as netns:
            w.pods = {"old": Workload("old", "old", "shop", "default", netns, 1)}
            w.server.snapshot_ready.set()
            stand_in = standing_in(w, fault)
            running = asyncio.create_task(stand_in.run())
            await eventually("the snapshot", lambda: stand_in.workloads.ready)
            try:
                await w.server.add(Workload("u", "u", "shop", "default", netns, 1))
                assert result == "ack"
            except ZtunnelError as error:
                assert error.cause == result  # noqa: PT017
            await eventually("the end", lambda: w.closed == [cause])
            await eventually("the next", lambda: stand_in.link.connections == 2 and stand_in.workloads.ready)
            assert set(stand_in.workloads.running) == {"old"}  # what failed is not in the next snapshot
            assert stand_in.workloads.stopped == 1
            await ended(running, stand_in)

    run(body, deadline_seconds=SHORT_SECONDS)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
