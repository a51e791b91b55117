"""Clusters for tests: one with kube-proxy's iptables and one with its nftables, each shared by a session's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.cluster import Cluster
from lab.node import LabUnavailableError


@pytest.fixture(scope="session")
def iptables_cluster() -> Iterator[Cluster]:
    yield from running_cluster()


@pytest.fixture
def cluster(iptables_cluster: Cluster) -> Iterator[Cluster]:
    """Two nodes, kube-proxy with iptables; shared: a test removes its namespaces, what it switched off is started."""
    iptables_cluster.restore()
    yield iptables_cluster
    iptables_cluster.restore()


@pytest.fixture(scope="session")
def nftables_cluster() -> Iterator[Cluster]:
    """Two nodes, kube-proxy with nftables."""
    yield from running_cluster("nftables")


def running_cluster(proxy_mode: str = "iptables") -> Iterator[Cluster]:
    cluster = Cluster(proxy_mode=proxy_mode)
    try:
        cluster.__enter__()
    except LabUnavailableError as error:
        pytest.skip(f"THE CLUSTER TIER CANNOT RUN HERE: {error}")
    try:
        yield cluster
    finally:
        cluster.close()
