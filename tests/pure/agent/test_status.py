"""What people read: status text, heartbeat, allowance."""

from __future__ import annotations

from meshcni.agent.health import Heartbeat
from meshcni.agent.socketservices import Allowance
from meshcni.cli.statustext import as_text

DOCUMENT = {
    "version": "1",
    "node": "n1",
    "uptimeSeconds": 3.0,
    "ready": False,
    "notReady": ["no conf"],
    "notLive": [],
    "install": {"conf_path": "", "installs": 2, "conf_fights": 1, "notes": ["a broken file"]},
    "backend": {"backend": "iptables", "variant": "nft", "why": "it works"},
    "watches": [{"resource": "pods", "synced": True, "connected": False, "objects": 7, "lastError": "refused"}],
    "adds": [
        {
            "at": "2026-01-01T01:02:03+00:00",
            "pod": "shop/cart",
            "verdict": "sidecar",
            "reason": "sidecar-injected",
            "variant": "nft",
            "milliseconds": {"total": 5.25},
            "message": "It has an injected sidecar.",
        }
    ],
    "errors": {"KubeError": 2.0},
    "missingCapabilities": "missing CAP_NET_RAW",
}


def test_status_says_all_that_matters() -> None:
    text = as_text(DOCUMENT)
    for part in (
        "no: no conf",
        "our entry is in none",
        "a broken file",
        "iptables, variant nft: it works",
        "pods: synced, 7 objects, disconnected: refused",
        "KubeError: 2",
        "missing CAP_NET_RAW",
        "01:02:03  shop/cart  sidecar  sidecar-injected  nft      5.2  It has an injected sidecar.",
    ):
        assert part in text


def test_status_before_the_first_add() -> None:
    assert as_text(DOCUMENT | {"adds": []}).endswith("no ADD since the start")


def test_status_shows_what_to_paste_as_it_is() -> None:
    missing = {"stops": ["no conf"], "degrades": ["no events"], "yaml": "spec:\n  template: {}\n"}
    text = as_text(DOCUMENT | {"missing": missing})
    assert "degraded   no events\n" in text
    assert "\nto be put into the manifest:\nspec:\n  template: {}\n\n" in text
    assert as_text(DOCUMENT | {"missing": None}) == as_text(DOCUMENT)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_heartbeat_that_stops_is_a_reason() -> None:
    clock, lags = Clock(), []
    heart = Heartbeat(30, lags.append, clock)
    assert heart.reasons() == ()
    clock.now += 31
    assert heart.reasons() == ("the event loop has not run for 31 s",)
    heart.beat()
    assert heart.reasons() == ()
    assert lags == [30.0]


def test_allowance_runs_out_and_comes_back() -> None:
    clock = Clock()
    allowance = Allowance(per_second=2, at_once=3, clock=clock)
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
    clock.now += 1
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    clock.now += 100
    assert sum(allowance.take() for _ in range(10)) == 3


SIDECAR = {
    "pod": "shop/cart",
    "uid": "u",
    "state": "captured",
    "reason": "",
    "netnsInode": 4026532000,
    "variant": "nft",
    "seenCaptured": "2026-01-01T01:02:03Z",
    "lastMended": "",
}


def sidecars(*pods: dict[str, object], trouble: str = "") -> str:
    section = {"mode": "heal", "trouble": trouble, "pods": [SIDECAR | pod for pod in pods]}
    return as_text(DOCUMENT | {"sidecars": section})


def test_status_counts_sidecars_and_shows_those_that_need_a_look() -> None:
    text = sidecars(
        {},
        {"pod": "shop/mended", "lastMended": "no rules at all: older than the conf"},
        {"pod": "shop/open", "state": "uncaptured", "reason": "nat is flushed: somebody did it", "netnsInode": None},
        {"pod": "shop/far", "state": "unknown", "reason": "no process of it was found", "variant": ""},
    )
    assert "sidecars   4 pods: 2 captured, 1 uncaptured, 1 not looked at; what is not captured: heal\n" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("shop/")]
    assert [row[:2] for row in rows] == [
        ["shop/open", "uncaptured"],
        ["shop/far", "unknown"],
        ["shop/mended", "captured"],
    ]
    assert "nat is flushed: somebody did it" in text
    assert "mended: no rules at all" in text


def test_status_without_sidecars() -> None:
    assert "sidecars   0 pods on this node; what is not captured: heal\n" in sidecars()
    assert as_text(DOCUMENT | {"sidecars": None}) == as_text(DOCUMENT)
    assert "sidecars   are not looked at: no /proc of the host\n" in sidecars(trouble="no /proc of the host")


def test_status_shows_what_the_repair_controller_is_at() -> None:
    pod = {"pod": "shop/cart", "uid": "u", "cause": "istio-validation failed", "failures": 2, "last": "label: refused"}
    repair = {"mode": "label", "reason": "", "broken": 1, "pods": [pod]}
    text = as_text(DOCUMENT | {"repair": repair})
    assert "repair     label: 1 broken pod\n" in text
    assert "shop/cart: istio-validation failed; label: refused" in text
    assert as_text(DOCUMENT | {"repair": repair | {"broken": 0, "pods": []}}) == as_text(DOCUMENT)
