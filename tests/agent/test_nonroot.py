"""The whole job as user 65532 with the chart's five capabilities, on a node whose directories and files are root's."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.namespaces import call_in_netns
from lab.objects import sidecar_pod
from lab.ztunnel.client import Program
from tests.agent.ambientscene import (
    VARIANTS,
    AmbientScene,
    add,
    announced,
    is_captured,
    wait_state,
)
from tests.agent.container import NONROOT, run_as, user
from tests.agent.scene import Agent, Scene, answer_to_nobody, wait_until

from meshcni import istio

PLUGIN = "bin/istio-cni"


@pytest.fixture
def nonroot(scene: Scene) -> Scene:
    """A node whose directories only root may look into, with an agent of another user."""
    for name in ("net.d", "bin"):
        (scene.directory / name).chmod(0o700)
    scene.conf.chmod(0o600)
    run_as(scene, user(NONROOT))
    return scene


def owner(scene: Scene, name: str) -> tuple[int, int, int]:
    found = (scene.directory / name).lstat()
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


def start(scene: Scene) -> Agent:
    agent = scene.start()
    agent.wait_ready()
    return agent


def test_has_exactly_the_five_capabilities(nonroot: Scene) -> None:
    agent = start(nonroot)
    with open(f"/proc/{agent.process.pid}/status", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    assert facts["Uid"].split() == [str(NONROOT)] * 4
    assert {int(facts[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {
        1 << 1 | 1 << 12 | 1 << 13 | 1 << 19 | 1 << 21
    }
    assert "CAP_" not in agent.log
    assert agent.status()["missingCapabilities"] == ""


def test_installs_repairs_and_takes_away(nonroot: Scene) -> None:
    agent = start(nonroot)
    assert istio.PLUGIN_NAME in nonroot.conf.read_text()
    assert owner(nonroot, PLUGIN) == (NONROOT, NONROOT, 0o755)
    assert owner(nonroot, "run/istio-cni-kubeconfig") == (NONROOT, NONROOT, 0o600)
    assert owner(nonroot, "net.d/10-lab.conflist")[2] == 0o600
    plugin = nonroot.directory / PLUGIN
    for break_it in (plugin.unlink, lambda: plugin.chmod(0o600), lambda: plugin.write_bytes(b"another")):
        break_it()
        os.chown(plugin, 0, 0) if plugin.exists() else None  # as if root had done it
        wait_until("the plugin", lambda: plugin.exists() and owner(nonroot, PLUGIN)[2] == 0o755 and is_ours(nonroot))
    text = nonroot.conf.read_text()
    for _ in range(2):
        beside = nonroot.conf.with_suffix(".new")
        beside.write_text('{"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "bridge"}]}')
        beside.rename(nonroot.conf)  # root's, by its CNI plugin's installer
        wait_until("the entry", lambda: istio.PLUGIN_NAME in nonroot.conf.read_text())
    assert '"bridge"' in text
    done = nonroot.run("uninstall", "--purge")
    assert done.returncode == 0, done.stderr
    assert istio.PLUGIN_NAME not in nonroot.conf.read_text()
    assert not plugin.exists()
    assert agent.stop() == 0


def is_ours(scene: Scene) -> bool:
    return (scene.directory / PLUGIN).read_bytes() == (scene.directory / "source/istio-cni").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_sidecar_pod(nonroot: Scene, variant: str) -> None:
    agent = nonroot.start(**VARIANTS[variant])
    agent.wait_ready()
    pod = nonroot.add_pod(sidecar_pod("shop", "cart"))
    netns = nonroot.pod_netns("10.1.0.5/24")
    reply = agent.add(pod, netns)
    assert (reply.ok, reply.verdict) == (True, "sidecar"), reply
    command = {"nftables": ("nft", "list", "ruleset")}.get(variant, (f"iptables-{variant}-save",))
    rules = call_in_netns(netns, lambda: subprocess.check_output(command, text=True))
    assert "15001" in rules
    assert agent.status()["adds"][-1]["pod"] == "shop/cart"


@pytest.fixture
def shifted_netns() -> Iterator[str]:
    """A netns of a pod with `hostUsers: false`, whose root is the host's user 100000."""
    command = ("unshare", "--user", "--net", "sh", "-c", "echo ready; exec sleep 300")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            for kind in ("uid", "gid"):
                Path(f"/proc/{process.pid}/{kind}_map").write_text("0 100000 65536\n")
            for words in ("link set lo up", "link add eth0 type veth peer name peer0", "addr add 10.1.0.5/24 dev eth0"):
                inside = ("nsenter", f"--target={process.pid}", "--user", "--net", "ip", *words.split())
                subprocess.run(inside, check=True)
            yield f"/proc/{process.pid}/ns/net"
        finally:
            process.kill()


@pytest.mark.parametrize("variant", VARIANTS)
def test_pod_with_a_user_namespace_of_its_own(nonroot: Scene, shifted_netns: str, variant: str) -> None:
    agent = nonroot.start(**VARIANTS[variant])
    agent.wait_ready()
    pod = nonroot.add_pod(sidecar_pod("shop", "cart", mode="TPROXY"))
    reply = agent.add(pod, shifted_netns)
    assert (reply.ok, reply.verdict) == (True, "sidecar"), reply


@pytest.mark.parametrize("variant", VARIANTS)
def test_ambient_pod(nonroot: Scene, ambient: AmbientScene, ztunnel: Program, variant: str) -> None:
    agent = ambient.ready(**VARIANTS[variant])
    pod, running = ambient.new_pod(), ambient.running_pod("before")
    reply = add(agent, pod)
    assert (reply.ok, reply.verdict) == (True, "ambient"), agent.log
    wait_state(agent, running, "enrolled")
    for one in (pod, running):
        assert is_captured(one, variant)
        assert announced(ztunnel, one)
    entries = ambient.set_entries() if variant == "nftables" else ambient.ipset_entries()
    assert set(entries) == {pod.address, running.address}
    ambient.wait_annotation(pod, "enabled")


def test_only_root_is_ztunnel_and_needs_no_capability_for_it(nonroot: Scene, ambient: AmbientScene) -> None:
    """Istio's chart runs ztunnel as root without DAC_OVERRIDE; 65532 is the user of many other images."""
    ambient.ready()
    nonroot.open_to_everybody()
    program = (
        "import socket, sys\n"
        "connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); connection.settimeout(1)\n"
        "connection.connect(sys.argv[1])\n"
        "try: print('refused' if connection.recv(1) == b'' else 'answered')\n"
        "except TimeoutError: print('waited for')\n"
    )
    for uid, answer in ((0, "waited for"), (NONROOT, "refused")):
        command = (*user(uid, ()), "/usr/bin/python3", "-c", program, str(nonroot.ztunnel_socket))
        assert subprocess.check_output(command, text=True) == f"{answer}\n"


def test_node_changes_hands_between_root_and_nonroot(nonroot: Scene) -> None:
    """Upgrade from an agent of root's to one of 65532 and back; each finds and mends what the other has left."""
    for turn, uid in enumerate((0, NONROOT, 0, NONROOT)):
        run_as(nonroot, user(uid))
        (nonroot.directory / "source/istio-cni").write_bytes(b"#!/bin/true %d\n" % turn)
        nonroot.api.do(
            lambda server, turn=turn: server.write_service_account(nonroot.directory / "account", f"t{turn}")
        )
        agent = start(nonroot)
        assert is_ours(nonroot)
        assert owner(nonroot, PLUGIN) == (uid, uid, 0o755)
        kubeconfig = nonroot.run_dir / "istio-cni-kubeconfig"
        assert kubeconfig.read_text().endswith(f"token: t{turn}\n")
        for name in ("agent.sock", "control.sock", "log.sock", "pluginevent.sock"):
            assert owner(nonroot, f"run/{name}") == (uid, uid, 0o600)
        pod = nonroot.add_pod(sidecar_pod("shop", f"cart-{turn}"))
        assert agent.add(pod, nonroot.pod_netns("10.1.0.5/24")).ok
        assert istio.PLUGIN_NAME in nonroot.conf.read_text()
        agent.kill()  # nothing is taken away


def test_status_as_in_the_container_and_by_nobody(nonroot: Scene) -> None:
    """`kubectl exec` runs as the agent's user; another user of the node gets no answer, whatever the modes are."""
    start(nonroot)
    done = nonroot.run("status")
    assert done.returncode == 0, done.stderr
    nonroot.open_to_everybody()
    for name in ("control.sock", "log.sock"):
        request = b"GET /status HTTP/1.0\r\n\r\n"
        assert answer_to_nobody(nonroot.run_dir / name, socket.SOCK_STREAM, request) == b""
