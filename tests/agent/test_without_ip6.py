"""Ambient mode where the kernel has IPv6 and no netfilter for it: IPv4 works, and no IPv6 address is passed over."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from lab.withoutip6 import without_ip6tables
from lab.ztunnel.client import Program
from tests.agent.ambientnode import LONG_SECONDS, V4, VERIFY_SECONDS, Node, run, settle
from tests.agent.ambientscene import VARIANTS, AmbientScene, add, is_captured, lines_of, shell_in
from tests.agent.scene import Agent

from meshcni.errors import ApplyError

LEGACY = VARIANTS["legacy"]
MISSING = "the kernel lacks ip6_tables, ip6table_{nat,mangle,raw} for IPv6"
LACK = {"families": V4, "without_ipv6": MISSING}


# --- the real agent on such a kernel ----------------------------------------------------------------------------------


@pytest.fixture
def agent(ambient: AmbientScene, ztunnel: Program) -> Agent:
    return without_ip6tables(lambda: ambient.ready(AMBIENT_IPV6="true", **LEGACY))


def test_a_pod_without_ipv6_is_captured_and_the_node_warned_of_once(ambient: AmbientScene, agent: Agent) -> None:
    pod = ambient.new_pod()
    reply = add(agent, pod)
    assert reply.ok, reply.message
    assert is_captured(pod, "legacy")
    assert ambient.ipset_entries() == {pod.address: pod.uid}
    ambient.wait_annotation(pod, "enabled")
    (note,) = agent.status()["kernel"]
    assert note.startswith(MISSING)
    assert "modprobe" in note
    (warning,) = lines_of(agent, "for IPv6")
    assert "\twarn\t" in warning
    assert lines_of(agent, "\terror\t") == []
    assert "istio-inpod-probes-v6" not in shell_in(ambient.scene.netns, "ipset", "list")


@pytest.mark.parametrize("told_by", ["prevResult", "netns"])
def test_a_dual_stack_pod_is_refused_with_the_remedy(ambient: AmbientScene, agent: Agent, told_by: str) -> None:
    pod = ambient.new_pod()
    pod.netns.ip("addr add fd00:1::5/64 dev eth0 nodad")
    ips = (f"{pod.address}/24", "fd00:1::5/64") if told_by == "prevResult" else (f"{pod.address}/24",)
    reply = add(agent, pod, ips=ips)
    assert not reply.ok
    said = f"{reply.message} {reply.details}"
    for part in ("IPv6 address fd00:1::5", MISSING, "start the agent again", "AMBIENT_IPV6=false"):
        assert part in said
    assert not is_captured(pod, "legacy")
    assert ambient.ipset_entries() == {}


# --- pods that run ----------------------------------------------------------------------------------------------------


def test_a_running_pod_with_ipv6_is_not_enrolled_and_told_why(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        both = node.running("both", "10.0.0.1", "fd00::1")
        plain = node.running("plain", "10.0.0.2")
        await settle(LONG_SECONDS)
        assert node.is_enrolled("plain", plain)
        assert both.inside.is_clean
        assert node.served == {node.uid("plain"): plain.inode}
        assert {name for name, _reason, _text in node.events} == {"both"}
        assert all("fd00::1" in text and MISSING in text for _name, _reason, text in node.events)
        node.label_namespace("shop")
        await settle(LONG_SECONDS)
        for name, sandbox in (("both", both), ("plain", plain)):
            assert node.is_out(node.uid(name), sandbox)

    run(tmp_path, body, **LACK)


def test_an_address_that_comes_later_is_told_of_and_the_rules_stay(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        assert node.is_enrolled("cart", sandbox)
        node.events.clear()
        sandbox.inside.addresses |= {ip_address("fd00::1")}
        await settle(2 * VERIFY_SECONDS)
        assert any("fd00::1" in text and MISSING in text for _name, _reason, text in node.events)
        assert sandbox.inside.rules is not None
        assert sandbox.inside.opened == 0
        sandbox.inside.addresses = frozenset({ip_address("10.0.0.1")})
        await settle(2 * VERIFY_SECONDS)
        assert node.is_enrolled("cart", sandbox)
        record = node.record("cart")
        assert record is not None
        assert record.error is None

    run(tmp_path, body, **LACK)


def test_an_add_of_such_a_pod_leaves_nothing(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("cart")
        sandbox = node.sandbox("10.0.0.1", "fd00::1")
        with pytest.raises(ApplyError, match="fd00::1") as caught:
            await node.add("cart", sandbox)
        assert "AMBIENT_IPV6=false" in caught.value.hint
        await settle()
        assert sandbox.inside.is_clean
        assert (node.served, node.probes.held) == ({}, {})
        assert node.annotation("cart") != "enabled"

    run(tmp_path, body, **LACK)


def test_where_ipv6_is_off_on_purpose_no_address_is_looked_for(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1", "fd00::1")
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body, families=V4)
