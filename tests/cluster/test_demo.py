"""The demo on a cluster, as somebody sees it who runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lab.cluster import missing_binaries
from lab.cluster.binaries import ROOT
from lab.node import missing_requirements


def test_demo_shows_every_connection_captured_at_both_ends() -> None:
    if reason := missing_binaries() or missing_requirements():
        pytest.skip(f"THE CLUSTER TIER CANNOT RUN HERE: {reason}")
    done = subprocess.run(
        [sys.executable, "-m", "lab.cluster", "demo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Envoy took 1 out, ztunnel took 1 in" in done.stdout
    assert "ztunnel took 1 out, ztunnel took 1 in" in done.stdout
    assert "ztunnel took 1 out, Envoy took 1 in" in done.stdout
    assert "they do, about every pod" in done.stdout
    assert "nat ISTIO_IN_REDIRECT" in done.stdout
    assert "mounts, cgroups and files are gone" in done.stdout
