"""The cluster itself: what tests of the agent stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.cluster import Cluster, workloads

NODES = ("n1", "n2")


@pytest.fixture
def shop(cluster: Cluster) -> Iterator[str]:
    """A namespace of its own for each test."""
    name = "shop"
    cluster.apply(workloads.namespace(name))
    cluster.wait_service_account(name)
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
