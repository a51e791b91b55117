"""What the people's commands print about pods, parameters and rules: objects for JSON, script text, words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from meshcni.pods.assess import Assessment
from meshcni.pods.interception import Interception, NumberRange
from meshcni.pods.model import Pod
from meshcni.rules import iptables, nft
from meshcni.rules.model import Backend, Family, Ruleset

RESTORE = {Family.V4: "iptables-restore --noflush", Family.V6: "ip6tables-restore --noflush"}


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


def parameter_objects(parameters: Interception, origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return every parameter with its value and where that came from."""
    return {
        camel_case(one.name): {"value": plain(getattr(parameters, one.name)), "origin": origins[one.name]}
        for one in fields(parameters)
    }


def assessment_object(pod: Pod, assessment: Assessment) -> dict[str, Any]:
    """Return what is known about a pod: verdict, reason, evidence, warnings, error, parameters."""
    decision, derived, error = assessment.decision, assessment.derived, assessment.error
    return {
        "pod": {"namespace": pod.namespace, "name": pod.name},
        "verdict": decision.verdict.value,
        "reason": decision.reason.code,
        "message": decision.reason.text,
        "evidence": decision.evidence,
        "warnings": list(assessment.warnings),
        "error": {"message": error.message, "hint": error.hint} if error else None,
        "parameters": parameter_objects(derived.interception, derived.origins) if derived else None,
    }


def script(ruleset: Ruleset, backend: Backend) -> str:
    """Return the text for the tools: one nft transaction, or one restore input per family; the rest as comments."""
    families = [family for family in Family if family in ruleset.families]
    if backend is Backend.NFTABLES:
        parts = ["# nft -f -\n" + nft.render(ruleset)]
    else:
        parts = [f"# IPv{family.value}: {RESTORE[family]}\n" + iptables.render(ruleset, family) for family in families]
    commands = [
        *(f"ip -{rule.family.value} rule add fwmark {rule.mark} lookup {rule.table}" for rule in ruleset.policy_rules),
        *(
            f"ip -{route.destination.version} route add local {route.destination} dev lo table {route.table}"
            for route in ruleset.routes
        ),
        *(
            f"ip -{item.address.version} address add {item.address}/{item.prefix_length} dev lo"
            for item in ruleset.addresses
        ),
    ]
    if commands:
        parts.append("".join(f"# {command}\n" for command in commands))
    return "\n".join(parts)


def removal_script(backend: Backend) -> str:
    """Return what takes our rules out; for iptables that depends on what is there, which is looked at only to apply."""
    if backend is Backend.NFTABLES:
        return "# nft -f -\n" + nft.render_removal()
    return "# Every ISTIO_ chain, every jump to one and every rule of ours is taken out, as --apply finds them.\n"
