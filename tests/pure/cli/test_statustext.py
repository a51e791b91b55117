"""The status document of an agent in ambient mode, as people read it."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshcni.agent.ambientreport import pod_status
from meshcni.agent.podrecord import PodRecord
from meshcni.agent.reconciler import Reconciler
from meshcni.agent.zdsrecords import ConnectionStatus
from meshcni.cli.control import AgentFailedError
from meshcni.cli.statustext import as_text
from meshcni.pods.enrollment import Intent
from meshcni.pods.model import Pod

LINK: dict[str, Any] = {
    "number": 2,
    "pid": 77,
    "since": "2026-01-01T01:02:03+00:00",
    "state": "ready",
    "version": 1,
    "newest": True,
    "acked": 2,
    "pending": 1,
    "last_error": "",
}
POD: dict[str, Any] = {
    "pod": "shop/cart",
    "uid": "u1",
    "state": "enrolled",
    "annotation": "enabled",
    "netnsInode": 4026532000,
    "rules": "0123456789abcdef",
    "wantedRules": "0123456789abcdef",
    "ztunnelAcked": True,
    "addresses": ["10.0.0.1"],
    "inSet": ["10.0.0.1"],
    "source": "add",
    "attempts": 0,
    "lastError": "",
    "lastMended": "",
}
WAITING: dict[str, Any] = POD | {
    "pod": "shop/till",
    "state": "pending",
    "annotation": "pending",
    "netnsInode": None,
    "rules": "",
    "ztunnelAcked": False,
    "addresses": ["10.0.0.2", "fd00::2"],
    "inSet": [],
    "attempts": 3,
    "lastError": "no ztunnel is connected",
}
AMBIENT: dict[str, Any] = {"ztunnel": [LINK], "hostRules": "in place", "setEntries": 1, "pods": [POD, WAITING]}
DOCUMENT: dict[str, Any] = {
    "version": "1",
    "node": "n1",
    "uptimeSeconds": 3.0,
    "ready": True,
    "notReady": [],
    "notLive": [],
    "install": {"conf_path": "/etc/cni/net.d/10-a.conflist", "installs": 1, "conf_fights": 0, "notes": []},
    "backend": {"backend": "nftables", "variant": "nftables", "why": "nftables is asked for"},
    "watches": [],
    "adds": [],
    "errors": {},
    "missingCapabilities": "",
    "ambient": AMBIENT,
}


def lines(**ambient: Any) -> list[str]:
    return as_text(DOCUMENT | {"ambient": AMBIENT | ambient}).splitlines()


def test_the_parts_of_ambient_mode() -> None:
    shown = lines()
    assert "ztunnel    ready, newest: pid 77 since 2026-01-01T01:02:03+00:00, 2 pods acknowledged, 1 waiting" in shown
    assert "host rules in place; 1 address in the set" in shown
    assert "ambient    2 pods: 1 enrolled, 1 pending" in shown
    header = next(number for number, line in enumerate(shown) if line.startswith("POD "))
    waiting, enrolled = shown[header + 1 : header + 3]
    assert waiting.split() == [
        *("shop/till", "pending", "pending", "-", "-", "(wanted", "0123456789abcdef)", "-"),
        *("-", "(wanted", "10.0.0.2,", "fd00::2)", "3", "no", "ztunnel", "is", "connected"),
    ]
    assert enrolled.split() == [
        *("shop/cart", "enrolled", "enabled", "4026532000", "0123456789abcdef", "acked", "10.0.0.1", "0"),
    ]


def test_columns_stand_below_their_headings() -> None:
    shown = lines()
    header = next(line for line in shown if line.startswith("POD "))
    row = next(line for line in shown if line.startswith("shop/till"))
    assert header.index("LAST ERROR") == row.index("no ztunnel is connected")


def test_without_ztunnel_and_without_pods() -> None:
    shown = lines(ztunnel=[], pods=[], setEntries=0, hostRules="the host's probe rules are not in place: no set")
    assert "ztunnel    none is connected: new ambient pods wait, running ones keep their proxies" in shown
    assert "host rules the host's probe rules are not in place: no set; 0 addresses in the set" in shown
    assert "ambient    0 pods on this node" in shown
    assert not any(line.startswith("POD ") for line in shown)


def test_an_error_of_a_connection_is_told() -> None:
    assert any(
        line.endswith("; last error: nack: no room") for line in lines(ztunnel=[LINK | {"last_error": "nack: no room"}])
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lastMended": "chain nat ISTIO_PRERT is missing"}, "mended: chain nat ISTIO_PRERT is missing"),
        ({"inSet": ["10.0.0.9"]}, "10.0.0.9 (wanted 10.0.0.1)"),
        ({"rules": "fedcba9876543210"}, "fedcba9876543210 (wanted 0123456789abcdef)"),
        ({"state": "leaving", "annotation": "", "addresses": [], "inSet": []}, "leaving  -"),
    ],
)
def test_what_a_pod_has(changes: dict[str, Any], said: str) -> None:
    assert any(said in line for line in lines(pods=[POD | changes]))


def test_an_agent_without_ambient_mode_says_nothing_of_it() -> None:
    text = as_text(DOCUMENT | {"ambient": None})
    assert "ztunnel" not in text
    assert text == as_text({key: value for key, value in DOCUMENT.items() if key != "ambient"})


@pytest.mark.parametrize("ambient", [{}, {"ztunnel": [], "hostRules": "", "setEntries": 0, "pods": [{"pod": "a"}]}, []])
def test_a_document_of_another_release_is_told_from_a_fault(ambient: Any) -> None:
    with pytest.raises(AgentFailedError, match="status is of another form"):
        as_text(DOCUMENT | {"ambient": ambient})


def test_the_fields_are_those_that_an_agent_tells() -> None:
    record = PodRecord(Pod("shop", "cart", "u1"), Intent.ENROLL, "add")
    records = SimpleNamespace(actual=lambda record: record.actual, is_desired=lambda _record: False)
    assert set(pod_status(record, cast(Reconciler, records))) == set(POD)
    assert {one.name for one in fields(ConnectionStatus)} == set(LINK)
