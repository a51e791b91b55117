"""What an apply costs in processes, threads and descriptors, and that nobody's lock makes it wait."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.kernel.conftest import PodMaker
from tests.kernel.world import KIND, VARIANTS, Netns, apply, make_pod, node_choice

from meshcni.host.backends.iptables import SEARCH_PATH, find_tools
from meshcni.host.netns import new_netns, run_in_netns
from meshcni.host.redirection import apply_sidecar, verify_sidecar
from meshcni.pods.interception import Interception
from meshcni.rules.model import Family

XTABLES_LOCK = "/run/xtables.lock"
EXPECTED_PROCESSES = {"nftables": 0, "nft": 2, "legacy": 2}

# Programs the namespace given as descriptor, as an ADD does; strace counts what it starts.
ONE_ADD = """
import sys
from meshcni.pods.interception import Interception
from tests.kernel.world import Netns, apply
apply(Netns(int(sys.argv[1])), Interception(), sys.argv[2])
"""


def test_processes_of_a_fresh_add(variant: str, new_pod: PodMaker, tmp_path: Path) -> None:
    pod = new_pod()
    os.set_inheritable(pod.fd, True)
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=execve", "-o", str(trace)]
    command += [sys.executable, "-c", ONE_ADD, str(pod.fd), variant]
    subprocess.run(command, check=True, close_fds=False, env={"PYTHONPATH": "src:.", "PATH": os.environ["PATH"]})

    started = re.findall(r'execve\("([^"]*)".* = 0$', trace.read_text(), flags=re.MULTILINE)

    expected = [sys.executable]
    if variant != "nftables":
        tools = find_tools(variant)
        assert tools is not None
        expected += tools.restore.values()
    assert started == expected
    assert len(started) - 1 == EXPECTED_PROCESSES[variant]


def test_processes_are_counted(variant: str, pod: Netns) -> None:
    assert apply(pod, Interception(), variant).processes == EXPECTED_PROCESSES[variant]


def test_no_ipv6_command_for_a_pod_without_ipv6(new_pod: PodMaker) -> None:
    for variant in ("nft", "legacy"):
        pod = new_pod(frozenset({Family.V4}))
        assert apply(pod, Interception(), variant).processes == 1


def test_the_hosts_lock_does_not_matter(variant: str, pod: Netns) -> None:
    with open(XTABLES_LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Everything an apply may do: fresh, over itself, over something else.
        for parameters in (Interception(), Interception(), Interception(redirect_dns=True, capture_all_dns=True)):
            assert apply(pod, parameters, variant).variant == variant


def test_fifty_at_once(variant: str, new_pod: PodMaker) -> None:
    pods = [new_pod() for _ in range(50)]
    gc.collect()  # what earlier tests left must not go in between
    before = len(os.listdir("/proc/self/fd"))

    def add() -> tuple[str, ...]:
        apply_sidecar(Interception(), KIND[variant], choice=node_choice(variant))
        return verify_sidecar(Interception(), KIND[variant], choice=node_choice(variant))

    async def all_at_once() -> list[tuple[str, ...]]:
        return await asyncio.gather(*(run_in_netns(pod.fd, add) for pod in pods))

    assert asyncio.run(all_at_once()) == [()] * 50
    assert len(os.listdir("/proc/self/fd")) <= before


def test_pods_do_not_share_a_lock(new_pod: PodMaker) -> None:
    one, other = new_pod(), new_pod()
    held = os.open(f"/proc/self/fd/{one.fd}", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert apply(other, Interception(), "legacy").changed
    finally:
        os.close(held)


def test_two_hundred_applies_leave_no_thread_and_no_descriptor() -> None:
    pods = [make_pod() for _ in range(3)]
    try:
        for pod, variant in zip(pods, VARIANTS, strict=True):
            apply(pod, Interception(), variant)
        gc.collect()  # what earlier tests left must not go in between
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for number in range(200):
            variant = VARIANTS[number % 3]
            apply(pods[number % 3], Interception(proxy_port=15001 + number), variant)
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    finally:
        for pod in pods:
            pod.close()


def test_failures_leave_no_thread_and_no_descriptor(variant: str) -> None:
    pod = Netns()
    try:
        gc.collect()  # what earlier tests left must not go in between
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(20):
            with pytest.raises(Exception, match="no valid local IP address"):
                apply(pod, Interception(), variant)
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    finally:
        pod.close()


def test_tools_are_absolute_paths() -> None:
    for variant in ("nft", "legacy"):
        tools = find_tools(variant)
        assert tools is not None
        for path in (*tools.restore.values(), *tools.save.values(), tools.into_userns[0]):
            assert os.path.dirname(path) in SEARCH_PATH


def test_a_plain_command_counts_when_it_is_a_link_to_the_variant(tmp_path: Path) -> None:
    for command in ("iptables", "ip6tables"):
        for suffix in ("save", "restore"):
            (tmp_path / f"{command}-{suffix}").symlink_to("/usr/sbin/xtables-legacy-multi")
    assert find_tools("nft", (str(tmp_path),)) is None
    tools = find_tools("legacy", (str(tmp_path),))
    assert tools is not None
    assert set(tools.save.values()) == {f"{tmp_path}/iptables-save", f"{tmp_path}/ip6tables-save"}


def test_new_namespaces_are_closed_on_exec() -> None:
    fd = new_netns()
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
