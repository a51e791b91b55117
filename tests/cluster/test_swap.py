"""From Istio's own agent to ours and back on a node with running pods: nobody notices.

The original is played by its documented files, sockets and rules (tests/cluster/original.py): ambient mode, which looks
after sidecars and ambient pods. Both ways are the commands of docs/migration.md.
"""

from __future__ import annotations

import errno
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.cluster import Cluster, workloads
from lab.cluster.hostpods import ZTUNNEL, ztunnel_daemon_set
from lab.namespaces import call_in_netns
from lab.streams import Attempt, Stream
from lab.traffic import EchoServers
from tests.cluster import guideblocks, original
from tests.cluster.original import Object
from tests.cluster.releases import CONF, NAMESPACE, Release, entry, release_on, restarts

from meshcni import istio

NODE = "n1"
ECHO_PORT = 9090
PAUSE_SECONDS = 0.15  # between two connections of a stream
ENOUGH = 10  # connections of each stream, before and after a swap
LOOKED_AT = ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"]
NFT = ["nft", "--stateless", "--handle", "list", "ruleset"]
PORT_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
PORTS_OF_PROXIES = "20000 32000"  # those of the streams lie above
PORT_TAKEN = f"Errno {errno.EADDRINUSE}"
ELEMENT = re.compile(r'(\S+) comment "([0-9a-f-]{36})"')
ROUTING = ["ip rule", "ip -6 rule", "ip route show table 100", "ip -6 route show table 100"]


@dataclass(frozen=True)
class World:
    """A cluster with the original on one of its nodes."""

    release: Release
    native_nftables: bool

    @property
    def cluster(self) -> Cluster:
        return self.release.cluster


@pytest.fixture(params=["iptables", "nftables"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    native = request.param == "nftables"
    for release in release_on(request.getfixturevalue("nftables_cluster" if native else "cluster")):
        yield World(release, native)


def test_swap_and_back(world: World) -> None:
    cluster, release = world.cluster, world.release
    shop = release.add_namespace("shop")
    install_original(world)
    make_pods(world, shop)
    cluster.apply(ztunnel_daemon_set())
    wait_for_ztunnel(world, ["ambient"], shop)
    there, look, back = guideblocks.kubectl_blocks()
    before = picture(world, shop)
    with traffic(world, shop) as streams:
        wait_for(streams)
        guideblocks.run(cluster, there, {"IMAGE": release.by_digest})
        assert "ready      yes" in guideblocks.run(cluster, look, {})
        check_ours(world, shop)
        assert picture(world, shop) == before
        start_new_pod(world, shop)
        assert picture(world, shop) == before
        wait_for(streams)
        guideblocks.run(cluster, back, {})
        wait_for_ztunnel(world, ["ambient", "new"], shop)
        check_adopted(world)
        assert picture(world, shop) == before
        wait_for(streams)
    assert streams.failures() == []


# --- the original and its pods ----------------------------------------------------------------------------------------


def install_original(world: World) -> None:
    cluster = world.cluster
    original.import_image(cluster)
    cluster.apply(workloads.namespace(NAMESPACE))
    cluster.apply(original.rights(ambient=True))
    manifest = original.manifest(ambient=True, native_nftables=world.native_nftables)
    config, daemonset = yaml.safe_load_all(original.with_the_hosts_python(manifest))
    daemonset["spec"]["template"]["spec"]["nodeSelector"] = {"kubernetes.io/hostname": NODE}
    container = daemonset["spec"]["template"]["spec"]["containers"][0]
    container["image"] = original.IMAGE
    container["readinessProbe"]["periodSeconds"] = 1  # for a test that waits for two rollouts
    cluster.apply([config, daemonset])
    cluster.wait("the original has installed itself", lambda: entry(cluster.nodes[NODE]))


def make_pods(world: World, shop: str) -> None:
    """Pods that started under the original, with what its plugin and its agent do for them."""
    cluster, node = world.cluster, world.cluster.nodes[NODE]
    dual = workloads.sidecar_pod(shop, "sidecar", node=NODE, validate=())
    proxy = next(each for each in dual["spec"]["containers"] if each["name"] == istio.PROXY_CONTAINER)
    proxy["env"].append({"name": "ISTIO_DUAL_STACK", "value": "true"})
    single = workloads.sidecar_pod(shop, "sidecar-v4", node=NODE, validate=())
    ambient = workloads.ambient_pod(shop, "ambient", node=NODE)
    cluster.apply([dual, single, ambient, workloads.plain_pod(shop, "plain", node=NODE)])
    pods = {pod["metadata"]["name"]: pod for pod in cluster.wait_ready(shop, count=4)}
    for name in ("sidecar", "sidecar-v4"):
        original.program_sidecar(cluster.pod_netns(pods[name]), pods[name], native_nftables=world.native_nftables)
    original.program_ambient(cluster.pod_netns(pods["ambient"]), native_nftables=world.native_nftables)
    original.program_host(node, [pods["ambient"]], native_nftables=world.native_nftables)
    original.annotate(cluster, pods["ambient"])
    original.tell_of_pods(node, [pods["ambient"]])


def wait_for_ztunnel(world: World, names: list[str], shop: str) -> None:
    """Return when ztunnel serves the pods and has heard of all of them from the agent of now."""
    cluster = world.cluster
    cluster.wait_rollout(f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{ZTUNNEL}", f"app={ZTUNNEL}", 60)
    for name in names:
        cluster.wait(f"ztunnel serves {name}", lambda name=name: cluster.capture(cluster.pod(shop, name)).tunnel)


# --- what must not change ---------------------------------------------------------------------------------------------


def picture(world: World, shop: str) -> dict[str, Any]:
    """Rules of pods and host as the kernel's tools list them, handles included; what the API says of the pods."""
    cluster, found, uids = world.cluster, {}, set()
    for name in ("sidecar", "sidecar-v4", "ambient", "plain"):
        pod = cluster.pod(shop, name)
        uids.add(pod["metadata"]["uid"])
        found[name] = {
            "rules": call_in_netns(cluster.pod_netns(pod), rules),
            "annotations": pod["metadata"].get("annotations"),
            "containers": [each["containerID"] for each in pod["status"]["containerStatuses"]],
            "restarts": restarts(pod),
        }
    found["host"] = {"rules": host_rules(world, uids)}
    return found


def rules() -> list[str]:
    commands = [*([each] for each in LOOKED_AT), NFT, *(each.split() for each in ROUTING)]
    lines = [line for command in commands for line in output(command).splitlines()]
    return [re.sub(r" \[\d+:\d+\]$", "", line) for line in lines if not line.startswith("#")]


def output(command: list[str]) -> str:
    """What a command prints; an empty routing table is an error to `ip`, and warnings go elsewhere."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def host_rules(world: World, uids: set[str]) -> list[str]:
    """The mesh's part of the host's rules, and what its address sets hold of these pods."""
    node = world.cluster.nodes[NODE]
    if world.native_nftables:
        text = node.run(["nft", "--stateless", "list", "table", "inet", "istio-ambient-nat"])
        lines = [line for line in text.splitlines() if " snat to " in line or "hook" in line]
    else:
        text = node.run(["ipset", "save"])
        saved = node.run(["iptables-nft-save"]) + node.run(["ip6tables-nft-save"])
        lines = [line for line in saved.splitlines() if "ISTIO" in line]
    return lines + sorted(address for address, uid in ELEMENT.findall(text) if uid in uids)


# --- traffic ----------------------------------------------------------------------------------------------------------


class Streams(dict[str, Stream]):
    """By name, until closed."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, stream: Stream) -> None:
        self[name] = self._stack.enter_context(stream)

    def failures(self) -> list[tuple[str, Attempt]]:
        """Connections that failed, by the name of their stream; one whose own port was taken has not been one."""
        found = [(name, each) for name, stream in self.items() for each in stream.failures()]
        return [(name, each) for name, each in found if PORT_TAKEN not in each.error]

    def serve(self, *netns: str) -> None:
        servers = self._stack.enter_context(EchoServers())
        for each in netns:
            servers.serve(each, ECHO_PORT)


def traffic(world: World, shop: str) -> Streams:
    """Connections out of and into each pod of the mesh, one after the other without end.

    Without IPv6 where the original programs none: natively in nftables it redirects that all the same, to itself.
    """
    cluster, streams = world.cluster, Streams()
    pods = {name: cluster.pod(shop, name) for name in ("sidecar", "sidecar-v4", "ambient", "plain")}
    netns = {name: cluster.pod_netns(pod) for name, pod in pods.items()}
    for each in netns.values():
        call_in_netns(each, lambda: Path(PORT_RANGE).write_text(PORTS_OF_PROXIES))
    streams.serve(*netns.values())
    for name in ("sidecar", "sidecar-v4", "ambient"):
        for version in (4, 6) if name != "sidecar-v4" else (4,):
            for source, target in ((name, "plain"), ("plain", name)):
                address = address_of(pods[target], version)
                stream = Stream(netns[source], address, ECHO_PORT, pause_seconds=PAUSE_SECONDS)
                streams.add(f"{source} to {target}, IPv{version}", stream)
    return streams


def address_of(pod: Object, version: int) -> str:
    addresses = (each["ip"] for each in pod["status"]["podIPs"])
    return next(address for address in addresses if (":" in address) == (version == 6))


def wait_for(streams: Mapping[str, Stream]) -> None:
    for stream in streams.values():
        stream.wait(ENOUGH)


# --- under our agent, and after it ------------------------------------------------------------------------------------


def check_ours(world: World, shop: str) -> None:
    """Our agent has taken over: conf, sockets, ztunnel, and has verified what it found."""
    release, cluster = world.release, world.cluster
    node = cluster.nodes[NODE]
    status = release.status(NODE)
    assert [(pod["state"], pod["annotation"], pod["attempts"]) for pod in status["ambient"]["pods"]] == [
        ("enrolled", "enabled", 0)
    ]
    assert status["ambient"]["hostRules"] == "in place"
    # without IPv6 because the original gives none to a pod without ISTIO_DUAL_STACK: captured all the same
    states = {pod["pod"].rpartition("/")[2]: pod["state"] for pod in status["sidecars"]["pods"]}
    assert states == {"sidecar": "captured", "sidecar-v4": "otherwise"}
    wait_for_ztunnel(world, ["ambient"], shop)
    assert entry(node) is not None


def start_new_pod(world: World, shop: str) -> None:
    cluster = world.cluster
    cluster.apply(workloads.ambient_pod(shop, "new", node=NODE))
    new = cluster.wait_pod(shop, "new")
    assert cluster.capture(new).tunnel
    original.tell_of_pods(cluster.nodes[NODE], [cluster.pod(shop, "ambient"), new])


def check_adopted(world: World) -> None:
    """What the original found when it came back is what it would have written itself, or more."""
    node = world.cluster.nodes[NODE]
    found = original.found_at_start(node)
    assert "in use" not in found["sockets"].values()
    assert found["plugin"]
    kubeconfig = yaml.safe_load(found["kubeconfig"])
    assert kubeconfig["current-context"] == "istio-cni-context"
    assert kubeconfig["users"][0]["user"]["token"]
    plugins = json.loads(found["confs"][CONF.rpartition("/")[2]])["plugins"]
    (ours,) = (plugin for plugin in plugins if plugin["type"] == istio.PLUGIN_NAME)
    theirs = entry(node)
    assert theirs is not None
    assert {key: ours.get(key) for key in theirs} == theirs
