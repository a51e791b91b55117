"""Which pods are broken, what is done with them, and how long a failure waits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.pods.model import InitStatus, Pod, Termination, pod_from_object
from meshcni.pods.repair import (
    BACK_OFF_SECONDS,
    JITTER,
    Action,
    Mode,
    RepairRules,
    back_off_seconds,
    choose_mode,
    detect,
    treat,
)

STATUS = "sidecar.istio.io/status"
LABEL = "cni.istio.io/uninitialized"
RULES = RepairRules()


def status(name: str = "istio-validation", *, state: Any = None, last: Any = None, restarts: int = 1) -> dict[str, Any]:
    return {"name": name, "state": state or {}, "lastState": last or {}, "restartCount": restarts}


def ended(code: int, *, reason: str = "Error", message: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
WAITING = {"waiting": {"reason": "CrashLoopBackOff"}}


def pod(
    *statuses: Any, restart_policy: str = "Always", phase: str = "Pending", annotations: Any = None, **spec: Any
) -> Pod:
    return pod_from_object(
        {
            "metadata": {
                "namespace": "shop",
                "name": "cart",
                "uid": "u1",
                "annotations": {STATUS: "{}"} if annotations is None else annotations,
            },
            "spec": {"restartPolicy": restart_policy, **spec},
            "status": {"phase": phase, "initContainerStatuses": list(statuses)},
        }
    )


BROKEN = pod(status(state=WAITING, last=ended(126)))

# what the pod is -> whether it is broken
CASES: dict[str, tuple[Pod, bool]] = {
    "waits to be started again": (BROKEN, True),
    "is in its next attempt": (pod(status(state=RUNNING, last=ended(126))), True),
    "has just ended, before any restart": (pod(status(state=ended(126), restarts=0)), True),
    "failed with another status": (pod(status(state=WAITING, last=ended(1))), False),
    "failed otherwise now, and by validation before": (pod(status(state=ended(1), last=ended(126))), True),
    "succeeded at last": (pod(status(state=ended(0, reason="Completed"), last=ended(126))), False),
    "succeeded at last, said by the reason alone": (pod(status(state=ended(126, reason="Completed"))), False),
    "never ran": (pod(status(state={"waiting": {"reason": "PodInitializing"}}, restarts=0)), False),
    "another init container failed": (pod(status("migrate", state=WAITING, last=ended(126))), False),
    "the second of two init containers failed": (
        pod(status("migrate", state=ended(0)), status(state=WAITING, last=ended(126))),
        True,
    ),
    "no injected pod": (pod(status(state=WAITING, last=ended(126)), annotations={}), False),
    "on the host's network": (pod(status(state=WAITING, last=ended(126)), hostNetwork=True), False),
    "no status at all": (pod(), False),
    "evicted meanwhile": (pod(status(state=WAITING, last=ended(126)), phase="Failed"), False),
    "done": (pod(status(state=WAITING, last=ended(126)), phase="Succeeded", restart_policy="Never"), False),
    "failed for good": (pod(status(state=ended(126)), phase="Failed", restart_policy="Never"), True),
    "failed for good, but not by validation": (
        pod(status(state=ended(1), last=ended(126)), phase="Failed", restart_policy="Never"),
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_detection(name: str) -> None:
    case, is_broken = CASES[name]
    assert (detect(case, RULES) is not None) is is_broken


def test_a_pod_that_is_being_deleted_is_left_alone() -> None:
    assert detect(replace(BROKEN, terminating=True), RULES) is None


@pytest.mark.parametrize(
    ("policy", "where", "code"), list(product(("Always", "OnFailure", "Never"), ("current", "last"), (126, 0, 1)))
)
def test_every_restart_policy_every_state_every_code(policy: str, where: str, code: int) -> None:
    failed = policy == "Never" and where == "current" and code != 0
    found = detect(
        pod(
            status(state=ended(code)) if where == "current" else status(state=WAITING, last=ended(code)),
            restart_policy=policy,
            phase="Failed" if failed else "Pending",
        ),
        RULES,
    )

    assert (found is not None) is (code == 126)
    if found is not None:
        assert (found.is_current, found.final) == (where == "current", failed)


@pytest.mark.parametrize(
    ("rules", "broken"),
    [
        (RepairRules(sidecar_annotation=""), True),
        (RepairRules(sidecar_annotation="mesh.example/injected"), False),
        (RepairRules(container=""), True),
        (RepairRules(container="other"), False),
        (RepairRules(exit_code=1), False),
        (RepairRules(exit_code=0), True),
        (RepairRules(message=" no rules \n"), True),
        (RepairRules(message="no rule"), False),
        (RepairRules(message=" \n"), True),
    ],
)
def test_what_the_settings_ask_for(rules: RepairRules, broken: bool) -> None:
    case = pod(status(state=WAITING, last=ended(126, message="\nno rules ")))
    assert (detect(case, rules) is not None) is broken


def test_any_status_is_not_success() -> None:
    assert detect(pod(status(state=RUNNING, last=ended(0))), RepairRules(exit_code=0)) is None


def test_the_cause_is_named() -> None:
    found = detect(pod(status(state=WAITING, last=ended(126, message="no\nrules" + "x" * 500), restarts=7)), RULES)
    text = str(found)
    assert text.startswith("init container istio-validation last ended with status 126 saying 'no rulesxxx")
    assert text.endswith("...', restarted 7 times")
    assert len(text) < 250


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "state", "lastState", "terminated", "exitCode", "reason", "message"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JUNK)
def test_a_malformed_status_makes_no_pod_unreadable(junk: Any) -> None:
    read = pod_from_object({"metadata": {"name": "a"}, "status": {"initContainerStatuses": junk}})
    assert read.name == "a"
    detect(read, RepairRules(sidecar_annotation="", container="", exit_code=0))


def test_what_is_kept_of_statuses() -> None:
    read = pod(
        status("fine", state=ended(0)),
        status("again", state=RUNNING, last=ended(0)),
        status(state=ended(1), last=ended(126, message="m"), restarts=3),
        {"name": 5},
        "junk",
        {"name": "wrong", "state": ended(1), "lastState": {"terminated": {"exitCode": True}}, "restartCount": "3"},
    )
    assert read.init_statuses == (
        InitStatus("istio-validation", Termination(1, "Error"), Termination(126, "Error", "m"), 3),
        InitStatus("wrong", Termination(1, "Error"), None, 0),
    )


TERMINATIONS = st.none() | st.builds(
    Termination, st.sampled_from([0, 1, 126, 255]), st.sampled_from(["", "Error", "Completed"]), st.just("")
)
STATUSES = st.builds(
    InitStatus, st.sampled_from(["istio-validation", "other"]), TERMINATIONS, TERMINATIONS, st.integers(0, 9)
)


@given(
    st.lists(STATUSES, max_size=4),
    st.sampled_from(["", "Always", "OnFailure", "Never"]),
    st.sampled_from(["Pending", "Running", "Succeeded", "Failed"]),
    st.booleans(),
    st.booleans(),
)
def test_whoever_is_broken_can_be_treated_and_is_nobody_to_leave_alone(
    statuses: list[InitStatus], policy: str, phase: str, host_network: bool, terminating: bool
) -> None:
    case = replace(
        BROKEN,
        init_statuses=tuple(statuses),
        restart_policy=policy,
        phase=phase,
        host_network=host_network,
        terminating=terminating,
    )
    found = detect(case, RULES)
    if found is None:
        return
    assert not host_network
    assert not terminating
    assert phase != "Succeeded"
    assert (found.container, found.exit_code) == ("istio-validation", 126)
    assert phase != "Failed" or (policy == "Never" and found.final)
    for mode in Mode:
        treatment = treat(case, found, mode, LABEL)
        assert treatment.reason
        assert (treatment.action is Action.PROGRAM) == (mode is Mode.REPAIR and not found.final)


# --- modes ------------------------------------------------------------------------------------------------------------

MODES = [
    ((False, False, False), Mode.NONE, ()),
    ((True, False, False), Mode.REPAIR, ()),
    ((False, True, False), Mode.DELETE, ()),
    ((False, False, True), Mode.LABEL, ()),
    ((True, True, False), Mode.REPAIR, ("REPAIR_DELETE_PODS",)),
    ((True, False, True), Mode.REPAIR, ("REPAIR_LABEL_PODS",)),
    ((False, True, True), Mode.DELETE, ("REPAIR_LABEL_PODS",)),
    ((True, True, True), Mode.REPAIR, ("REPAIR_DELETE_PODS", "REPAIR_LABEL_PODS")),
]


@pytest.mark.parametrize(("on", "mode", "ignored"), MODES)
def test_the_first_mode_that_is_on_wins(on: tuple[bool, bool, bool], mode: Mode, ignored: tuple[str, ...]) -> None:
    choice = choose_mode(repair=on[0], delete=on[1], label=on[2])
    assert (choice.mode, choice.ignored) == (mode, ignored)
    assert all(name in choice.reason for name in ignored)
    assert "REPAIR_" in choice.reason


def test_treatments() -> None:
    broken = detect(BROKEN, RULES)
    never = pod(status(state=ended(126)), phase="Failed", restart_policy="Never")
    final = detect(never, RULES)
    assert broken is not None
    assert final is not None
    labelled = replace(BROKEN, labels={LABEL: "whatever"})

    assert treat(BROKEN, broken, Mode.REPAIR, LABEL).action is Action.PROGRAM
    assert treat(BROKEN, broken, Mode.DELETE, LABEL).action is Action.DELETE
    assert treat(BROKEN, broken, Mode.LABEL, LABEL).action is Action.LABEL
    assert treat(labelled, broken, Mode.LABEL, LABEL).action is Action.SKIP
    assert treat(BROKEN, broken, Mode.NONE, LABEL).action is Action.TELL
    assert treat(never, final, Mode.DELETE, LABEL).action is Action.DELETE
    assert treat(never, final, Mode.LABEL, LABEL).action is Action.LABEL
    given_up = treat(never, final, Mode.REPAIR, LABEL)
    assert given_up.action is Action.GIVE_UP
    assert "restartPolicy is Never" in given_up.reason
    assert "REPAIR_DELETE_PODS" in given_up.reason


# --- back-off ---------------------------------------------------------------------------------------------------------


def test_the_back_off_goes_from_seconds_to_minutes() -> None:
    assert BACK_OFF_SECONDS[0] >= 1
    assert BACK_OFF_SECONDS[-1] == 300
    assert all(shorter < longer for shorter, longer in pairwise(BACK_OFF_SECONDS))


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_a_pause_is_never_none_and_jitter_only_shortens(failures: int, chance: float) -> None:
    seconds = back_off_seconds(failures, chance)
    whole = back_off_seconds(failures, 0.0)
    assert whole in BACK_OFF_SECONDS
    assert whole * (1 - JITTER) <= seconds <= whole
    assert back_off_seconds(failures + 1, 0.0) >= whole
