"""Kubeconfig and binaries on the node, seen from outside."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest
from tests.agent.contract import BRIDGE, BRIDGE_WITH_ENTRY, Node, healed, mode_of
from tests.agent.scene import wait_until
from tests.cluster.originalagent import KUBECONFIG, trust

from meshcni import istio

QUIET = {"REPAIR_ENABLED": "false"}
TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6IkEifQ.eyJhdWQiOlsiaHR0cHM6Ly9rIl19.c2lnbmF0dXJl-_x"
CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.fixture(autouse=True)
def account(node: Node) -> Path:
    """The service account as the kubelet projects it: `..data` leads to a folder, the files lead through `..data`."""
    for name in ("token", "ca.crt"):
        (node.account / name).unlink(missing_ok=True)
        (node.account / name).symlink_to(f"..data/{name}")
    project(node, "first", TOKEN)
    node.write("10-a.conflist", BRIDGE)
    return node.account


def project(node: Node, folder: str, token: str, ca: str = CA) -> None:
    """What the kubelet does when it renews the volume."""
    made = node.account / f"..{folder}"
    made.mkdir()
    (made / "token").write_text(token)
    (made / "ca.crt").write_text(ca)
    link = node.account / "..data_tmp"
    link.symlink_to(made.name)
    link.rename(node.account / "..data")


# --- kubeconfig -------------------------------------------------------------------------------------------------------

HOST = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443", "KUBERNETES_SERVICE_PROTOCOL": ""}


@pytest.mark.parametrize(
    ("settings", "line", "server"),
    [
        ({}, trust(CA), "https://10.96.0.1:443"),
        ({"SKIP_TLS_VERIFY": "true"}, "insecure-skip-tls-verify: true", "https://10.96.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::a"}, trust(CA), "https://[fd00::a]:443"),
        ({"KUBERNETES_SERVICE_PROTOCOL": "http"}, trust(CA), "http://10.96.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "api.example.org"}, trust(CA), "https://api.example.org:443"),
        ({"KUBE_CA_FILE": "OTHER"}, trust("another\n"), "https://10.96.0.1:443"),
    ],
)
def test_kubeconfig_bytes(node: Node, settings: dict[str, str], line: str, server: str) -> None:
    other = node.scene.directory / "other.crt"
    other.write_text("another\n")
    chosen = {key: value.replace("OTHER", str(other)) for key, value in settings.items()}
    node.ready(**(QUIET | HOST | chosen))
    assert node.kubeconfig.read_text() == KUBECONFIG.format(trust=line, server=server, token=TOKEN)
    assert mode_of(node.kubeconfig) == 0o600


def test_token_is_taken_over_verbatim(node: Node) -> None:
    project(node, "second", f"{TOKEN}\n")
    node.ready(**QUIET, **HOST)
    expected = KUBECONFIG.format(trust=trust(CA), server="https://10.96.0.1:443", token=f"|\n      {TOKEN}")
    assert node.kubeconfig.read_text() == expected


@pytest.mark.parametrize(
    ("text", "mode"), [("0600", 0o600), ("384", 0o600), ("0644", 0o644), ("0x1a0", 0o640), ("600", 0o130), ("", 0o600)]
)
def test_kubeconfig_mode(node: Node, text: str, mode: int) -> None:
    """Base by prefix, so 600 is decimal: 0o1130, whose first digit says nothing on a file."""
    node.ready(KUBECONFIG_MODE=text, **QUIET)
    assert mode_of(node.kubeconfig) & 0o777 == mode


def test_a_kubeconfig_for_the_agent_itself_is_minded_only(node: Node) -> None:
    """The original's would go by it. Ours is a pod: it works, and says what it does instead."""
    agent = node.ready(KUBECONFIG="/nowhere/config", **QUIET)
    assert "KUBECONFIG=/nowhere/config has no effect: the agent reaches the API server by its service account" in (
        agent.log
    )


def test_kubeconfig_mode_as_flag(node: Node) -> None:
    node.ready("--kubeconfig-mode=0640", **QUIET)
    assert mode_of(node.kubeconfig) == 0o640


def test_kubeconfig_comes_back(node: Node) -> None:
    node.ready(**QUIET, **HOST)
    text = node.kubeconfig.read_text()
    node.kubeconfig.unlink()
    healed("deleted", lambda: node.kubeconfig.exists() and node.kubeconfig.read_text() == text)
    node.kubeconfig.write_text("something else")
    healed("overwritten", lambda: node.kubeconfig.read_text() == text)


@pytest.mark.parametrize(
    ("changes", "missing", "words"),
    [
        (
            {"KUBERNETES_SERVICE_HOST": ""},
            "",
            "KUBERNETES_SERVICE_HOST not set. Is this not running within a pod?",
        ),
        (
            {"KUBERNETES_SERVICE_PORT": ""},
            "",
            "KUBERNETES_SERVICE_PORT not set. Is this not running within a pod?",
        ),
        ({}, "token", "write kubeconfig: "),
        ({}, "ca.crt", "write kubeconfig: "),
    ],
)
def test_kubeconfig_that_cannot_be_made(node: Node, changes: dict[str, str], missing: str, words: str) -> None:
    if missing:
        (node.account / missing).unlink()
    agent = node.start(**(QUIET | HOST | changes))
    wait_until("its reason", lambda: words in agent.log)
    wait_until("its count", lambda: 'istio_cni_installs_total{result="CREATE_KUBECONFIG_FAILURE"}' in agent.metrics())
    assert agent.get(istio.READY_PATH)[0] == 503
    assert agent.metrics()["istio_cni_install_ready"] == 0
    assert agent.process.poll() is None
    assert not node.kubeconfig.exists()
    wait_until("the conf all the same", lambda: node.text("10-a.conflist") == BRIDGE_WITH_ENTRY)


def test_rotation_reaches_the_kubeconfig_and_not_the_log(node: Node) -> None:
    agent = node.ready("--log_output_level=all:debug", **QUIET, **HOST)
    before = agent.log.splitlines()
    conf = (node.conf / "10-a.conflist").stat().st_mtime_ns
    for turn in range(5):
        token = f"{TOKEN}{turn}"
        project(node, f"turn-{turn}", token, CA.replace("MIIB", f"MII{turn}"))
        healed("the new token", lambda token=token: f"token: {token}\n" in node.kubeconfig.read_text())
        assert agent.get(istio.READY_PATH) == (200, "")
    time.sleep(0.1)  # for whatever else it might have to say
    said = agent.log.splitlines()[len(before) :]
    assert len(said) <= 5, said
    for secret in (TOKEN, "certificate-authority-data", base64.b64encode(CA.encode()).decode(), "current-context"):
        assert secret not in agent.log
    assert (node.conf / "10-a.conflist").stat().st_mtime_ns == conf
    assert node.leftovers() == []


# --- binaries ---------------------------------------------------------------------------------------------------------


def test_every_file_of_the_source_is_copied_with_its_mode(node: Node) -> None:
    for name, text, mode in (("istio-cni", "#!one\n", 0o755), ("other", "two" * 40_000, 0o750), ("notes", "", 0o444)):
        (node.source / name).write_text(text)
        (node.source / name).chmod(mode)
    (node.source / "folder").mkdir()
    (node.bin / "bridge").write_text("of another plugin")
    node.ready(**QUIET)
    found = {path.name: (path.read_bytes(), mode_of(path)) for path in node.bin.iterdir()}
    expected = {path.name: (path.read_bytes(), mode_of(path)) for path in node.source.iterdir() if path.is_file()}
    assert found == expected | {"bridge": (b"of another plugin", mode_of(node.bin / "bridge"))}


def test_binaries_come_back(node: Node) -> None:
    (node.source / "other").write_text("two")
    agent = node.ready(**QUIET)
    wanted = node.plugin.read_bytes()
    node.plugin.unlink()
    healed("the plugin", lambda: node.plugin.exists() and node.plugin.read_bytes() == wanted)
    (node.bin / "other").unlink()
    healed("the other file", lambda: (node.bin / "other").exists())
    node.plugin.write_bytes(b"an older one")
    healed("its content", lambda: node.plugin.read_bytes() == wanted)
    agent.wait_ready()


def test_leftovers_of_a_killed_predecessor_are_removed(node: Node) -> None:
    for name in ("istio-cni.tmp.1234", "istio-cni.tmp.old", "istio-cni.tmp."):
        (node.bin / name).write_text("half")
    for name in ("bridge.tmp.77", "istio-cni.tmpfile", "istio-cni2.tmp.1"):
        (node.bin / name).write_text("of somebody else")
    node.ready(**QUIET)
    assert sorted(path.name for path in node.bin.iterdir()) == sorted(
        ["bridge.tmp.77", "istio-cni", "istio-cni.tmpfile", "istio-cni2.tmp.1"]
    )


@pytest.mark.parametrize("broken", ["source", "bin"])
def test_binaries_that_cannot_be_copied(node: Node, broken: str) -> None:
    (node.scene.directory / broken).rename(node.scene.directory / "away")
    agent = node.start(**QUIET)
    wait_until("its reason", lambda: "copy binaries: " in agent.log)
    wait_until("its count", lambda: 'istio_cni_installs_total{result="COPY_BINARIES_FAILURE"}' in agent.metrics())
    assert agent.get(istio.READY_PATH)[0] == 503
    assert node.text("10-a.conflist") == BRIDGE
    (node.scene.directory / "away").rename(node.scene.directory / broken)
    agent.wait_ready()
    assert node.text("10-a.conflist") == BRIDGE_WITH_ENTRY
