"""Names, types and labels of the exposition."""

from __future__ import annotations

import pytest

from meshcni.agent.metrics import (
    ADD_DURATION,
    ADDS,
    ERRORS,
    INSTALL_READY,
    INSTALLS,
    METRICS,
    PLUGIN_REQUESTS,
    PODS_REPAIRED,
    RECONCILE_EVENTS,
    ZTUNNEL_CONNECTED,
    Metrics,
)


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
