"""What the people's commands print about pods, parameters and rules: objects for JSON, script text, words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from meshcni.cli.given import DEFAULT_ORIGIN
from meshcni.errors import PodSpecError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.assess import Assessment
from meshcni.pods.eligibility import Decision, Verdict
from meshcni.pods.interception import Interception, NumberRange
from meshcni.pods.model import Pod
from meshcni.pods.outlook import STEP_WORDS, Outlook, Prospect
from meshcni.rules import iproute, iptables, nft
from meshcni.rules.iproute import mark_words
from meshcni.rules.model import Backend, Family, Purpose, Ruleset

Parameters = Interception | AmbientParameters

RESTORE = {Family.V4: "iptables-restore --noflush", Family.V6: "ip6tables-restore --noflush"}


# --- pods and parameters ----------------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """Return a parameter's value as JSON takes it: a single port or id as a number, a range and `*` as text."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, NumberRange) and value.first == value.last:
        return value.first
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, bool | int | str) else str(value)


def camel_case(name: str) -> str:
    """`inbound_ports` as JSON keys are written here: `inboundPorts`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def parameter_values(parameters: Parameters) -> dict[str, Any]:
    """Return every parameter with its value."""
    return {camel_case(one.name): plain(getattr(parameters, one.name)) for one in fields(parameters)}


def parameter_objects(parameters: Parameters, origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return every parameter with its value and where that came from; `origins` is by field."""
    return {
        camel_case(one.name): {
            "value": plain(getattr(parameters, one.name)),
            "origin": origins.get(one.name, DEFAULT_ORIGIN),
        }
        for one in fields(parameters)
    }


def assessment_object(pod: Pod, assessment: Assessment) -> dict[str, Any]:
    """Return what is known about a pod: verdict, reason, evidence, warnings, error, parameters."""
    derived, error = assessment.derived, assessment.error
    return {
        "pod": {"namespace": pod.namespace, "name": pod.name},
        **_decision_object(assessment.decision),
        "warnings": list(assessment.warnings),
        "error": _error_object(error) if error else None,
        "parameters": parameter_objects(derived.interception, derived.origins) if derived else None,
    }


@dataclass(frozen=True, slots=True)
class Explained:
    """All that is known about a pod: its assessment, and what ambient mode makes of it.

    `origins` says by field where the node's ambient parameters come from, which annotations of the pod override.
    """

    pod: Pod
    assessment: Assessment
    prospect: Prospect
    origins: Mapping[str, str]

    @property
    def error(self) -> PodSpecError | None:
        """What is wrong with the pod's parameters."""
        return self.assessment.error or self.prospect.problem

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that was passed over, or works otherwise than one may think."""
        return (*self.assessment.warnings, *self.prospect.warnings)

    @property
    def parameters(self) -> dict[str, dict[str, Any]] | None:
        """The parameters of its rules, each with its origin; None when it gets no rules."""
        sidecar, ambient = self.assessment.derived, self.prospect.derived
        if ambient is not None:
            return parameter_objects(ambient.parameters, {**self.origins, **ambient.origins})
        return parameter_objects(sidecar.interception, sidecar.origins) if sidecar else None


def explained_object(explained: Explained) -> dict[str, Any]:
    """Return what is known about a pod, with the annotation of its redirection and what comes next."""
    prospect, error = explained.prospect, explained.error
    return {
        **assessment_object(explained.pod, explained.assessment),
        **_decision_object(prospect.decision),
        "warnings": list(explained.warnings),
        "error": _error_object(error) if error else None,
        "parameters": explained.parameters,
        "redirection": prospect.annotation.value,
        "next": _outlook_object(prospect.outlook),
    }


def _decision_object(decision: Decision) -> dict[str, str]:
    return {
        "verdict": decision.verdict.value,
        "reason": decision.reason.code,
        "message": decision.reason.text,
        "evidence": decision.evidence,
    }


def _error_object(error: PodSpecError) -> dict[str, str]:
    return {"message": error.message, "hint": error.hint}


def _outlook_object(outlook: Outlook | None) -> dict[str, Any] | None:
    if outlook is None:
        return None
    return {
        "text": outlook.text,
        "steps": [{"step": step.value, "words": STEP_WORDS[step]} for step in outlook.steps],
        "whenAgentStarts": [{"step": step.value, "words": STEP_WORDS[step]} for step in outlook.when_agent_starts],
    }


def print_decision(form: str, pod: Pod, decision: Decision, shown: Mapping[str, Any]) -> int:
    """Print why a pod gets no rules of the kind asked for, `shown` with format json; returns the exit status."""
    if form == "json":
        print(json.dumps(shown, indent=2))
    else:
        print(f"{pod.full_name}: {decision.verdict.value}. {decision.reason.text} ({decision.evidence})")
    return 1 if decision.verdict is Verdict.ERROR else 0


# --- rules ------------------------------------------------------------------------------------------------------------


def script(ruleset: Ruleset, backend: Backend) -> str:
    """Return the text for the tools: one nft transaction, or one restore input per family; the rest as comments.

    For a pod of ambient mode the comments come first, as the agent makes rule and route before the packet rules.
    """
    if backend is Backend.NFTABLES:
        parts = ["# nft -f -\n" + nft.render(ruleset)]
    else:
        parts = [
            f"# IPv{family.value}: {RESTORE[family]}\n" + iptables.render(ruleset, family)
            for family in _ordered(ruleset)
        ]
    if ruleset.purpose is Purpose.SIDECAR:
        parts.append(_commented(_sidecar_commands(ruleset)))
    else:
        parts.insert(0, _commented(iproute.render(ruleset).splitlines()))
    return "\n".join(filter(None, parts))


def _sidecar_commands(ruleset: Ruleset) -> list[str]:
    return [
        *(
            f"ip -{rule.family.value} rule add fwmark {mark_words(rule)} lookup {rule.table}"
            for rule in ruleset.policy_rules
        ),
        *(
            f"ip -{route.destination.version} route add local {route.destination} dev lo table {route.table}"
            for route in ruleset.routes
        ),
        *(
            f"ip -{item.address.version} address add {item.address}/{item.prefix_length} dev lo"
            for item in ruleset.addresses
        ),
    ]


def removal_script(backend: Backend) -> str:
    """Return what takes our rules out; for iptables that depends on what is there, which is looked at only to apply."""
    if backend is Backend.NFTABLES:
        return "# nft -f -\n" + nft.render_removal()
    return "# Every ISTIO_ chain, every jump to one and every rule of ours is taken out, as --apply finds them.\n"


def removal_of(ruleset: Ruleset, backend: Backend) -> str:
    """Return the text for the tools that takes out what `script` puts in, in the order of a removal.

    Not for nftables on the host, where the table is shared with the address sets.
    """
    if backend is Backend.NFTABLES:
        parts = ["# nft -f -\n" + nft.render_removal(ruleset.purpose)]
    else:
        parts = [
            f"# IPv{family.value}: {RESTORE[family]}\n"
            + iptables.render_removal(iptables.expected(ruleset, family), purpose=ruleset.purpose)
            for family in _ordered(ruleset)
        ]
    parts.append(_commented(iproute.render(ruleset).replace(" add ", " del ").splitlines()))
    return "\n".join(filter(None, parts))


def _ordered(ruleset: Ruleset) -> list[Family]:
    return [family for family in Family if family in ruleset.families]


def _commented(commands: list[str]) -> str:
    return "".join(f"# {command}\n" for command in commands)
