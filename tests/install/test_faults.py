"""Kills, full and read-only disks, writers that fight us, locks, too few watches: files stay whole, causes are said."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.install.hosts import BRIDGE, Host, Record, running, until

from meshcni.agent.installation import LASTING_SECONDS, Installation
from meshcni.agent.installconfig import InstallConfig
from meshcni.agent.installer import FIGHT_REPAIRS, Installer
from meshcni.errors import InstallError

KILLS = 250
REPOSITORY = Path(__file__).parents[2]


def drive(*arguments: object, around: Sequence[str] = ()) -> dict[str, Any]:
    """Run the driver in a process of its own, wrapped in a command that gives it namespaces."""
    command = [*around, sys.executable, "-m", "tests.install.driver", *map(str, arguments)]
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "src"))
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    facts = drive("kills", tmp_path, KILLS)
    assert facts["partial"] == []
    assert facts["interrupted"] > 0  # or the kills came at harmless moments only
    assert facts["leftovers"] == []
    assert facts["reasons"] == []
    assert facts["types"] == ["bridge", "istio-cni"]


def test_a_full_disk(tmp_path: Path) -> None:
    facts = drive("full", tmp_path, around=["unshare", "--mount", "--propagation", "private"])
    (result, text), *_ = facts["failures"]
    assert result == "COPY_BINARIES_FAILURE"
    assert "No space left on device" in text
    assert "free some space, what was there is unchanged" in text
    assert not facts["binary"]
    assert (facts["unchanged"], facts["leftovers"]) == (True, [])
    assert "CREATE_CNI_CONFIG_FAILURE" in [result for result, _ in facts["conf_failures"]]
    assert (facts["conf_unchanged"], facts["conf_leftovers"]) == (True, [])
    assert facts["after"] == []
    assert facts["types"] == ["bridge", "istio-cni"]


def test_a_read_only_conf_directory(tmp_path: Path) -> None:
    facts = drive("readonly", tmp_path, around=["unshare", "--mount", "--propagation", "private"])
    ((result, text),) = facts["failures"]
    assert result == "CREATE_CNI_CONFIG_FAILURE"
    assert "write CNI config: " in text
    assert "Read-only file system" in text
    assert "global.platform" in text
    assert (facts["unchanged"], facts["leftovers"], facts["after"]) == (True, [], [])
    assert facts["types"] == ["bridge", "istio-cni"]


def test_without_inotify_we_look_now_and_then(tmp_path: Path) -> None:
    facts = drive("polling", tmp_path, around=["unshare", "--user", "--map-root-user"])
    assert facts == {"ready": True}


FIGHTER = """
import sys, time
from pathlib import Path
path, text = Path(sys.argv[1]), sys.argv[2]
beside = path.with_suffix(".beside")
rewrites = 0
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    if path.read_text() != text:
        rewrites += 1
    beside.write_text(text)
    beside.rename(path)
    time.sleep(0.05)
print(rewrites)
"""
FIGHT_SECONDS = 6.0


async def test_a_fight_over_the_conf_is_bounded_and_told(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    path = host.write("05-cilium.conflist", BRIDGE)
    record = Record()
    async with running(host.config(), record) as installer:
        await until(lambda: installer.ready)
        fighter = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FIGHTER, str(path), BRIDGE, str(FIGHT_SECONDS), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await fighter.communicate()
        await until(lambda: host.types("05-cilium.conflist") == ["bridge", "istio-cni"])
        await until(lambda: installer.ready)
    overwritten = int(out)  # of ours, by the other
    assert 2 <= overwritten <= 2 + FIGHT_SECONDS  # of some 120 changes; a fighter that was stalled costs one more
    assert overwritten <= installer.status.conf_fights
    assert [(path, "cni.exclusive=false" in hint) for path, hint in record.fights] == [(str(path), True)]
    assert any("changed again by somebody else" in entry.message for entry in caplog.records)


async def test_a_slow_fight_over_the_conf_is_told_too(host: Host) -> None:
    """Somebody who leaves our entry alone for longer than a writer at once does is no less a fighter."""
    path = host.write("05-cilium.conflist", BRIDGE)
    record = Record()
    async with running(host.config(), record) as installer:
        await until(lambda: installer.ready)
        for repairs in range(1, FIGHT_REPAIRS + 1):
            assert not record.fights
            await asyncio.sleep(LASTING_SECONDS)
            host.write("05-cilium.conflist", BRIDGE)
            await until(lambda wanted=repairs: installer.status.conf_fights == wanted)
        await until(lambda: record.fights)
    assert [(path, "cni.exclusive=false" in hint) for path, hint in record.fights] == [(str(path), True)]
    assert "cni.exclusive=false" in installer.status.contested


def test_what_another_writes_between_our_look_and_our_rename_is_not_lost(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE)
    theirs = BRIDGE.replace('"net"', '"renamed"')
    installation = Installation(host.config())
    looks = 0
    read = installation._read_conf_dir

    def read_and_then_write() -> Any:
        nonlocal looks
        looks += 1
        found = read()
        if looks == 2:  # the look under the lock, after which we write
            host.write("10-a.conflist", theirs)
        return found

    installation._read_conf_dir = read_and_then_write  # type: ignore[method-assign]
    outcome = installation.look_and_repair()
    assert outcome.reasons == ()
    value = json.loads(path.read_text())
    assert (value["name"], [plugin["type"] for plugin in value["plugins"]]) == ("renamed", ["bridge", "istio-cni"])
    assert host.leftovers() == []


def test_a_lock_held_by_another_process_is_said_and_waited_for(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    installation = Installation(host.config())
    fd = os.open(host.conf, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        outcome = installation.look_and_repair()
        assert "has been locked by another process" in outcome.reasons[0]
        assert host.types("10-a.conflist") == ["bridge"]
    finally:
        os.close(fd)
    assert installation.look_and_repair().reasons == ()


async def test_a_failed_installation_is_tried_again_while_serving(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)
    token = (host.account / "token").read_text()
    shutil.rmtree(host.account)  # so it is not even watched
    record = Record()
    async with running(host.config(), record) as installer:
        await until(lambda: len(record.results) >= 2)  # the second try
        assert set(record.results) == {"CREATE_KUBECONFIG_FAILURE"}
        host.account.mkdir()
        (host.account / "ca.crt").write_text("PEM")
        (host.account / "token").write_text(token)
        await until(lambda: installer.ready)
    assert record.results[-1] == "SUCCESS"


async def test_the_token_is_nowhere_in_the_log(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    host.write("10-a.conflist", BRIDGE)
    async with running(host.config()) as installer:
        await until(lambda: installer.ready)
    assert "first.token" in (host.run / "istio-cni-kubeconfig").read_text()
    assert "first.token" not in caplog.text


async def test_what_cannot_be_taken_out_is_said_and_the_rest_stays(host: Host) -> None:
    path = host.write("10-a.conflist", BRIDGE)
    config: InstallConfig = host.config(uninstall_removes_binary=True)
    async with running(config) as installer:
        await until(lambda: installer.ready)
    fd = os.open(host.conf, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(InstallError, match=r"clean up CNI config: .* locked by another process"):
            await Installer(config).uninstall()
    finally:
        os.close(fd)
    assert path.exists()
    assert host.plugin.exists()
    await Installer(config).uninstall()
    assert not host.plugin.exists()


async def test_no_descriptor_and_no_thread_is_left(host: Host) -> None:
    host.write("10-a.conflist", BRIDGE)

    async def once() -> None:
        async with running(host.config()) as installer:
            await until(lambda: installer.ready)
            for _ in range(20):
                host.write("10-a.conflist", BRIDGE.replace("net", "other"))
                await asyncio.sleep(0.01)
        await Installer(host.config()).uninstall()

    await once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await once()
    assert len(os.listdir("/proc/self/fd")) == before
