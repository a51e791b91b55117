"""What is told of running sidecar pods in the status document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshcni.agent.sidecarrecord import SidecarRecord


def status(mode: str, trouble: str, records: Iterable[SidecarRecord]) -> dict[str, Any]:
    """The section of the status document. `trouble`: why no pod is looked at, empty when pods are."""
    return {
        "mode": mode,
        "trouble": trouble,
        "pods": [_pod(record) for record in sorted(records, key=lambda record: record.pod.full_name)],
    }


def _pod(record: SidecarRecord) -> dict[str, Any]:
    look, netns = record.look, record.netns
    return {
        "pod": record.pod.full_name,
        "uid": record.pod.uid,
        "state": record.state.value,
        "reason": record.reason,
        "netnsInode": netns.inode if netns else None,
        "variant": look.variant if look else "",
        "seenCaptured": record.seen_at,
        "lastMended": record.mended,
    }
