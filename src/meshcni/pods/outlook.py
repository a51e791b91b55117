"""What ambient mode makes of a pod, and what the agent would do to it next, in words.

The steps come from the tables of `pods.enrollment`, which the agent works by, so what is told here is what it does.
Only what the API knows of the pod goes in: its verdict, its annotation, its phase and its addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Final

from meshcni import istio
from meshcni.errors import PodSpecError
from meshcni.pods.ambient import DerivedAmbient, derive_ambient
from meshcni.pods.ambientsettings import AmbientNode, refuse_sandboxed
from meshcni.pods.eligibility import BAD_PARAMETERS, NAMESPACE_UNKNOWN, Decision, Verdict
from meshcni.pods.enrollment import (
    Actual,
    Addresses,
    Annotation,
    Desired,
    Intent,
    Life,
    NetnsId,
    Step,
    adopted,
    after,
    annotation_of,
    intent_of,
    next_row,
)
from meshcni.pods.model import Pod, pod_addresses

STEP_WORDS: Final[Mapping[Step, str]] = {
    Step.FIND_NETNS: "its network namespace is looked for among the node's processes",
    Step.LOOK: "that is looked at for rules that an earlier agent left",
    Step.ROUTES: "its policy rule and route are made",
    Step.ADD: "ztunnel is told of it and opens its listeners in it",
    Step.RULES: "its packet rules are put in",
    Step.ADDRESSES: "its addresses go into the host's set, so that the kubelet's probes pass",
    Step.ENABLE: "it is annotated enabled, so that others reach it through the tunnel",
    Step.PEND: "it is annotated pending",
    Step.RELEASE: "the rules that capture its new connections are taken out",
    Step.REMOVE_RULES: "the rest of its rules is taken out",
    Step.WITHDRAW: "the annotation is removed",
    Step.DEL: "ztunnel is told to close its listeners",
    Step.REMOVE_ADDRESSES: "its addresses leave the host's set",
}

_NETNS: Final = NetnsId(0, 1)  # stands for the one that is found
_ADDRESSES: Final[Addresses] = frozenset({IPv4Address("192.0.2.1")})  # stands for those that the ADD brings


@dataclass(frozen=True, slots=True)
class Outlook:
    """What comes next: a sentence, and the steps in it, none when there is nothing to do.

    `when_agent_starts` are the steps by which a fresh agent makes sure of an enrolled pod.
    """

    text: str
    steps: tuple[Step, ...] = ()
    when_agent_starts: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Prospect:
    """What ambient mode makes of a pod.

    `decision` is the one given, but for parameters that make the ADD fail. `derived` is there with verdict AMBIENT
    unless there is a `problem`. `outlook` is None for a pod that ambient mode has nothing to do with.
    """

    decision: Decision
    annotation: Annotation
    derived: DerivedAmbient | None = None
    problem: PodSpecError | None = None
    outlook: Outlook | None = None
    warnings: tuple[str, ...] = ()


def prospect_of(pod: Pod, decision: Decision, node: AmbientNode) -> Prospect:
    """Tell what ambient mode makes of `pod`, about which `decision` was made. Never raises for anything in the pod."""
    annotation = annotation_of(pod)
    derived: DerivedAmbient | None = None
    problem: PodSpecError | None = None
    if decision.verdict is Verdict.AMBIENT:
        try:
            derived = _derive(pod, annotation, node)
        except PodSpecError as error:
            problem = error
    outlook = look_ahead(pod, decision, node, problem)
    if problem is not None and annotation is Annotation.ABSENT:
        decision = replace(decision, verdict=Verdict.ERROR, reason=BAD_PARAMETERS, evidence=problem.message)
    warnings = _warnings(pod, annotation, node, decision)
    if derived is not None:
        warnings = (*derived.warnings, *warnings)
    return Prospect(decision, annotation, derived, problem, outlook, warnings)


def _derive(pod: Pod, annotation: Annotation, node: AmbientNode) -> DerivedAmbient:
    if annotation is Annotation.ABSENT:  # one that is enrolled is never opened because a setting has changed
        refuse_sandboxed(pod, node.sandboxed_runtimes)
    return derive_ambient(pod.annotations, node.defaults)


def look_ahead(pod: Pod, decision: Decision, node: AmbientNode, problem: PodSpecError | None = None) -> Outlook | None:
    """Tell what the agent would do next; None for a pod that ambient mode has nothing to do with.

    `problem` says that the pod's overrides, or its RuntimeClass, make no rules.
    """
    annotation = annotation_of(pod)
    is_ours = annotation is not Annotation.ABSENT
    # To ambient mode a pod whose sidecar has wrong parameters is a pod with a sidecar.
    verdict = Verdict.SIDECAR if decision.reason is BAD_PARAMETERS else decision.verdict
    is_unknown = decision.reason is NAMESPACE_UNKNOWN
    if not is_ours and verdict is not Verdict.AMBIENT and not is_unknown:
        return None
    if not node.enabled:
        return Outlook(
            "Nothing: ambient mode is off for this agent, and the pod keeps what an earlier one gave it. "
            "With AMBIENT_ENABLED=true an agent looks after it, or takes it out."
        )
    intent = intent_of(verdict, is_ours)
    addresses = frozenset(pod_addresses(pod)[0])
    life = _life(pod, is_ours, addresses)
    if intent is Intent.ENROLL and life is not Life.ENDED and problem is not None:
        return Outlook(_refusal(is_ours, life, problem))
    if is_unknown and not is_ours and life is Life.STARTING:
        return Outlook("Its ADD fails, and the runtime tries again, until the labels of its namespace are known.")
    return _of_tables(annotation, intent, life, addresses)


def _life(pod: Pod, is_ours: bool, addresses: Addresses) -> Life:
    """A pod with neither annotation nor address is still to be made: its ADD enrols it."""
    if pod.has_terminated:
        return Life.ENDED
    return Life.RUNNING if is_ours or addresses else Life.STARTING


def _refusal(is_ours: bool, life: Life, problem: PodSpecError) -> str:
    if is_ours:
        return f"It keeps the rules that it has, and gets no others until this is corrected: {problem.message}."
    if life is Life.STARTING:
        return f"Its ADD fails, and the runtime tries again, until this is corrected: {problem.message}."
    return f"It stays outside the mesh until this is corrected: {problem.message}."


def _of_tables(annotation: Annotation, intent: Intent, life: Life, addresses: Addresses) -> Outlook:
    """Play the tables through, every step succeeding, and say what they say."""
    starts = life is Life.STARTING
    desired = Desired(intent, life, _NETNS if starts else None, "wanted", _ADDRESSES if starts else addresses)
    steps = _play(desired, adopted(annotation))
    if annotation is Annotation.ENABLED and intent is Intent.ENROLL and life is Life.RUNNING and steps:
        return Outlook(
            "Nothing, as long as all is in place: it is enrolled. An agent that starts makes sure of that: "
            f"{_sentence(steps)} What is there already stays as it is.",
            when_agent_starts=steps,
        )
    if not steps:
        return Outlook(_nothing(annotation, intent, life, addresses))
    return Outlook(f"{_occasion(annotation, intent, life)}: {_sentence(steps)}", steps)


def _play(desired: Desired, actual: Actual) -> tuple[Step, ...]:
    steps: list[Step] = []
    for _most in Step:  # each is needed once at most
        row = next_row(desired, actual)
        if row is None:
            break
        steps.append(row.step)
        if row.step is Step.FIND_NETNS:
            desired = replace(desired, netns=_NETNS)
        actual = after(row.step, desired, actual)
    return tuple(steps)


def _sentence(steps: tuple[Step, ...]) -> str:
    return ", then ".join(STEP_WORDS[step] for step in steps) + "."


def _occasion(annotation: Annotation, intent: Intent, life: Life) -> str:
    if life is Life.STARTING:
        return "When its sandbox is made, before a container of it runs"
    if life is Life.ENDED:
        return f"It has ended, annotated {annotation.value}"
    if intent is Intent.LEAVE:
        return f"Annotated {annotation.value} and not selected any more"
    if annotation is Annotation.PENDING:
        return "Annotated pending, so its enrolment did not complete"
    return "It runs outside the mesh and is selected; connections that it has open are reset"


def _nothing(annotation: Annotation, intent: Intent, life: Life, addresses: Addresses) -> str:
    if life is Life.ENDED:
        return "Nothing: it has ended, and nothing is known to be left of it."
    if annotation is Annotation.ABSENT and intent is Intent.LEAVE:
        return "Nothing: it is not enrolled, and as long as it is not known to belong, it stays so."
    if not addresses:
        return (
            f"Nothing before it has an address: it is annotated {annotation.value}, and its sandbox is still to come."
        )
    return "Nothing."


def _warnings(pod: Pod, annotation: Annotation, node: AmbientNode, decision: Decision) -> tuple[str, ...]:
    said: list[str] = []
    text = pod.annotations.get(istio.AMBIENT_REDIRECTION, "")
    if text and annotation is Annotation.ABSENT:
        said.append(
            f"annotation {istio.AMBIENT_REDIRECTION}={text[:80]!r} is neither enabled nor pending, so it counts "
            "as absent"
        )
    good, malformed = pod_addresses(pod)
    if malformed:
        said.append(f"the pod has an address that is none: {', '.join(malformed)[:100]}")
    bypassing = [str(address) for address in good if address.version == 6]
    if decision.verdict is Verdict.AMBIENT and bypassing and not node.ipv6:
        said.append(f"traffic by its IPv6 address {', '.join(bypassing)} passes by the mesh: AMBIENT_IPV6 is false")
    return tuple(said)
