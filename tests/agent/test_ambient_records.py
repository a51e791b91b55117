"""What the API says of pods and namespaces, and what becomes of it: the state table, labels, addresses, successors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from tests.agent.ambientnode import (
    ADD_SECONDS,
    BOTH,
    LONG_SECONDS,
    MODE,
    REDIRECTION,
    VERIFY_SECONDS,
    Node,
    failing,
    run,
    settle,
)

from meshcni.errors import KubeError, MeshCniError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.enrollment import Step
from meshcni.protocols.zds import Add, Delete, Keep

OUT = {MODE: "none"}  # labels of a pod that stays out of an ambient namespace
DNS = "ambient.istio.io/dns-capture"
INTERFACES = "istio.io/reroute-virtual-interfaces"


def annotations(value: str) -> Mapping[str, str]:
    return {REDIRECTION: value} if value else {}


def told_of(node: Node, uid: str) -> list[type]:
    """What any ztunnel was told of a pod."""
    return [type(one) for ztunnel in node.ztunnels for one in ztunnel.requests if getattr(one, "uid", "") == uid]


# --- the state table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_start", [True, False], ids=["at-start", "later"])
@pytest.mark.parametrize("belongs", [True, False], ids=["belongs", "does-not-belong"])
@pytest.mark.parametrize("annotation", ["", "pending", "enabled", "nonsense"])
def test_a_pod_that_runs(tmp_path: Path, annotation: str, belongs: bool, at_start: bool) -> None:
    """Spec 1.6: what is annotated and what should be, and what comes of it."""

    async def body(node: Node) -> None:
        if not at_start:
            node.start_agent()
            await settle()
            node.ztunnel()
        labels = {} if belongs else OUT
        is_ours = annotation in ("pending", "enabled")
        if is_ours:
            sandbox = node.enrolled("cart", "10.0.0.1", annotation=annotation, labels=labels)
        else:
            sandbox = node.running("cart", "10.0.0.1", labels=labels, annotations=annotations(annotation))
        if at_start:
            node.start_agent()
            node.ztunnel()
        await settle(LONG_SECONDS)
        if belongs:
            assert node.is_enrolled("cart", sandbox)
            assert sandbox.inside.opened == 0
        elif is_ours:
            assert node.is_out("uid-cart", sandbox)
            assert node.record("cart") is None
        else:
            assert node.record("cart") is None
            assert (node.patches, told_of(node, "uid-cart")) == ([], [])
            assert node.annotation("cart") == annotation

    run(tmp_path, body)


@pytest.mark.parametrize("at_start", [True, False], ids=["at-start", "later"])
@pytest.mark.parametrize("belongs", [True, False], ids=["belongs", "does-not-belong"])
@pytest.mark.parametrize("annotation", ["", "pending", "enabled"])
@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended(tmp_path: Path, phase: str, annotation: str, belongs: bool, at_start: bool) -> None:
    async def body(node: Node) -> None:
        if not at_start:
            node.start_agent()
            await settle()
            node.ztunnel()
        labels = {} if belongs else OUT
        sandbox = node.enrolled("job", "10.0.0.1", annotation=annotation, labels=labels, phase=phase)
        del node.runs["uid-job"]
        if not annotation:
            node.probes.held.clear()
        if at_start:
            node.start_agent()
            node.ztunnel()
        await settle(LONG_SECONDS)
        assert node.record("job") is None
        assert node.annotation("job") == ""
        assert node.held_by("uid-job") == set()
        assert "uid-job" not in node.served
        assert Add not in told_of(node, "uid-job")
        assert sandbox.inside.opened == 0, "nothing runs there any more"

    run(tmp_path, body)


@pytest.mark.parametrize("belongs", [True, False], ids=["belongs", "does-not-belong"])
@pytest.mark.parametrize("annotation", ["", "pending", "enabled"])
def test_a_pod_without_an_address(tmp_path: Path, annotation: str, belongs: bool) -> None:
    """As after a reboot, until the sandbox is made anew: an Add is to come, and entries of the set wait for it."""

    async def body(node: Node) -> None:
        node.pod("cart", annotations=annotations(annotation), labels={} if belongs else OUT)
        node.start_agent()
        ztunnel = node.ztunnel()
        await settle(LONG_SECONDS)
        stays = belongs and annotation
        assert node.annotation("cart") == (annotation if stays else "")
        assert told_of(node, "uid-cart")[-1:] == ([Keep] if stays else [Delete] if annotation else [])
        assert ztunnel.proxies == {}
        assert node.events == []
        if belongs:
            sandbox = node.sandbox("10.0.0.1")
            await node.add("cart", sandbox)
            await settle()
            assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_an_address_that_comes_later(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("cart")
        await settle()
        assert node.record("cart") is None
        sandbox = node.running("cart", "10.0.0.1")
        await settle()
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_a_pod_whose_end_has_begun_stays(tmp_path: Path) -> None:
    """It still answers requests; its enrolment ends with it."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        node.pod("cart", terminating=True)
        await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)
        node.delete("cart")
        await settle()
        assert node.held_by("uid-cart") == set()
        assert node.served == {}
        assert sandbox.inside.opened == 0

    run(tmp_path, body)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_of_a_namespace(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        cart = node.running("cart", "10.0.1.1", namespace="plain")
        out = node.running("out", "10.0.1.2", namespace="plain", labels=OUT)
        own = node.running("own", "10.0.1.3", namespace="plain", labels={MODE: "ambient"})
        await settle()
        assert [cart.inside.is_clean, out.inside.is_clean, own.inside.is_clean] == [True, True, False]
        node.label_namespace("plain", mode="ambient")
        await settle()
        assert [cart.inside.is_clean, out.inside.is_clean, own.inside.is_clean] == [False, True, False]
        node.label_namespace("plain", mode="ambient", another="label")
        await settle()
        assert cart.inside.opened == own.inside.opened == 0
        node.label_namespace("plain")
        await settle()
        assert [cart.inside.is_clean, out.inside.is_clean, own.inside.is_clean] == [True, True, False]
        assert set(node.served) == {"uid-own"}

    run(tmp_path, body)


def test_a_label_that_goes_from_one_selector_to_the_other(tmp_path: Path) -> None:
    """Both take the pod before and after: nothing may happen to it in between."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = node.running("cart", "10.0.0.1", labels={MODE: "ambient"})
        await settle()
        node.label_namespace("shop")
        await settle()
        node.label_namespace("shop", mode="ambient")
        node.pod("cart", labels={})
        await settle()
        assert node.is_enrolled("cart", sandbox)
        assert sandbox.inside.opened == 0

    run(tmp_path, body)


def test_a_label_that_comes_back_at_once(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = node.running("cart", "10.0.0.1")
        await settle()
        for wait in (0.0, 0.01, 0.1, 0.25, 0.3, 0.35, 0.5):
            node.label_namespace("shop")
            await settle(wait)
            node.label_namespace("shop", mode="ambient")
            await settle(LONG_SECONDS)
            assert node.is_enrolled("cart", sandbox), wait

    run(tmp_path, body)


def test_a_namespace_that_is_not_known_changes_nothing(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        known = node.enrolled("cart", "10.0.0.1", namespace="lost")
        unknown = node.running("new", "10.0.0.2", namespace="lost")
        node.start_agent()
        node.ztunnel()
        await settle(LONG_SECONDS)
        assert known.inside.opened == 0
        assert node.annotation("cart", "lost") == "enabled"
        assert node.served["uid-cart"] == known.inode
        assert unknown.inside.is_clean
        assert told_of(node, "uid-new") == []
        node.label_namespace("lost", mode="ambient")
        await settle()
        assert not unknown.inside.is_clean
        node.label_namespace("lost")
        await settle()
        assert known.inside.is_clean
        assert unknown.inside.is_clean

    run(tmp_path, body)


def test_no_pod_leaves_before_its_namespace_is_known(tmp_path: Path) -> None:
    """Pods are heard of first; what does not belong any more leaves when that is certain."""

    async def body(node: Node) -> None:
        stays = node.enrolled("cart", "10.0.0.1")
        leaves = node.enrolled("left", "10.0.0.2", namespace="plain")
        node.start_agent(synced=False)
        ztunnel = node.ztunnel()
        for pod in node.pods.values():
            node.tell(pod)
        node.pod_informer.synced.set()
        await settle(LONG_SECONDS)
        assert (stays.inside.opened, leaves.inside.opened, node.patches) == (0, 0, [])
        assert ztunnel.requests == [], "no snapshot of what is not known"
        assert node.agent.not_ready() != ()
        node.sync()
        await settle()
        assert node.is_enrolled("cart", stays)
        assert stays.inside.opened == 0
        assert node.is_out("uid-left", leaves)
        assert node.agent.not_ready() == ()

    run(tmp_path, body)


# --- successors and namesakes -----------------------------------------------------------------------------------------


def test_a_pod_made_anew_under_the_same_name(tmp_path: Path) -> None:
    """As StatefulSets do; the informer may hear of both in one event."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await node.started("db-0", "10.0.0.1", uid="first")
        del node.runs["first"]
        node.pod("db-0", uid="second")
        await settle()
        assert (node.served, node.held_by("first")) == ({}, set())
        assert node.annotation("db-0") == ""
        sandbox = node.sandbox("10.0.0.2")
        await node.add("db-0", sandbox)
        node.pod("db-0", "10.0.0.2")
        await settle()
        assert node.is_enrolled("db-0", sandbox)
        assert node.served == {"second": sandbox.inode}

    run(tmp_path, body)


def test_a_patch_that_comes_too_late_meets_no_successor(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.api_trouble = KubeError(503, "away")
        node.pod("db-0", uid="first")
        await node.add("db-0", node.sandbox("10.0.0.1"))
        node.watches = False
        node.pod("db-0", uid="second")
        node.api_trouble = None
        await settle(LONG_SECONDS)
        assert node.annotation("db-0") == ""
        record = node.agent.records.get("first")
        assert record is not None
        assert not record.in_api

    run(tmp_path, body)


def test_a_static_pods_mirror_that_is_made_anew(tmp_path: Path) -> None:
    """The API's object and its UID change, what runs is the same: ztunnel may not see both in one netns."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        mirror = {"kubernetes.io/config.hash": "abc"}
        node.pod("etcd", "10.0.0.1", uid="first", annotations=mirror)
        sandbox = node.runs["abc"] = node.sandbox("10.0.0.1")
        await settle()
        assert node.is_enrolled("etcd", sandbox)
        node.pod("etcd", "10.0.0.1", uid="second", annotations=mirror)
        await settle(LONG_SECONDS)
        assert node.is_enrolled("etcd", sandbox)
        assert ztunnel.proxies == {"second": sandbox.inode}
        assert node.held_by("first") == set()
        assert sandbox.inside.opened == 0

    run(tmp_path, body)


def test_an_address_that_an_ended_pod_still_has(tmp_path: Path) -> None:
    """P11: the set's entry is the new pod's, and the old one's end takes nothing from it, nor does a restart."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await node.started("job", "10.0.0.1")
        del node.runs["uid-job"]
        node.watches = False
        node.pod("job", phase="Succeeded")
        node.watches = True
        sandbox = await node.started("cart", "10.0.0.1")
        assert node.held_by("uid-cart") == {"10.0.0.1"}
        node.tell(node.pods["shop", "job"])
        await settle()
        assert node.is_enrolled("cart", sandbox)
        node.pod("job", annotations={REDIRECTION: "enabled"})  # the patch was lost
        node.probes.held = dict.fromkeys(node.probes.held, "uid-job")  # and so was the entry's owner
        await node.restart()
        await settle()
        assert node.is_enrolled("cart", sandbox)
        assert node.annotation("job") == ""
        node.delete("job")
        await settle()
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


@pytest.mark.parametrize("first", ["cart", "stray"])
def test_two_pods_that_are_seen_in_one_netns(tmp_path: Path, first: str) -> None:
    """Whoever it is, ztunnel never has two of them there (its double would fail), and nobody loses rules."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandbox = node.sandbox("10.0.0.1")
        for name in (first, "stray" if first == "cart" else "cart"):
            node.pod(name, "10.0.0.1")
            node.runs[f"uid-{name}"] = sandbox
            await settle()
        assert len(ztunnel.proxies) == 1
        assert sandbox.inside.opened == 0
        node.delete("stray")
        del node.runs["uid-stray"]
        await settle(2 * VERIFY_SECONDS)
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


# --- addresses --------------------------------------------------------------------------------------------------------


def test_malformed_addresses(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = node.running("cart", "10.0.0.1")
        await settle()
        node.pod("cart", "not an address", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0")
        await settle()
        assert node.is_enrolled("cart", sandbox)
        node.pod("cart", "nothing")
        await settle()
        assert node.is_enrolled("cart", sandbox), "no address is an address that is not known"

    run(tmp_path, body)


def test_a_mapped_address_of_the_runtime(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("cart")
        sandbox = node.sandbox("10.0.0.1")
        pod = node.pods["shop", "cart"]
        mapped = (IPv6Address("::ffff:10.0.0.1"),)
        await node.agent.add(pod, sandbox.descriptor, mapped, "/run/netns/cart", ADD_SECONDS)
        await settle()
        assert node.held_by("uid-cart") == {"10.0.0.1"}

    run(tmp_path, body)


@pytest.mark.parametrize("both", [True, False])
def test_dual_stack(tmp_path: Path, both: bool) -> None:
    """With AMBIENT_IPV6 off an IPv6 address is nobody's concern, and no reason to try for ever."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1", "fd00::1")
        held = {"10.0.0.1", "fd00::1"} if both else {"10.0.0.1"}
        assert node.held_by("uid-cart") == held
        assert node.is_enrolled("cart", sandbox)
        await node.restart()
        await settle()
        assert node.is_enrolled("cart", sandbox)
        node.label_namespace("shop")
        await settle()
        assert node.is_out("uid-cart", sandbox)

    run(tmp_path, body, **({"families": BOTH} if both else {}))


def test_an_address_that_changes(tmp_path: Path) -> None:
    """7.2 no 17: the old one leaves the set."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        sandbox.inside.addresses = node.sandbox("10.0.0.2").inside.addresses
        node.pod("cart", "10.0.0.2")
        await settle()
        assert node.held_by("uid-cart") == {"10.0.0.2"}
        assert node.is_enrolled("cart", sandbox)
        assert sandbox.inside.opened == 0

    run(tmp_path, body)


def test_a_sandbox_made_anew_by_an_add(tmp_path: Path) -> None:
    """The API shows the old address until the kubelet has told it; that must not count for the new sandbox."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        await node.started("cart", "10.0.0.1")
        del node.runs["uid-cart"]
        sandbox = node.sandbox("10.0.0.2")
        node.netns_seconds = 1.0
        adding = asyncio.ensure_future(node.add("cart", sandbox))
        await settle(0.5)
        node.pod("cart", labels={"seen": "meanwhile"})
        await adding
        node.pod("cart", labels={"seen": "afterwards"})
        await settle()
        assert node.held_by("uid-cart") == {"10.0.0.2"}
        assert ztunnel.proxies == {"uid-cart": sandbox.inode}
        node.pod("cart", "10.0.0.2")
        await settle()
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_a_sandbox_made_anew_without_us(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        await node.started("cart", "10.0.0.1")
        sandbox = node.running("cart", "10.0.0.2")
        await settle()
        assert node.is_enrolled("cart", sandbox)
        assert ztunnel.proxies == {"uid-cart": sandbox.inode}
        assert [reason for _name, reason, _text in node.events] == ["AmbientRedirectionHealed"]

    run(tmp_path, body)


# --- annotations that are edited --------------------------------------------------------------------------------------


def test_overrides_that_are_edited(tmp_path: Path) -> None:
    """7.2 no 19: at once, and without opening the pod."""

    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        for text, dns in (("true", True), ("no boolean", False), ("T", True), ("false", False)):
            node.pod("cart", annotations={REDIRECTION: "enabled", DNS: text})
            await settle()
            assert sandbox.inside.rules == AmbientParameters(dns_capture=dns)
        assert sandbox.inside.opened == 0
        assert node.events == [], "what was asked for is no drift"

    run(tmp_path, body)


def test_an_edit_that_makes_no_rules(tmp_path: Path) -> None:
    """An enrolled pod keeps what it has, also when an agent starts that never saw better; a correction counts."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        had = sandbox.inside.rules
        node.pod("cart", annotations={REDIRECTION: "enabled", INTERFACES: "net 1"})
        await settle(LONG_SECONDS)
        assert (sandbox.inside.rules, sandbox.inside.opened) == (had, 0)
        await node.restart()
        await settle(LONG_SECONDS)
        assert (sandbox.inside.rules, sandbox.inside.opened) == (had, 0)
        assert ztunnel.proxies == {"uid-cart": sandbox.inode}
        assert node.held_by("uid-cart") == {"10.0.0.1"}
        assert node.annotation("cart") == "enabled"
        (event,) = node.events
        assert "net 1" in event[2]
        node.pod("cart", annotations={REDIRECTION: "enabled", INTERFACES: "net1"})
        await settle()
        assert sandbox.inside.rules == AmbientParameters(virtual_interfaces=("net1",))
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_a_pod_with_an_edit_that_makes_no_rules_can_leave(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        sandbox = node.enrolled("cart", "10.0.0.1", annotations={INTERFACES: "net 1"})
        node.start_agent()
        node.ztunnel()
        await settle()
        node.label_namespace("shop")
        await settle()
        assert node.is_out("uid-cart", sandbox)

    run(tmp_path, body)


def test_a_new_pod_that_makes_no_rules_is_refused(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        node.pod("cart", annotations={INTERFACES: "net 1"})
        sandbox = node.sandbox("10.0.0.1")
        with pytest.raises(MeshCniError, match="net 1"):
            await node.add("cart", sandbox)
        assert node.is_out("uid-cart", sandbox)
        node.pod("cart", annotations={INTERFACES: "net1"})
        await node.add("cart", sandbox)
        await settle()
        assert sandbox.inside.rules == AmbientParameters(virtual_interfaces=("net1",))

    run(tmp_path, body)


def test_a_runtime_class_whose_pods_cannot_be_enrolled(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = node.running("box", "10.0.0.1", runtime_class="kata-qemu")
        await settle(LONG_SECONDS)
        assert node.is_out("uid-box", sandbox)
        assert len(node.events) == 1
        other = node.sandbox("10.0.0.2")
        with pytest.raises(MeshCniError, match="runtime class kata-qemu"):
            await node.add("box", other)

    run(tmp_path, body)


@pytest.mark.parametrize("value", ["", "pending", "nonsense"])
def test_an_annotation_that_somebody_else_takes_away(tmp_path: Path, value: str) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        node.pod("cart", annotations=annotations(value))
        await settle()
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_an_event_from_before_a_pod_left(tmp_path: Path) -> None:
    """It still shows the annotation; taking the pod for enrolled would close it before ztunnel listens."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        before = node.pods["shop", "cart"]
        node.pod("cart", labels=OUT)
        node.watches = False
        await settle()
        assert node.is_out("uid-cart", sandbox)
        ztunnel.refused.add("uid-cart")
        node.pod("cart", labels={}, annotations={})
        node.tell(before)
        await settle(LONG_SECONDS)
        assert sandbox.inside.is_clean
        assert not [text for _name, _reason, text in node.events if "mended" in text]

    run(tmp_path, body)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["routes", "routes done", "rules", "rules done", "host", "host done"])
def test_a_running_pod_that_cannot_be_enrolled_is_left_alone(tmp_path: Path, what: str) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await settle()
        sandbox = node.running("cart", "10.0.0.1")
        with failing(node, what):
            await settle(LONG_SECONDS)
        record = node.record("cart")
        assert record is not None
        assert record.attempts > 3
        assert node.annotation("cart") == "pending"
        await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


@pytest.mark.parametrize("what", ["release", "release done", "remove", "remove done", "api", "host", "host done"])
def test_a_pod_that_cannot_leave_stays_served_until_it_can(tmp_path: Path, what: str) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        sandbox = await node.started("cart", "10.0.0.1")
        with failing(node, what):
            node.label_namespace("shop")
            await settle(LONG_SECONDS)
            assert sandbox.inside.rules is None or "uid-cart" in ztunnel.proxies, "closed and not served"
            assert node.annotation("cart") != "enabled" or "uid-cart" in ztunnel.proxies
            assert len(node.events) == 1
        await settle(LONG_SECONDS)
        assert node.is_out("uid-cart", sandbox)
        assert node.record("cart") is None

    run(tmp_path, body)


def test_ztunnel_that_refuses_a_running_pod_leaves_it_open(tmp_path: Path) -> None:
    """It listens on one of ztunnel's ports itself; also after the agent has started anew, with nothing in place."""

    async def body(node: Node) -> None:
        node.start_agent()
        ztunnel = node.ztunnel()
        ztunnel.refused.add("uid-cart")
        sandbox = node.running("cart", "10.0.0.1")
        await settle(LONG_SECONDS)
        assert sandbox.inside.rules is None
        assert node.annotation("cart") == "pending"
        await node.restart()
        await settle(LONG_SECONDS)
        assert sandbox.inside.rules is None
        assert sandbox.inside.opened == 0
        ztunnel.refused.clear()
        await settle(LONG_SECONDS)
        assert node.is_enrolled("cart", sandbox)

    run(tmp_path, body)


def test_people_hear_of_a_failure_once(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.start_agent()
        node.ztunnel()
        await settle()
        with failing(node, "rules"):
            node.running("cart", "10.0.0.1")
            await settle(10 * LONG_SECONDS)
        assert [name for name, _reason, _text in node.events] == ["cart"]
        assert Step.RULES.value in node.events[0][2]

    run(tmp_path, body)
