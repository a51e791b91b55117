"""What ambient mode tells of itself: gauges, the section of the status document, the counters of ZDS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from meshcni.agent import metrics as m
from meshcni.agent.hostside import HostSide
from meshcni.agent.metrics import Metrics
from meshcni.agent.podrecord import PodRecord
from meshcni.agent.reconciler import Reconciler
from meshcni.agent.ztunnel import Meter, ZtunnelServer
from meshcni.pods.enrollment import Intent, Life

STATES = ("enrolled", "pending", "leaving", "unknown")


def measure(metrics: Metrics, records: Reconciler, host: HostSide) -> None:
    """Set the gauges."""
    states = [state_of(record, records) for record in records]
    for state in STATES:
        metrics.set(m.AMBIENT_PODS, states.count(state), state=state)
    metrics.set(m.AMBIENT_NOT_DESIRED, sum(not records.is_desired(record) for record in records))
    metrics.set(m.AMBIENT_SET_ENTRIES, len(host.owners))


def status(records: Reconciler, host: HostSide, ztunnel: ZtunnelServer) -> dict[str, Any]:
    """What `install-cni status` shows of ambient mode."""
    return {
        "ztunnel": [asdict(connection) for connection in ztunnel.connections()],
        "hostRules": host.trouble or "in place",
        "setEntries": len(host.owners),
        "pods": [pod_status(record, records) for record in sorted(records, key=lambda record: record.name)],
    }


def state_of(record: PodRecord, records: Reconciler) -> str:
    """One of STATES; a pod is enrolled only when its rules were seen."""
    if record.intent is Intent.LEAVE or record.life is Life.ENDED:
        return "leaving"
    if record.parameters_error is not None:
        return "unknown"
    known = record.actual.enrolled and record.actual.rules == record.wanted_rules
    return "enrolled" if known and records.is_desired(record) else "pending"


def pod_status(record: PodRecord, records: Reconciler) -> Mapping[str, Any]:
    """One pod in the status document."""
    actual = records.actual(record)
    netns = record.netns
    return {
        "pod": record.name,
        "uid": record.uid,
        "state": state_of(record, records),
        "annotation": actual.annotation.value,
        "netnsInode": netns.id.inode if netns else None,
        "rules": actual.rules,
        "wantedRules": record.wanted_rules,
        "ztunnelAcked": actual.acked is not None and netns is not None and actual.acked == netns.id,
        "addresses": sorted(map(str, record.addresses)),
        "inSet": sorted(map(str, actual.addresses)),
        "source": record.source,
        "attempts": record.attempts,
        "lastError": str(record.parameters_error or record.error or ""),
        "lastMended": "; ".join(record.healed),
    }


def zds_meter(metrics: Metrics) -> Meter:
    """Count what the ZDS server tells."""
    return Meter(
        connected=lambda count: metrics.set(m.ZTUNNEL_CONNECTED, count),
        message=lambda kind, result: metrics.count(m.ZDS_MESSAGES, type=kind, result=result),
        latency=lambda _kind, seconds: metrics.observe(m.ZDS_ACK, seconds),
        closed=lambda cause: metrics.count(m.ZDS_CLOSED, cause=cause),
        refused=lambda cause: metrics.count(m.REFUSED, socket="ztunnel", cause=cause),
    )
