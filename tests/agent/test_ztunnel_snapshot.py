"""The snapshot: what each connection is told of the pods there are, while they change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.ztunnel.messages import HELLO
from tests.agent.zdsworld import (
    SHORT_SECONDS,
    Netns,
    Run,
    World,
    add_of,
    begin,
    eventually,
    runner,
    ticks,
)

from meshcni.agent.ztunnel import Workload
from meshcni.errors import ZtunnelError
from meshcni.protocols.zds import Add, Delete, Keep, SnapshotSent


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(tmp_path)


def test_the_snapshot_is_add_keep_and_the_end_once(run: Run) -> None:
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


def test_a_pod_that_is_acked_needs_no_keep(run: Run) -> None:
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


def test_the_snapshot_is_read_entry_by_entry(run: Run) -> None:
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


def test_one_bad_pod_among_ten(run: Run) -> None:
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


def test_live_requests_go_before_the_rest_of_the_snapshot(run: Run) -> None:
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


def test_a_pod_that_ends_during_the_snapshot_is_left_out(run: Run) -> None:
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


def test_a_pod_that_ends_before_the_hello_is_left_out_unless_it_comes_back(run: Run) -> None:
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


def test_a_del_that_was_taken_back_leaves_the_pod_in_the_snapshot(run: Run) -> None:
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


def test_a_pod_that_comes_back_during_the_snapshot_is_named(run: Run) -> None:
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


def test_a_snapshot_that_cannot_be_made_is_never_said_to_be_whole(run: Run) -> None:
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


def test_a_pod_whose_descriptor_is_of_no_use_is_kept(run: Run) -> None:
    async def body(w: World) -> None:
        w.source = lambda: [
            Workload("gone", "web", "shop", "default", 1 << 20, 5),
            Workload("long", "n" * 1100, "shop", "default", w.netns.fd, 5),
            w.pod("a"),
        ]
        peer = await w.live()
        assert peer.received == [Keep("gone"), Keep("long"), add_of("a"), SnapshotSent()]

    run(body)


def test_every_connection_gets_its_own_snapshot(run: Run) -> None:
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


def test_no_answer_during_the_snapshot_ends_the_connection(run: Run) -> None:
    async def body(w: World) -> None:
        w.enrol("a", "b")
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        await peer.request()
        assert await peer.request() is None
        assert w.closed == ["ack-timeout"]
        assert w.server.acked("a") is None

    run(body, deadline_seconds=SHORT_SECONDS)


def test_a_refused_end_of_the_snapshot_is_not_said_again(run: Run) -> None:
    async def body(w: World) -> None:
        w.server.snapshot_ready.set()
        peer = await w.greeted()
        assert await peer.request() == SnapshotSent()
        peer.ack("no")
        await eventually("the snapshot", lambda: w.server.settled)
        await ticks()
        assert peer.is_quiet()

    run(body)
