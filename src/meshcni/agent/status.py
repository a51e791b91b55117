"""What the agent says about itself, as one JSON object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from meshcni import __version__
from meshcni.agent.installer import InstallStatus
from meshcni.agent.podadds import AddRecord
from meshcni.agent.programming import Programmer
from meshcni.kube.informer import Informer


def snapshot(
    *,
    uptime_seconds: float,
    not_ready: Sequence[str],
    not_live: Sequence[str],
    install: InstallStatus,
    programmer: Programmer,
    informers: Iterable[Informer[Any]],
    node: str,
    adds: Iterable[AddRecord],
    errors: Mapping[str, float],
    missing_capabilities: str,
    missing: Mapping[str, object] | None = None,
    kernel: Sequence[str] = (),
    ambient: Mapping[str, Any] | None = None,
    sidecars: Mapping[str, Any] | None = None,
    repair: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The status document. Keys are stable; times are UTC, durations name their unit."""
    choice = programmer.choice
    return {
        "version": __version__,
        "node": node,
        "uptimeSeconds": round(uptime_seconds, 1),
        "ready": not not_ready,
        "notReady": list(not_ready),
        "notLive": list(not_live),
        "install": asdict(install),
        "backend": {
            "backend": programmer.config.backend.value,
            "variant": choice.variant if choice else "",
            "why": choice.reason if choice else "not known before the first look",
        },
        "watches": [_watch(informer) for informer in informers],
        "adds": [asdict(record) for record in adds],
        "errors": dict(errors),
        "missingCapabilities": missing_capabilities,
        "missing": missing,
        "kernel": list(kernel),
        "ambient": ambient,
        "sidecars": sidecars,
        "repair": repair,
    }


def _watch(informer: Informer[Any]) -> dict[str, Any]:
    state = informer.state
    return {
        "resource": informer.name,
        "synced": informer.synced.is_set(),
        "connected": state.connected,
        "objects": len(informer.items()),
        "restarts": state.restarts,
        "lastError": state.last_error,
    }
