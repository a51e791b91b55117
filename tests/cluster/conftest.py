"""Clusters for tests: one with kube-proxy's iptables and one with its nftables, each shared by a session's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.cluster import Cluster
from lab.node import LabUnavailableError


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, kube-proxy with iptables; a test leaves the nodes running and removes its namespaces."""
    yield from running_cluster()


@pytest.fixture(scope="session")
def nftables_cluster() -> Iterator[Cluster]:
    """Two nodes, kube-proxy with nftables."""
    yield from running_cluster(proxy_mode="nftables")


def running_cluster(**options: object) -> Iterator[Cluster]:
    cluster = Cluster(**options)  # type: ignore[arg-type]
    try:
        cluster.__enter__()
    except LabUnavailableError as error:
        pytest.skip(f"THE CLUSTER TIER CANNOT RUN HERE: {error}")
    try:
        yield cluster
    finally:
        cluster.close()
