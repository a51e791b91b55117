"""The installer on real files with real inotify: puts in place, heals, takes away."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.install.hosts import BRIDGE, SINGLE, Host, Record, running, until

from meshcni.agent.installer import Installer
from meshcni.cni import conf
from meshcni.host import files

OWNED_NAME = "02-istio-cni.conflist"


def mode_of(path: Any) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@dataclass(frozen=True)
class Scenario:
    """Files before; the file that carries our entry; the directory while installed; the files after a clean-up."""

    before: Mapping[str, str]
    target: str
    installed: tuple[str, ...]
    after: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    late: Mapping[str, str] = field(default_factory=dict)  # written once the installer waits


SCENARIOS = {
    "first list": Scenario(
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
        "10-a.conflist",
        ("10-a.conflist", "20-b.conflist"),
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
    ),
    "list comes late": Scenario(
        {}, "10-a.conflist", ("10-a.conflist",), {"10-a.conflist": BRIDGE}, late={"10-a.conflist": BRIDGE}
    ),
    "single network": Scenario({"10-a.conf": SINGLE}, "10-a.conflist", ("10-a.conflist",), {"10-a.conf": SINGLE}),
    "json network": Scenario({"10-a.json": SINGLE}, "10-a.conflist", ("10-a.conflist",), {"10-a.json": SINGLE}),
    "named list": Scenario(
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
        "20-b.conflist",
        ("10-a.conflist", "20-b.conflist"),
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
        {"conf_name": "20-b.conflist"},
    ),
    "named list comes late": Scenario(
        {"10-a.conflist": BRIDGE},
        "20-b.conflist",
        ("10-a.conflist", "20-b.conflist"),
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
        {"conf_name": "20-b.conflist"},
        {"20-b.conflist": BRIDGE},
    ),
    "named single network, there as list": Scenario(
        {"10-a.conflist": BRIDGE},
        "10-a.conflist",
        ("10-a.conflist",),
        {"10-a.conflist": BRIDGE},
        {"conf_name": "10-a.conf"},
    ),
    "named file with another extension": Scenario(
        {"some.file": BRIDGE}, "some.file", ("some.file",), {"some.file": BRIDGE}, {"conf_name": "some.file"}
    ),
    "standalone": Scenario(
        {"10-a.conflist": BRIDGE},
        "YYY-istio-cni.conf",
        ("10-a.conflist", "YYY-istio-cni.conf"),
        {"10-a.conflist": BRIDGE},
        {"chained": False},
    ),
    "standalone, named": Scenario(
        {"10-a.conf": SINGLE},
        "mesh.conf",
        ("10-a.conf", "mesh.conf"),
        {"10-a.conf": SINGLE},
        {"chained": False, "conf_name": "mesh.conf"},
    ),
    "owned": Scenario(
        {"10-a.conflist": BRIDGE},
        OWNED_NAME,
        (OWNED_NAME, "10-a.conflist"),
        {"10-a.conflist": BRIDGE},
        {"owned": True},
    ),
    "owned copy of a single network": Scenario(
        {"10-a.conf": SINGLE},
        "00-own.conflist",
        ("00-own.conflist", "10-a.conf"),
        {"10-a.conf": SINGLE},
        {"owned": True, "owned_name": "00-own.conflist"},
    ),
}


def carries(host: Host, name: str) -> bool:
    path = host.conf / name
    if not path.exists():
        return False
    value = json.loads(path.read_text())
    return "istio-cni" in [value.get("type"), *(plugin["type"] for plugin in value.get("plugins", []))]


@pytest.mark.parametrize("name", SCENARIOS)
async def test_installs_heals_and_leaves_everything_as_it_was(host: Host, name: str) -> None:
    scenario = SCENARIOS[name]
    for file, text in scenario.before.items():
        host.write(file, text)
    record = Record()
    config = host.config(**scenario.options)
    async with running(config, record) as installer:
        if scenario.late:
            await until(lambda: "waiting for" in " ".join(installer.reasons))
            assert not installer.ready
        for file, text in scenario.late.items():
            host.write(file, text)
        await until(lambda: installer.ready, "installed")
        assert installer.installed.is_set()
        assert carries(host, scenario.target)
        assert host.listing() == sorted(scenario.installed)
        assert installer.status.conf_path == str(host.conf / scenario.target)
        assert mode_of(host.plugin) == 0o755
        assert mode_of(host.run / "istio-cni-kubeconfig") == 0o600
        (host.conf / scenario.target).unlink()
        for file, text in {**scenario.before, **scenario.late}.items():
            host.write(file, text)
        await until(lambda: carries(host, scenario.target) and installer.ready, "healed")
        await until(lambda: host.listing() == sorted(scenario.installed))
    done = await uninstalled(installer)
    assert {file: (host.conf / file).read_text() for file in host.listing()} == scenario.after
    assert not (host.run / "istio-cni-kubeconfig").exists()
    assert (host.run / "uninstalled").exists()
    assert host.plugin.exists()
    assert host.leftovers() == []
    assert record.results[0] == "SUCCESS"
    assert set(record.results) == {"SUCCESS"}
    assert any(str(host.conf) in sentence for sentence in done)


async def uninstalled(installer: Installer) -> tuple[str, ...]:
    """What a fresh process would do: it knows nothing but the files."""
    return await Installer(installer.config).uninstall()


async def test_other_bytes_and_the_mode_of_the_conf_stay(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE, 0o640)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
    assert mode_of(path) == 0o640
    before, after = BRIDGE.splitlines(), path.read_text().splitlines()
    assert after[:4] == before[:4]
    assert after[4] == before[4] + ","
    assert after[-2:] == before[-2:]
    await uninstalled(installer)
    assert mode_of(path) == 0o640
    assert path.read_text() == BRIDGE


@pytest.mark.parametrize(("group_read", "mode"), [(False, 0o600), (True, 0o640)])
@pytest.mark.parametrize("options", [{"chained": False}, {"owned": True}])
async def test_mode_of_new_files(host: Host, options: dict[str, bool], group_read: bool, mode: int) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config(conf_group_read=group_read, **options)) as installer:
        await until(lambda: installer.ready)
        assert mode_of(installer.status.conf_path) == mode
        assert mode_of(host.conf / "10-a.conflist") == 0o644


async def test_extended_attributes_of_a_conf_stay(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE)
    try:
        os.setxattr(path, "user.label", b"kept")
    except OSError as error:
        pytest.skip(f"the file system of {path} has no extended attributes: {error}")
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
    assert os.getxattr(path, "user.label") == b"kept"


async def test_nothing_is_written_when_everything_is_in_place(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
    paths = [host.plugin, host.run / "istio-cni-kubeconfig", host.conf / "10-a.conflist"]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
    record = Record()
    async with running(host.config(), record) as installer:
        await until(lambda: installer.ready)
        host.write("99-foreign.conf", SINGLE)
        await asyncio.sleep(0.2)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths] == before
    assert installer.status.installs == 0
    assert record.results == ["SUCCESS"]


async def test_a_changed_setting_is_written_at_the_next_start(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE)
    for namespaces in (("kube-system",), ("kube-system", "other"), ()):
        async with running(host.config(entry={"exclude_namespaces": namespaces})) as installer:
            await until(lambda: installer.ready)
        found = json.loads(path.read_text())["plugins"][-1]["exclude_namespaces"]
        assert found == (list(namespaces) or None)


async def test_our_entry_edited_or_doubled_by_hand_is_put_right(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        good = path.read_text()
        host.write("10-a.conflist", good.replace('"exclude_namespaces": null', '"exclude_namespaces": ["all"]'))
        await until(lambda: path.read_text() == good)
        value = json.loads(good)
        value["plugins"].append(value["plugins"][-1])
        host.write("10-a.conflist", json.dumps(value))
        await until(lambda: host.types("10-a.conflist") == ["bridge", "istio-cni"])
        await until(lambda: installer.status.conf_fights == 2)


async def test_a_conf_edited_in_place_moved_away_or_renamed_is_noticed(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        path.write_text(BRIDGE)
        await until(lambda: host.types("10-a.conflist")[1:] == ["istio-cni"])
        path.rename(host.root / "elsewhere")
        await until(lambda: not installer.ready)
        assert "no conf in" in installer.reasons[0]
        (host.root / "elsewhere").rename(host.conf / "20-b.conflist")
        await until(lambda: installer.ready)
        assert installer.status.conf_path.endswith("20-b.conflist")


async def test_a_conf_that_sorts_earlier_gets_the_entry_and_the_old_one_loses_it(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        host.write("05-new.conflist", BRIDGE)
        await until(lambda: host.types("05-new.conflist") == ["bridge", "istio-cni"])
        await until(lambda: (host.conf / "10-a.conflist").read_text() == BRIDGE)
        (host.conf / "05-new.conflist").unlink()
        await until(lambda: host.types("10-a.conflist") == ["bridge", "istio-cni"])
        await until(lambda: installer.ready)


async def test_a_json_conf_that_sorts_earlier_is_converted(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        host.write("00-x.json", SINGLE, 0o604)
        await until(lambda: host.listing() == ["00-x.conflist", "10-a.conflist"])
        await until(lambda: (host.conf / "10-a.conflist").read_text() == BRIDGE)
        assert host.types("00-x.conflist") == ["bridge", "istio-cni"]
        assert mode_of(host.conf / "00-x.conflist") == 0o604


async def test_a_broken_conf_of_another_plugin_stays_as_it_is(host: Host) -> None:
    broken = host.write("10-a.conflist", '{"name": "net", "plugins": [')
    record = Record()
    async with running(host.config(), record) as installer:
        await until(lambda: "10-a.conflist is not valid JSON" in " ".join(installer.reasons))
        assert not installer.ready
        host.write("20-b.conflist", BRIDGE)
        await until(lambda: installer.ready)
        assert "containerd loads no conf until it is repaired" in installer.status.notes[0]
        assert broken.read_text() == '{"name": "net", "plugins": ['
        host.write("10-a.conflist", BRIDGE)
        await until(lambda: host.types("10-a.conflist") == ["bridge", "istio-cni"])
        await until(lambda: host.types("20-b.conflist") == ["bridge"])
        path = host.write("10-a.conflist", "[]")
        (host.conf / "20-b.conflist").unlink()
        await until(lambda: not installer.ready)
        assert path.read_text() == "[]"


async def test_a_link_out_of_the_directory_is_a_reason_not_to_be_ready(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    link = host.conf / "05-x.conflist"
    link.symlink_to("/opt/of/the/host/x.conflist")
    async with running(host.config()) as installer:
        await until(lambda: host.types("10-a.conflist") == ["bridge", "istio-cni"])
        await until(lambda: "05-x.conflist cannot be read: it is a link to /opt/of" in " ".join(installer.reasons))
        assert link.is_symlink()
        link.unlink()
        await until(lambda: installer.ready)


async def test_owned_copy_follows_the_primary(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config(owned=True)) as installer:
        await until(lambda: installer.ready)
        host.write("10-a.conflist", BRIDGE.replace('"bridge"', '"bridge", "mtu": 9000'))
        await until(lambda: '"mtu": 9000' in (host.conf / OWNED_NAME).read_text())
        assert host.types(OWNED_NAME) == ["bridge", "istio-cni"]
        (host.conf / "10-a.conflist").unlink()
        await until(lambda: not installer.ready)
        assert (host.conf / OWNED_NAME).exists()


async def test_owned_copy_that_sorts_too_late_is_not_written(host: Host) -> None:
    host.write("01-a.conflist", BRIDGE)
    async with running(host.config(owned=True)) as installer:
        await until(lambda: "sorts after 01-a.conflist" in " ".join(installer.reasons))
        assert host.listing() == ["01-a.conflist"]


async def test_token_rotation_never_costs_readiness(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    record = Record()
    kubeconfig = host.run / "istio-cni-kubeconfig"
    async with running(host.config(), record) as installer:
        await until(lambda: installer.ready)
        seen = len(record.statuses)
        for turn in range(100):
            folder = host.account / f"..{turn}"  # as the kubelet's projected volume does it
            folder.mkdir()
            (folder / "token").write_text(f"token.{turn}")
            link = host.account / "link"
            link.symlink_to(folder / "token")
            link.rename(host.account / "token")
            await asyncio.sleep(0.01)
            assert installer.ready
        await until(lambda: "token: token.99\n" in kubeconfig.read_text())
        assert all(status.ready for status in record.statuses[seen:])
        assert set(record.results) == {"SUCCESS"}


async def test_binary_and_kubeconfig_come_back(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        host.plugin.unlink()
        await until(host.plugin.exists)
        host.plugin.write_bytes(b"something else")
        await until(lambda: host.plugin.read_bytes() == (host.source / "istio-cni").read_bytes())
        (host.run / "istio-cni-kubeconfig").unlink()
        await until((host.run / "istio-cni-kubeconfig").exists)
        (host.run / "istio-cni-kubeconfig").chmod(0o644)
        await asyncio.sleep(0)
        await until(lambda: mode_of(host.run / "istio-cni-kubeconfig") == 0o600)


async def test_a_binary_that_runs_is_replaced(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    shutil.copy("/bin/sleep", host.plugin)
    host.plugin.chmod(0o755)
    sleeper = await asyncio.create_subprocess_exec(str(host.plugin), "60")
    try:
        async with running(host.config()) as installer:
            await until(lambda: installer.ready)
        assert host.plugin.read_bytes() == (host.source / "istio-cni").read_bytes()
    finally:
        sleeper.kill()
        await sleeper.wait()


async def test_without_a_binary_the_conf_is_not_touched(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    (host.source / "istio-cni").unlink()
    record = Record()
    async with running(host.config(), record) as installer:
        await until(lambda: "no plugin in" in " ".join(installer.reasons))
    assert host.types("10-a.conflist") == ["bridge"]
    host.source.rmdir()
    async with running(host.config(), record) as installer:
        await until(lambda: "copy binaries: " in " ".join(installer.reasons))
    assert "COPY_BINARIES_FAILURE" in record.results


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"api_host": ""}, "KUBERNETES_SERVICE_HOST not set. Is this not running within a pod?"),
        ({"service_account_dir": "/nonexistent"}, "write kubeconfig: "),
        ({"kube_ca_file": "/nonexistent/ca"}, "write kubeconfig: "),
    ],
)
async def test_without_a_kubeconfig_the_conf_is_kept_but_we_are_not_ready(
    host: Host, options: dict[str, str], part: str
) -> None:
    host.write("10-a.conflist", BRIDGE)
    record = Record()
    async with running(host.config(**options), record) as installer:
        await until(lambda: part in " ".join(installer.reasons))
        assert not installer.ready
        assert host.types("10-a.conflist") == ["bridge", "istio-cni"]
    assert record.results[0] == "CREATE_KUBECONFIG_FAILURE"


async def test_another_ca_and_none_at_all(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    (host.root / "other.crt").write_text("OTHER")
    async with running(host.config(kube_ca_file=str(host.root / "other.crt"), kubeconfig_mode=0o640)) as installer:
        await until(lambda: installer.ready)
    path = host.run / "istio-cni-kubeconfig"
    assert "certificate-authority-data: T1RIRVI=\n" in path.read_text()
    assert mode_of(path) == 0o640
    async with running(host.config(skip_tls_verify=True)) as installer:
        await until(lambda: installer.ready)
    assert "insecure-skip-tls-verify: true" in path.read_text()
    assert mode_of(path) == 0o600


async def test_the_marker_of_an_uninstall_goes_when_we_install_again(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
    await uninstalled(installer)
    marker = host.run / "uninstalled"
    assert marker.exists()
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        assert not marker.exists()


@pytest.mark.parametrize("way", ["setting", "purge"])
async def test_the_binary_goes_when_asked_for(host: Host, way: str) -> None:
    host.write("10-a.conflist", BRIDGE)
    (host.source / "other").write_text("another plugin")
    config = host.config(uninstall_removes_binary=way == "setting")
    async with running(config) as installer:
        await until(lambda: installer.ready)
    await Installer(config).uninstall(purge=way == "purge")
    assert sorted(path.name for path in host.bin.iterdir()) == ["other"]
    assert list(host.run.iterdir()) == []
    assert (host.conf / "10-a.conflist").read_text() == BRIDGE


async def test_nothing_is_written_once_it_has_ended(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    task = asyncio.create_task(Installer(host.config()).run())
    with files.locked(str(host.conf)):  # what is at work on a thread cannot finish
        await until((host.run / "istio-cni-kubeconfig").exists)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert carries(host, "10-a.conflist")


async def test_an_uninstall_can_be_repeated_and_needs_nothing(host: Host) -> None:
    for folder in (host.conf, host.run, host.bin):
        folder.rmdir()
    assert await Installer(host.config()).uninstall() == ()
    assert (await Installer(host.config()).uninstall(purge=True)) == ()


async def test_directories_may_come_later(host: Host) -> None:
    host.conf.rmdir()
    host.run.rmdir()
    async with running(host.config()) as installer:
        await until(lambda: "no conf in" in " ".join(installer.reasons))
        host.conf.mkdir()
        host.write("10-a.conflist", BRIDGE)
        await until(lambda: installer.ready)
        (host.conf / "10-a.conflist").unlink()
        host.conf.rmdir()
        await until(lambda: not installer.ready)
        host.conf.mkdir()
        host.write("10-a.conflist", BRIDGE)
        await until(lambda: installer.ready)


async def test_hint_when_the_other_plugins_are_elsewhere(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
        assert "names bridge, not found in" in " ".join(installer.status.notes)
        (host.bin / "bridge").touch()
        await until(lambda: installer.status.notes == ())


async def test_entries_of_another_agent_stay(host: Host) -> None:
    theirs = json.dumps({"name": "n", "plugins": [{"type": "b"}, {"type": "istio-cni", "cni_agent_run_dir": "/other"}]})
    host.write("10-a.conflist", BRIDGE)
    host.write("20-b.conflist", theirs)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
    await uninstalled(installer)
    assert (host.conf / "20-b.conflist").read_text() == theirs
    assert (host.conf / "10-a.conflist").read_text() == BRIDGE
    assert conf.candidates(host.listing()) == host.listing()
