"""The names that pages, alerts and dashboards may use, from the code: metrics, labels, settings, Event reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping

from meshcni.agent import ownpod, podadds, prerequisites, repairs, sidecarexaminer, steps
from meshcni.agent.metrics import METRICS, Metric, Type
from meshcni.agent.settings import ROWS

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
OF_PROCESS = {
    f"process_{name}"
    for name in (
        "resident_memory_bytes", "virtual_memory_bytes", "cpu_seconds_total", "open_fds", "max_fds",
        "start_time_seconds",
    )
}  # fmt: skip
OF_CLUSTER = {"kube_daemonset_status_number_unavailable"}  # of kube-state-metrics; the alerts' group says so
OF_CLUSTER_LABELS = {"daemonset"}
OF_SCRAPE = {"job", "instance", "pod", "namespace", "node"}  # labels that scraping adds
NAME = re.compile(r"\b(?:istio_cni|nodeagent|ztunnel|process|kube)_[a-z_]+\b")
SERIES = re.compile(r"\b((?:istio_cni|nodeagent|ztunnel|process|kube)_[a-z_]+)(?:\{([^}]*)\})?")
SELECTOR = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
REASONS = {
    podadds.EVENT_REASON, prerequisites.EVENT_REASON, *ownpod.REASONS, repairs.DELETED, repairs.LABELED,
    repairs.REPAIRED, repairs.NOT_REPAIRED, sidecarexaminer.REPAIRED, sidecarexaminer.MISSING, sidecarexaminer.FAILED,
    steps.FAILED, steps.HEALED,
}  # fmt: skip
VARIABLES = {name for row in ROWS for name in row.variables}


def metric_of(series: str) -> Metric | None:
    """The metric of a series' name, the suffixes of a histogram taken off; None when there is none."""
    if series in BY_NAME:
        return BY_NAME[series]
    found = BY_NAME.get(re.sub(r"_(bucket|sum|count)$", "", series))
    return found if found is not None and found.type is Type.HISTOGRAM else None


def wrong_names(expression: str) -> list[str]:
    """What of a PromQL expression does not exist: metrics, labels, values of labels. Empty when all is well."""
    wrong, labels = [], {"le"} | OF_SCRAPE
    for name, selectors in SERIES.findall(expression):
        metric = metric_of(name)
        if metric is None and name not in OF_PROCESS | OF_CLUSTER:
            wrong.append(f"no metric {name}")
            continue
        own = set(metric.labels) if metric else OF_CLUSTER_LABELS if name in OF_CLUSTER else set()
        labels |= own
        for label, operator, value in SELECTOR.findall(selectors):
            if label not in own | OF_SCRAPE:
                wrong.append(f"{name} has no label {label}")
            elif metric and label in own:
                values = value.split("|") if "~" in operator else [value]
                wrong += [f"{name}: {label} is never {one}" for one in values if not _is_value(metric, one)]
    for group in GROUPING.findall(expression):
        wrong += [f"nothing has label {one}" for one in re.findall(r"\w+", group) if one not in labels]
    return wrong


def _is_value(metric: Metric, value: str) -> bool:
    """Whether the description of the labels' values has it as a word; `resource` is a kind of object."""
    if "resource" in metric.labels:
        return value in ("pods", "namespaces")
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", metric.values) is not None
