"""The guide's DaemonSet on a node: as it stands it starts the image as its own user, who is not root, privileged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from lab.daemonset import DaemonSet
from lab.imageagent import ImageAgent
from lab.mesh import APP_PORT, Mesh
from lab.node import wait_until
from lab.objects import sidecar_pod, unmeshed_pod
from lab.traffic import address_seen
from tests.image.guide import NEWER_EDITION, daemonset
from tests.image.running import FIVE, NONROOT, process_status

from meshcni import istio

MESSAGE = "this agent changes nothing on this node"
READ_ONLY = {"privileged": True, "readOnlyRootFilesystem": True}


@pytest.fixture
def mesh(built_image: Path) -> Iterator[Mesh]:
    """A node that has never had an agent."""
    with Mesh("image") as made:
        made.runtime.start()
        yield made


@contextmanager
def agent_of(mesh: Mesh, manifest: DaemonSet, **security: object) -> Iterator[ImageAgent]:
    """The node's agent, from that manifest and nothing else."""
    agent = ImageAgent(
        mesh.node,
        mesh.runtime,
        mesh.api.environment,
        mesh.node.folder / "serviceaccount",
        manifest=manifest,
        security=security,
        verbatim=True,
    )
    mesh.agent = agent
    try:
        yield agent
    finally:
        agent.close()


def of_the_host(mesh: Mesh) -> dict[str, bytes]:
    """Every file in the directories of the host that an agent may touch, and the rules of its netns."""
    run = mesh.node.path("/run/istio-cni")
    folders = (mesh.runtime.bin_dir, mesh.runtime.conf_dir, run, mesh.node.path("/run/ztunnel"))
    files = {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    present = {str(folder): b"" for folder in folders if folder.exists()}
    return {**files, **present, "rules": mesh.rules(mesh.node.netns).listing.encode()}


def assert_does_its_job(mesh: Mesh, agent: ImageAgent) -> None:
    """Installed, capturing what belongs to the mesh and nothing else, as the image's user with the chart's five."""
    status = process_status(agent.pid)
    assert (status["Uid"].split()[0], int(status["CapEff"], 16), int(status["CapAmb"], 16)) == (
        str(NONROOT),
        FIVE,
        FIVE,
    )
    plugin = mesh.runtime.bin_dir / istio.PLUGIN_NAME
    assert mode(plugin) == 0o755
    assert mode(mesh.runtime.conf_dir / "10-lab.conflist") == 0o644, "as it was before"
    assert mode(mesh.node.path(f"/run/istio-cni/{istio.KUBECONFIG_NAME}")) == 0o600
    assert json.loads(agent.command("status", "-o", "json"))["ready"] is True

    meshed, other = (
        mesh.start_pod(make("shop", make.__name__.replace("_", "-"))) for make in (sidecar_pod, unmeshed_pod)
    )
    assert (mesh.rules(meshed.netns).count, mesh.rules(other.netns).count) == (1, 0)
    envoy = mesh.start_proxy(meshed)
    before = envoy.captured()
    assert address_seen(mesh.node.netns, meshed.address(4), APP_PORT) == "127.0.0.6"
    assert (envoy.captured() - before).inbound == 1


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_without_a_mount_it_says_what_to_paste_and_changes_nothing(mesh: Mesh) -> None:
    mesh.api.do(lambda server: server.denied.deny("* *"))  # the account that a pod gets if it names none
    before = of_the_host(mesh)
    with agent_of(mesh, daemonset()) as agent:
        agent.start(wait=False)
        wait_until("the message", lambda: MESSAGE in agent.log_text(), 30)
        pod = mesh.start_pod(sidecar_pod("shop", "before-the-mounts"))
        assert mesh.rules(pod.netns).count == 0
        status, body = agent.get(istio.HEALTH_PORT, istio.READY_PATH)
        assert (status, agent.get(istio.HEALTH_PORT, istio.LIVE_PATH)[0]) == (503, 200), "unready, and not restarted"
        (line,) = [line for line in agent.log_text().splitlines() if "\terror\t" in line]
        for part in (istio.HOST_BINARY_DIR, istio.HOST_CONF_DIR, istio.RUN_DIR, "list, watch pods"):
            assert part in line
        patch, *role = yaml.safe_load_all(json.loads(body)["yaml"])
        assert [one["kind"] for one in role] == ["ServiceAccount", "ClusterRole", "ClusterRoleBinding"]
        assert agent.terminate() == 0
    assert of_the_host(mesh) == before

    mesh.api.do(lambda server: server.denied.allow())
    with agent_of(mesh, daemonset(patch)) as agent:  # what it said, pasted
        agent.start()
        assert_does_its_job(mesh, agent)


@pytest.mark.parametrize("security", [{}, READ_ONLY], ids=["as it stands", "read-only root"])
def test_with_the_newer_editions_mounts_it_does_its_job(mesh: Mesh, security: dict[str, object]) -> None:
    with agent_of(mesh, daemonset(NEWER_EDITION), **security) as agent:
        agent.start()
        assert_does_its_job(mesh, agent)
        assert agent.terminate() == 0
    assert (mesh.runtime.bin_dir / istio.PLUGIN_NAME).exists(), "a stop is no uninstall"
