"""The ZDS server over real sockets: who is told what, who is let in, and how it begins and ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from lab.ztunnel.behaviour import Behaviour, Options, parse_fault
from lab.ztunnel.client import Program
from lab.ztunnel.messages import HELLO
from lab.ztunnel.standin import StandIn
from tests.agent.scene import answer_to_nobody
from tests.agent.zdsworld import (
    SHORT_SECONDS,
    Peer,
    Run,
    World,
    add_of,
    begin,
    eventually,
    failure,
    open_descriptors,
    own_netns,
    runner,
    ticks,
    world,
)

from meshcni.agent.zdsadmission import BEGINS, MAX_SILENT
from meshcni.agent.ztunnel import Workload
from meshcni.errors import ZtunnelError
from meshcni.host.sockets import listen_seqpacket
from meshcni.protocols.zds import Delete, SnapshotSent


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(tmp_path)


# --- the bytes --------------------------------------------------------------------------------------------------------


def test_recorded_bytes_of_a_ztunnel(run: Run) -> None:
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


def test_without_a_connection(run: Run) -> None:
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


def test_adds_and_dels_do_not_wait_for_the_snapshot(run: Run) -> None:
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


def test_an_add_goes_to_the_newest_a_del_to_all(run: Run) -> None:
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


def test_when_the_older_goes_adds_go_to_the_newer(run: Run) -> None:
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


def test_when_the_newest_goes_the_older_is_back_with_what_it_acked(run: Run) -> None:
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
def test_connections_may_end_in_any_order(run: Run, order: tuple[int, ...]) -> None:
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


def test_a_connection_without_hello_takes_no_add(run: Run) -> None:
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


def test_a_connection_that_ends_during_a_del_is_done_with_it(run: Run) -> None:
    async def body(w: World) -> None:
        old, new = await w.live(), await w.live()
        task = begin(w.server.delete("u"))
        await new.serve(1)
        await old.request()
        old.close()
        await task

    run(body)


def test_a_refused_del_is_done(run: Run) -> None:
    async def body(w: World) -> None:
        peer = await w.live()
        task = begin(w.server.delete("u"))
        await peer.request()
        peer.ack("no such thing")
        await task

    run(body)


def test_what_is_asked_first_is_sent_first(run: Run) -> None:
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


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_no_hello_in_time(run: Run) -> None:
    async def body(w: World) -> None:
        peer = w.peer(hello=None)
        assert await peer.request() is None
        assert w.closed == ["hello-timeout"]
        assert w.connected == [0, 1, 0]
        assert not w.server.has_connection

    run(body, deadline_seconds=SHORT_SECONDS)


def test_200_silent_connections_do_not_delay_a_ztunnel(run: Run, tmp_path: Path) -> None:
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


def test_a_process_that_connects_again_and_again_is_slowed_and_nobody_else(run: Run, tmp_path: Path) -> None:
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


def test_only_root_and_the_agents_own_user_may_connect(run: Run, tmp_path: Path) -> None:
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


def test_what_people_are_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
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


def test_descriptors_stay_as_many(run: Run) -> None:
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


def test_fifty_pods_with_two_overlapping_ztunnels(run: Run) -> None:
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
def test_a_ztunnel_with_a_fault_is_back_with_its_pods(run: Run, fault: str, result: str, cause: str) -> None:
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
