"""Where the host is inside the agent's container."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from tests.kernel.world import Netns

from meshcni.errors import NetnsError
from meshcni.host.hostpaths import ProcRoot, find_proc_root, host_netns_path, open_plugin_netns


def test_the_host_s_processes_if_mounted(tmp_path: Path) -> None:
    assert find_proc_root(mounted="/proc", own="/elsewhere") == ProcRoot("/proc")
    for missing in (tmp_path / "missing", tmp_path):  # an empty folder is a mount that failed
        root = find_proc_root(mounted=str(missing), own="/proc")
        assert root.path == "/proc"
        assert f"no /proc of the host at {missing}" in root.warning


def test_the_host_s_netns() -> None:
    assert host_netns_path("/host/proc", True) == "/host/proc/1/ns/net"
    assert host_netns_path("/proc", True) == "/proc/1/ns/net"
    assert host_netns_path("/host/proc", False) == "/proc/self/ns/net"


def place(netns: Netns, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(f"/proc/{os.getpid()}/fd/{netns.fd}")


def inode_of(path: str, host_root: Path) -> int:
    descriptor = open_plugin_netns(path, str(host_root))
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mounted", ["/var/run/netns/cni-1", "/run/netns/cni-1", "/var/run/docker/netns/1"])
@pytest.mark.parametrize("asked", ["/var/run", "/run"])
def test_a_path_of_the_host_under_either_name(pod: Netns, tmp_path: Path, mounted: str, asked: str) -> None:
    place(pod, Path(f"{tmp_path}{mounted}"))
    assert inode_of(asked + mounted.removeprefix("/var").removeprefix("/run"), tmp_path) == os.fstat(pod.fd).st_ino


def test_the_host_s_file_comes_before_the_container_s(pod: Netns, tmp_path: Path) -> None:
    own = tmp_path / "own" / "netns"
    other = Netns()
    try:
        place(other, own)
        assert inode_of(str(own), tmp_path / "host") == os.fstat(other.fd).st_ino
        place(pod, Path(f"{tmp_path}/host{own}"))
        assert inode_of(str(own), tmp_path / "host") == os.fstat(pod.fd).st_ino
    finally:
        other.close()


def test_a_number_of_the_host_s_is_no_number_of_ours(pod: Netns, tmp_path: Path) -> None:
    path = f"/proc/{os.getpid()}/ns/net"
    assert inode_of(path, tmp_path) == os.stat(path).st_ino  # no procfs of the host: ours may be it
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "stat").touch()
    with pytest.raises(NetnsError, match=re.escape(f"looked for as {tmp_path}{path}")):
        open_plugin_netns(path, str(tmp_path))
    place(pod, Path(f"{tmp_path}{path}"))
    assert inode_of(path, tmp_path) == os.fstat(pod.fd).st_ino


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "the path '' of the pod's network namespace is not absolute"),
        ("netns/x", "the path 'netns/x' of the pod's network namespace is not absolute"),
        ("/var/run/netns/x", "there is no network namespace '/var/run/netns/x'"),
        ("/a\0b", "there is no network namespace '/a\\x00b'"),
        ("/dev/null", "'/dev/null' is not a namespace file"),
        ("/proc/self/ns/uts", "is a namespace of another kind"),
    ],
)
def test_what_is_no_netns(tmp_path: Path, path: str, message: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NetnsError) as caught:
        open_plugin_netns(path, str(tmp_path))
    assert message in str(caught.value)
    assert os.listdir("/proc/self/fd") == before


def test_the_error_names_every_place(tmp_path: Path) -> None:
    with pytest.raises(NetnsError) as caught:
        open_plugin_netns("/run/netns/no-such-pod", str(tmp_path))
    names = ("/run/netns/no-such-pod", "/var/run/netns/no-such-pod")
    places = ", ".join([f"{tmp_path}{name}" for name in names] + list(names))
    assert f"looked for as {places}" in caught.value.message
    assert f"is the host's folder /run/netns mounted below {tmp_path}?" in caught.value.hint
