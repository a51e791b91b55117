"""Label and field selectors as text (`app=web,tier in (a, b)`; `metadata.namespace!=x`), evaluated on our pods.

The informer has all pods of the node already, so a second watch is needed only for what our projection does not hold.
Sources: apimachinery `pkg/labels` (Parse) and `pkg/fields` (ParseSelector); kubernetes `pkg/apis/core/v1/conversion.go`
for the fields of pods that can be selected by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshcni.errors import SettingError
from meshcni.pods.model import Pod
from meshcni.pods.selectors import LabelSelector, Operator, parse_label_selector

_KEY: Final = r"(?P<key>[^\s!=<>(),]+)"
_ABSENT: Final = re.compile(rf"!\s*{_KEY}")
_PRESENT: Final = re.compile(_KEY)
_EQUAL: Final = re.compile(rf"{_KEY}\s*(?P<operator>==?|!=)\s*(?P<value>[^\s!=<>(),]*)")
_AMONG: Final = re.compile(rf"{_KEY}\s+(?P<operator>in|notin)\s*\((?P<values>[^()]*)\)")
_COMPARED: Final = re.compile(rf"{_KEY}\s*[<>]\s*-?\d+")
_FIELD: Final = re.compile(r"(?P<name>[^!=\s]+)\s*(?P<operator>==?|!=)\s*(?P<value>[^!=]*)")

POD_FIELDS: Final[Mapping[str, Callable[[Pod], str]]] = {
    "metadata.name": lambda pod: pod.name,
    "metadata.namespace": lambda pod: pod.namespace,
    "spec.nodeName": lambda pod: pod.node_name,
    "spec.restartPolicy": lambda pod: pod.restart_policy,
    "spec.serviceAccountName": lambda pod: pod.service_account,
    "spec.hostNetwork": lambda pod: "true" if pod.host_network else "false",
    "status.phase": lambda pod: pod.phase,
    "status.podIP": lambda pod: pod.ips[0] if pod.ips else "",
}
SERVER_FIELDS: Final = ("spec.schedulerName", "status.nominatedNodeName")  # selectable, and not in our projection


_EVERYTHING: Final = LabelSelector()


@dataclass(frozen=True, slots=True)
class PodSelection:
    """Which pods are meant: by labels, and by fields as (name, equal or not, value).

    `needs_server` names what only an API server can evaluate; the rest is evaluated by `matches`.
    """

    labels: LabelSelector = _EVERYTHING
    fields: tuple[tuple[str, bool, str], ...] = ()
    needs_server: tuple[str, ...] = ()

    def matches(self, pod: Pod) -> bool:
        """Whether `pod` is meant, as far as our projection can tell."""
        return self.labels.matches(pod.labels) and all(
            (POD_FIELDS[name](pod) == value) is equal for name, equal, value in self.fields
        )


def parse_selection(label_text: str, field_text: str) -> PodSelection:
    """Read both selectors; empty text selects everything. Raises ValueError, which quotes the part that is wrong."""
    labels, compared = parse_label_text(label_text)
    fields, foreign = parse_field_text(field_text)
    return PodSelection(labels, fields, (*compared, *foreign))


def parse_label_text(text: str) -> tuple[LabelSelector, tuple[str, ...]]:
    """Read a label selector; the second part are its comparisons (`priority>3`). Raises ValueError."""
    requirements: list[dict[str, Any]] = []
    compared: list[str] = []
    for part in _outside_parentheses(text):
        if _COMPARED.fullmatch(part):
            compared.append(part)
        else:
            requirements.append(_requirement(part))
    try:
        return parse_label_selector({"matchExpressions": requirements}, "selector"), tuple(compared)
    except SettingError as error:
        raise ValueError(error.message.removeprefix("selector.")) from None


def parse_field_text(text: str) -> tuple[tuple[tuple[str, bool, str], ...], tuple[str, ...]]:
    """Read a field selector; the second part are the names of fields that we do not have. Raises ValueError."""
    found: list[tuple[str, bool, str]] = []
    foreign: list[str] = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        match = _FIELD.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no condition on a field, such as metadata.namespace!=kube-system")
        if match["name"] in POD_FIELDS:
            found.append((match["name"], match["operator"] != "!=", match["value"].strip()))
        elif match["name"] in SERVER_FIELDS:
            foreign.append(match["name"])
        else:
            raise ValueError(
                f"pods cannot be selected by field {match['name']!r}, but by {', '.join((*POD_FIELDS, *SERVER_FIELDS))}"
            )
    return tuple(found), tuple(foreign)


def _requirement(part: str) -> dict[str, Any]:
    if match := _AMONG.fullmatch(part):
        values = [value.strip() for value in match["values"].split(",")]
        operator = Operator.IN if match["operator"] == "in" else Operator.NOT_IN
        return {"key": match["key"], "operator": operator.value, "values": values}
    if match := _EQUAL.fullmatch(part):
        operator = Operator.NOT_IN if match["operator"] == "!=" else Operator.IN
        return {"key": match["key"], "operator": operator.value, "values": [match["value"]]}
    if match := _ABSENT.fullmatch(part):
        return {"key": match["key"], "operator": Operator.DOES_NOT_EXIST.value}
    if match := _PRESENT.fullmatch(part):
        return {"key": match["key"], "operator": Operator.EXISTS.value}
    raise ValueError(f"{part!r} is no condition on a label, such as app=web, app in (web, db) or !app")


def _outside_parentheses(text: str) -> list[str]:
    """Split at the commas that are not in parentheses; blank parts are left out."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
