"""Whose process the kubelet is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kernel.processworlds import FileWorld, PodPaths
from tests.kernel.world import Netns

from meshcni.errors import KubeletNotFoundError
from meshcni.host.kubelet import kubelet_uid

KUBELET_CGROUP = "/system.slice/kubelet.service"
POD_CGROUP = PodPaths("3f0c5d1e-9a7b-4c26-8e14-0b2d6f8a9c33").systemd("5b1e" * 16)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FileWorld]:
    world = FileWorld(tmp_path)
    yield world
    world.close()


@pytest.mark.parametrize(
    ("comm", "arguments"),
    [
        ("kubelet", "/usr/bin/kubelet --config=/var/lib/kubelet/config.yaml"),
        ("kubelet", "/opt/KUBELET"),
        ("kubelite", "/snap/microk8s/1/kubelite --kubelet-args-file=/var/snap/args"),
        ("k3s", "/usr/local/bin/k3s server"),
        ("k3s-server", "/usr/local/bin/k3s server"),
        ("k3s-agent", "/usr/local/bin/k3s agent"),
    ],
)
def test_what_is_a_kubelet(host: FileWorld, comm: str, arguments: str) -> None:
    host.start(KUBELET_CGROUP, comm=comm, arguments=arguments, uid=1000)
    assert kubelet_uid(host.root) == 1000


@pytest.mark.parametrize(
    ("comm", "arguments"),
    [
        ("kubelet", "/usr/bin/other"),
        ("kubelite", "/usr/bin/other"),
        ("kubelet-helper", "/usr/bin/kubelet"),
        ("bash", "kubelet"),
        ("K3s", "k3s"),
    ],
)
def test_what_is_none(host: FileWorld, comm: str, arguments: str) -> None:
    host.start(KUBELET_CGROUP, comm=comm, arguments=arguments, uid=1000)
    with pytest.raises(KubeletNotFoundError) as caught:
        kubelet_uid(host.root)
    assert f"no process under {host.root} is a kubelet" in caught.value.message
    assert "KUBELET_UID" in caught.value.hint
    assert "/host/proc" in caught.value.hint


def test_the_preferred_program_wins_wherever_it_is_in_the_scan(host: FileWorld) -> None:
    host.start("/k3s", comm="k3s", uid=3)
    assert kubelet_uid(host.root) == 3
    host.start("/microk8s", comm="kubelite", arguments="kubelite --kubelet", uid=2)
    assert kubelet_uid(host.root) == 2
    host.start(KUBELET_CGROUP, comm="kubelet", uid=1)
    host.start(KUBELET_CGROUP, comm="kubelet", uid=9)
    assert kubelet_uid(host.root) == 1


def test_nobody_becomes_the_kubelet_by_its_name(host: FileWorld) -> None:
    pod = Netns()
    try:
        host.start(POD_CGROUP, pod, comm="kubelet", uid=666)
        host.start(POD_CGROUP, comm="kubelet", uid=667)  # with hostNetwork
        host.start("/user.slice", pod, comm="kubelet", uid=668)
        host.start("/k3s", comm="k3s", uid=3)
        assert kubelet_uid(host.root) == 3
    finally:
        pod.close()


def test_a_node_that_is_a_pod_itself_has_a_kubelet_too(host: FileWorld) -> None:
    host.start(POD_CGROUP + "/kubelet", comm="kubelet", uid=5)
    assert kubelet_uid(host.root) == 5


def test_entries_that_cannot_be_read_disturb_nobody(host: FileWorld) -> None:
    gone, zombie, odd = (host.start(KUBELET_CGROUP, comm="kubelet", uid=number) for number in (1, 2, 3))
    Path(host.root, str(gone), "comm").unlink()
    host.become_zombie(zombie)
    host.write(odd, "cgroup", "nonsense")
    assert kubelet_uid(host.root) == 3


def test_a_kubelet_without_a_readable_user(host: FileWorld, tmp_path: Path) -> None:
    pid = host.start(KUBELET_CGROUP, comm="kubelet")
    for text in ("Name:\tkubelet\n", "Uid:\tx\n"):
        host.write(pid, "status", text)
        with pytest.raises(KubeletNotFoundError, match="the kubelet's user cannot be read"):
            kubelet_uid(host.root)
    with pytest.raises(KubeletNotFoundError, match=r"cannot be read under .*/missing: .*No such file"):
        kubelet_uid(str(tmp_path / "missing"))
