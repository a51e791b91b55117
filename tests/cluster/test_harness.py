"""The cluster itself: what tests of the agent stand on."""

from __future__ import annotations

import http.client
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from lab import namespaces
from lab.clean import leftovers
from lab.clean import main as clean_main
from lab.cluster import Cluster, running, workloads
from lab.cluster.binaries import ROOT
from lab.cluster.client import ready
from lab.node import CGROUP_ROOT, PREFIX, LabError, wait_until

NODES = ("n1", "n2")


@pytest.fixture
def shop(cluster: Cluster) -> Iterator[str]:
    """A namespace of its own for each test."""
    name = cluster.new_namespace("shop")
    yield name
    cluster.delete_namespace(name)


@pytest.fixture
def pods(cluster: Cluster, shop: str) -> dict[str, dict]:
    """A pod on each node."""
    cluster.apply([workloads.plain_pod(shop, f"on-{node}", node=node) for node in NODES])
    return {pod["spec"]["nodeName"]: pod for pod in cluster.wait_ready(shop, count=2)}


def addresses(pod: dict) -> list[str]:
    return [each["ip"] for each in pod["status"]["podIPs"]]


def get(cluster: Cluster, pod: dict, address: str, port: int = workloads.APP_PORT) -> str:
    meta = pod["metadata"]
    return cluster.exec(meta["namespace"], meta["name"], "/workload", "connect", address, str(port))


def test_nodes_are_ready_and_of_both_families(cluster: Cluster) -> None:
    nodes = cluster.api.list("/api/v1/nodes")
    assert [node["metadata"]["name"] for node in nodes] == list(NODES)
    for node in nodes:
        inside = [each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP"]
        assert len(inside) == 2
        assert {":" in address for address in inside} == {False, True}


def test_pods_reach_each_other_across_nodes(cluster: Cluster, pods: dict[str, dict]) -> None:
    for here, there in (NODES, NODES[::-1]):
        found = addresses(pods[there])
        assert len(found) == 2
        for address in found:
            answer = get(cluster, pods[here], address)
            assert answer.startswith(f"pod=on-{there} port=8080 client={addresses(pods[here])[':' in address]}")


def test_service_is_reached_by_its_addresses(cluster: Cluster, pods: dict[str, dict]) -> None:
    check_service(cluster, pods)


def test_service_is_reached_with_nftables(nftables_cluster: Cluster) -> None:
    shop = nftables_cluster.new_namespace("shop")
    nftables_cluster.apply([workloads.plain_pod(shop, f"on-{node}", node=node) for node in NODES])
    check_service(
        nftables_cluster, {pod["spec"]["nodeName"]: pod for pod in nftables_cluster.wait_ready(shop, count=2)}
    )
    assert "kube-proxy" in nftables_cluster.nodes["n1"].run(["nft", "list", "tables"])


def check_service(cluster: Cluster, pods: dict[str, dict]) -> None:
    """From another node, from a pod of the same node and from the node itself, by both families."""
    made = cluster.apply(workloads.service(pods["n1"]["metadata"]["namespace"], "on-n1"))
    found = made[0]["spec"]["clusterIPs"]
    assert len(found) == 2
    for address in found:
        for node in NODES:
            cluster.wait(f"{address} answers a pod of {node}", partial(answers, cluster, pods[node], address))
        shown = f"[{address}]" if ":" in address else address
        assert "pod=on-n1" in fetch(cluster.nodes["n2"].netns, address, shown)


def answers(cluster: Cluster, pod: dict, address: str) -> bool:
    try:
        return "pod=on-n1" in get(cluster, pod, address)
    except LabError:
        return False


def fetch(netns: str, address: str, host: str) -> str:
    connection = http.client.HTTPConnection(host, workloads.APP_PORT)
    connection.sock = namespaces.connect(netns, address, workloads.APP_PORT)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_power_loss_takes_all_but_the_disk(cluster: Cluster, shop: str, pods: dict[str, dict]) -> None:
    node, other = cluster.nodes["n2"], cluster.nodes["n1"]
    node.run(["sh", "-c", "echo kept > /opt/cni/kept; echo gone > /run/gone"])
    netns, old = cluster.pod_netns(pods["n2"]), node.pid
    assert Path(netns).exists()
    node.power_loss()
    assert not Path(netns).exists()
    assert not argument_text(Path(f"/proc/{old}"))
    with pytest.raises(OSError, match=r"."):
        namespaces.connect(other.netns, node.addresses.v4, 10250, timeout_seconds=1).close()
    cluster.wait_nodes(["n2"], ready=False)
    node.start()
    cluster.wait_nodes(["n2"])
    assert cluster.api.get("/api/v1/nodes/n2")["status"]["nodeInfo"]["bootID"] == node.boot_id
    assert node.run(["cat", "/opt/cni/kept"]) == "kept\n"
    assert not node.path("/run/gone").exists()
    back = cluster.wait_pod(shop, "on-n2", lambda pod: ready(pod) and restarts(pod) == 1)
    assert back["metadata"]["uid"] == pods["n2"]["metadata"]["uid"]
    assert "pod=on-n2" in get(cluster, pods["n1"], addresses(back)[0])


def restarts(pod: dict) -> int:
    return sum(each["restartCount"] for each in pod["status"]["containerStatuses"])


def test_kubelet_may_start_before_containerd(cluster: Cluster, shop: str, pods: dict[str, dict]) -> None:
    node = cluster.nodes["n2"]
    node.power_loss()
    node.start(order=("kubelet", "containerd"))
    cluster.wait_pod(shop, "on-n2", lambda pod: ready(pod) and restarts(pod) == 1)


def test_pods_outlive_containerd_kubelet_and_api_server(cluster: Cluster, shop: str, pods: dict[str, dict]) -> None:
    node = cluster.nodes["n1"]
    node.stop_kubelet()
    node.stop_containerd()
    assert "pod=on-n1" in fetch(cluster.nodes["n2"].netns, addresses(pods["n1"])[0], "pod")
    node.start_containerd()
    node.start_kubelet()
    cluster.stop_api_server()
    with pytest.raises(OSError, match=r"."):
        cluster.api.get("/api/v1/nodes")
    assert "pod=on-n1" in fetch(cluster.nodes["n2"].netns, addresses(pods["n1"])[0], "pod")
    cluster.start_api_server()
    cluster.wait_nodes()
    after = {pod["spec"]["nodeName"]: pod for pod in cluster.wait_ready(shop, count=2)}
    assert {name: pod["metadata"]["uid"] for name, pod in after.items()} == {
        name: pod["metadata"]["uid"] for name, pod in pods.items()
    }
    assert [restarts(pod) for pod in after.values()] == [0, 0]


def test_uncaptured_pod_is_seen_as_untouched(cluster: Cluster, pods: dict[str, dict]) -> None:
    for pod in pods.values():
        assert cluster.capture(pod).is_untouched


def test_sidecar_pod_without_agent_fails_its_validation(cluster: Cluster, shop: str) -> None:
    cluster.apply(workloads.sidecar_pod(shop, "cart"))
    pod = cluster.wait_pod(shop, "cart", lambda pod: validation_code(pod) is not None)
    assert validation_code(pod) == 126


def validation_code(pod: dict) -> int | None:
    for status in pod["status"].get("initContainerStatuses") or ():
        for state in (status["state"], status["lastState"]):
            if "terminated" in state:
                return int(state["terminated"]["exitCode"])
    return None


def test_verdict_finds_what_contradicts_itself(cluster: Cluster, shop: str) -> None:
    """With an agent all agree; then rules are taken from one pod and given to another behind its back."""
    market = cluster.new_namespace("market", ambient=True)
    try:
        cluster.install_agent({"ambient": {"enabled": True}, "sidecarReconcile": "off"})
        cluster.install_ztunnel()
        cluster.apply([workloads.sidecar_pod(shop, "cart", node="n1"), workloads.plain_pod(shop, "batch", node="n2")])
        cluster.apply(workloads.plain_pod(market, "web", node="n2"))
        cluster.wait_ready(shop, count=2)
        cluster.wait_ready(market, count=1)
        cluster.wait_agreed()
        found = {name: cluster.capture(cluster.pod(where, name)) for where, name in ((shop, "cart"), (market, "web"))}
        assert found["cart"].both
        assert not found["cart"].tunnel
        assert found["web"].both
        assert found["web"].tunnel
        change_rules(cluster, shop, "cart", "flush ruleset")
        change_rules(cluster, shop, "batch", "add table ip somebody; add chain ip somebody any")
        said = "\n".join(cluster.verdict())
        assert f"{shop}/cart: it is a sidecar pod and not captured" in said
        assert f"{shop}/batch: it is not in the mesh (no-proxy-container) and touched" in said
        assert market not in said
        cluster.nodes["n1"].kill_agent()
        assert not cluster.nodes["n1"].agent_alive()
        cluster.wait_agent()
    finally:
        cluster.delete_namespace(market)
        cluster.uninstall_agent()
        cluster.delete_namespace("istio-system", wait=True)


def change_rules(cluster: Cluster, namespace: str, name: str, order: str) -> None:
    netns = cluster.pod_netns(cluster.pod(namespace, name))
    namespaces.call_in_netns(netns, partial(subprocess.run, ["nft", order], check=True))


def test_command_line_leaves_a_cluster_up_until_it_is_told_to_end_it(tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lab.cluster", *words],
            cwd=ROOT,
            env={**os.environ, running.VARIABLE: str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "no cluster is up" in command("kubectl", "get", "nodes").stderr
    started = command("up", "--nodes", "1")
    try:
        assert started.returncode == 0, started.stderr
        assert "n1" in command("kubectl", "get", "nodes", "-o", "name").stdout
        assert command("helm", "list", "-A").returncode == 0
        assert "up already" in command("up").stderr
    finally:
        ended = command("down")
    assert "has ended" in ended.stdout
    name = next(word for word in ended.stdout.split() if word.startswith(PREFIX))
    assert not {each for each in leftovers() if each.startswith(name)}
    assert command("down").stdout == "no cluster is up\n"


def test_clusters_do_not_know_of_each_other(cluster: Cluster, pods: dict[str, dict]) -> None:
    with Cluster(nodes=1) as other:
        assert [node["metadata"]["name"] for node in other.api.list("/api/v1/nodes")] == ["n1"]
        assert other.pods() == []
        other.apply(workloads.plain_pod("default", "on-n1"))
        other.wait_ready("default", count=1)
        names = [node.name for node in other.nodes.values()]
        assert all((CGROUP_ROOT / "memory" / name).exists() for name in names)
    left = leftovers()
    assert not left & {*names, other.control.name, other.name}
    assert "pod=on-n2" in get(cluster, pods["n1"], addresses(pods["n2"])[0])


def test_kubectl_and_watch(cluster: Cluster, shop: str, pods: dict[str, dict]) -> None:
    assert "on-n1" in cluster.kubectl("-n", shop, "get", "pods")
    assert "NotFound" in cluster.kubectl("-n", shop, "get", "pod", "nobody", check=False)
    path = f"/api/v1/namespaces/{shop}/pods"
    events = cluster.api.watch(path, timeout_seconds=10)
    first = [(kind, pod["metadata"]["name"]) for kind, pod in itertools.islice(events, 2)]
    assert sorted(first) == [("ADDED", "on-n1"), ("ADDED", "on-n2")]


def test_cluster_ends_with_the_process_that_made_it() -> None:
    program = "from lab.cluster import Cluster; c = Cluster(nodes=1).__enter__(); print(c.name, flush=True); input()"
    made = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    with made.stdout as output:
        name = output.readline().strip()
    assert name.startswith(PREFIX)
    assert processes_of(name)
    made.kill()
    made.wait()
    wait_until(f"no process of {name} is left", lambda: not processes_of(name), 20)
    clean_main()
    assert not {each for each in leftovers() if each.startswith(name)}


def processes_of(name: str) -> list[str]:
    """Commands of processes whose host name is that of a node of the cluster."""
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if name in argument_text(path.parent)]


def argument_text(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
