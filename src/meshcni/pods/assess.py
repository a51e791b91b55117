"""The one path from a pod to what is done with it: the agent's ADD and `explain` both ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshcni.errors import PodSpecError
from meshcni.pods.ambientsettings import refuse_sandboxed
from meshcni.pods.annotations import Derived, derive_interception
from meshcni.pods.eligibility import BAD_PARAMETERS, UNREADABLE, Decision, Policy, Verdict, decide
from meshcni.pods.model import NO_PAIRS, Namespace, Pod


@dataclass(frozen=True, slots=True)
class Assessment:
    """A decision; with verdict SIDECAR also the parameters, with an invalid parameter also the error."""

    decision: Decision
    derived: Derived | None = None
    error: PodSpecError | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that was passed over, in the decision and in the parameters."""
        return self.decision.warnings + (self.derived.warnings if self.derived else ())


def assess(
    pod: Pod, namespace: Namespace | None, policy: Policy, environment: Mapping[str, str] = NO_PAIRS
) -> Assessment:
    """Decide about `pod` and, when it is a sidecar pod, derive its parameters. Never raises for anything in the pod."""
    decision = decide(pod, namespace, policy)
    if decision.verdict is not Verdict.SIDECAR:
        return Assessment(decision)
    try:
        refuse_sandboxed(pod, policy.sandboxed_runtimes)
        return Assessment(decision, derive_interception(pod, environment))
    except PodSpecError as error:
        refused = replace(decision, verdict=Verdict.ERROR, reason=BAD_PARAMETERS, evidence=error.message)
        return Assessment(refused, error=error)


def unreadable(error: PodSpecError) -> Assessment:
    """Assess a pod whose projection failed with `error`: it is refused, because nothing is known about it."""
    return Assessment(Decision(UNREADABLE.verdict, UNREADABLE, error.message), error=error)
