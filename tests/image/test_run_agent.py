"""The agent from the image on a node: its children, migrating to it and back, debugging it without a shell."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lab.agent import Agent, AgentOptions
from lab.container import ContainerSpec, Mount, Security
from lab.cri import CriError
from lab.imageagent import ImageAgent, import_image
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.node import wait_until
from lab.objects import ambient_pod, sidecar_pod
from lab.traffic import address_seen
from tests.image.running import FIVE, NONROOT, dev_image, process_status
from tests.node.ambientworld import BACKENDS, disagreements, kernel, start_ambient, wait_agreement, wait_enrolled

IPTABLES = AgentOptions(nftables=False, force_iptables="nft")
ROUNDS = "istio_cni_ambient_verification_seconds_count"
PROGRAM = "/usr/sbin/xtables-nft-multi"


@pytest.fixture
def mesh(built_image: Path) -> Iterator[Mesh]:
    with Mesh("image") as made:
        made.runtime.start()
        yield made


class WitnessedAgent(ImageAgent):
    """Its iptables programs say what they were started with."""

    def spec(self) -> ContainerSpec:
        made = super().spec()
        folder = self.node.folder
        places = (Mount(str(folder / "witness"), PROGRAM), Mount(str(folder / "witnessed"), "/host/witnessed"))
        return replace(made, mounts=(*made.mounts, *places))


@pytest.mark.parametrize("security", [{}, {"privileged": True, "capabilities": {}}], ids=["the five", "privileged"])
def test_children_have_exactly_the_five(mesh: Mesh, security: dict[str, object]) -> None:
    folder = mesh.node.folder
    source = Path(__file__).parent / "witness.c"
    subprocess.run(["gcc", "-Os", "-static", "-o", folder / "witness", source], check=True)
    account = folder / "serviceaccount"
    agent = WitnessedAgent(mesh.node, mesh.runtime, mesh.api.environment, account, security=security)
    root = agent.image.unpack(folder / "unpacked")
    (folder / "witnessed").mkdir()
    (root / PROGRAM.lstrip("/")).rename(folder / "witnessed" / "xtables-nft-multi")
    mesh.agent = agent
    agent.start(IPTABLES)
    pod = mesh.start_pod(sidecar_pod("shop", "witnessed"))
    assert mesh.rules(pod.netns).iptables_nft
    agent.close()
    text = mesh.node.path("/run/istio-cni/witness").read_text()
    runs = [part for part in text.split("Name:\t") if part]
    assert runs
    for run in runs:
        values = {name: value.strip() for name, _, value in (line.partition(":") for line in run.splitlines()[1:])}
        assert values["Uid"].split() == [str(NONROOT)] * 4
        assert {kind: int(values[kind], 16) for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == dict.fromkeys(
            ("CapEff", "CapPrm", "CapInh", "CapAmb"), FIVE
        )


# --- from the checkout's agent, root, to the image's and back ---------------------------------------------------------


def both_agents(mesh: Mesh) -> tuple[ImageAgent, Agent]:
    """The node's agent from the image, and one from the checkout beside it; neither runs."""
    image = mesh.agent
    assert isinstance(image, ImageAgent)
    assert image.pod.sandbox, "from here on all rules are listed by the same program, the image's"
    return image, Agent(mesh.node, mesh.runtime, mesh.api.environment, mesh.node.folder / "serviceaccount")


def test_running_sidecar_pods_do_not_notice_a_migration(mesh: Mesh) -> None:
    image, first = both_agents(mesh)
    mesh.agent = first
    first.start(IPTABLES)
    pod = mesh.start_pod(sidecar_pod("shop", "from-before"))
    envoy = mesh.start_proxy(pod)
    rules = mesh.rules(pod.netns).listing
    for number, (old, new) in enumerate(((first, image), (image, first))):
        assert old.terminate() == 0
        mesh.agent = new
        new.start(IPTABLES)
        assert mesh.rules(pod.netns).listing == rules
        before = envoy.captured()
        assert address_seen(mesh.node.netns, pod.address(4), APP_PORT) == "127.0.0.6"
        assert (envoy.captured() - before).inbound == 1
        later = mesh.start_pod(sidecar_pod("shop", f"from-{number}"))
        assert mesh.rules(later.netns).count == 1
        assert mesh.rules(pod.netns).listing == rules


@pytest.mark.parametrize("backend", ["iptables-nft", "iptables-legacy", "nftables"])
def test_running_ambient_pods_do_not_notice_a_migration(mesh: Mesh, backend: str) -> None:
    image, first = both_agents(mesh)
    socket = image.ztunnel_socket  # one ztunnel, which stays, at the manifest's place
    options = BACKENDS[backend]
    options = replace(options, environment={**options.environment, "ZTUNNEL_UDS_ADDRESS": str(socket)})
    mesh.node.run(["mkdir", "-p", str(socket.parent)])
    mesh.agent = first
    first.start(options)
    mesh.agent = image
    ztunnel = mesh.start_ztunnel()
    mesh.agent = first
    pods = start_ambient(mesh, "client", "server")
    rules = [kernel(mesh, pod.netns) for pod in pods]
    wait_agreement(mesh, rules[0])
    started = ztunnel.state()["started"]
    for number, (old, new) in enumerate(((first, image), (image, first))):
        host, connections = kernel(mesh, mesh.node.netns), ztunnel.state()["connections"]
        assert old.terminate() == 0
        mesh.agent = new
        new.start(options)
        ztunnel.wait("it is told again", lambda now, n=connections: now["ready"] and now["connections"] > n)
        wait_until("a round of verification", lambda agent=new: agent.metric(ROUNDS) > 0, 30)
        assert [kernel(mesh, pod.netns) for pod in pods] == rules
        assert kernel(mesh, mesh.node.netns) == host
        assert ztunnel.state()["started"] == started + number, "no running pod was told as new"
        assert "mended" not in new.log_text()
        later: RunningPod = mesh.start_pod(ambient_pod("shop", f"later-{number}"))
        wait_enrolled(mesh, [later])
        found = disagreements(mesh, kernel(mesh, later.netns))
        # versions of the tools put the same rule into different instructions, so pods of the other agent look different
        assert [line for line in found if not line.endswith("are others")] == []


def test_the_nodes_own_nft_lists_what_the_image_wrote(mesh: Mesh) -> None:
    own = mesh.node.folder / "own-nft"
    shutil.copy2("/usr/sbin/nft", own)  # before the node's is covered by the image's
    mesh.agent.start(BACKENDS["nftables"])
    mesh.start_ztunnel()
    pods = start_ambient(mesh, "listed")
    for netns in (mesh.node.netns, pods[0].netns):
        assert "istio-ambient" in mesh.node.run([str(own), "list", "ruleset"], netns=netns)


# --- debugging without a shell ----------------------------------------------------------------------------------------


def test_an_ephemeral_container_of_the_dev_variant_sees_the_agent(mesh: Mesh, built_image: Path) -> None:
    agent = mesh.agent
    assert isinstance(agent, ImageAgent)
    agent.start()
    container, pod = agent.container, agent.pod
    assert container is not None
    with pytest.raises(CriError, match=r"not found|no such file"):
        container.exec("sh", "-c", "true")
    assert "ready" in container.check("install-cni", "status")
    assert "install-cni" in container.check("install-cni", "help")

    image = dev_image(built_image)
    import_image(mesh.runtime, image)
    security = Security(add=("SYS_PTRACE", "NET_ADMIN", "NET_RAW"))
    spec = ContainerSpec(image.name, "debugger", ("sleep", "600"), security=security)
    debugger = pod.run(spec, beside=container)
    assert process_status(agent.pid)["Uid"].split()[0] == str(NONROOT)
    assert "install-cni" in debugger.check("bash", "-c", "cat /proc/1/comm; ls /proc/1/root/usr/local/bin")
    assert "istio-cni" in debugger.check("ls", "/proc/1/root/host/opt/cni/bin")
    assert ":8000" in debugger.check("ss", "-Hltn"), "the agent's netns"
    assert "nf_tables" in debugger.check("iptables", "-V")
    assert debugger.check("apt", "--version").startswith("apt 3")
    assert "ii  bash" in debugger.check("dpkg", "-l", "bash")
    debugger.stop(0)
