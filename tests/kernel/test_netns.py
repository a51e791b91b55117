"""Opening, checking and entering network namespaces."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.kernel.conftest import PodMaker
from tests.kernel.world import IPV4, IPV6, Netns

from meshcni.errors import NetnsError
from meshcni.host import netns as module
from meshcni.host.netns import (
    MAX_THREADS,
    call_in_netns,
    call_in_new_netns,
    check_pod_netns,
    enter,
    facts,
    open_netns,
    run_in_netns,
)

OWN = "/proc/self/ns/net"


def inode_here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def living_threads() -> int:
    """Count threads, after those have ended that have nothing more to do."""
    for thread in threading.enumerate():
        if thread.name == "netns":
            thread.join(10)
    return threading.active_count()


@pytest.fixture
def named(pod: Netns) -> Iterator[str]:
    """The pod's namespace as a file, as a runtime makes it."""
    path = Path("/run/netns", f"mc-k-{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    path.touch()
    subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/fd/{pod.fd}", str(path)], check=True)
    yield str(path)
    subprocess.run(["umount", str(path)], check=True)
    path.unlink()


def test_a_runtime_s_netns_file(named: str, pod: Netns) -> None:
    fd = open_netns(named)
    try:
        assert check_pod_netns(fd) == os.fstat(pod.fd).st_ino == call_in_netns(fd, inode_here)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/proc/self/ns/uts", "is a namespace of another kind"),
        ("/proc/self/status", "is not a namespace file"),
        ("/dev/null", "is not a namespace file"),
        ("/", "is not a namespace file"),
        ("/run/netns/no-such-pod", "cannot open the network namespace '/run/netns/no-such-pod'"),
        ("", "cannot open the network namespace ''"),
        ("a\0b", "cannot open the network namespace"),
    ],
)
def test_what_is_no_netns_is_refused(path: str, message: str) -> None:
    before = open_descriptors()
    with pytest.raises(NetnsError, match=re.escape(message)):
        open_netns(path)
    assert open_descriptors() == before


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NetnsError, match="is not a namespace file"):
        open_netns(str(tmp_path / "fifo"))


def test_own_and_host_netns_are_refused(named: str) -> None:
    for path, others, whose in ((OWN, module.OTHERS_NETNS, "the agent's own"), (named, (OWN, named), "the host's")):
        fd = open_netns(path)
        try:
            with pytest.raises(NetnsError, match=f"given for the pod is {whose}"):
                check_pod_netns(fd, others)
        finally:
            os.close(fd)


def test_unreadable_others_do_not_matter(pod: Netns) -> None:
    assert check_pod_netns(pod.fd, (OWN, "/no/such/file")) == os.fstat(pod.fd).st_ino


def test_call_enters_and_leaves(pod: Netns) -> None:
    here = inode_here()
    inside = call_in_netns(pod.fd, lambda: (inode_here(), subprocess.check_output(["stat", "-Lc%i", OWN])))
    assert inside == (os.fstat(pod.fd).st_ino, b"%d\n" % os.fstat(pod.fd).st_ino)
    assert inode_here() == here


def test_errors_come_back(pod: Netns) -> None:
    with pytest.raises(ZeroDivisionError):
        call_in_netns(pod.fd, lambda: 1 // 0)
    with pytest.raises(NetnsError, match="cannot enter"), open("/dev/null") as file:
        call_in_netns(file.fileno(), inode_here)


def test_the_main_thread_stays_where_it_is(pod: Netns) -> None:
    with pytest.raises(RuntimeError, match="main thread"):
        enter(pod.fd)


def test_a_new_netns_is_empty_and_gone_afterwards() -> None:
    before = open_descriptors()
    assert call_in_new_netns(facts).addresses == ()
    assert call_in_new_netns(inode_here) != inode_here()
    assert open_descriptors() == before


def test_many_calls_leave_nothing(pod: Netns) -> None:
    before = open_descriptors(), living_threads()

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(run_in_netns(pod.fd, inode_here) for _ in range(300)))

    assert set(asyncio.run(all_at_once())) == {os.fstat(pod.fd).st_ino}
    assert (open_descriptors(), living_threads()) == before


def test_no_more_than_the_limit_at_once(pod: Netns) -> None:
    at_work, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01)
        with lock:
            at_work -= 1

    async def all_at_once() -> None:
        await asyncio.gather(*(run_in_netns(pod.fd, work) for _ in range(5 * MAX_THREADS)))

    asyncio.run(all_at_once())
    assert 1 < most <= MAX_THREADS


def test_errors_come_back_to_the_loop(pod: Netns) -> None:
    async def fail() -> None:
        await run_in_netns(pod.fd, lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(fail())

    async def gone() -> None:
        await run_in_netns(10_000, inode_here)

    with pytest.raises(NetnsError, match="cannot be copied"):
        asyncio.run(gone())


def test_cancelled_work_runs_to_its_end_on_its_own_descriptor(new_pod: PodMaker) -> None:
    before = open_descriptors(), living_threads()
    started, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    expected: list[int] = []
    seen: list[int] = []

    def work() -> None:
        started.set()
        may_end.wait(10)
        seen.append(inode_here())
        ended.set()

    async def cancel() -> None:
        pod = Netns()
        expected.append(os.fstat(pod.fd).st_ino)
        task = asyncio.create_task(run_in_netns(pod.fd, work))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pod.close()
        may_end.set()
        await asyncio.to_thread(ended.wait, 10)
        # All places are free again: this would wait for ever otherwise.
        await asyncio.gather(*(run_in_netns(own.fd, inode_here) for own in [new_pod()] * MAX_THREADS))

    asyncio.run(cancel())
    assert seen == expected
    assert (open_descriptors() - 1, living_threads()) == before  # one pod is still open


def test_facts(new_pod: PodMaker) -> None:
    pod = new_pod()
    # Neither loopback nor link-local addresses count (eth0 has one), nor the proxy's own ::6.
    pod.ip("addr add ::6/128 dev lo", "addr add 169.254.1.1/16 dev eth0", "addr add fd00::9/128 dev lo")
    found = pod.call(facts)
    assert set(found.addresses) == {ip_address(IPV4), ip_address(IPV6), ip_address("fd00::9")}
    assert found.addresses[0] == ip_address(IPV4)
    assert (found.has_ipv4, found.has_ipv6) == (True, True)


def test_facts_without_ipv6(new_pod: PodMaker) -> None:
    pod = new_pod()
    pod.shell("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    found = pod.call(facts)
    assert found.addresses == (ip_address(IPV4),)
    assert (found.has_ipv4, found.has_ipv6) == (True, False)


def test_a_mapped_address_counts_as_ipv4(new_pod: PodMaker) -> None:
    pod = new_pod(frozenset())
    pod.ip("addr add ::ffff:10.1.2.3/128 dev lo")
    assert pod.call(facts).addresses == (ip_address("10.1.2.3"),)
