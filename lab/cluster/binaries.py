"""Where the cluster's own programs are: those that scripts/build-kubernetes makes."""

from __future__ import annotations

from pathlib import Path

from lab.node import LabError

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "kubernetes"


def hyperkube() -> Path:
    """Return the binary that holds every Kubernetes daemon, etcd and kubectl; LabError when it has not been built."""
    return _built("hyperkube")


def helm() -> Path:
    """Return helm's binary; LabError when it has not been built."""
    return _built("helm")


def missing_binaries() -> str:
    """Return why no cluster can run here as far as its binaries go; empty when it can."""
    absent = [name for name in ("hyperkube", "helm") if not (FOLDER / name).exists()]
    return f"not built: {', '.join(absent)} (scripts/build-kubernetes builds them)" if absent else ""


def _built(name: str) -> Path:
    found = FOLDER / name
    if not found.exists():
        raise LabError(f"no {found} (scripts/build-kubernetes builds it)")
    return found
