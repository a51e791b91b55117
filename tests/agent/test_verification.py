"""Enrolled pods are looked at in rounds and when something asks for it, on a clock that never waits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.agent.ambientnode import VERIFY_SECONDS, Node, Sandbox, run, settle

from meshcni.agent.podrecord import PodRecord
from meshcni.agent.rounds import GATHER_SECONDS

ROUND = VERIFY_SECONDS * 1.5  # one has begun and ended


async def enrolled(node: Node, name: str, ip: str) -> tuple[PodRecord, Sandbox]:
    sandbox = await node.started(name, ip)
    record = node.record(name)
    assert record is not None
    return record, sandbox


def test_rules_that_somebody_changed_are_mended_in_a_round(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        _record, sandbox = await enrolled(node, "cart", "10.0.0.1")
        sandbox.inside.rules = "tampered"
        await settle(ROUND)
        assert sandbox.inside.rules == node.defaults

    run(tmp_path, body)


def test_pods_that_are_looked_at_all_the_time_delay_no_round(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        restless, _ = await enrolled(node, "restless", "10.0.0.1")
        _record, sandbox = await enrolled(node, "cart", "10.0.0.2")
        sandbox.inside.rules = "tampered"
        end = asyncio.get_running_loop().time() + ROUND
        while asyncio.get_running_loop().time() < end:
            node.agent.verification.look_at(restless)
            await settle(GATHER_SECONDS)
        assert sandbox.inside.rules == node.defaults

    run(tmp_path, body)


@pytest.mark.parametrize("first", ["all", "one"])
def test_a_look_at_everything_is_not_lost_when_one_pod_is_to_be_looked_at_too(tmp_path: Path, first: str) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        moved, _ = await enrolled(node, "moved", "10.0.0.1")
        _record, sandbox = await enrolled(node, "cart", "10.0.0.2")
        sandbox.inside.rules = "tampered"
        anew = node.runs[moved.uid] = node.sandbox("10.0.0.1")
        asked = [node.agent.verification.hurry, lambda: node.agent.verification.look_at(moved)]
        for ask in asked if first == "all" else reversed(asked):
            ask()
        await settle()
        assert sandbox.inside.rules == node.defaults
        assert node.is_enrolled("moved", anew)

    run(tmp_path, body)


def test_a_pod_that_moves_during_a_round_does_not_wait_for_its_end(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        for number in range(10):
            await enrolled(node, f"pod-{number}", f"10.0.0.{number + 1}")
        await settle(VERIFY_SECONDS * 0.6)  # in the midst of the first round
        record = node.record("pod-0")
        assert record is not None
        anew = node.runs[record.uid] = node.sandbox("10.0.0.1")
        node.agent.verification.look_at(record)
        await settle()
        assert node.is_enrolled("pod-0", anew)

    run(tmp_path, body)
