"""Every metric of the agent, in one table, and the registry that counts them.

The original's names are exact (cni/pkg/install, cni/pkg/repair, cni/pkg/nodeagent: monitoring.go); `ours` marks the
others. No `_created` series, no target_info.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from enum import Enum

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from meshcni import __version__

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4


class Type(Enum):
    """Kinds of metrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: `labels` are its label names, `values` says what they can be (for the reference page)."""

    name: str
    type: Type
    meaning: str
    labels: tuple[str, ...] = ()
    values: str = ""
    buckets: tuple[float, ...] = ()  # seconds
    ours: bool = True


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
ROUND_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 900.0, 3600.0)

INSTALLS = Metric(
    "istio_cni_installs_total",
    Type.COUNTER,
    "times that the files on the node were put or found in place, and failures to do so",
    ("result",),
    "SUCCESS, COPY_BINARIES_FAILURE, CREATE_KUBECONFIG_FAILURE, CREATE_CNI_CONFIG_FAILURE",
    ours=False,
)
INSTALL_READY = Metric("istio_cni_install_ready", Type.GAUGE, "1 when the files on the node are in place", ours=False)
PODS_REPAIRED = Metric(
    "istio_cni_repair_pods_repaired_total",
    Type.COUNTER,
    "broken pods handled",
    ("type", "result"),
    "type: repair, delete, label; result: success, fail, skip",
    ours=False,
)
PLUGIN_REQUESTS = Metric(
    "istio_cni_plugin_requests_total",
    Type.COUNTER,
    "events of plugins on pluginevent.sock",
    ("response_code",),
    "200, 400, 500",
    ours=False,
)
RECONCILE_EVENTS = Metric(
    "nodeagent_reconcile_events_total",
    Type.COUNTER,
    "informer events handled, ambient",
    ("type",),
    "add, update, delete",
    ours=False,
)
ZTUNNEL_CONNECTED = Metric("ztunnel_connected", Type.GAUGE, "connections of ztunnel", ours=False)

ADDS = Metric(
    "istio_cni_adds_total",
    Type.COUNTER,
    "ADDs answered",
    ("verdict", "reason"),
    "verdict: sidecar, ambient, skip, error; reason: see the reasons page",
)
ADD_DURATION = Metric(
    "istio_cni_add_duration_seconds",
    Type.HISTOGRAM,
    "time that an ADD took in the agent",
    ("phase", "verdict"),
    "phase: lookup (pod found), program (sidecar: rules in the kernel), enroll (ambient: ztunnel has it too), total",
    SECONDS,
)
ADDS_IN_PROGRESS = Metric("istio_cni_adds_in_progress", Type.GAUGE, "ADDs being served now")
POD_LOOKUPS = Metric(
    "istio_cni_pod_lookups_total",
    Type.COUNTER,
    "where the pod of an ADD was found",
    ("source",),
    "informer, api, failed",
)
REFUSED = Metric(
    "istio_cni_requests_refused_total",
    Type.COUNTER,
    "requests and connections refused",
    ("socket", "cause"),
    "socket: agent, log, event, control, health, metrics, ztunnel; cause: peer, oversized, malformed, version, "
    "descriptors, slow, busy",
)
ERRORS = Metric("istio_cni_errors_total", Type.COUNTER, "errors by class", ("error",), "see the exit codes page")
CONF_DRIFT = Metric(
    "istio_cni_conf_drift_total",
    Type.COUNTER,
    "times that somebody removed or changed our conf entry, and it was put back",
)
INSTALL_TROUBLES = Metric(
    "istio_cni_install_troubles",
    Type.GAUGE,
    "troubles with the files on the node, broken conf files of others among them",
    ("kind",),
    "blocking (not ready because of it), note",
)
WATCH_SYNCED = Metric("istio_cni_watch_synced", Type.GAUGE, "1 when the informer holds the API's state", ("resource",))
WATCH_OBJECTS = Metric("istio_cni_watch_objects", Type.GAUGE, "objects that the informer holds", ("resource",))
WATCH_FAILURES = Metric(
    "istio_cni_watch_failures", Type.GAUGE, "failures of list and watch since the start", ("resource",)
)
WATCH_REJECTED = Metric(
    "istio_cni_watch_rejected_objects", Type.GAUGE, "objects that could not be read since the start", ("resource",)
)
LOG_LINES = Metric(
    "istio_cni_plugin_log_lines_total",
    Type.COUNTER,
    "lines that plugins sent to log.sock",
    ("result",),
    "printed, malformed, limited",
)
EVENT_LOOP_LAG = Metric("istio_cni_event_loop_lag_seconds", Type.GAUGE, "how late the last beat of the event loop was")
AMBIENT_PODS = Metric(
    "istio_cni_ambient_pods",
    Type.GAUGE,
    "pods that are, or were a moment ago, in ambient mode",
    ("state",),
    "enrolled, pending, leaving, unknown (their parameters cannot be read)",
)
AMBIENT_NOT_DESIRED = Metric(
    "istio_cni_ambient_not_desired", Type.GAUGE, "pods of ambient mode in another state than they should be"
)
AMBIENT_STEPS = Metric(
    "istio_cni_ambient_steps_total",
    Type.COUNTER,
    "steps done to take pods into ambient mode and out of it",
    ("step", "result"),
    "step: find-netns, look, routes, ztunnel-add, rules, addresses, annotate-enabled, annotate-pending, release, "
    "remove-rules, remove-annotation, ztunnel-del, remove-addresses; result: ok, failed",
)
AMBIENT_STEP_DURATION = Metric(
    "istio_cni_ambient_step_duration_seconds", Type.HISTOGRAM, "time that a step took", ("step",), "", SECONDS
)
AMBIENT_DRIFT = Metric(
    "istio_cni_ambient_drift_total",
    Type.COUNTER,
    "times that something of an enrolled pod or of the host was not as it should be, and was mended",
    ("what",),
    "rules, netns, host-rules (the address sets included)",
)
AMBIENT_VERIFICATION = Metric(
    "istio_cni_ambient_verification_seconds",
    Type.HISTOGRAM,
    "time that a verification of all pods took, most of it pauses",
    buckets=ROUND_SECONDS,
)
AMBIENT_SET_ENTRIES = Metric(
    "istio_cni_ambient_set_entries", Type.GAUGE, "addresses that the host's set of enrolled pods should hold"
)
ZDS_MESSAGES = Metric(
    "istio_cni_zds_messages_total",
    Type.COUNTER,
    "requests to ztunnel and what became of them",
    ("type", "result"),
    "type: add, keep, del, snapshot-sent; result: ack, nack, timeout, closed",
)
ZDS_ACK = Metric(
    "istio_cni_zds_ack_seconds", Type.HISTOGRAM, "time from a request to ztunnel's answer", buckets=SECONDS
)
ZDS_CLOSED = Metric(
    "istio_cni_zds_closed_total",
    Type.COUNTER,
    "connections of ztunnel that ended",
    ("cause",),
    "eof, transport, hello-timeout, write-timeout, ack-timeout, unsolicited, second-hello, malformed, oversized, "
    "descriptors, crowded, snapshot, stopped",
)
SIDECAR_EXPECTED = Metric(
    "istio_cni_sidecar_pods_expected", Type.GAUGE, "running sidecar pods of this node, which should be captured"
)
SIDECAR_PODS = Metric(
    "istio_cni_sidecar_pods",
    Type.GAUGE,
    "running sidecar pods of this node by how they were when last looked at",
    ("state",),
    "captured, otherwise (captured, by other rules than an ADD would make now), uncaptured, unknown (not looked at)",
)
SIDECAR_DRIFT = Metric(
    "istio_cni_sidecar_drift_total",
    Type.COUNTER,
    "times that the redirection of a running sidecar pod was not in place, and what was done",
    ("cause", "result"),
    "cause: early (older than the agent or its conf), plugin-not-called, new-sandbox, removed (while it ran), "
    "incomplete; result: healed, reported, failed",
)
SIDECAR_VERIFICATION = Metric(
    "istio_cni_sidecar_verification_seconds",
    Type.HISTOGRAM,
    "time that a look at all running sidecar pods took, most of it pauses",
    buckets=ROUND_SECONDS,
)
BACKEND = Metric(
    "istio_cni_backend_info",
    Type.GAUGE,
    "1 for what programs the rules",
    ("backend", "variant"),
    "backend: iptables, nftables; variant: nft, legacy, nftables",
)
BUILD = Metric("istio_cni_build_info", Type.GAUGE, "1 for this build", ("version", "python"))

METRICS: tuple[Metric, ...] = tuple(value for value in tuple(globals().values()) if isinstance(value, Metric))


class Metrics:
    """Counts. One instance for each process; only the event loop's thread writes."""

    def __init__(self, *, of_process: bool = True) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        of = {kind: [metric for metric in METRICS if metric.type is kind] for kind in Type}
        self._counters = {m: Counter(m.name, m.meaning, m.labels, registry=registry) for m in of[Type.COUNTER]}
        self._gauges = {m: Gauge(m.name, m.meaning, m.labels, registry=registry) for m in of[Type.GAUGE]}
        self._histograms = {
            m: Histogram(m.name, m.meaning, m.labels, registry=registry, buckets=m.buckets) for m in of[Type.HISTOGRAM]
        }
        if of_process:
            ProcessCollector(registry=registry)
        self.set(BUILD, 1, version=__version__, python=platform.python_version())

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[metric]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[metric]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        histogram = self._histograms[metric]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def text(self) -> bytes:
        """The exposition, Prometheus text format 0.0.4."""
        return generate_latest(self._registry)

    def value(self, metric: Metric, **labels: str) -> float:
        """The present value of one series of a counter or gauge; 0 when it was never counted."""
        return self._registry.get_sample_value(metric.name, labels or None) or 0.0

    def series(self, metric: Metric) -> dict[str, float]:
        """All series of a counter or gauge, by their label values joined with commas."""
        made = self._counters.get(metric) or self._gauges[metric]
        return {
            ",".join(sample.labels.values()): sample.value
            for family in made.collect()
            for sample in family.samples
            if sample.name == metric.name
        }
