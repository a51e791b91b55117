"""Finding the network namespaces of running pods, among real processes and in a procfs made of files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from tests.kernel.processworlds import HOST_CGROUP, FileWorld, PodPaths, ProcessWorld, RealWorld
from tests.kernel.world import Netns

from meshcni.errors import NetnsError
from meshcni.host.netns import open_netns
from meshcni.host.podnetns import Found, NetnsFinder, Refused, Wanted

UID = "3f0c5d1e-9a7b-4c26-8e14-0b2d6f8a9c33"
OTHER_UID = "c0ffee00-1234-4abc-9def-00112233aabb"
PATHS, OTHER_PATHS = PodPaths(UID), PodPaths(OTHER_UID)
ID, OTHER_ID = "5b1e" * 16, "77aa" * 16
ADDRESS, OTHER_ADDRESS = IPv4Address("10.88.0.2"), IPv4Address("10.88.0.3")
POD = Wanted((UID,), (ADDRESS,))
OTHER_POD = Wanted((OTHER_UID,), (OTHER_ADDRESS,))
PodNetns = Callable[..., Netns]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileWorld]:
    world = FileWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture(params=[FileWorld, RealWorld])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ProcessWorld]:
    """A host made of files, and one made of processes."""
    try:
        made: ProcessWorld = request.param(tmp_path)
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield made
    made.close()


@pytest.fixture
def netns_with() -> Iterator[PodNetns]:
    made: list[Netns] = []

    def make(*addresses: IPv4Address | IPv6Address) -> Netns:
        made.append(Netns())
        lines = ["link set lo up", "link add eth0 type veth peer name peer0", "link set eth0 up"]
        lines += [f"addr add {one}/{24 if one.version == 4 else 64} dev eth0" for one in addresses]
        made[-1].ip(*lines)
        return made[-1]

    yield make
    for netns in made:
        netns.close()


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """No test may leave a thread; descriptors are counted where results are."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("netns-finder")] == []


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def look(finder: NetnsFinder, **wanted: Wanted) -> dict[str, Found | Refused]:
    """Find, check that every answer's descriptor is what it says and that no other is open; close them."""
    before = descriptors()
    results = finder.find(wanted)
    assert results.keys() == wanted.keys()
    for result in results.values():
        if isinstance(result, Found):
            status = os.fstat(result.descriptor)
            assert (status.st_dev, status.st_ino) == (result.device, result.inode)
            assert not os.get_inheritable(result.descriptor)
            os.close(result.descriptor)
    assert descriptors() == before
    return results


def is_netns(result: Found | Refused, netns: Netns, pid: int) -> bool:
    assert isinstance(result, Found), result
    return (result.inode, result.pid) == (os.fstat(netns.fd).st_ino, pid)


def refusal(result: Found | Refused) -> Refused:
    assert isinstance(result, Refused), result
    return result


# --- the contract: the same of files and of processes -----------------------------------------------------------------


def test_pods_are_found_by_cgroup_and_address(world: ProcessWorld, netns_with: PodNetns) -> None:
    one, other = netns_with(ADDRESS), netns_with(OTHER_ADDRESS, ip_address("fd00:88::3"))
    world.start(HOST_CGROUP, comm="containerd")
    first = world.start(PATHS.systemd(ID), one, comm="pause")
    world.start(PATHS.systemd(OTHER_ID), one, comm="we ird) S 1 (x")
    second = world.start(OTHER_PATHS.cgroupfs(ID), other, comm="a) b")
    world.start("/system.slice/other.service", netns_with(ADDRESS))
    finder = NetnsFinder(world.root)

    both = look(finder, one=POD, other=Wanted((OTHER_UID,), (IPv6Address("fd00:88::3"), OTHER_ADDRESS)))
    assert is_netns(both["one"], one, first)
    assert is_netns(both["other"], other, second)
    assert is_netns(look(finder, one=POD)["one"], one, first)


def test_a_netns_without_the_address_is_refused_until_it_has_it(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(OTHER_ADDRESS)
    pid = world.start(PATHS.cgroupfs(ID), netns)
    finder = NetnsFinder(world.root)
    refused = refusal(look(finder, pod=POD)["pod"])
    assert refused.code == "wrong-address"
    inode = os.fstat(netns.fd).st_ino
    assert f"its processes {pid} (app) are in a netns (inode {inode}) with {OTHER_ADDRESS}" in refused.text
    assert refused.text.endswith(f"not {ADDRESS}")

    netns.ip(f"addr add {ADDRESS}/24 dev eth0")
    assert is_netns(look(finder, pod=POD)["pod"], netns, pid)


def test_a_mismatch_leaves_the_netns_to_its_pod(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(OTHER_ADDRESS)
    world.start(PATHS.cgroupfs(ID), netns, comm="intruder")
    rightful = world.start(OTHER_PATHS.cgroupfs(ID), netns)
    results = look(NetnsFinder(world.root), pod=POD, other=OTHER_POD)
    assert refusal(results["pod"]).code == "wrong-address"
    assert is_netns(results["other"], netns, rightful)


def test_the_oldest_process_wins(world: ProcessWorld, netns_with: PodNetns) -> None:
    older, younger = netns_with(ADDRESS), netns_with(ADDRESS)
    world.start(PATHS.cgroupfs(ID), netns_with(OTHER_ADDRESS))  # older still, but elsewhere
    first = world.start(PATHS.cgroupfs(ID), older)
    second = world.start(PATHS.cgroupfs(OTHER_ID), younger)
    world.start(PATHS.cgroupfs(OTHER_ID), older)
    finder = NetnsFinder(world.root)
    assert is_netns(look(finder, pod=POD)["pod"], older, first)
    world.end(first)
    assert is_netns(look(finder, pod=POD)["pod"], younger, second)


def test_the_host_s_netns_is_nobodys(world: ProcessWorld) -> None:
    world.host.ip("link set lo up", f"addr add {ADDRESS}/32 dev lo")
    pid = world.start(PATHS.cgroupfs(ID))
    finder = NetnsFinder(world.root)
    refused = refusal(look(finder, pod=POD)["pod"])
    assert refused.code == "host-netns"
    assert f"its processes {pid} (app) are in the network namespace of the host" in refused.text


def test_who_is_not_there_is_not_found(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    pid = world.start(PATHS.cgroupfs(ID), netns)
    finder = NetnsFinder(world.root)
    refused = refusal(look(finder, pod=POD, other=OTHER_POD)["other"])
    assert refused.code == "not-found"
    assert f"none of the 2 processes under {world.root} is in a cgroup of pod {OTHER_UID}" in refused.text
    world.end(pid)
    assert refusal(look(finder, pod=POD)["pod"]).code == "not-found"
    assert finder.remembered == 0


def test_a_zombie_is_nobody(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    zombie = world.start(PATHS.cgroupfs(ID), netns)
    living = world.start(PATHS.cgroupfs(ID), netns)
    world.become_zombie(zombie)
    finder = NetnsFinder(world.root)
    assert is_netns(look(finder, pod=POD)["pod"], netns, living)
    world.become_zombie(living)
    assert refusal(look(finder, pod=POD)["pod"]).code == "not-found"


def test_a_process_may_outlive_its_first_thread(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    pid = world.start_headless(PATHS.cgroupfs(ID), netns)
    assert is_netns(look(NetnsFinder(world.root), pod=POD)["pod"], netns, pid)


def test_a_process_that_ends_between_look_and_open(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    victim = world.start(PATHS.cgroupfs(ID), netns)
    survivor = world.start(PATHS.cgroupfs(ID), netns)
    dying = [victim, survivor]

    def open_too_late(path: str) -> int:
        if dying:
            world.end(dying.pop(0))
        return open_netns(path)

    finder = NetnsFinder(world.root, open_too_late)
    del dying[1:]
    assert is_netns(look(finder, pod=POD)["pod"], netns, survivor)
    dying.append(survivor)
    refused = refusal(look(finder, pod=POD)["pod"])
    assert refused == Refused("not-found", f"its processes {survivor} (app) ended while they were looked at")


def test_a_container_of_cri_o_outside_of_pods_cgroups(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    pid = world.start(f"/machine.slice/crio-{ID}.scope", netns)
    finder = NetnsFinder(world.root)
    assert refusal(look(finder, pod=POD)["pod"]).code == "not-found"
    named = Wanted((UID,), (ADDRESS,), frozenset({OTHER_ID, ID}))
    assert is_netns(look(finder, pod=named)["pod"], netns, pid)


def test_a_command_line_tells_gvisor(world: ProcessWorld, netns_with: PodNetns) -> None:
    netns = netns_with()
    pid = world.start(PATHS.cgroupfs(ID), netns, comm="exe", arguments="runsc-sandbox")
    refused = refusal(look(NetnsFinder(world.root), pod=POD)["pod"])
    assert refused.code == "sandboxed"
    assert refused.text.startswith(f"it runs in gVisor (process {pid} (exe))")


# --- what only a made-up host can show --------------------------------------------------------------------------------


def test_an_address_may_be_mapped_on_either_side(files: FileWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    files.start(PATHS.cgroupfs(ID), netns)
    mapped = IPv6Address(f"::ffff:{OTHER_ADDRESS}")
    netns.ip(f"addr add {mapped}/128 dev eth0 nodad")
    finder = NetnsFinder(files.root)
    for address in (IPv6Address(f"::ffff:{ADDRESS}"), ADDRESS, OTHER_ADDRESS, mapped):
        assert isinstance(look(finder, pod=Wanted((UID,), (address,)))["pod"], Found)


def test_any_one_address_is_enough_but_there_must_be_one(files: FileWorld, netns_with: PodNetns) -> None:
    files.start(PATHS.cgroupfs(ID), netns_with(ADDRESS))
    wanted = {"two": Wanted((UID,), (OTHER_ADDRESS, ADDRESS)), "none": Wanted((UID,), ())}
    finder = NetnsFinder(files.root)
    results = look(finder, two=wanted["two"])
    assert isinstance(results["two"], Found)
    assert refusal(look(finder, none=wanted["none"])["none"]).code == "no-address"
    assert look(NetnsFinder("/no/such/folder"), none=wanted["none"])  # for which no walk is needed
    assert look(finder) == {}


def test_a_static_pod_goes_by_either_uid(files: FileWorld, netns_with: PodNetns) -> None:
    manifest = "9d41f0a27be35c8812aa40ff6e0d71c5"
    pid = files.start(f"/kubepods/pod{manifest}/{ID}", netns := netns_with(ADDRESS))
    assert is_netns(look(NetnsFinder(files.root), pod=Wanted((UID, manifest), (ADDRESS,)))["pod"], netns, pid)


def test_one_netns_goes_to_one_pod(files: FileWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    older = files.start(OTHER_PATHS.cgroupfs(ID), netns)
    files.start(PATHS.cgroupfs(ID), netns)
    same_address = Wanted((OTHER_UID,), (ADDRESS,))
    results = look(NetnsFinder(files.root), a_pod=POD, other_pod=same_address)
    assert is_netns(results["other_pod"], netns, older)
    assert refusal(results["a_pod"]).code == "taken"
    assert "are in the netns of other_pod" in refusal(results["a_pod"]).text


def test_a_number_with_a_new_owner_is_not_taken_for_the_old_one(files: FileWorld, netns_with: PodNetns) -> None:
    """The new process is in the same netns and in the same cgroup, and in another netns; neither is what was seen."""
    netns = netns_with(ADDRESS)
    for place in (netns, netns_with(ADDRESS)):
        pid = files.start(PATHS.cgroupfs(ID), netns)

        def open_another(path: str, pid: int = pid, place: Netns = place) -> int:
            files.end(pid)
            files.start(PATHS.cgroupfs(ID), place, pid=pid)
            return open_netns(path)

        refused = refusal(look(NetnsFinder(files.root, open_another), pod=POD)["pod"])
        assert refused.code == "not-found"
        files.end(pid)


def test_a_process_that_changes_its_netns_is_not_where_it_was(files: FileWorld, netns_with: PodNetns) -> None:
    netns, other = netns_with(ADDRESS), netns_with(ADDRESS)
    pid = files.start(PATHS.cgroupfs(ID), netns)

    def open_elsewhere(_path: str) -> int:
        return open_netns(f"/proc/self/fd/{other.fd}")

    assert refusal(look(NetnsFinder(files.root, open_elsewhere), pod=POD)["pod"]).code == "not-found"
    assert is_netns(look(NetnsFinder(files.root), pod=POD)["pod"], netns, pid)


def test_an_agent_s_own_netns_is_nobodys(files: FileWorld) -> None:
    pid = files.start(PATHS.cgroupfs(ID))
    link = Path(files.root, str(pid), "ns", "net")
    link.unlink()
    link.symlink_to("/proc/self/ns/net")
    assert refusal(look(NetnsFinder(files.root), pod=POD)["pod"]).code == "host-netns"


def test_the_runtimes_processes_do_not_put_a_pod_on_the_host(files: FileWorld) -> None:
    files.start(PATHS.systemd(f"conmon-{ID}"), comm="conmon")
    assert refusal(look(NetnsFinder(files.root), pod=POD)["pod"]).code == "not-found"


def test_odd_entries_disturb_nobody_and_are_mentioned(files: FileWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    for name in ("12junk", "٣", "-5"):
        Path(files.root, name).mkdir()
    Path(files.root, "4000").touch()
    Path(files.root, "4001").mkdir()
    for pid, name, text in (
        (4002, "stat", "4002 (app"),
        (4003, "stat", ""),
        (4004, "cgroup", "nonsense\n"),
        (4005, "cgroup", f"1:cpu:/kubepods/pod{UID}/{ID}\n0::/kubepods/pod{UID}/{OTHER_ID}\n"),
    ):
        files.start(PATHS.cgroupfs(ID), netns, pid=pid)
        files.write(pid, name, text)
    finder = NetnsFinder(files.root)
    refused = refusal(look(finder, pod=POD)["pod"])
    assert refused.code == "not-found"
    assert "4 could not be looked at, such as process 4002: no process status" in refused.text
    pid = files.start(PATHS.cgroupfs(ID), netns)
    assert is_netns(look(finder, pod=POD)["pod"], netns, pid)


def test_hierarchies_of_cgroup_v1(files: FileWorld, netns_with: PodNetns) -> None:
    text = f"12:pids:{PATHS.cgroupfs(ID)}\n11:cpu,cpuacct:{PATHS.cgroupfs(ID)}\n" + "1:name=systemd:/\n" * 2000
    pid = files.start(text, netns := netns_with(ADDRESS))
    assert is_netns(look(NetnsFinder(files.root), pod=POD)["pod"], netns, pid)


def test_a_netns_that_cannot_be_opened_is_unreadable(files: FileWorld, netns_with: PodNetns) -> None:
    pid = files.start(PATHS.cgroupfs(ID), netns_with(ADDRESS))

    def refuse(path: str) -> int:
        raise NetnsError(f"cannot open {path}: Permission denied")

    refused = refusal(look(NetnsFinder(files.root, refuse), pod=POD)["pod"])
    assert refused.code == "unreadable"
    assert f"the network namespace of its process {pid} (app): cannot open" in refused.text


def test_a_netns_that_cannot_be_entered_is_unreadable(files: FileWorld, netns_with: PodNetns) -> None:
    """As without CAP_SYS_ADMIN: here, what is opened is a namespace of another kind."""
    pid = files.start(PATHS.cgroupfs(ID), netns_with(ADDRESS))
    link = Path(files.root, str(pid), "ns", "net")
    link.unlink()
    link.symlink_to("/proc/self/ns/uts")
    finder = NetnsFinder(files.root, lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    refused = refusal(look(finder, pod=POD)["pod"])
    assert refused.code == "unreadable"
    assert "cannot enter the pod's network namespace" in refused.text


def test_a_netns_that_cannot_be_looked_at_is_unreadable(files: FileWorld) -> None:
    """As without CAP_SYS_PTRACE; a link to itself stands for it, because nothing is forbidden to root."""
    pid = files.start(PATHS.cgroupfs(ID))
    link = Path(files.root, str(pid), "ns", "net")
    link.unlink()
    link.symlink_to(link)
    finder = NetnsFinder(files.root)
    refused = refusal(look(finder, pod=POD)["pod"])
    assert refused.code == "unreadable"
    assert refused.text.startswith(f"the network namespace of its process {pid} (app) cannot be read: ")


def test_a_root_without_a_host_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NetnsError, match=r"cannot tell the host's network namespace by .*/1/ns/net: No such file"):
        NetnsFinder(str(tmp_path)).find({"pod": POD})


def test_an_unexpected_error_leaves_no_descriptor(files: FileWorld, netns_with: PodNetns) -> None:
    files.start(OTHER_PATHS.cgroupfs(ID), netns_with(OTHER_ADDRESS))
    pid = files.start(PATHS.cgroupfs(ID), netns_with(ADDRESS))

    def fail_late(path: str) -> int:
        if f"/{pid}/" in path:
            raise ZeroDivisionError
        return open_netns(path)

    before = descriptors()
    with pytest.raises(ZeroDivisionError):
        NetnsFinder(files.root, fail_late).find({"pod": POD, "other": OTHER_POD})
    assert descriptors() == before


# --- sandboxed runtimes -----------------------------------------------------------------------------------------------

CONTAINER_PIDNS = 4026532555


@pytest.mark.parametrize(
    ("comm", "arguments", "in_container", "addresses", "code"),
    [
        ("exe", "runsc-sandbox --root /run", True, (), "sandboxed"),
        ("exe", "/proc/self/exe init", True, (), "wrong-address"),
        ("exe", "runsc-sandbox --network=host", True, (ADDRESS,), "found"),  # its traffic does pass the netns
        ("qemu-system-x86_64", "", False, (ADDRESS,), "sandboxed"),
        ("cloud-hypervisor", "", False, (ADDRESS,), "sandboxed"),
        ("firecracker", "", False, (ADDRESS,), "sandboxed"),
        ("virtiofsd", "", False, (ADDRESS,), "sandboxed"),
        ("qemu-system-x86_64", "", True, (ADDRESS,), "found"),
        ("qemu-system-x86_64", "", True, (), "sandboxed"),
        ("pause", "", False, (ADDRESS,), "found"),
    ],
)
def test_sandboxes(
    files: FileWorld,
    netns_with: PodNetns,
    comm: str,
    arguments: str,
    in_container: bool,
    addresses: tuple[IPv4Address, ...],
    code: str,
) -> None:
    pid_namespace = {"pid_namespace": CONTAINER_PIDNS} if in_container else {}
    files.start(PATHS.cgroupfs(ID), netns_with(*addresses), comm, arguments, **pid_namespace)
    result = look(NetnsFinder(files.root), pod=POD)["pod"]
    assert (result.code if isinstance(result, Refused) else "found") == code


def test_a_virtual_machine_in_a_plain_pod_is_no_sandbox(files: FileWorld, netns_with: PodNetns) -> None:
    """KubeVirt: the hypervisor runs in a container, beside a launcher that is older."""
    netns = netns_with(ADDRESS)
    pid = files.start(PATHS.cgroupfs(ID), netns, comm="virt-launcher-monitor", pid_namespace=CONTAINER_PIDNS)
    files.start(PATHS.cgroupfs(ID), netns, comm="qemu-kvm", pid_namespace=CONTAINER_PIDNS)
    assert is_netns(look(NetnsFinder(files.root), pod=POD)["pod"], netns, pid)


def test_a_sandbox_on_the_host_s_network_is_named(files: FileWorld) -> None:
    files.start(PATHS.cgroupfs(ID), comm="containerd-shim", arguments="/usr/bin/containerd-shim-runc-v2 -id x")
    finder = NetnsFinder(files.root)
    assert refusal(look(finder, pod=POD)["pod"]).code == "not-found"
    files.start(PATHS.cgroupfs(ID), comm="containerd-shim", arguments="/opt/kata/bin/containerd-shim-kata-v2 -id x")
    assert refusal(look(finder, pod=POD)["pod"]).code == "sandboxed"


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_a_known_process_s_cgroup_is_not_read_again(files: FileWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    pid = files.start(PATHS.cgroupfs(ID), netns)
    finder = NetnsFinder(files.root)
    look(finder, pod=POD)
    files.write(pid, "cgroup", "nonsense")
    assert is_netns(look(finder, pod=POD)["pod"], netns, pid)
    files.end(pid)
    files.start(OTHER_PATHS.cgroupfs(ID), netns, pid=pid)  # the number's next owner
    results = look(finder, pod=POD, other=Wanted((OTHER_UID,), (ADDRESS,)))
    assert refusal(results["pod"]).code == "not-found"
    assert is_netns(results["other"], netns, pid)
    assert finder.remembered == 1
    files.end(pid)
    look(finder, pod=POD)
    assert finder.remembered == 0


def test_a_process_may_still_be_moved_into_its_container(files: FileWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    pid = files.start(HOST_CGROUP, netns, comm="runc:[2:INIT]")
    finder = NetnsFinder(files.root)
    assert refusal(look(finder, pod=POD)["pod"]).code == "not-found"
    files.write(pid, "cgroup", f"0::{PATHS.systemd(ID)}\n")
    assert is_netns(look(finder, pod=POD)["pod"], netns, pid)


def test_hundreds_of_processes_a_hundred_times(files: FileWorld, netns_with: PodNetns) -> None:
    netns, other = netns_with(ADDRESS), netns_with(OTHER_ADDRESS)
    for number in range(250):
        files.start(HOST_CGROUP)
        files.start(PodPaths(f"00000000-0000-4000-8000-{number:012}").systemd(ID), other)
    pid = files.start(PATHS.systemd(ID), netns)
    finder = NetnsFinder(files.root)
    for _ in range(100):
        results = look(finder, pod=POD, other=OTHER_POD)
        assert is_netns(results["pod"], netns, pid)
        assert refusal(results["other"]).code == "not-found"
    assert finder.remembered == 251


def test_several_threads_may_look_at_once(files: FileWorld, netns_with: PodNetns) -> None:
    netns = netns_with(ADDRESS)
    for _ in range(50):
        files.start(PATHS.cgroupfs(ID), netns)
    finder = NetnsFinder(files.root)
    before, results = descriptors(), []
    threads = [threading.Thread(target=lambda: results.append(finder.find({"pod": POD})["pod"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.descriptor for result in results if isinstance(result, Found)}) == len(threads)
    for result in results:
        os.close(result.descriptor)
    assert descriptors() == before
