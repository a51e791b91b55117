"""Commands of docs/migration.md, run on a cluster as somebody with kubectl and Helm runs them."""

from __future__ import annotations

from collections.abc import Mapping

from lab.cluster import Cluster
from lab.cluster.binaries import helm, hyperkube
from tests.image import guides

GUIDE = "migration.md"
KUBECTL = '#!/bin/sh\nexec {} kubectl "$@"\n'
FAILED = "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR"


def run(cluster: Cluster, block: str, variables: Mapping[str, str]) -> str:
    """Run a block; returns its output. LabError with the command that failed."""
    programs = cluster.control.folder / "programs"
    if not programs.exists():
        programs.mkdir()
        (programs / "kubectl").write_text(KUBECTL.format(hyperkube()))
        (programs / "kubectl").chmod(0o755)
        (programs / "helm").symlink_to(helm())
    environment = cluster.command_environment()
    environment |= {"PATH": f"{programs}:{environment['PATH']}", **variables}
    return cluster.control.run(
        ["bash", "-c", f"set -euo pipefail; {FAILED}\n{block}"], environment=environment, timeout_seconds=120
    )


def kubectl_blocks() -> list[str]:
    """The way there, the look, the way back, with kubectl alone."""
    found = guides.blocks(GUIDE, "bash")
    there, _, back = found
    assert "set image" in there
    assert "rollout undo" in back
    return found


def helm_blocks() -> list[str]:
    """The way there and the way back with Helm."""
    found = guides.blocks(GUIDE, "helm")
    there, back = found
    assert "helm -n istio-system upgrade" in there
    assert "rollback" in back
    return found
