"""What comes next for an ambient pod: in words, and by the very tables that the agent works by."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from meshcni import istio
from meshcni.errors import PodSpecError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.ambientsettings import AmbientNode
from meshcni.pods.eligibility import (
    AMBIENT_ENABLED,
    BAD_PARAMETERS,
    NAMESPACE_UNKNOWN,
    NOT_INJECTED,
    SIDECAR_INJECTED,
    Decision,
    Reason,
    Verdict,
)
from meshcni.pods.enrollment import TABLES, Annotation, Intent, Life, Step
from meshcni.pods.model import Pod
from meshcni.pods.outlook import STEP_WORDS, look_ahead, prospect_of

NODE = AmbientNode(AmbientParameters(), enabled=True)
ADDRESS = "10.0.0.1"


def decided(reason: Reason) -> Decision:
    return Decision(reason.verdict, reason, "evidence")


SELECTED, LEFT, UNKNOWN = decided(AMBIENT_ENABLED), decided(NOT_INJECTED), decided(NAMESPACE_UNKNOWN)


def pod(annotation: str = "", *ips: str, phase: str = "Running", **annotations: str) -> Pod:
    shown = {istio.AMBIENT_REDIRECTION: annotation} if annotation else {}
    return Pod("shop", "cart", uid="u", annotations=shown | annotations, ips=ips, phase=phase)


def test_every_step_has_words() -> None:
    assert set(STEP_WORDS) == set(Step)


# --- the table of intent and annotation -------------------------------------------------------------------------------

# A pod that runs and has an address: annotation, decision, how the sentence begins, some steps in their order.
RUNNING: dict[str, tuple[str, Decision, str, tuple[Step, ...]]] = {
    "selected": ("", SELECTED, "It runs outside the mesh and is selected", (Step.ADD, Step.RULES, Step.ENABLE)),
    "selected, pending": ("pending", SELECTED, "Annotated pending, so its", (Step.ADD, Step.RULES, Step.ENABLE)),
    "selected, enabled": ("enabled", SELECTED, "Nothing, as long as all is in place: it is enrolled", ()),
    "left, pending": (
        "pending",
        LEFT,
        "Annotated pending and not selected any more",
        (Step.RELEASE, Step.DEL, Step.REMOVE_RULES, Step.WITHDRAW, Step.REMOVE_ADDRESSES),
    ),
    "left, enabled": (
        "enabled",
        LEFT,
        "Annotated enabled and not selected any more",
        (Step.RELEASE, Step.DEL, Step.REMOVE_RULES, Step.WITHDRAW, Step.REMOVE_ADDRESSES),
    ),
    "a sidecar now": (
        "enabled",
        decided(SIDECAR_INJECTED),
        "Annotated enabled and not",
        (Step.RELEASE, Step.PEND, Step.DEL),
    ),
    "a broken sidecar now": ("enabled", decided(BAD_PARAMETERS), "Annotated enabled and not", (Step.REMOVE_RULES,)),
    "unknown, enabled": ("enabled", UNKNOWN, "Nothing, as long as all is in place", ()),
    "unknown, pending": ("pending", UNKNOWN, "Annotated pending, so its enrolment", (Step.RULES, Step.ENABLE)),
    "unknown": ("", UNKNOWN, "Nothing: it is not enrolled", ()),
    "another word": ("partly", SELECTED, "It runs outside the mesh and is selected", (Step.RULES, Step.ENABLE)),
}


@pytest.mark.parametrize(("annotation", "decision", "begin", "steps"), RUNNING.values(), ids=RUNNING)
def test_a_pod_that_runs(annotation: str, decision: Decision, begin: str, steps: tuple[Step, ...]) -> None:
    outlook = look_ahead(pod(annotation, ADDRESS), decision, NODE)
    assert outlook is not None
    assert outlook.text.startswith(begin)
    assert [step for step in outlook.steps if step in steps] == list(steps)
    assert bool(outlook.steps) is bool(steps)
    assert bool(outlook.when_agent_starts) is (annotation == "enabled" and not steps)


def test_a_pod_whose_sandbox_is_still_to_be_made() -> None:
    outlook = look_ahead(pod(phase="Pending"), SELECTED, NODE)
    assert outlook is not None
    assert outlook.text.startswith("When its sandbox is made, before a container of it runs: its packet rules are put")
    assert outlook.steps == (Step.RULES, Step.ADD, Step.ADDRESSES, Step.ENABLE)


@pytest.mark.parametrize("annotation", ["pending", "enabled"])
def test_a_pod_that_has_ended(annotation: str) -> None:
    for decision in (SELECTED, LEFT, UNKNOWN):
        outlook = look_ahead(pod(annotation, ADDRESS, phase="Failed"), decision, NODE)
        assert outlook is not None
        assert outlook.text.startswith(f"It has ended, annotated {annotation}: its addresses leave the host's set")
        assert outlook.steps == (Step.REMOVE_ADDRESSES, Step.DEL, Step.WITHDRAW)


def test_an_enrolled_pod_that_waits_for_a_sandbox() -> None:
    outlook = look_ahead(pod("enabled", phase="Pending"), SELECTED, NODE)
    assert outlook is not None
    assert (outlook.text[:35], outlook.steps) == ("Nothing before it has an address: i", ())


@pytest.mark.parametrize("reason", [NOT_INJECTED, SIDECAR_INJECTED, BAD_PARAMETERS])
def test_a_pod_that_ambient_mode_has_nothing_to_do_with(reason: Reason) -> None:
    assert look_ahead(pod("", ADDRESS), decided(reason), NODE) is None
    assert look_ahead(pod("", ADDRESS), decided(reason), replace(NODE, enabled=False)) is None


def test_an_add_of_a_pod_whose_namespace_is_unknown_fails() -> None:
    outlook = look_ahead(pod(phase="Pending"), UNKNOWN, NODE)
    assert outlook is not None
    assert outlook.text.startswith("Its ADD fails")
    assert outlook.steps == ()


def test_an_agent_without_ambient_mode_leaves_all_as_it_is() -> None:
    outlook = look_ahead(pod("enabled", ADDRESS), LEFT, replace(NODE, enabled=False))
    assert outlook is not None
    assert outlook.text.startswith("Nothing: ambient mode is off for this agent")
    assert outlook.steps == ()


PHASES = ("", "Pending", "Running", "Succeeded", "Failed", "Unknown")


@pytest.mark.parametrize("reason", [AMBIENT_ENABLED, NOT_INJECTED, NAMESPACE_UNKNOWN, SIDECAR_INJECTED])
def test_every_pod_has_an_outlook_that_the_tables_give(reason: Reason) -> None:
    """Nothing raises, each step occurs once and is of the table that applies, and the sentence names them in order."""
    for annotation, phase, ips in product(("", "pending", "enabled"), PHASES, ((), (ADDRESS,), ("no address", "::1"))):
        outlook = look_ahead(pod(annotation, *ips, phase=phase), decided(reason), NODE)
        if outlook is None:
            assert not annotation
            continue
        steps = (*outlook.steps, *outlook.when_agent_starts)
        assert len(set(steps)) == len(steps)
        assert any([row.step for row in rows if row.step in steps] == list(steps) for rows in TABLES.values())
        places = [outlook.text.index(STEP_WORDS[step]) for step in steps]
        assert places == sorted(places)
        assert outlook.text.endswith(".")


def test_the_tables_that_are_played_through_are_those_of_the_agent() -> None:
    """All that a table may ask for is told for the pod that knows least of it."""
    outlook = look_ahead(pod("enabled", ADDRESS), LEFT, NODE)
    assert outlook is not None
    assert outlook.steps == tuple(row.step for row in TABLES[Intent.LEAVE, Life.RUNNING])


# --- parameters, problems and warnings --------------------------------------------------------------------------------


def test_parameters_come_from_annotations_over_the_nodes() -> None:
    node = replace(NODE, defaults=AmbientParameters(dns_capture=True))
    prospect = prospect_of(pod("", ADDRESS, **{istio.AMBIENT_BYPASS_INBOUND: "true"}), SELECTED, node)
    assert prospect.derived is not None
    assert prospect.derived.parameters == AmbientParameters(dns_capture=True, ingress=True)
    assert prospect.derived.origins == {"ingress": f"annotation {istio.AMBIENT_BYPASS_INBOUND}"}
    assert (prospect.decision, prospect.annotation, prospect.problem) == (SELECTED, Annotation.ABSENT, None)


BAD_INTERFACE = {istio.REROUTE_VIRTUAL_INTERFACES: "a b"}


def test_a_bad_override_is_a_verdict_for_a_new_pod_only() -> None:
    new = prospect_of(pod(phase="Pending", **BAD_INTERFACE), SELECTED, NODE)
    assert (new.decision.verdict, new.decision.reason) == (Verdict.ERROR, BAD_PARAMETERS)
    assert isinstance(new.problem, PodSpecError)
    assert new.decision.evidence == new.problem.message
    assert new.outlook is not None
    assert new.outlook.text.startswith(
        "Its ADD fails, and the runtime tries again, until this is corrected: annotation"
    )

    late = prospect_of(pod("", ADDRESS, **BAD_INTERFACE), SELECTED, NODE)
    assert late.outlook is not None
    assert late.outlook.text.startswith("It stays outside the mesh until this is corrected")

    enrolled = prospect_of(pod("enabled", ADDRESS, **BAD_INTERFACE), SELECTED, NODE)
    assert (enrolled.decision, enrolled.derived) == (SELECTED, None)
    assert enrolled.outlook is not None
    assert enrolled.outlook.text.startswith("It keeps the rules that it has")

    leaving = prospect_of(pod("enabled", ADDRESS, **BAD_INTERFACE), LEFT, NODE)
    assert leaving.outlook is not None
    assert Step.REMOVE_RULES in leaving.outlook.steps


def test_a_sandboxed_runtime_class_is_refused_unless_the_pod_is_enrolled() -> None:
    sandboxed = replace(pod(phase="Pending"), runtime_class="kata-qemu")
    assert prospect_of(sandboxed, SELECTED, NODE).decision.reason is BAD_PARAMETERS
    assert prospect_of(sandboxed, LEFT, NODE).problem is None
    assert prospect_of(sandboxed, SELECTED, replace(NODE, sandboxed_runtimes=())).problem is None
    assert prospect_of(replace(pod("enabled", ADDRESS), runtime_class="gvisor"), SELECTED, NODE).problem is None


WARNED: dict[str, tuple[Pod, Decision, AmbientNode, str]] = {
    "a switch": (pod("", ADDRESS, **{istio.AMBIENT_DNS_CAPTURE: "yes"}), SELECTED, NODE, "'yes' is no boolean"),
    "the annotation": (pod("partly", ADDRESS), LEFT, NODE, "'partly' is neither enabled nor pending"),
    "an address": (pod("", ADDRESS, "10.0.0"), SELECTED, NODE, "an address that is none: 10.0.0"),
    "IPv6 passes by": (
        pod("", ADDRESS, "fd00::1"),
        SELECTED,
        NODE,
        "fd00::1 passes by the mesh: AMBIENT_IPV6 is false",
    ),
}


@pytest.mark.parametrize(("subject", "decision", "node", "warning"), WARNED.values(), ids=WARNED)
def test_warnings(subject: Pod, decision: Decision, node: AmbientNode, warning: str) -> None:
    (said,) = prospect_of(subject, decision, node).warnings
    assert warning in said


def test_nothing_to_warn_of() -> None:
    node = replace(NODE, ipv6=True)
    assert prospect_of(pod("enabled", ADDRESS, "fd00::1"), SELECTED, node).warnings == ()
    assert prospect_of(pod("", ADDRESS, "fd00::1"), LEFT, NODE).warnings == ()
