"""The wrong directories for the platform: which one the runtime seems to use is said, with the value to set."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.install.hosts import BRIDGE, Host, Record, running, until

from meshcni.agent import platforms
from meshcni.agent.installation import Installation
from meshcni.agent.installer import Installer, fight_hint
from meshcni.agent.ownpod import INSTALLATION, OwnPod
from meshcni.agent.platforms import PLATFORMS, networked
from meshcni.host.mounts import mount_points, shown_directory
from meshcni.pods.model import Pod

BINS = {one.name: one.bin_dir for one in PLATFORMS if one.bin_dir != "/opt/cni/bin"}
CONFS = {one.name: one.conf_dir for one in PLATFORMS if one.conf_dir != "/etc/cni/net.d"}


def root_of(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.mark.parametrize("name", BINS)
def test_plugins_that_are_elsewhere_name_the_platform(host: Host, tmp_path: Path, name: str) -> None:
    root = root_of(tmp_path)
    path = host.write("10-a.conflist", BRIDGE)
    there = Path(f"{root}{BINS[name]}")
    there.mkdir(parents=True)
    (there / "bridge").touch()
    outcome = Installation(host.config(host_root=str(root))).look_and_repair()
    (note,) = outcome.notes
    assert f"global.platform={name} (" in note
    assert [other for other in BINS if f"global.platform={other} " in note] == [name]
    assert "names bridge, not found in" in note
    assert path.exists()


def test_plugins_and_confs_where_they_are_by_default_name_no_platform(tmp_path: Path) -> None:
    """Then it is a value of cniBinDir or cniConfDir that was set by mistake."""
    root = root_of(tmp_path)
    for directory, name in (("/opt/cni/bin", "bridge"), ("/etc/cni/net.d", "10-a.conflist")):
        Path(f"{root}{directory}").mkdir(parents=True)
        Path(f"{root}{directory}/{name}").touch()
    assert platforms.hint_for_plugins(str(root), ["bridge"]) == "set the chart's cniBinDir=/opt/cni/bin, its default"
    assert platforms.hint_for_confs(str(root)) == "set the chart's cniConfDir=/etc/cni/net.d, its default"


def test_an_entry_that_would_let_no_pod_start_is_not_written(host: Host, tmp_path: Path) -> None:
    """The runtime would miss our plugin for every pod, the agent's own next one with the right value included."""
    root = root_of(tmp_path)
    path = host.write("10-a.conflist", BRIDGE)
    there = Path(f"{root}/opt/cni/bin")
    there.mkdir(parents=True)
    (there / "bridge").touch()
    installation = Installation(host.config(host_root=str(root)))
    outcome = installation.look_and_repair()
    assert "the plugins of 10-a.conflist are in /opt/cni/bin of the host" in outcome.waiting
    assert path.read_text() == BRIDGE
    (Path(host.config().binary_target_dirs[0]) / "bridge").touch()
    assert not installation.look_and_repair().reasons
    assert host.types("10-a.conflist") == ["bridge", "istio-cni"]


def test_plugins_that_are_nowhere_name_all_platforms_that_differ(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    (note,) = Installation(host.config()).look_and_repair().notes
    assert all(f"global.platform={name} (" in note for name in BINS)


@pytest.mark.parametrize("name", [*CONFS, ""])
async def test_pods_with_a_network_and_no_conf_here(host: Host, tmp_path: Path, name: str) -> None:
    root = root_of(tmp_path)
    if name:
        Path(f"{root}{CONFS[name]}").mkdir(parents=True)
        Path(f"{root}{CONFS[name]}/10-x.conflist").write_text(BRIDGE)
    record = Record()
    installer = Installer(host.config(host_root=str(root)), record.callbacks(), sandboxes=lambda: 3)
    task = asyncio.create_task(installer.run())
    try:
        await until(lambda: installer.status.notes)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    (note,) = installer.status.notes
    assert "3 pods of this node have a network" in note
    assert f"cniConfDir={CONFS[name] if name else '/etc/cni/multus/net.d'}" in note
    assert host.listing() == []


async def test_no_pod_has_a_network_yet(host: Host) -> None:
    """A node that starts waits for its primary plugin: no reason to suspect anything."""
    async with running(host.config()) as installer:
        await until(lambda: "no conf in" in " ".join(installer.reasons))
        assert installer.status.notes == ()


def test_which_pods_have_a_network() -> None:
    given = [Pod("a", "b", ips=("10.0.0.1",)), Pod("a", "c"), Pod("a", "d", ips=("10.0.0.2",), host_network=True)]
    assert networked(given) == 1


def test_a_file_of_ours_alone_must_not_be_the_nodes_network(host: Host) -> None:
    installation = Installation(host.config(chained=False))
    (note,) = installation.look_and_repair().notes
    assert "YYY-istio-cni.conf is the first conf" in note
    assert "provider=multus" in note
    host.write("10-a.conflist", BRIDGE)
    assert installation.look_and_repair().notes == ()


def test_a_directory_of_multus_may_hold_ours_alone(host: Host) -> None:
    folder = host.root / "multus" / "net.d"
    folder.mkdir(parents=True)
    assert Installation(host.config(chained=False, conf_dir=str(folder))).look_and_repair().notes == ()


MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 8:1 /etc/cni/multus/net.d /host/etc/cni/net.d rw - ext4 /dev/sda1 rw
24 22 8:2 / /data rw - ext4 /dev/sda2 rw
"""


@pytest.mark.parametrize(
    ("directory", "shown"),
    [
        ("/host/etc/cni/net.d", "/etc/cni/multus/net.d"),
        ("/host/etc/cni/net.d/x", "/etc/cni/multus/net.d/x"),
        ("/data/x", "/x"),
        ("/srv/x", "/srv/x"),
    ],
)
def test_the_hosts_name_of_a_directory(directory: str, shown: str) -> None:
    assert shown_directory(directory, mount_points(MOUNTS)) == shown


async def test_multus_own_conf(host: Host) -> None:
    multus = BRIDGE.replace('"bridge"', '"multus-shim"')
    host.write("00-multus.conflist", multus)
    host.write("10-a.conflist", BRIDGE)
    notes = " ".join(Installation(host.config()).look_and_repair().notes)
    assert "00-multus.conflist belongs to Multus" in notes
    assert "NetworkAttachmentDefinition" in notes


def test_a_read_only_directory_names_all_platforms() -> None:
    hint = platforms.hint_for_read_only("/opt/cni/bin")
    assert all(one.name in hint for one in PLATFORMS)


# --- who changes the conf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside", "types", "words"),
    [
        ("05-cilium.conflist", "", "cilium-cni", "cni.exclusive=false"),
        ("10-a.conflist", "10-b.conflist.cilium_bak", "bridge", "cni.exclusive=false"),
        ("10-a.conflist", "", "cilium-cni", "cni.exclusive=false"),
        ("10-azure.conflist", "", "azure-vnet", "AKS"),
        ("10-a.conflist", "", "calico", "calico-node"),
        ("00-multus.conflist", "", "multus", "CNI_CONF_NAME"),
        ("10-flannel.conflist", "", "flannel", "kube-flannel"),
        ("10-kindnet.conflist", "", "ptp", "kindnet"),
        ("10-a.conflist", "", "bridge", "find out who writes it"),
    ],
)
def test_the_likely_writer(host: Host, name: str, beside: str, types: str, words: str) -> None:
    path = host.write(name, BRIDGE.replace('"bridge"', f'"{types}"'))
    if beside:
        (host.conf / beside).touch()
    assert words in fight_hint(str(path))
    path.unlink()
    assert fight_hint(str(path))


# --- at our own pod ---------------------------------------------------------------------------------------------------


class Pods:
    """An informer that knows the agent's pod, or does not."""

    def __init__(self, *pods: Pod) -> None:
        self.synced = asyncio.Event()
        self.pods = {(pod.namespace, pod.name): pod for pod in pods}

    def get(self, namespace: str, name: str) -> Pod | None:
        return self.pods.get((namespace, name))


async def test_troubles_that_last_are_told_at_our_own_pod(host: Host) -> None:
    told: list[tuple[str, str, str]] = []

    async def warn(pod: Pod, reason: str, message: str) -> None:
        told.append((pod.uid, reason, message))

    pods = Pods(Pod("mesh", "agent", uid="u1"))
    own = OwnPod(warn, pods, "mesh", "agent", lasting_seconds=0.05)
    record = Record()
    callbacks = record.callbacks()
    callbacks.changed = own.installation_changed
    callbacks.fight = own.tell_of_fight
    installer = Installer(host.config(), callbacks)
    task = asyncio.create_task(installer.run())
    try:
        await until(lambda: installer.reasons)
        await asyncio.sleep(0.2)
        assert told == [], "our own pod is not known yet"
        pods.synced.set()
        await until(lambda: told)
        assert told[0][:2] == ("u1", INSTALLATION)
        assert "no conf in" in told[0][2]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await own.close()


async def test_nothing_is_told_of_a_pod_without_a_name() -> None:
    async def warn(pod: Pod, reason: str, message: str) -> None:
        raise AssertionError(pod)

    own = OwnPod(warn, Pods(), "", "")
    own.tell("X", "y")
    await own.close()
