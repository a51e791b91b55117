"""A running sidecar pod without redirection gets it in its own netns, and nobody else gets anything."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.kernel import world as pods
from tests.kernel.processworlds import FileWorld, PodPaths
from tests.kernel.world import IPV4, IPV6, KIND, VARIANTS, Netns, apply, make_pod, node_choice

from meshcni import istio
from meshcni.agent.healing import (
    BAD_PARAMETERS,
    CLAIMED_TWICE,
    NOT_A_SIDECAR,
    NOT_PROGRAMMED,
    OTHER_NODE,
    Drifted,
    Healed,
    Healer,
    NotHealed,
)
from meshcni.agent.podrecord import Netns as OpenNetns
from meshcni.agent.programming import BackendConfig, Programmer
from meshcni.errors import NetnsError
from meshcni.host.backends.iptables import find_tools
from meshcni.host.boundnetns import BoundNetns
from meshcni.host.netns import OTHERS_NETNS
from meshcni.host.podnetns import (
    HOST_NETNS,
    NO_ADDRESS,
    NOT_FOUND,
    SANDBOXED,
    UNREADABLE,
    WRONG_ADDRESS,
    NetnsFinder,
)
from meshcni.host.redirection import FamilyPolicy
from meshcni.pods.eligibility import Policy
from meshcni.pods.interception import Interception
from meshcni.pods.model import Container, Pod

UID = "3f0c5d1e-9a7b-4c26-8e14-0b2d6f8a9c33"
OTHER_UID = "c0ffee00-1234-4abc-9def-00112233aabb"
ID = "5b1e" * 16
PROXY = Container(istio.PROXY_CONTAINER, args=("proxy", "sidecar"))
POD = Pod(
    "shop",
    "cart",
    uid=UID,
    node_name="n1",
    annotations={istio.SIDECAR_STATUS: "{}"},
    containers=(PROXY,),
    ips=(IPV4, IPV6),
    phase="Pending",
)


class World:
    """A host made of files with one pod's namespace, and a healer on it."""

    def __init__(self, folder: Path, variant: str) -> None:
        (folder / "proc").mkdir()
        (folder / "netns").mkdir()
        self.processes = FileWorld(folder / "proc")
        self.bound = folder / "netns"
        self.variant = variant
        self.pods: list[Pod] = [POD]
        self.netns = [make_pod()]
        config = BackendConfig(KIND[variant], "", FamilyPolicy.BY_ADDRESS, str(folder), istio.OWN_NETNS)
        self.programmer = Programmer(config)
        self.programmer.choice = node_choice(variant) or self.programmer.choice
        self.healer = Healer(
            self.programmer,
            NetnsFinder(self.processes.root).find,
            Policy(),
            find_bound=BoundNetns(self.processes.root, str(self.bound)).find,
            everybody=lambda: self.pods,
            never=(*OTHERS_NETNS, f"{self.processes.root}/1/ns/net"),
            node="n1",
        )

    @property
    def pod_netns(self) -> Netns:
        return self.netns[0]

    def run(self, netns: Netns | None = None, uid: str = UID) -> int:
        """Start a process of the pod of `uid`."""
        return self.processes.start(PodPaths(uid).cgroupfs(ID), netns or self.pod_netns)

    def bind(self, name: str = "cni-1", netns: Netns | None = None) -> None:
        (self.bound / name).symlink_to(f"/proc/{os.getpid()}/fd/{(netns or self.pod_netns).fd}")

    def another_netns(self) -> Netns:
        self.netns.append(make_pod())
        return self.netns[-1]

    def heal(self, pod: Pod = POD) -> Healed | NotHealed:
        """Heal; no descriptor may be left."""
        before = len(os.listdir("/proc/self/fd"))
        outcome = asyncio.run(self.healer.heal(pod))
        assert len(os.listdir("/proc/self/fd")) <= before
        return outcome

    def refusal(self, pod: Pod = POD) -> NotHealed:
        """Heal in vain: not a byte may have changed anywhere."""
        before = [state(netns) for netns in (*self.netns, self.processes.host)]
        outcome = self.heal(pod)
        assert isinstance(outcome, NotHealed)
        assert [state(netns) for netns in (*self.netns, self.processes.host)] == before
        assert outcome.text
        return outcome

    def close(self) -> None:
        self.processes.close()
        for netns in self.netns:
            netns.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, "nftables")
    yield made
    made.close()


@pytest.fixture(params=VARIANTS)
def each(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """Each way of programming rules."""
    if request.param != "nftables" and find_tools(request.param) is None:
        pytest.skip(f"iptables-{request.param} is not here")
    made = World(tmp_path, request.param)
    yield made
    made.close()


def state(netns: Netns) -> str:
    """Everything that rules can consist of; the kernel's own routes come by themselves, a moment after a link."""
    return "".join(line for line in pods.state(netns).splitlines(keepends=True) if "proto kernel" not in line)


def as_an_add_leaves_it(world: World) -> str:
    netns = make_pod()
    try:
        apply(netns, Interception(), world.variant)
        return state(netns)
    finally:
        netns.close()


def test_a_bare_pod_ends_as_an_add_would_have_left_it(each: World) -> None:
    each.run()

    healed = each.heal()

    assert isinstance(healed, Healed)
    assert healed.changed
    assert healed.variant == each.variant
    assert state(each.pod_netns) == as_an_add_leaves_it(each)
    assert healed.netns.inode == os.fstat(each.pod_netns.fd).st_ino


def test_what_is_right_is_not_touched(each: World) -> None:
    each.run()
    apply(each.pod_netns, Interception(), each.variant)
    before = state(each.pod_netns)

    healed = each.heal()

    assert isinstance(healed, Healed)
    assert not healed.changed
    assert state(each.pod_netns) == before


def test_half_of_the_rules_become_all_of_them(each: World) -> None:
    each.run()
    apply(each.pod_netns, Interception(), each.variant)
    whole = state(each.pod_netns)
    if each.variant == "nftables":
        each.pod_netns.shell("nft", "flush", "chain", "inet", "istio-proxy-nat", "output")
    else:
        each.pod_netns.shell(f"iptables-{each.variant}", "-t", "nat", "-D", "OUTPUT", "1")
    damaged = state(each.pod_netns)
    assert damaged != whole

    looked = asyncio.run(each.healer.look(POD))
    assert isinstance(looked, Drifted)
    assert looked.drift
    assert state(each.pod_netns) == damaged

    healed = each.heal()
    assert isinstance(healed, Healed)
    assert healed.drift == looked.drift
    assert state(each.pod_netns) == whole


def test_a_pod_without_a_process_is_found_by_its_bound_netns(each: World) -> None:
    each.bind()

    healed = each.heal()

    assert isinstance(healed, Healed)
    assert healed.changed
    assert state(each.pod_netns) == as_an_add_leaves_it(each)


def test_without_a_process_two_pods_with_one_address_are_refused(world: World) -> None:
    world.bind()
    world.pods.append(replace(POD, name="rival", uid=OTHER_UID, ips=(IPV4,)))

    refusal = world.refusal()

    assert refusal.code == CLAIMED_TWICE
    assert "shop/rival" in refusal.text
    assert not refusal.lasting


@pytest.mark.parametrize("runtime_class", ["kata-qemu", "gvisor", "confined"])
def test_a_sandboxed_pod_without_a_process_is_refused(world: World, runtime_class: str) -> None:
    """By the name of its class before anything is looked for, and under any other name by its hypervisor."""
    world.bind()
    if runtime_class == "confined":
        world.processes.start(f"/kata_overhead/{ID}", world.pod_netns, comm="qemu-system-x86_64")
    refusal = world.refusal(replace(POD, runtime_class=runtime_class))
    assert refusal.code == (SANDBOXED if runtime_class == "confined" else BAD_PARAMETERS)
    assert refusal.lasting


@pytest.mark.parametrize(
    "harmless", [{"phase": "Succeeded"}, {"host_network": True}, {"ips": ("10.77.0.99",)}, {"uid": UID}]
)
def test_who_claims_no_address_stands_in_nobodys_way(world: World, harmless: dict[str, object]) -> None:
    world.bind()
    world.pods.append(replace(POD, **{"name": "rival", "uid": OTHER_UID, **harmless}))  # type: ignore[arg-type]
    assert isinstance(world.heal(), Healed)


def test_a_process_tells_a_pod_from_another_of_its_address(world: World) -> None:
    """Its cgroup has the kubelet's word, so what the API says of others does not matter."""
    world.run()
    world.pods.append(replace(POD, name="rival", uid=OTHER_UID))
    other = world.another_netns()
    world.run(other, OTHER_UID)

    assert isinstance(world.heal(), Healed)

    assert state(world.pod_netns) == as_an_add_leaves_it(world)
    assert "istio" not in state(other)


def test_a_successor_of_the_same_name_is_healed_in_its_own_netns(world: World) -> None:
    world.run()
    assert isinstance(world.heal(), Healed)
    before = state(world.pod_netns)
    successor = world.another_netns()
    world.run(successor, OTHER_UID)

    healed = world.heal(replace(POD, uid=OTHER_UID))

    assert isinstance(healed, Healed)
    assert healed.changed
    assert healed.netns.inode == os.fstat(successor.fd).st_ino
    assert state(successor) == as_an_add_leaves_it(world)
    assert state(world.pod_netns) == before


REFUSALS: dict[str, tuple[dict[str, object], str, bool]] = {
    "on the host's network": ({"host_network": True}, NOT_A_SIDECAR, True),
    "no injected pod": ({"annotations": {}}, NOT_A_SIDECAR, True),
    "a bad annotation": (
        {"annotations": {istio.SIDECAR_STATUS: "{}", istio.INTERCEPTION_MODE: "SIDEWAYS"}},
        BAD_PARAMETERS,
        True,
    ),
    "no address": ({"ips": ()}, NO_ADDRESS, False),
    "an address that is none": ({"ips": (IPV4, "fe80::1%eth0")}, WRONG_ADDRESS, False),
    "one address too many": ({"ips": (IPV4, IPV6, "10.77.0.9")}, WRONG_ADDRESS, False),
    "other addresses": ({"ips": ("10.77.0.9",)}, WRONG_ADDRESS, False),
    "no process": ({"uid": OTHER_UID, "ips": ("10.77.0.9",)}, NOT_FOUND, False),
    "on another node": ({"node_name": "n2"}, OTHER_NODE, True),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_whose_netns_is_left_alone(world: World, name: str) -> None:
    changes, code, lasting = REFUSALS[name]
    world.run()

    refusal = world.refusal(replace(POD, **changes))  # type: ignore[arg-type]

    assert (refusal.code, refusal.lasting) == (code, lasting), str(refusal)


def test_the_hosts_netns_is_never_programmed(world: World) -> None:
    """Its processes are on the host's network, though the API does not say so, and the host has its addresses."""
    host = world.processes.host
    host.ip("link set lo up", f"addr add {IPV4}/32 dev lo", f"addr add {IPV6}/128 dev lo nodad")
    world.run(host)
    assert world.refusal().code == HOST_NETNS


def test_a_descriptor_of_the_host_is_refused_whoever_found_it(world: World) -> None:
    host = world.processes.host
    host.ip("link set lo up", f"addr add {IPV4}/32 dev lo", f"addr add {IPV6}/128 dev lo nodad")
    netns = OpenNetns(os.dup(host.fd))
    before = state(host)
    try:
        outcome = asyncio.run(world.healer.heal(POD, netns))
    finally:
        netns.close()
    assert isinstance(outcome, NotHealed)
    assert outcome.code == HOST_NETNS
    assert state(host) == before


def test_what_the_kernel_refuses_is_told(world: World, tmp_path: Path) -> None:
    world.run()
    config = replace(world.programmer.config, backend=KIND["nft"], forced_variant="none-such")
    healer = Healer(Programmer(config), NetnsFinder(world.processes.root).find, Policy())
    outcome = asyncio.run(healer.heal(POD))
    assert isinstance(outcome, NotHealed)
    assert outcome.code == NOT_PROGRAMMED
    assert "none-such" in outcome.text


def test_a_proc_that_cannot_be_walked_is_told(world: World) -> None:
    def broken(_wanted: object) -> dict[str, object]:
        raise NetnsError("cannot tell the host's network namespace", "mount /proc")

    healer = Healer(world.programmer, broken, Policy())  # type: ignore[arg-type]
    outcome = asyncio.run(healer.heal(POD))
    assert isinstance(outcome, NotHealed)
    assert outcome.code == UNREADABLE
    assert "mount /proc" in outcome.text


def test_whoever_stops_waiting_leaves_no_descriptor(world: World) -> None:
    """A pod that is deleted while it is looked for."""
    world.run()
    before = len(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        open_in_loop = len(os.listdir("/proc/self/fd"))
        for moments in range(12):
            task = asyncio.create_task(world.healer.heal(POD))
            for _ in range(moments):
                await asyncio.sleep(0.0005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(20):  # the threads go on, and close what they find
            while len(os.listdir("/proc/self/fd")) > open_in_loop:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(scenario())

    assert len(os.listdir("/proc/self/fd")) == before


def test_many_pods_are_located_in_one_walk(world: World) -> None:
    world.run()
    walks = []
    find = NetnsFinder(world.processes.root).find
    healer = Healer(world.programmer, lambda wanted: walks.append(len(wanted)) or find(wanted), Policy())
    pods = [POD, replace(POD, uid=OTHER_UID), replace(POD, uid="x", ips=())]

    located = asyncio.run(healer.locate(pods))

    assert walks == [2]
    found = located[UID]
    assert isinstance(found, OpenNetns)
    found.close()
    assert {uid: one.code for uid, one in located.items() if isinstance(one, NotHealed)} == {
        OTHER_UID: NOT_FOUND,
        "x": NO_ADDRESS,
    }
