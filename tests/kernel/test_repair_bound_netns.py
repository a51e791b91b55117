"""Finding the netns of a pod without a process, among files that runtimes bind namespaces to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from tests.kernel.processworlds import HOST_CGROUP, FileWorld, PodPaths, ProcessWorld, RealWorld
from tests.kernel.world import Netns

from meshcni.host.boundnetns import BoundNetns
from meshcni.host.podnetns import NOT_FOUND, SANDBOXED, TAKEN, Found, Refused, Wanted

UID = "3f0c5d1e-9a7b-4c26-8e14-0b2d6f8a9c33"
OTHER_UID = "c0ffee00-1234-4abc-9def-00112233aabb"
V4, V6 = IPv4Address("10.88.0.2"), IPv6Address("fd00:88::2")
POD = Wanted((UID,), (V4, V6))
ID = "5b1e" * 16
Address = IPv4Address | IPv6Address


@pytest.fixture(params=[FileWorld, RealWorld])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ProcessWorld]:
    (tmp_path / "proc").mkdir()
    try:
        made: ProcessWorld = request.param(tmp_path / "proc")
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield made
    made.close()


class Bound:
    """A folder of bound namespaces, as /var/run/netns is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self._netns: list[Netns] = []
        self._mounted: list[Path] = []

    def make(self, name: str, *addresses: Address) -> Netns:
        """Bind a new namespace with these addresses."""
        netns = Netns()
        self._netns.append(netns)
        lines = ["link set lo up", "link add eth0 type veth peer name peer0", "link set eth0 up"]
        lines += [f"addr add {one}/{24 if one.version == 4 else 64} dev eth0" for one in addresses]
        netns.ip(*lines)
        self.bind(name, netns)
        return netns

    def bind(self, name: str, netns: Netns) -> None:
        """Bind as a runtime does: a mount over an empty file."""
        path = self.folder / name
        path.touch()
        subprocess.run(("mount", "--bind", f"/proc/{os.getpid()}/fd/{netns.fd}", str(path)), check=True)
        self._mounted.append(path)

    def close(self) -> None:
        for path in self._mounted:
            subprocess.run(("umount", str(path)), check=True)
        for netns in self._netns:
            netns.close()


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Bound]:
    made = Bound(tmp_path / "netns")
    yield made
    made.close()


def look(world: ProcessWorld, bound: Bound, **wanted: Wanted) -> dict[str, Found | Refused]:
    """Find, check that no descriptor but those of the answers is left, and close these."""
    before = len(os.listdir("/proc/self/fd"))
    results = BoundNetns(world.root, str(bound.folder)).find(wanted)
    found = [one for one in results.values() if isinstance(one, Found)]
    assert len(os.listdir("/proc/self/fd")) == before + len(found)
    for one in found:
        os.close(one.descriptor)
    return results


def inode(netns: Netns) -> int:
    return os.fstat(netns.fd).st_ino


def test_a_netns_without_a_process_is_found_by_all_addresses(world: ProcessWorld, bound: Bound) -> None:
    bound.make("cni-1", ip_address("10.88.0.3"))
    mine = bound.make("cni-2", V4, V6)
    bound.make("cni-3", V4)  # an address is not enough

    result = look(world, bound, a=POD)["a"]

    assert isinstance(result, Found)
    assert (result.inode, result.pid) == (inode(mine), 0)


def test_one_address_of_two_is_not_enough(world: ProcessWorld, bound: Bound) -> None:
    bound.make("cni-1", V4)
    result = look(world, bound, a=POD)["a"]
    assert isinstance(result, Refused)
    assert result.code == NOT_FOUND
    assert "none of the 1 network namespaces" in result.text


def test_two_namespaces_with_the_addresses_are_nobodys(world: ProcessWorld, bound: Bound) -> None:
    bound.make("cni-1", V4, V6)
    bound.make("cni-2", V4, V6)
    result = look(world, bound, a=POD)["a"]
    assert isinstance(result, Refused)
    assert result.code == TAKEN
    assert "cni-1" in result.text
    assert "cni-2" in result.text


def test_one_namespace_bound_twice_is_one(world: ProcessWorld, bound: Bound) -> None:
    netns = bound.make("cni-1", V4, V6)
    bound.bind("cni-2", netns)
    assert isinstance(look(world, bound, a=POD)["a"], Found)


def test_two_pods_with_one_address_get_nothing(world: ProcessWorld, bound: Bound) -> None:
    bound.make("cni-1", V4, V6)
    results = look(world, bound, a=POD, b=Wanted((OTHER_UID,), (V4,)))
    assert [type(one) for one in results.values()] == [Refused, Refused]
    assert {one.code for one in results.values() if isinstance(one, Refused)} == {TAKEN}


@pytest.mark.parametrize(
    ("comm", "words"),
    [("qemu-system-x86_64", "a virtual machine"), ("virtiofsd", "Kata"), ("firecracker", "a virtual machine")],
)
def test_the_netns_of_a_virtual_machine_is_refused_whatever_its_class_is_called(
    comm: str, words: str, world: ProcessWorld, bound: Bound
) -> None:
    """Kata without `sandbox_cgroup_only`: the hypervisor is in the pod's netns, and in no cgroup of the pod."""
    netns = bound.make("cni-1", V4, V6)
    world.start(f"/kata_overhead/{ID}", netns, comm=comm)
    result = look(world, bound, a=POD)["a"]
    assert isinstance(result, Refused)
    assert result.code == SANDBOXED
    assert words in result.text


def test_other_processes_in_the_netns_are_no_matter(world: ProcessWorld, bound: Bound) -> None:
    """A runtime's helper, and a gVisor that works with the netns' own addresses."""
    netns = bound.make("cni-1", V4, V6)
    world.start(HOST_CGROUP, netns, comm="pinns")
    world.start(HOST_CGROUP, netns, comm="runsc-sandbox")
    elsewhere = bound.make("cni-2", ip_address("10.88.0.9"))
    world.start(f"/kata_overhead/{ID}", elsewhere, comm="qemu-system-x86_64")
    assert isinstance(look(world, bound, a=POD)["a"], Found)


def test_the_netns_of_another_pods_process_is_not_taken(world: ProcessWorld, bound: Bound) -> None:
    netns = bound.make("cni-1", V4, V6)
    world.start(PodPaths(OTHER_UID).cgroupfs(ID), netns)
    result = look(world, bound, a=POD)["a"]
    assert isinstance(result, Refused)
    assert result.code == TAKEN
    assert OTHER_UID in result.text


def test_a_process_of_the_pod_itself_is_no_hindrance(world: ProcessWorld, bound: Bound) -> None:
    netns = bound.make("cni-1", V4, V6)
    world.start(PodPaths(UID).systemd(ID), netns)
    assert isinstance(look(world, bound, a=POD)["a"], Found)


def test_the_hosts_netns_is_never_found(world: ProcessWorld, bound: Bound) -> None:
    world.host.ip("link set lo up", f"addr add {V4}/32 dev lo", f"addr add {V6}/128 dev lo")
    bound.bind("host", world.host)
    result = look(world, bound, a=POD)["a"]
    assert isinstance(result, Refused)
    assert result.code == NOT_FOUND


def test_files_that_are_no_namespaces_are_named(world: ProcessWorld, bound: Bound) -> None:
    """What a container sees whose mount does not propagate: the empty files below the runtime's mounts."""
    (bound.folder / "cni-1").touch()
    (bound.folder / "folder").mkdir()
    result = look(world, bound, a=POD)["a"]
    assert isinstance(result, Refused)
    assert "2 files are none for us" in result.text
    assert "cni-1" in result.text


def test_nothing_is_mounted(world: ProcessWorld, tmp_path: Path) -> None:
    folder = str(tmp_path / "absent")
    result = BoundNetns(world.root, folder).find({"a": POD})["a"]
    assert isinstance(result, Refused)
    assert result.code == NOT_FOUND
    assert folder in result.text
