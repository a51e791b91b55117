"""Names, types and labels of the exposition."""

from __future__ import annotations

import re
from enum import Enum

import pytest

from meshcni.agent.metrics import (
    ADD_DURATION,
    ADDS,
    AMBIENT_DRIFT,
    AMBIENT_NOT_DESIRED,
    AMBIENT_PODS,
    AMBIENT_SET_ENTRIES,
    AMBIENT_STEP_DURATION,
    AMBIENT_STEPS,
    AMBIENT_VERIFICATION,
    ERRORS,
    INSTALL_READY,
    INSTALLS,
    METRICS,
    PLUGIN_REQUESTS,
    PODS_REPAIRED,
    RECONCILE_EVENTS,
    ZDS_ACK,
    ZDS_CLOSED,
    ZDS_MESSAGES,
    ZTUNNEL_CONNECTED,
    Metric,
    Metrics,
)
from meshcni.pods.enrollment import Step
from meshcni.protocols.zdslink import Cause, Result


def exposition(metrics: Metrics) -> list[str]:
    return metrics.text().decode().splitlines()


def test_originals_series_are_exact() -> None:
    metrics = Metrics(of_process=False)
    metrics.count(INSTALLS, result="SUCCESS")
    metrics.set(INSTALL_READY, True)
    metrics.count(PODS_REPAIRED, type="label", result="success")
    metrics.count(PLUGIN_REQUESTS, response_code="500")
    metrics.count(RECONCILE_EVENTS, type="add")
    metrics.set(ZTUNNEL_CONNECTED, 0)
    lines = exposition(metrics)
    for line in (
        'istio_cni_installs_total{result="SUCCESS"} 1.0',
        "# TYPE istio_cni_installs_total counter",
        "istio_cni_install_ready 1.0",
        'istio_cni_repair_pods_repaired_total{result="success",type="label"} 1.0',
        'istio_cni_plugin_requests_total{response_code="500"} 1.0',
        'nodeagent_reconcile_events_total{type="add"} 1.0',
        "ztunnel_connected 0.0",
    ):
        assert line in lines


def test_no_series_has_a_suffix_of_its_own() -> None:
    metrics = Metrics(of_process=False)
    metrics.count(ADDS, verdict="skip", reason="not-injected")
    metrics.observe(ADD_DURATION, 0.002, phase="total", verdict="skip")
    text = "\n".join(exposition(metrics))
    assert "_created" not in text
    assert "_total_total" not in text
    assert 'istio_cni_add_duration_seconds_bucket{le="0.0025",phase="total",verdict="skip"} 1.0' in text


def test_series_of_ambient_mode() -> None:
    metrics = Metrics(of_process=False)
    metrics.set(AMBIENT_PODS, 2, state="enrolled")
    metrics.set(AMBIENT_NOT_DESIRED, 1)
    metrics.set(AMBIENT_SET_ENTRIES, 3)
    metrics.count(AMBIENT_STEPS, step="rules", result="ok")
    metrics.observe(AMBIENT_STEP_DURATION, 0.002, step="rules")
    metrics.count(AMBIENT_DRIFT, what="host-rules")
    metrics.observe(AMBIENT_VERIFICATION, 40)
    metrics.count(ZDS_MESSAGES, type="add", result="ack")
    metrics.observe(ZDS_ACK, 0.002)
    metrics.count(ZDS_CLOSED, cause="eof")
    lines = exposition(metrics)
    for line in (
        'istio_cni_ambient_pods{state="enrolled"} 2.0',
        "istio_cni_ambient_not_desired 1.0",
        "istio_cni_ambient_set_entries 3.0",
        'istio_cni_ambient_steps_total{result="ok",step="rules"} 1.0',
        'istio_cni_ambient_step_duration_seconds_bucket{le="0.0025",step="rules"} 1.0',
        'istio_cni_ambient_drift_total{what="host-rules"} 1.0',
        'istio_cni_ambient_verification_seconds_bucket{le="30.0"} 0.0',
        'istio_cni_ambient_verification_seconds_bucket{le="45.0"} 1.0',
        'istio_cni_zds_messages_total{result="ack",type="add"} 1.0',
        'istio_cni_zds_ack_seconds_bucket{le="0.0025"} 1.0',
        'istio_cni_zds_closed_total{cause="eof"} 1.0',
    ):
        assert line in lines


VALUES = [(AMBIENT_STEPS, Step), (ZDS_MESSAGES, Result), (ZDS_CLOSED, Cause)]


@pytest.mark.parametrize(("metric", "values"), VALUES, ids=lambda value: getattr(value, "name", ""))
def test_the_page_names_every_value(metric: Metric, values: type[Enum]) -> None:
    named = set(re.findall(r"[a-z-]+", metric.values))
    assert named >= {value.value for value in values}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metric_is_exposed_under_its_name(metric: object) -> None:
    assert f"# TYPE {metric.name} {metric.type.value}" in exposition(Metrics(of_process=False))  # type: ignore[attr-defined]


def test_names_are_unique_and_ours_say_whose_they_are() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.name.startswith("istio_cni_") for metric in METRICS if metric.ours)


def test_values_can_be_read_back() -> None:
    metrics = Metrics(of_process=False)
    metrics.count(ERRORS, error="KubeError")
    metrics.count(ERRORS, 2, error="NetnsError")
    assert metrics.value(ERRORS, error="KubeError") == 1
    assert metrics.series(ERRORS) == {"KubeError": 1, "NetnsError": 2}
    assert metrics.value(ERRORS, error="Other") == 0
