"""Whether a DaemonSet or a pod of it still selects a node: nodeSelector and required affinity, as schedulers do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Object = Mapping[str, Any]


def excludes_node(daemonset: Object, node: Object) -> bool:
    """True only when the template's nodeSelector or required affinity positively excludes `node` (both API objects)."""
    return pod_spec_excludes_node(((daemonset.get("spec") or {}).get("template") or {}).get("spec") or {}, node)


def pod_spec_excludes_node(spec: Object, node: Object) -> bool:
    """The same for the `spec` of a pod that is on the node, whose labels may have changed since."""
    metadata = node.get("metadata") or {}
    labels = metadata.get("labels") or {}
    if any(labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return True
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return False
    fields = {"metadata.name": metadata.get("name", "")}
    return not any(_term_matches(term, labels, fields) for term in required.get("nodeSelectorTerms") or ())


def _term_matches(term: Object, labels: Mapping[str, str], fields: Mapping[str, str]) -> bool:
    """All requirements of a term hold; a term without any matches nothing."""
    by_label, by_field = term.get("matchExpressions") or (), term.get("matchFields") or ()
    return bool(by_label or by_field) and all(
        [_holds(one, labels) for one in by_label] + [_holds(one, fields) for one in by_field]
    )


def _holds(requirement: Object, values: Mapping[str, str]) -> bool:
    value = values.get(requirement.get("key", ""))
    operator = OPERATORS.get(requirement.get("operator", ""))
    return operator is not None and operator(value, requirement.get("values") or ())


def _compare(value: str | None, limits: Sequence[str], sign: int) -> bool:
    """`value` beyond the only limit, both integers; anything else does not hold."""
    try:
        return value is not None and len(limits) == 1 and sign * int(value) > sign * int(limits[0])
    except ValueError:
        return False


# k8s.io/api core/v1 NodeSelectorOperator
OPERATORS: Mapping[str, Callable[[str | None, Sequence[str]], bool]] = {
    "In": lambda value, values: value is not None and value in values,
    "NotIn": lambda value, values: value is None or value not in values,
    "Exists": lambda value, values: value is not None,
    "DoesNotExist": lambda value, values: value is None,
    "Gt": lambda value, values: _compare(value, values, 1),
    "Lt": lambda value, values: _compare(value, values, -1),
}
