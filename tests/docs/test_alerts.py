"""Alerts and dashboard: every expression names what the agent exposes, promtool takes them, each alert leads somewhere.

promtool is got out of Debian's package (scripts/get-promtool). Where that fails, these tests fail: an unchecked rule is
one that never fires.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs import names, programs
from tests.docs.pages import OPERATIONS, ROOT, SPAN, Page

ALERTS = OPERATIONS / "alerts.yaml"
DASHBOARD = OPERATIONS / "grafana-dashboard.json"
UNIT_TESTS = Path(__file__).parent / "alerts_test.yaml"
GROUPS: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
TIMEOUT_SECONDS = 240  # a download is part of the first run


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every expression of the dashboard, as a query without its variables."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [one.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*") for one in found]


@pytest.fixture(scope="session")
def promtool() -> Path:
    made = subprocess.run(
        [ROOT / "scripts" / "get-promtool"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert made.returncode == 0, f"the alert rules cannot be checked: {made.stderr}"
    return ROOT / "build" / "promtool"


def run(promtool: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


# --- alerts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_only_what_exists(rule: dict[str, Any]) -> None:
    assert names.wrong_names(rule["expr"]) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happens_what_to_run_and_where_to_read_on(rule: dict[str, Any]) -> None:
    notes = rule["annotations"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert notes["summary"]
    commands = [span for span in SPAN.findall(notes["description"]) if re.match(r"(install-cni|kubectl) ", span)]
    assert commands or "Events" in notes["description"], notes["description"]
    for command in commands:
        programs.check(command)
    path, _, fragment = notes["runbook_url"].partition("#")
    assert fragment in Page(OPERATIONS / path).anchors()
    for label in re.findall(r"\$labels\.(\w+)", " ".join(notes.values())):
        assert label in names.OF_SCRAPE | _labels_of(rule["expr"]), label


def _labels_of(expression: str) -> set[str]:
    return {label for name, _ in names.SERIES.findall(expression) if (m := names.metric_of(name)) for label in m.labels}


def test_alerts_have_names_of_their_own_and_pages_speak_of_no_others() -> None:
    known = [rule["alert"] for rule in RULES]
    assert len(known) == len(set(known))
    spoken = {word for page in OPERATIONS.glob("*.md") for word in re.findall(r"\bIstioCni[A-Za-z]+", page.read_text())}
    assert spoken <= set(known)


@pytest.mark.parametrize(
    "expression",
    [
        "istio_cni_no_such_metric > 0",
        'istio_cni_sidecar_pods{status="uncaptured"}',
        'istio_cni_sidecar_pods{state="uncapture"}',
        'istio_cni_zds_messages_total{result=~"nack|refused"}',
        "sum by (verdict) (istio_cni_conf_drift_total)",
        "istio_cni_adds_total_bucket",
    ],
)
def test_an_expression_that_would_never_match_is_noticed(expression: str) -> None:
    assert names.wrong_names(expression)


def test_promtool_takes_the_alerts(promtool: Path) -> None:
    checked = run(promtool, "check", "rules", ALERTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_the_alerts_fire_when_they_should_and_not_before(promtool: Path) -> None:
    tested = run(promtool, "test", "rules", UNIT_TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_critical_alert_but_the_cluster_s_has_a_unit_test() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"]}
    critical = {rule["alert"] for rule in RULES if rule["labels"]["severity"] == "critical"}
    assert critical - tested == {"IstioCniAgentUnavailable"}


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('istio_cni_sidecar_pods{state="uncaptured"} > 0', 'istio_cni_sidecar_pods{state="captured"} > 0'),
        ("== 0 and on (job, instance) istio_cni_watch_synced", "== 0 unless on (job, instance) istio_cni_watch_synced"),
        ("increase(istio_cni_conf_drift_total[15m]) > 3", "increase(istio_cni_conf_drift_total[15m]) > 300"),
    ],
    ids=["other state", "other join", "other bound"],
)  # fmt: skip
def test_the_unit_tests_notice_a_wrong_rule(promtool: Path, tmp_path: Path, was: str, becomes: str) -> None:
    text = ALERTS.read_text()
    assert was in text
    (tmp_path / "alerts.yaml").write_text(text.replace(was, becomes))
    tests = UNIT_TESTS.read_text().replace("../../docs/operations/alerts.yaml", "alerts.yaml")
    (tmp_path / "tests.yaml").write_text(tests)
    assert run(promtool, "test", "rules", tmp_path / "tests.yaml").returncode != 0


# --- dashboard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_names_only_what_exists(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        assert names.wrong_names(target["expr"]) == []
        labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert labels <= names.OF_SCRAPE | _labels_of(target["expr"])


def test_promtool_takes_every_expression_of_the_dashboard(promtool: Path, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(expressions())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = run(promtool, "check", "rules", tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_is_laid_out_without_overlaps_and_ids_are_unique() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    identities = [panel["id"] for panel in dashboard()["panels"]]
    assert len(identities) == len(set(identities))


def test_the_dashboard_s_variables_are_those_that_its_expressions_use() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", DASHBOARD.read_text()))
    assert used == defined
