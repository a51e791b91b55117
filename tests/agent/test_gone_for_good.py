"""A node whose agent is gone for good: what pods can do with the conf on disk, and with the one a runtime remembers.

Every row of docs/shutdown.md in each of the three ways to be in the conf, with the built plugin run as a runtime does.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from lab.apiserver import ApiServer
from lab.objects import daemonset_object, sidecar_pod, unmeshed_pod
from tests.agent.container import Container, user
from tests.agent.contract import BRIDGE, Node
from tests.agent.scene import NODE, Agent, new_netns, wait_until
from tests.plugin.harness import PLUGIN, ROOT, Outcome, run, variables

from meshcni import istio
from meshcni.errors import CNI_TRY_AGAIN_LATER
from meshcni.host.files import locked

PRIMARY = "10-a.conflist"
CONF = BRIDGE.replace("0.4.0", "1.0.0")
ADDRESS = "10.1.0.5/24"
RESULT = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}], "ips": [{"address": ADDRESS}]}
BRIEFLY = {"AGENT_WAIT_SECONDS": "1", "EXCLUDE_NAMESPACES": "kube-system"}
MODES: dict[str, dict[str, str]] = {
    "chained": {},
    "standalone": {"CHAINED_CNI_PLUGIN": "false", "CNI_CONF_NAME": "istio-cni.conf"},
    "owned": {"ISTIO_OWNED_CNI_CONFIG": "true"},
}
FILES = {"chained": PRIMARY, "standalone": "istio-cni.conf", "owned": "02-istio-cni.conflist"}
Entry = dict[str, Any]
Frozen = Callable[[Callable[[], object]], Agent]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """build/istio-cni, up to date."""
    subprocess.run([ROOT / "scripts" / "build-plugin"], check=True)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def place(node: Node, mode: str) -> Place:
    return Place(node, mode)


class Place:
    """A node with the real plugin, a primary's conf, and one pod of each kind at the API server."""

    def __init__(self, node: Node, mode: str) -> None:
        self.node, self.mode, self.settings = node, mode, BRIEFLY | MODES[mode]
        (node.source / istio.PLUGIN_NAME).write_bytes(PLUGIN.read_bytes())
        node.write(PRIMARY, CONF)
        node.scene.add_pod(unmeshed_pod("shop", "plain"))
        node.scene.add_pod(sidecar_pod("shop", "cart"))

    def ready(self, **environment: str) -> Agent:
        agent = self.node.ready(**(self.settings | environment))
        agent.wait_watching()
        return agent

    def api(self, work: Callable[[ApiServer], object]) -> None:
        self.node.scene.api.do(work)

    def left_behind(self) -> Entry:
        """What a runtime remembers of an agent that could not ask anybody at its end."""
        agent = self.ready()
        entry = self.entry()
        self.api(lambda server: refuse(server, 503))
        stop(agent)
        self.api(lambda server: server.clear_faults())
        assert self.entry() == entry != {}
        return entry

    def entry(self) -> Entry:
        """What the runtime, or the meta plugin that is given our file by name, hands to the plugin now; none: empty."""
        return entry_of(self.node.text(FILES[self.mode]), str(self.node.run))

    def entry_in_use(self) -> Entry:
        """Of the file that the runtime reads, which is the first; with a meta plugin ours never is that."""
        names = [name for name in self.node.listing() if name != "istio-cni.conf"]
        return entry_of(self.node.text(names[0]), str(self.node.run)) if names else {}

    def call(self, command: str, entry: Entry, pod: str = "plain", namespace: str = "shop") -> Outcome:
        stdin = {**entry, "cniVersion": "1.0.0", "name": "dbnet"}
        if self.mode != "standalone":
            stdin["prevResult"] = RESULT
        with new_netns(ADDRESS) as netns:
            environ = variables(command, netns, namespace, pod)
            environ["CNI_ARGS"] = environ["CNI_ARGS"].replace(";K8S_POD_UID=uid-1", "")
            return run(environ, json.dumps(stdin).encode(), path=self.node.plugin)

    def lets_everything_pass(self, *entries: Entry) -> None:
        """What is not in the mesh any more starts, and whatever was there before can go."""
        assert self.node.plugin.exists(), "runtimes say 'failed to find plugin' for ever"
        for entry in filter(None, entries):
            for pod in ("plain", "cart"):
                done = self.call("ADD", entry, pod)
                assert done.status == 0, done.stdout
                assert done.json.get("ips", RESULT["ips"]) == RESULT["ips"]
                gone = self.call("DEL", entry, pod)
                assert (gone.status, gone.stdout) == (0, b"")

    def is_clean(self) -> None:
        """The directory is as it was before we came, but for what its owner has written since."""
        assert self.entry() == {}
        assert self.entry_in_use() == {}
        assert self.node.listing() in ([PRIMARY], [])
        assert not self.node.kubeconfig.exists()
        assert (self.node.run / istio.UNINSTALLED_MARKER_NAME).exists()
        assert self.node.leftovers() == []

    def stays_closed(self, entry: Entry) -> None:
        """Mesh pods wait, everything else that can be told without an agent starts, everything may go."""
        done = self.call("ADD", entry, "cart")
        assert (done.status, done.json["code"]) == (1, CNI_TRY_AGAIN_LATER)
        for way_out in ("install-cni uninstall", istio.UNINSTALLED_MARKER_NAME):
            assert way_out in done.json["details"], done.json
        assert self.call("ADD", entry, namespace="kube-system").status == 0
        assert self.call("ADD", entry, f"{istio.AGENT_POD_PREFIX}next", "istio-system").status == 0
        for pod in ("plain", "cart"):
            assert self.call("DEL", entry, pod).status == 0


def entry_of(text: str, run_dir: str) -> Entry:
    if not text:
        return {}
    document = json.loads(text.replace("RUN", run_dir))
    plugins = document.get("plugins", [document])
    return next((plugin for plugin in plugins if plugin["type"] == istio.PLUGIN_NAME), {})


def stop(agent: Agent) -> str:
    """End it as the kubelet does; returns what it said about the end."""
    assert agent.stop() == 0, agent.log
    return next(line for line in reversed(agent.log.splitlines()) if "at shutdown" in line)


# --- the rows ---------------------------------------------------------------------------------------------------------

OWN, OTHER = "istio-cni-node-abcde", "istio-cni-node-other"
WITHOUT_DAEMONSETS = {"status": 403, "prefix": "/apis/apps/v1"}


def add_daemonset(server: ApiServer, **metadata: Any) -> None:
    daemonset = daemonset_object("istio-system")
    daemonset["metadata"] |= metadata
    server.add("daemonsets", daemonset)
    server.add("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {"zone": "a"}}})


def add_daemonset_elsewhere(server: ApiServer) -> None:
    add_daemonset(server)
    patch = {"spec": {"template": {"spec": {"nodeSelector": {"zone": "b"}}}}}
    server.patch("daemonsets", "istio-system", istio.DAEMONSET_NAME, patch)


def refuse(server: ApiServer, status: int, prefix: str = "/") -> None:
    server.fault("status", status=status, count=-1, prefix=prefix)


def agent_pods(**terminating: bool) -> Callable[[ApiServer], None]:
    """The agent's pods by the last word of their names, and no right to read the DaemonSet."""

    def prepare(server: ApiServer) -> None:
        for number, (word, ends) in enumerate(terminating.items(), 1):
            labels = {"k8s-app": "istio-cni-node", "controller-revision-hash": "2" if word == "newer" else "1"}
            pod = unmeshed_pod("istio-system", f"istio-cni-node-{word}", labels=labels)
            pod["metadata"]["creationTimestamp"] = f"2026-01-0{number}T00:00:00Z"
            if ends:
                pod["metadata"] |= {"deletionTimestamp": "2026-02-01T00:00:00Z", "finalizers": ["a/b"]}
            server.add_pod(pod)
        refuse(server, **WITHOUT_DAEMONSETS)

    return prepare


# Row of docs/shutdown.md, what happens at the API server before the signal, settings of the agent.
CLEANED: dict[str, tuple[str, Callable[[ApiServer], object], dict[str, str]]] = {
    "always": ("0", add_daemonset, {"DISABLE_SAFE_UPGRADE": "true"}),
    "no DaemonSet": ("1", lambda server: None, {}),
    "no DaemonSet, ambient": ("1", lambda server: None, {"AMBIENT_ENABLED": "true"}),
    "DaemonSet being deleted": (
        "1",
        lambda server: add_daemonset(server, deletionTimestamp="2026-01-01T00:00:00Z", finalizers=["a/b"]),
        {},
    ),
    "not for this node": ("1", add_daemonset_elsewhere, {}),
    "account withdrawn": ("4", lambda server: refuse(server, 401), {}),
    "role withdrawn": ("4", lambda server: refuse(server, 403), {}),
    "role withdrawn, ambient": ("4", lambda server: refuse(server, 403), {"AMBIENT_ENABLED": "true"}),
    "all agents end": ("5d", agent_pods(abcde=True, other=True), {}),
    "the only agent": ("5f", agent_pods(abcde=True), {}),
}
KEPT: dict[str, tuple[str, Callable[[ApiServer], object], dict[str, str]]] = {
    "DaemonSet": ("2", add_daemonset, {}),
    "server errors": ("3", lambda server: refuse(server, 503), {}),
    "own pod stays": ("5a", agent_pods(abcde=False), {}),
    "others stay": ("5b", agent_pods(abcde=True, other=False), {}),
    "newer agent": ("5c", agent_pods(abcde=True, newer=True), {}),
    "the only agent, ambient": ("5e", agent_pods(abcde=True), {"AMBIENT_ENABLED": "true"}),
}


@pytest.mark.parametrize("row", CLEANED)
def test_what_is_cleaned_up_blocks_no_pod(place: Place, row: str) -> None:
    name, prepare, settings = CLEANED[row]
    agent = place.ready(**settings)
    remembered = place.entry()
    assert remembered
    place.api(prepare)
    assert stop(agent).endswith(f"row={name}")
    place.is_clean()
    assert place.node.text(PRIMARY) == CONF
    place.lets_everything_pass(remembered, place.entry_in_use())


@pytest.mark.parametrize("row", KEPT)
def test_what_is_kept_waits_for_the_next_agent(place: Place, row: str) -> None:
    name, prepare, settings = KEPT[row]
    agent = place.ready(**settings)
    place.api(prepare)
    said = stop(agent)
    assert said.endswith(f"row={name}")
    place.stays_closed(place.entry())


# --- and then nobody comes --------------------------------------------------------------------------------------------


def test_uninstalled_while_the_api_server_was_away(place: Place) -> None:
    """Row 3 keeps; it says the way out, which needs no API server, and after which every pod starts."""
    agent = place.ready()
    remembered = place.entry()
    place.node.scene.api.crash()
    said = stop(agent)
    assert "install-cni uninstall" in said
    place.stays_closed(remembered)
    done = place.node.scene.run("uninstall", **place.settings)
    assert done.returncode == 0, done.stderr
    place.is_clean()
    place.lets_everything_pass(remembered, place.entry_in_use())


def test_the_next_agent_cleans_up_what_was_kept(place: Place) -> None:
    remembered = place.left_behind()
    stop(place.ready())
    place.is_clean()
    place.lets_everything_pass(remembered)


def test_a_mark_by_hand_lets_pods_pass_until_then(place: Place) -> None:
    agent = place.ready()
    remembered = place.entry()
    place.api(add_daemonset)
    stop(agent)
    (place.node.run / istio.UNINSTALLED_MARKER_NAME).touch()
    place.lets_everything_pass(remembered, place.entry())
    place.ready()
    assert not (place.node.run / istio.UNINSTALLED_MARKER_NAME).exists()


@pytest.mark.parametrize("status", [401, 403])
def test_withdrawn_before_a_new_agent_had_read_anything(place: Place, status: int) -> None:
    """The conf is of an agent before; the new one hears nothing but refusals, then its end."""
    remembered = place.left_behind()
    place.api(lambda server: refuse(server, status))
    agent = place.node.start(**place.settings)
    wait_until("a refusal", lambda: "missing" in agent.log)
    agent.process.send_signal(signal.SIGTERM)
    if status == 403:  # an account that is gone: the API server remembers its token for ten seconds
        wait_until("the end to begin", lambda: "Exit signal" in agent.log)
        place.api(lambda server: (server.clear_faults(), refuse(server, 401)))
    assert agent.process.wait(30) == 0, agent.log
    place.is_clean()
    place.lets_everything_pass(remembered)


def test_stopped_before_the_first_list(place: Place) -> None:
    """The API server is slow to list, and the DaemonSet is gone already."""
    remembered = place.left_behind()
    place.api(lambda server: server.fault("hang", count=-1, prefix="/api/v1/pods"))
    agent = place.node.start(**place.settings)
    wait_until("it lives", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    stop(agent)
    place.is_clean()
    place.lets_everything_pass(remembered)


CLEANUP = ROOT / "docs" / "manifests" / "istio-cni-cleanup.yaml"


def test_the_cleanup_manifest(place: Place) -> None:
    """A pod that needs no plugin to start, with no API server and no account: all that is left of a cluster's node."""
    agent = place.ready()
    remembered = place.entry()
    place.node.scene.api.crash()
    stop(agent)
    spec = yaml.safe_load(CLEANUP.read_text())["spec"]
    assert spec["hostNetwork"] is True
    (container,) = spec["containers"]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"]}
    of_host = {"/opt/cni/bin": place.node.bin, "/etc/cni/net.d": place.node.conf, "/var/run/istio-cni": place.node.run}
    mounts = {mount["mountPath"]: of_host.get(paths[mount["name"]]) for mount in container["volumeMounts"]}
    program = place.node.scene.program
    inside = Container(place.node.scene, {path: folder for path, folder in mounts.items() if folder}, user(0))
    environment = inside.environment() | {one["name"]: one.get("value", NODE) for one in container["env"]}
    owned = {name: value for name, value in MODES[place.mode].items() if name.startswith("ISTIO_OWNED")}
    entry = place.node.conf / FILES[place.mode]
    entry.write_text(entry.read_text().replace(str(place.node.run), istio.RUN_DIR))  # as on a real node
    done = place.node.scene.run(*container["command"][1:], **(environment | owned | {"KUBERNETES_SERVICE_HOST": ""}))
    place.node.scene.program = program
    assert done.returncode == 0, done.stderr
    place.is_clean()
    place.lets_everything_pass(remembered)


# --- while others write -----------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(place: Place) -> Frozen:
    """Lets somebody change the directory at the last moment of an agent, which cannot mend it any more."""

    def end(change: Callable[[], object]) -> Agent:
        agent = place.ready()
        agent.process.send_signal(signal.SIGSTOP)
        change()
        agent.process.send_signal(signal.SIGTERM)
        agent.process.send_signal(signal.SIGCONT)
        assert agent.process.wait(30) == 0, agent.log
        return agent

    return end


def test_the_primary_wrote_its_conf_anew(place: Place, frozen: Frozen) -> None:
    theirs = CONF.replace('"cni0"', '"cni1"')
    frozen(lambda: place.node.write(PRIMARY, theirs))
    place.is_clean()
    assert place.node.text(PRIMARY) == theirs


def test_the_primary_changed_our_copy_of_it(place: Place, frozen: Frozen) -> None:
    theirs = place.node.text

    def change() -> None:
        path = place.node.conf / (PRIMARY if place.mode == "standalone" else FILES[place.mode])
        path.write_text(path.read_text().replace('"cni0"', '"cni1"'))

    frozen(change)
    place.is_clean()
    assert ('"cni1"' in theirs(PRIMARY)) == (place.mode != "owned")


def test_the_primary_is_gone(place: Place, frozen: Frozen) -> None:
    """A copy or a file of ours that is alone then must not become the node's network."""
    remembered: list[Entry] = []

    def change() -> None:
        remembered.append(place.entry())
        (place.node.conf / PRIMARY).unlink()

    frozen(change)
    place.is_clean()
    assert place.node.listing() == []
    place.lets_everything_pass(*remembered)


@pytest.mark.parametrize("mode", ["owned"], indirect=True)
@pytest.mark.parametrize("text", ["{ broken", CONF], ids=["broken", "without our entry"])
def test_our_own_file_was_spoilt(place: Place, frozen: Frozen, text: str) -> None:
    """Broken it would keep containerd from loading any conf; without our entry it would hide the primary for ever."""
    frozen(lambda: (place.node.conf / FILES["owned"]).write_text(text))
    place.is_clean()


def test_the_directory_cannot_be_written(place: Place) -> None:
    """Uninstalled is uninstalled: the entry stays and is said, and the mark lets pods start."""
    agent = place.ready(UNINSTALL_REMOVES_BINARY="true")
    entry = place.entry()
    with locked(str(place.node.conf)):
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(30) == 1
    assert "locked by another process" in agent.log
    assert place.entry() == entry
    place.lets_everything_pass(entry)
    done = place.node.scene.run("uninstall", **place.settings)
    assert done.returncode == 0, done.stderr
    place.is_clean()


# --- two agents -------------------------------------------------------------------------------------------------------


def ready_beside(place: Place, **environment: str) -> Agent:
    """Another agent while the first one runs, as after a forced delete."""
    agent = place.node.start(**(place.settings | {"HEALTH_PORT": "8001", "MONITORING_PORT": "15015"} | environment))
    wait_until("the second to be ready", lambda: agent.get(istio.READY_PATH, 8001)[0] == 200)
    return agent


def test_the_older_of_two_leaves_everything_to_the_newer(place: Place) -> None:
    older = place.ready()
    newer = ready_beside(place)
    stop(older)
    entry = place.entry()
    assert entry
    assert place.call("ADD", entry).status == 0
    stop(newer)
    place.is_clean()
    place.lets_everything_pass(entry)


def test_a_newer_one_that_comes_while_the_older_decides(place: Place) -> None:
    """Installed anew during an uninstall: the older must not take away what is the newer's by now."""
    older = place.ready()
    entry = place.entry()
    place.api(lambda server: server.fault("delay", count=1, prefix="/apis/apps/v1", seconds=3.5))
    older.process.send_signal(signal.SIGTERM)
    wait_until("the older to ask", lambda: "Exit signal" in older.log)
    ready_beside(place)
    assert older.process.wait(30) == 0, older.log
    assert place.entry() == entry
    assert place.node.kubeconfig.exists()
    assert "another agent serves this node" in older.log
