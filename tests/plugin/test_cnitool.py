"""libcni itself drives the plugin: cnitool, a chain of real plugins, a host netns and a pod netns of the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.plugin.harness import PLUGIN, ROOT, AgentDouble, identity, run, say

from meshcni.cni.versions import SUPPORTED_VERSIONS
from meshcni.protocols.podadd import encode_reply, refused

CNITOOL = ROOT / "build" / "cnitool"
DEBIAN_PLUGINS = "/usr/lib/cni"

# Debian's plugins do not speak 1.1.0, so there something has to stand before us that does: it gives a fixed address.
GIVER = """#!/usr/bin/python3 -I
import json, os, sys
command = os.environ["CNI_COMMAND"]
versions = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
if command == "VERSION":
    json.dump({"cniVersion": "1.1.0", "supportedVersions": versions}, sys.stdout)
elif command == "ADD":
    version = json.load(sys.stdin)["cniVersion"]
    address = {"ip": "10.9.8.7/24"} if version < "0.3.0" else {"address": "10.9.8.7/24"}
    if "0.3.0" <= version < "1.0.0":
        address["version"] = "4"
    result = {"ip4": address} if version < "0.3.0" else {"ips": [address]}
    json.dump({"cniVersion": version, **result}, sys.stdout)
"""


@pytest.fixture(scope="session", autouse=True)
def cnitool() -> Path:
    subprocess.run([ROOT / "scripts" / "build-cnitool"], check=True)
    return CNITOOL


class Chain:
    """A conflist with a first plugin and ours behind it, and cnitool in a netns that plays the host."""

    def __init__(self, folder: Path, run_dir: Path, host: str, pod: str, version: str, first: dict[str, Any]) -> None:
        self.pod = pod
        self.host = host
        self.folder = folder
        for name in ("conf", "bin", "state", "ipam"):
            (folder / name).mkdir()
        shutil.copy(PLUGIN, folder / "bin")
        giver = folder / "bin" / "giver"
        giver.write_text(GIVER)
        giver.chmod(0o755)
        ours = {
            "type": "istio-cni",
            "cni_agent_run_dir": str(run_dir),
            "exclude_namespaces": ["kube-system"],
            "agent_wait_seconds": 1,
        }
        conflist = {"cniVersion": version, "name": "pods", "plugins": [first, ours]}
        (folder / "conf" / "10-pods.conflist").write_text(json.dumps(conflist))

    def __call__(self, verb: str, namespace: str = "shop") -> subprocess.CompletedProcess[str]:
        environ = {
            "PATH": os.environ["PATH"],
            "NETCONFPATH": str(self.folder / "conf"),
            "CNI_PATH": f"{self.folder / 'bin'}:{DEBIAN_PLUGINS}",
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web",
        }
        # libcni keeps results in /var/lib/cni; it gets a folder of the test there.
        script = 'mount --bind "$1" /var/lib && exec nsenter --net="$2" "$3" "$4" pods "$5"'
        command = ["unshare", "-m", "sh", "-c", script, "sh", self.folder / "state", self.host, CNITOOL, verb, self.pod]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def ptp(folder: Path) -> dict[str, Any]:
    ipam = {
        "type": "host-local",
        "subnet": "10.250.0.0/24",
        "dataDir": str(folder / "ipam"),
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {"type": "ptp", "ipMasq": False, "mtu": 1400, "ipam": ipam}


@pytest.mark.parametrize("version", [version for version in SUPPORTED_VERSIONS if "0.3.0" <= version < "1.1.0"])
def test_behind_a_real_plugin(agent: AgentDouble, tmp_path: Path, host_netns: str, netns: str, version: str) -> None:
    chain = Chain(tmp_path, agent.run_dir, host_netns, netns, version, ptp(tmp_path))
    added = chain("add")
    assert added.returncode == 0, added.stderr
    result = json.loads(added.stdout)
    assert result["cniVersion"] == version
    address = result["ips"][0]["address"]
    assert address.startswith("10.250.0.")
    assert {interface["name"] for interface in result["interfaces"]} >= {"eth0"}
    (received,) = agent.received
    assert received.files == [identity(netns)]
    assert received.request.ips == (address,)
    assert received.request.cni_version == version
    if version >= "0.4.0":
        checked = chain("check")
        assert checked.returncode == 0, checked.stderr
    for _ in range(2):
        deleted = chain("del")
        assert (deleted.returncode, deleted.stdout) == (0, ""), deleted.stderr


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_every_version(agent: AgentDouble, tmp_path: Path, host_netns: str, netns: str, version: str) -> None:
    chain = Chain(tmp_path, agent.run_dir, host_netns, netns, version, {"type": "giver"})
    added = chain("add")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["cniVersion"] == version
    assert "10.9.8.7/24" in added.stdout
    assert [received.request.ips for received in agent.received] == [("10.9.8.7/24",)]
    # libcni itself refuses verbs that the conf's version does not have; what it lets through must succeed.
    for verb, since in (("check", "0.4.0"), ("gc", "1.1.0"), ("status", "1.1.0")):
        done = chain(verb)
        if version >= since:
            assert done.returncode == 0, (verb, done.stderr)
    deleted = chain("del")
    assert (deleted.returncode, deleted.stdout) == (0, ""), deleted.stderr


def test_alone_without_prev_result(agent: AgentDouble, tmp_path: Path, host_netns: str, netns: str) -> None:
    chain = Chain(tmp_path, agent.run_dir, host_netns, netns, "1.0.0", {"type": "loopback"})
    path = tmp_path / "conf" / "10-pods.conflist"
    conflist = json.loads(path.read_text())
    path.write_text(json.dumps({**conflist, "plugins": conflist["plugins"][1:]}))
    added = chain("add")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout) == {"cniVersion": "1.0.0"}
    assert agent.received[0].request.ips == ()


def test_status_and_gc_without_an_agent(run_dir: Path, tmp_path: Path, host_netns: str, netns: str) -> None:
    chain = Chain(tmp_path, run_dir, host_netns, netns, "1.1.0", {"type": "giver"})
    for verb in ("status", "gc"):
        done = chain(verb)
        assert done.returncode == 0, done.stderr


def test_libcni_reads_our_errors(agent: AgentDouble, tmp_path: Path, host_netns: str, netns: str) -> None:
    agent.answers.append(say(encode_reply(refused(11, "no rules yet", "wait a moment"))))
    chain = Chain(tmp_path, agent.run_dir, host_netns, netns, "1.0.0", {"type": "giver"})
    added = chain("add")
    assert added.returncode != 0
    assert "no rules yet" in added.stderr
    assert "wait a moment" in added.stderr


def test_no_agent(run_dir: Path, tmp_path: Path, host_netns: str, netns: str) -> None:
    chain = Chain(tmp_path, run_dir, host_netns, netns, "1.0.0", {"type": "giver"})
    refused_add = chain("add")
    assert refused_add.returncode != 0
    assert "did not answer within 1 s" in refused_add.stderr
    assert chain("add", namespace="kube-system").returncode == 0
    assert chain("del").returncode == 0


def test_the_host_netns_as_pod_is_refused(agent: AgentDouble, tmp_path: Path, host_netns: str) -> None:
    chain = Chain(tmp_path, agent.run_dir, host_netns, host_netns, "1.0.0", {"type": "giver"})
    added = chain("add")
    assert added.returncode != 0
    assert "is the one istio-cni itself runs in" in added.stderr
    assert agent.received == []


def test_by_hand_without_a_command() -> None:
    done = run({})
    assert (done.status, done.stdout) == (0, b"")
    assert done.stderr.startswith(b"CNI plugin istio-cni ")
    assert b"0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0" in done.stderr
