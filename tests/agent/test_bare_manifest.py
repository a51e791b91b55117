"""The manifest lacks mounts, rights or capabilities: one message with what to paste, nothing done to the node."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.agent.container import CHART, NONROOT, Container, run_as, user, written
from tests.agent.scene import Agent, Scene, wait_until

from meshcni import istio
from meshcni.agent.hostmounts import HOST_PID_NAMESPACE
from meshcni.cli.control import STATUS_PATH, UNINSTALL_PATH, AgentFailedError, ask

MOUNTS = {
    "cni-bin-dir": (istio.HOST_BINARY_DIR, "/opt/cni/bin", "DirectoryOrCreate"),
    "cni-net-dir": (istio.HOST_CONF_DIR, "/etc/cni/net.d", "DirectoryOrCreate"),
    "cni-socket-dir": (istio.RUN_DIR, istio.RUN_DIR, "DirectoryOrCreate"),
}
PROC = {"cni-host-procfs": (istio.HOST_PROC, "/proc", "Directory")}
if os.readlink("/proc/self/ns/pid") != HOST_PID_NAMESPACE:  # else our own /proc is the host's; tests/pure has the case
    MOUNTS |= PROC
AMBIENT_MOUNTS = {
    "cni-netns-dir": ("/host/var/run/netns", "/var/run/netns", "DirectoryOrCreate"),
    "cni-ztunnel-sock-dir": ("/var/run/ztunnel", "/var/run/ztunnel", "DirectoryOrCreate"),
}
AMBIENT = {"ZTUNNEL_UDS_ADDRESS": "", "HOST_PROC_DIR": "", "AMBIENT_ENABLED": "true"}
RIGHTS = {("pods", "get"), ("pods", "list"), ("pods", "watch")}
DEFAULT_ACCOUNT = "system:serviceaccount:mesh:default"
USERS = {"root": (), "nonroot": user(NONROOT)}


def token(subject: str) -> str:
    payload = base64.urlsafe_b64encode(json.dumps({"sub": subject}).encode()).decode().rstrip("=")
    return f"e30.{payload}.c2ln"


def documents(agent: Agent) -> list[dict[str, Any]]:
    """The YAML of /readyz, after a look at the log and the status, which have the same."""
    status, body = agent.get(istio.READY_PATH)
    assert status == 503
    text = json.loads(body)["yaml"]
    assert text.strip() in agent.log
    return list(yaml.safe_load_all(text))


def rules(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(resource, verb) for rule in document["rules"] for resource in rule["resources"] for verb in rule["verbs"]}


def mounts(document: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    spec = document["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["name"] == "install-cni"
    paths = {volume["name"]: volume["hostPath"] for volume in spec["volumes"]}
    found = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    return {name: (found[name], paths[name]["path"], paths[name]["type"]) for name in found}


def wait_for_message(agent: Agent) -> str:
    """The one line of the log that says it, without the YAML below it."""
    wait_until("the message", lambda: "\terror\t" in agent.log and "changes nothing" in agent.log)
    (line,) = [line for line in agent.log.splitlines() if "\terror\t" in line]
    return line


@pytest.fixture(params=USERS)
def bare(request: pytest.FixtureRequest, scene: Scene) -> Container:
    """A container with what the guide's manifest gives it: an account without rights, no mount."""
    scene.api.do(lambda server: server.denied.deny("* *"))
    (scene.directory / "account" / "token").write_text(token(DEFAULT_ACCOUNT))
    return Container(scene, prefix=USERS[request.param])


def test_guide_taken_literally(scene: Scene, bare: Container) -> None:
    agent = scene.start(**bare.environment())
    message = wait_for_message(agent)
    for part in (*MOUNTS, DEFAULT_ACCOUNT, "get, list, watch pods", "missing mounts", "missing rights"):
        assert part in message
    patch, account, role, binding = documents(agent)
    assert mounts(patch) == MOUNTS
    spec = patch["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"] == "istio-cni"
    assert account["metadata"]["namespace"] == binding["subjects"][0]["namespace"] == "mesh"
    assert {variable["name"] for variable in spec["containers"][0]["env"]} == {"NODE_NAME", "POD_NAME", "POD_NAMESPACE"}
    assert rules(role) > RIGHTS
    assert binding["roleRef"]["name"] == role["metadata"]["name"]

    assert written(agent.process.pid) == ["/run/istio-cni/control.sock"]
    assert scene.conf.read_text() == json.dumps({"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "bridge"}]})
    run_dir = f"/proc/{agent.process.pid}/root/run/istio-cni"
    status = ask(run_dir, "GET", STATUS_PATH)
    assert list(yaml.safe_load_all(status["missing"]["yaml"])) == [patch, account, role, binding]
    assert not status["ready"]
    with pytest.raises(AgentFailedError, match="cni-net-dir"):
        ask(run_dir, "POST", UNINSTALL_PATH)
    printed = in_container(scene, agent, "status", f"--cni-agent-run-dir={istio.RUN_DIR}")
    assert printed.returncode == 1, printed.stderr
    assert status["missing"]["yaml"].strip() in printed.stdout
    assert agent.stop() == 0
    assert "nothing that could be taken away" in agent.log


def in_container(scene: Scene, agent: Agent, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a sub-command in a running container, as `kubectl exec` does: as its user, with its root."""
    uid = os.stat(f"/proc/{agent.process.pid}").st_uid
    enter = ("nsenter", f"--target={agent.process.pid}", "--mount", "--root", "--wd=/")
    command = (*enter, *user(uid), scene.program[-3], "-m", "meshcni.agent", *arguments)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path("src").absolute())}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_guide_taken_literally_for_ambient(scene: Scene, bare: Container) -> None:
    agent = scene.start(ambient=True, **bare.environment(), **AMBIENT)
    message = wait_for_message(agent)
    patch, _, role, _ = documents(agent)
    assert mounts(patch) == MOUNTS | AMBIENT_MOUNTS
    propagations = {
        mount["name"]: mount.get("mountPropagation", "")
        for mount in patch["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert {name for name, value in propagations.items() if value == "HostToContainer"} == {"cni-netns-dir"}
    assert rules(role) >= RIGHTS | {("namespaces", "watch"), ("pods/status", "patch")}
    assert "patch pods/status" in message
    assert not Path(f"/proc/{agent.process.pid}/root/run/ztunnel").exists()
    assert agent.stop() == 0


@pytest.mark.parametrize("missing", ["cni-bin-dir", "cni-net-dir", "cni-socket-dir"])
def test_each_mount_is_indispensable(scene: Scene, missing: str) -> None:
    host = {name: scene.directory / name for name in ("cni-bin-dir", "cni-net-dir", "cni-socket-dir")}
    for path in host.values():
        path.mkdir()
    there = {MOUNTS[name][0]: path for name, path in host.items() if name != missing}
    container = Container(scene, there)
    agent = scene.start(**container.environment())
    message = wait_for_message(agent)
    assert missing in message
    assert set(mounts(documents(agent)[0])) - PROC.keys() == {missing}
    assert [path for path in written(agent.process.pid) if istio.PLUGIN_NAME in Path(path).name] == []
    assert not any(path for name in ("cni-bin-dir", "cni-net-dir") for path in host[name].iterdir())


def test_all_mounts_but_procfs_do_for_sidecars(scene: Scene) -> None:
    host = {MOUNTS[name][0]: scene.directory / name for name in ("cni-bin-dir", "cni-net-dir", "cni-socket-dir")}
    for path in host.values():
        path.mkdir()
    (host[istio.HOST_CONF_DIR] / "10-a.conflist").write_text(scene.conf.read_text())
    container = Container(scene, host, user(NONROOT))
    agent = scene.start(**container.environment())
    agent.wait_ready()
    assert istio.PLUGIN_NAME in (host[istio.HOST_CONF_DIR] / "10-a.conflist").read_text()
    assert (host[istio.HOST_BINARY_DIR] / istio.PLUGIN_NAME).exists()
    assert "\terror\t" not in agent.log
    status = ask(str(host[istio.RUN_DIR]), "GET", STATUS_PATH)
    missing = status["missing"]
    assert (missing is None) == (not PROC.keys() & MOUNTS.keys())
    assert missing is None or set(mounts(yaml.safe_load(missing["yaml"]))) == PROC.keys()


def test_read_only_root_without_mounts(scene: Scene, bare: Container) -> None:
    remount = ("sh", "-c", 'mount -o remount,ro / && exec "$@"', "sh")
    Container(scene, prefix=(*remount, *user(NONROOT)))
    agent = scene.start(**bare.environment())
    wait_for_message(agent)
    assert mounts(documents(agent)[0]) == MOUNTS
    assert written(agent.process.pid) == []


# --- rights ---------------------------------------------------------------------------------------------------------


def test_rights_that_are_granted_later(scene: Scene) -> None:
    before = scene.conf.read_text()
    scene.api.do(lambda server: server.denied.deny("* *"))
    agent = scene.start()
    message = wait_for_message(agent)
    assert "missing mounts" not in message
    account, role, _ = documents(agent)[-3:]
    assert rules(role) > RIGHTS
    assert account["metadata"]["namespace"] == "istio-system"
    assert scene.conf.read_text() == before
    assert list((scene.directory / "bin").iterdir()) == []
    scene.api.do(lambda server: server.denied.allow())
    agent.wait_ready()
    assert istio.PLUGIN_NAME in scene.conf.read_text()
    assert "has the mounts and rights that it needs now" in agent.log
    assert ask(str(scene.run_dir), "GET", STATUS_PATH)["missing"] is None


def test_only_what_is_refused_is_named(scene: Scene) -> None:
    scene.api.do(lambda server: server.denied.deny("patch pods/status"))
    agent = scene.start(ambient=True)
    message = wait_for_message(agent)
    assert "missing rights: patch pods/status" in message
    assert "list" not in message
    text = json.loads(agent.get(istio.READY_PATH)[1])["yaml"]
    assert [line for line in text.splitlines() if "# missing" in line] == ["  verbs: [patch]  # missing: patch"]


def test_events_that_are_refused_are_a_warning(scene: Scene) -> None:
    scene.api.do(lambda server: server.denied.deny("create events", "get daemonsets"))
    agent = scene.start()
    agent.wait_ready()
    wait_until("the warning", lambda: "missing rights: create events" in agent.log)
    assert "\terror\t" not in agent.log
    assert "daemonsets: " not in agent.log


def test_review_itself_is_refused(scene: Scene) -> None:
    """An administrator has taken the right to ask away: the refusals themselves tell."""
    scene.api.do(lambda server: server.fault("status", prefix="/apis/authorization", status=403, count=-1))
    scene.api.do(lambda server: server.denied.deny("list pods"))
    agent = scene.start()
    wait_until("the message", lambda: "missing rights: get, list, watch pods" in agent.log)
    scene.api.do(lambda server: server.denied.allow())
    agent.wait_ready()


def test_no_token_is_mounted(scene: Scene) -> None:
    agent = scene.start(SERVICE_ACCOUNT_DIR=str(scene.directory / "nothing"))
    message = wait_for_message(agent)
    assert "no token of a service account is mounted" in message
    patch, *_ = documents(agent)
    assert patch["spec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_refused_token(scene: Scene) -> None:
    scene.api.do(lambda server: setattr(server, "tokens", {"another"}))
    agent = scene.start()
    assert "HTTP 401" in wait_for_message(agent)
    assert istio.PLUGIN_NAME not in scene.conf.read_text()


def test_api_that_is_away_is_waited_for_and_not_blamed(scene: Scene) -> None:
    scene.api.crash()
    agent = scene.start()
    wait_until("the conf", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
    assert "\terror\t" not in agent.log


def test_rights_withdrawn_from_an_agent_at_work(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    scene.api.do(lambda server: server.denied.deny("* *"))
    scene.api.do(lambda server: server.fail_watches(403))
    wait_until("the message", lambda: "can no longer do its work" in agent.log)
    assert agent.get(istio.READY_PATH)[0] == 503
    assert istio.PLUGIN_NAME in scene.conf.read_text()
    scene.conf.write_text(scene.conf.read_text().replace(istio.PLUGIN_NAME, "another"))
    wait_until("the repair all the same", lambda: istio.PLUGIN_NAME in scene.conf.read_text())


# --- capabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [0, NONROOT])
@pytest.mark.parametrize("dropped", ["everything", *CHART])
def test_missing_capability(scene: Scene, uid: int, dropped: str) -> None:
    """Iptables in sidecar mode: everything but SYS_PTRACE is indispensable, and root needs no DAC_OVERRIDE."""
    run_as(scene, user(uid, [name for name in CHART if dropped not in ("everything", name)]))
    before = scene.conf.read_text()
    if dropped == "sys_ptrace" or (dropped, uid) == ("dac_override", 0):
        agent = scene.start(NATIVE_NFTABLES="false")
        agent.wait_ready()
        assert f"CAP_{dropped.upper()} (needed for" in agent.log
        return
    done = scene.run(NATIVE_NFTABLES="false")
    assert done.returncode == 77, done.stderr
    wanted = {"everything": [name for name in CHART if uid or name != "dac_override"]}.get(dropped, [dropped])
    for name in wanted:
        assert name == "sys_ptrace" or f"CAP_{name.upper()} (needed for" in done.stderr
    context = yaml.safe_load(done.stderr[done.stderr.index("securityContext:") :])["securityContext"]
    assert set(context["capabilities"]["add"]) == {name.upper() for name in CHART}
    assert context["capabilities"]["drop"] == ["ALL"]
    assert scene.conf.read_text() == before
    assert not scene.run_dir.exists()
    assert list((scene.directory / "bin").iterdir()) == []


@pytest.mark.parametrize("arguments", [("version",), ("help",), ("settings",), ("status",), ("explain", "--help")])
def test_sub_commands_need_nothing(scene: Scene, arguments: tuple[str, ...]) -> None:
    run_as(scene, user(NONROOT, ()))
    scene.directory.chmod(0o755)
    done = scene.run(*arguments, PYTHONPATH="src")
    assert "CAP_" not in done.stderr
    assert done.returncode == (1 if arguments == ("status",) else 0), done.stderr
