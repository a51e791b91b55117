"""Ambient mode as a whole: what a fresh agent adopts, ADDs, ztunnels that come and go, and the way out."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from tests.agent.ambientnode import LONG_SECONDS, MODE, Node, Sandbox, failing, run, settle

from meshcni.agent.reconciler import EnrollmentError
from meshcni.errors import KubeError, MeshCniError
from meshcni.protocols.zds import Add, Delete, Keep, SnapshotSent

OUT = {MODE: "none"}


# --- what a fresh agent finds -----------------------------------------------------------------------------------------


def test_the_snapshot_of_a_fresh_agent(tmp_path: Path) -> None:
    """Whoever may be captured is named, with the netns where that is known; nobody else is."""

    async def body(node: Node) -> None:
        found = node.enrolled("enabled", "10.0.0.1")
        pending = node.enrolled("pending", "10.0.0.2", annotation="pending")
        cut_short = node.running("cut-short", "10.0.0.3")
        node.enrolled("lost", "10.0.0.4")
        del node.runs["uid-lost"]
        node.running("foreign", "10.0.0.5", labels=OUT)
        node.pod("to-come")
        ended = node.enrolled("ended", "10.0.0.6", phase="Succeeded")
        node.start_agent()
        ztunnel = node.ztunnel()
        ztunnel.proxies = {"uid-enabled": found.inode, "uid-lost": 99, "uid-ended": ended.inode, "uid-unknown": 98}
        await settle()
        end = ztunnel.requests.index(SnapshotSent())
        named = {(type(one), getattr(one, "uid", "")) for one in ztunnel.requests[:end]} - {(Delete, "uid-ended")}
        assert named == {(Add, "uid-enabled"), (Add, "uid-pending"), (Add, "uid-cut-short"), (Keep, "uid-lost")}
        assert ztunnel.proxies == {
            "uid-enabled": found.inode,
            "uid-pending": pending.inode,
            "uid-cut-short": cut_short.inode,
            "uid-lost": 99,
        }

    run(tmp_path, body)


@pytest.mark.parametrize("annotation", ["", "pending", "enabled"])
@pytest.mark.parametrize("served", [True, False], ids=["ztunnel", "no-ztunnel"])
def test_what_was_captured_is_never_opened(tmp_path: Path, served: bool, annotation: str) -> None:
    """The agent before died after the rules were in, perhaps before it could say so; ztunnel may be away."""

    async def body(node: Node) -> None:
        sandbox = node.enrolled("cart", "10.0.0.1", annotation=annotation)
        node.start_agent()
        if served:
            node.ztunnel()
        await settle(LONG_SECONDS)
        assert sandbox.inside.opened == 0
        assert sandbox.inside.rules is not None
        if not served:
            node.ztunnel()
            await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)
        assert sandbox.inside.opened == 0

    run(tmp_path, body)


def test_a_running_pod_leaves_a_trace_before_it_is_changed(tmp_path: Path) -> None:
    """The agent dies in the middle of an enrolment, and the label goes before the next one comes."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await settle()
        node.netns_seconds = 0.5
        sandbox = node.running("cart", "10.0.0.1")
        await settle(0.8)
        assert not sandbox.inside.is_clean
        assert node.annotation("cart") == "pending"
        node.watches = False
        node.pod("cart", labels=OUT)
        node.watches = True
        await node.restart()
        await settle(LONG_SECONDS)
        assert node.is_out("uid-cart", sandbox)

    run(tmp_path, body)


def test_entries_of_the_set_at_the_start(tmp_path: Path) -> None:
    """7.2 no 2: nothing is flushed; what is no pod's goes, what may still be one's stays."""

    async def body(node: Node) -> None:
        node.enrolled("cart", "10.0.0.1")
        node.enrolled("rebooted", "10.0.0.2")
        node.pod("rebooted", ips=())
        del node.runs["uid-rebooted"]
        node.enrolled("gone", "10.0.0.3")
        del node.pods["shop", "gone"]
        node.start_agent()
        await settle()
        assert node.held_by("uid-cart") == {"10.0.0.1"}
        assert node.held_by("uid-rebooted") == {"10.0.0.2"}
        assert node.held_by("uid-gone") == set()

    run(tmp_path, body)


def test_entries_of_the_set_that_cannot_be_adopted_at_first(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.enrolled("gone", "10.0.0.3")
        del node.pods["shop", "gone"]
        node.start_agent()
        await node.agent.host.ready.wait()
        with failing(node, "host"):
            await settle(1.0)
        assert node.held_by("uid-gone") == {"10.0.0.3"}
        await settle(LONG_SECONDS)
        assert node.held_by("uid-gone") == set()

    run(tmp_path, body)


# --- ADDs -------------------------------------------------------------------------------------------------------------


def test_an_add_is_served_before_the_cluster_is_read(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.pod("cart")
        node.start_agent(synced=False)
        ztunnel = node.ztunnel()
        sandbox = node.sandbox("10.0.0.1")
        await node.add("cart", sandbox)
        await settle()
        assert ztunnel.proxies == {"uid-cart": sandbox.inode}
        assert SnapshotSent() not in ztunnel.requests
        node.sync()
        await settle()
        assert SnapshotSent() in ztunnel.requests
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_a_pod_that_the_watch_never_shows_is_asked_for(tmp_path: Path) -> None:
    """A watch that stands still proves nothing: only the API server's word ends a pod that an ADD made known."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await settle()
        node.watches = False
        node.pod("cart")
        sandbox = node.sandbox("10.0.0.1")
        await node.add("cart", sandbox)
        record = node.agent.records.get("uid-cart")
        assert record is not None
        record.started_at -= 100  # long ago
        node.api_trouble = KubeError(0, "no answer")
        await node.agent.verification.round(0.0)
        await settle(LONG_SECONDS)
        assert sandbox.inside.opened == 0
        node.api_trouble = None
        await settle(LONG_SECONDS)
        await node.agent.verification.round(0.0)
        await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)
        node.delete("cart")
        await node.agent.verification.round(0.0)
        await settle(LONG_SECONDS)
        assert node.agent.records.get("uid-cart") is None

    run(tmp_path, body)


def test_one_add_that_hangs_delays_no_other(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("stuck")
        held = node.sandbox("10.0.1.1")
        stuck = node.stuck[held.inode] = asyncio.Event()
        adding = asyncio.ensure_future(node.add("stuck", held))
        await settle(0.1)
        sandboxes: list[Sandbox] = []
        for number in range(50):
            node.pod(f"pod-{number}")
            sandboxes.append(node.sandbox(f"10.0.2.{number + 1}"))
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(node.add(f"pod-{number}", one) for number, one in enumerate(sandboxes)))
        assert asyncio.get_running_loop().time() - began < 1.0, "of a clock that only moves when all wait"
        assert not adding.done()
        stuck.set()
        await adding

    run(tmp_path, body)


@pytest.mark.parametrize("how", ["late", "cancelled", "refused"])
def test_an_add_that_fails_leaves_nothing(tmp_path: Path, how: str) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        await settle()
        ztunnel.silent = how != "refused"
        ztunnel.refused.add("uid-cart")
        node.pod("cart")
        sandbox = node.sandbox("10.0.0.1")
        adding = asyncio.ensure_future(node.add("cart", sandbox, seconds=3.0))
        await settle(1.0)
        if how == "cancelled":
            adding.cancel()
        with pytest.raises((MeshCniError, asyncio.CancelledError)):
            await adding
        ztunnel.silent = False
        await settle(LONG_SECONDS)
        assert sandbox.inside.is_clean
        assert node.held_by("uid-cart") == set()
        assert node.annotation("cart") == "pending"
        assert "find-netns" not in " ".join(text for _name, _reason, text in node.events)
        if not ztunnel.is_connected:
            ztunnel.connect()
        ztunnel.refused.clear()
        again = node.sandbox("10.0.0.2")
        await node.add("cart", again)
        node.pod("cart", "10.0.0.2")
        await settle()
        assert node.is_enrolled("cart", again)

    run(tmp_path, body)


def test_a_later_add_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        node.pod("cart")
        node.netns_seconds = 1.0
        first, second = node.sandbox("10.0.0.1"), node.sandbox("10.0.0.2")
        earlier = asyncio.ensure_future(node.add("cart", first))
        await settle(0.5)
        await node.add("cart", second)
        with pytest.raises(EnrollmentError, match="another ADD"):
            await earlier
        await settle()
        assert ztunnel.proxies == {"uid-cart": second.inode}
        assert node.held_by("uid-cart") == {"10.0.0.2"}

    run(tmp_path, body)


@pytest.mark.parametrize("connected", [True, False])
def test_an_add_that_is_repeated_for_an_enrolled_pod(tmp_path: Path, connected: bool) -> None:
    """What is in place counts, once it was looked at; it is no reason to open the pod."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        if not connected:
            ztunnel.disconnect()
            await settle()
            with pytest.raises(MeshCniError):
                await node.add("cart", sandbox)
            ztunnel.connect()
        await node.add("cart", sandbox)
        await settle()
        assert sandbox.inside.opened == 0
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_an_add_that_is_repeated_looks_at_the_rules(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        sandbox.inside.rules = "tampered"
        await node.add("cart", sandbox)
        assert sandbox.inside.rules == node.defaults

    run(tmp_path, body)


def test_an_add_that_comes_while_the_pod_is_looked_for(tmp_path: Path) -> None:
    """What the walk finds is the sandbox from before."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        await settle()
        old = node.running("cart", "10.0.0.1")
        await settle(0.01)
        new = node.sandbox("10.0.0.1")
        await node.add("cart", new)
        await settle()
        assert ztunnel.proxies == {"uid-cart": new.inode}
        assert old.inside.rules is None
        assert node.is_enrolled("cart", new)

    run(tmp_path, body)


def test_an_add_that_runs_out_of_time_is_undone_when_its_step_ends(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        node.pod("cart")
        sandbox = node.sandbox("10.0.0.1")
        stuck = node.stuck[sandbox.inode] = asyncio.Event()
        with pytest.raises(EnrollmentError, match=re.escape("within 1 s (step rules)")):
            await node.add("cart", sandbox, seconds=1.0)
        stuck.set()
        await settle(LONG_SECONDS)
        assert sandbox.inside.is_clean
        assert "uid-cart" not in ztunnel.proxies
        assert node.held_by("uid-cart") == set()

    run(tmp_path, body)


def test_what_stays_in_a_sandbox_is_not_taken_for_the_next_ones(tmp_path: Path) -> None:
    """The ADD fails and cannot be undone; then a sandbox is made without us."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("cart")
        first = node.sandbox("10.0.0.1")
        with failing(node, "host", "remove"), pytest.raises(MeshCniError):
            await node.add("cart", first)
        sandbox = node.running("cart", "10.0.0.2")
        await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_a_sandbox_made_anew_that_cannot_be_enrolled(tmp_path: Path) -> None:
    """Peers must not go on using the tunnel."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await node.started("cart", "10.0.0.1")
        del node.runs["uid-cart"]
        with failing(node, "rules"), pytest.raises(MeshCniError):
            await node.add("cart", node.sandbox("10.0.0.2"))
        await settle()
        assert node.annotation("cart") == "pending"

    run(tmp_path, body)


def test_a_pod_that_ends_while_its_enrolment_cannot_be_undone(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await settle()
        with failing(node, "host", "remove"):
            node.running("cart", "10.0.0.1")
            await settle(LONG_SECONDS)
            assert len(node.agent.records) == 1
        with failing(node, "remove"):
            node.delete("cart")
            await settle(LONG_SECONDS)
        assert len(node.agent.records) == 0
        assert node.held_by("uid-cart") == set()

    run(tmp_path, body)


def test_a_label_that_goes_while_a_pod_starts(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("cart")
        node.netns_seconds = 1.0
        sandbox = node.sandbox("10.0.0.1")
        adding = asyncio.ensure_future(node.add("cart", sandbox))
        await settle(0.5)
        node.pod("cart", labels=OUT)
        with pytest.raises(MeshCniError, match="left the mesh"):
            await adding
        await settle(LONG_SECONDS)
        assert node.is_out("uid-cart", sandbox)
        assert node.record("cart") is None

    run(tmp_path, body)


# --- ztunnels ---------------------------------------------------------------------------------------------------------


def test_a_rolling_update_of_ztunnel(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        old = node.ztunnel()
        first = await node.started("first", "10.0.0.1")
        new = node.ztunnel()
        await settle()
        assert old.proxies == new.proxies == {"uid-first": first.inode}
        second = await node.started("second", "10.0.0.2")
        assert "uid-second" not in old.proxies
        assert new.proxies["uid-second"] == second.inode
        node.pod("first", labels=OUT)
        await settle()
        assert old.proxies == {}
        assert set(new.proxies) == {"uid-second"}
        old.disconnect()
        await settle()
        assert node.is_enrolled("second", second)

    run(tmp_path, body)


def test_ztunnel_that_lost_everything_gets_it_again(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandboxes = {name: await node.started(name, f"10.0.0.{number}") for number, name in enumerate("abc", 1)}
        ztunnel.disconnect()
        ztunnel.proxies.clear()
        await settle(LONG_SECONDS)
        assert not node.events, "that ztunnel is away is no failure of a pod that is enrolled"
        ztunnel.connect()
        await settle()
        assert all(node.is_enrolled(name, sandbox) for name, sandbox in sandboxes.items())
        assert all(sandbox.inside.opened == 0 for sandbox in sandboxes.values())

    run(tmp_path, body)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.21, 0.22, 0.25, 0.4])
def test_a_ztunnel_that_comes_while_a_pod_leaves_keeps_nothing(tmp_path: Path, seconds: float) -> None:
    """A pod that its snapshot names and that no Del follows for stays there for ever."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        node.pod("cart", labels=OUT)
        await settle(seconds)
        new = node.ztunnel()
        await settle()
        assert new.proxies == {}
        assert node.is_out("uid-cart", sandbox)

    run(tmp_path, body)


# --- the way out ------------------------------------------------------------------------------------------------------


def test_all_pods_leave(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        adopted = node.enrolled("adopted", "10.0.0.1")
        node.start_agent()
        node.ztunnel()
        await settle()
        started = await node.started("started", "10.0.0.2")
        done = await node.agent.unenroll_all()
        assert sorted(done) == ["un-enrolled pod shop/adopted", "un-enrolled pod shop/started"]
        await settle()
        assert node.is_out("uid-adopted", adopted)
        assert node.is_out("uid-started", started)
        with pytest.raises(EnrollmentError, match="being removed"):
            await node.add("started", node.sandbox("10.0.0.3"))
        node.label_namespace("plain", mode="ambient")
        late = node.running("late", "10.0.1.1", namespace="plain")
        await settle(LONG_SECONDS)
        assert late.inside.is_clean

    run(tmp_path, body)


def test_nothing_is_said_to_have_left_before_anything_is_known(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        sandbox = node.enrolled("cart", "10.0.0.1")
        node.start_agent(synced=False)
        await settle()
        with pytest.raises(EnrollmentError, match="not looked at yet"):
            await node.agent.unenroll_all()
        assert sandbox.inside.opened == 0

    run(tmp_path, body)


def test_a_pod_that_does_not_leave_is_named(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        other = await node.started("other", "10.0.0.2")
        node.api_trouble = KubeError(503, "the API is away")
        with pytest.raises(EnrollmentError, match=r"shop/cart \(the API is away"):
            await node.agent.unenroll_all(seconds=0.2)
        assert "uid-cart" in node.served, "peers still come by the tunnel"
        node.api_trouble = None
        await settle(LONG_SECONDS)
        assert node.is_out("uid-cart", sandbox)
        assert node.is_out("uid-other", other)

    run(tmp_path, body)


def test_an_agent_that_ends_leaves_everything(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        node.pod("new")
        waiting = node.sandbox("10.0.0.2")
        ztunnel.silent = True
        adding = asyncio.ensure_future(node.add("new", waiting))
        await settle(0.1)
        await node.agent.close()
        with pytest.raises(MeshCniError):
            await adding
        assert sandbox.inside.opened == 0
        assert node.held_by("uid-cart") == {"10.0.0.1"}
        assert node.annotation("cart") == "enabled"

    run(tmp_path, body)


@pytest.mark.parametrize("what", ["host", "verify", "api"])
def test_what_fails_at_the_start_is_tried_again(tmp_path: Path, what: str) -> None:
    async def body(node: Node) -> None:
        sandbox = node.enrolled("cart", "10.0.0.1", annotation="pending")
        with failing(node, what):
            node.start_agent()
            ztunnel = node.ztunnel()
            await settle(LONG_SECONDS)
            assert ztunnel.proxies == {"uid-cart": sandbox.inode}, "7.2 no 1: whatever else fails, nobody is dropped"
            assert sandbox.inside.opened == 0
        await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)
