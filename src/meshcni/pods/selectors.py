"""Kubernetes label selectors, and the list of them that says which pods ambient mode takes.

Sources: apimachinery `pkg/apis/meta/v1` (LabelSelectorAsSelector) and `pkg/labels`; istio `cni/pkg/util/podutil.go`.
The plugin decides with this too, so no more of the standard library may be used than native/plugin/stubs has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from meshcni.errors import SettingError

SETTING: Final = "AMBIENT_ENABLEMENT_SELECTOR"
_LOWER: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
_ALPHANUMERIC: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + _LOWER
_MAX_NAME: Final = 63
_MAX_PREFIX: Final = 253


class Operator(Enum):
    """How a requirement looks at the label's value; NotIn and DoesNotExist also match when the label is missing."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Say whether `labels` meet this condition."""
        if self.operator is Operator.EXISTS:
            return self.key in labels
        if self.operator is Operator.DOES_NOT_EXIST:
            return self.key not in labels
        is_among = self.key in labels and labels[self.key] in self.values
        return is_among if self.operator is Operator.IN else not is_among


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """All of its labels and requirements must match; an empty selector matches everything."""

    match_labels: tuple[tuple[str, str], ...] = ()
    match_expressions: tuple[Requirement, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether this selector matches everything."""
        return not self.match_labels and not self.match_expressions

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Say whether `labels` meet every condition."""
        return all(labels.get(key) == value for key, value in self.match_labels) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )

    def to_object(self) -> dict[str, Any]:
        """Return the selector as Kubernetes serialises it: empty parts left out."""
        written: dict[str, Any] = {}
        if self.match_labels:
            written["matchLabels"] = dict(sorted(self.match_labels))
        if self.match_expressions:
            written["matchExpressions"] = [
                {"key": one.key, "operator": one.operator.value} | ({"values": list(one.values)} if one.values else {})
                for one in self.match_expressions
            ]
        return written


@dataclass(frozen=True, slots=True)
class EnablementSelector:
    """Takes a pod whose labels match `pod` in a namespace whose labels match `namespace`."""

    pod: LabelSelector = LabelSelector()
    namespace: LabelSelector = LabelSelector()

    def to_object(self) -> dict[str, Any]:
        """Return the entry as the plugin's conf carries it: both selectors, also empty ones."""
        return {"podSelector": self.pod.to_object(), "namespaceSelector": self.namespace.to_object()}


def to_objects(selectors: Iterable[EnablementSelector]) -> list[dict[str, Any]]:
    """Return the list as the conf key `enablement_selectors` carries it."""
    return [selector.to_object() for selector in selectors]


# --- parsing ----------------------------------------------------------------------------------------------------------


def _fields(value: object, path: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of an object by their canonical names; Go reads names in any case, and so do we.

    An unknown field is an error: passed over, `podSelectors` would leave a selector that takes every pod.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SettingError(f"{path} is {value!r}, expected an object")
    names = {name.lower(): name for name in allowed}
    fields: dict[str, Any] = {}
    for key, content in value.items():
        if str(key).lower() not in names:
            raise SettingError(f"{path} has the unknown field {key!r}", f"it takes {' and '.join(allowed)}")
        fields[names[str(key).lower()]] = content
    return fields


def _text(value: object, path: str) -> str:
    """Return a label's text; YAML reads `true` and `1` unquoted as other types, Go turns them back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | str):
        return str(value)
    raise SettingError(f"{path} is {value!r}, expected a string", "quote the value")


def _is_word(text: str, ends: str, inner: str) -> bool:
    """Whether the first and the last character are of `ends` and those between of these or of `inner`."""
    return bool(text) and text[0] in ends and text[-1] in ends and not text.strip(ends + inner)


def _is_name(text: str) -> bool:
    return len(text) <= _MAX_NAME and _is_word(text, _ALPHANUMERIC, "-_.")


def _is_domain(text: str) -> bool:
    return len(text) <= _MAX_PREFIX and all(_is_word(label, _LOWER, "-") for label in text.split("."))


def _key(value: object, path: str) -> str:
    key = _text(value, path)
    prefix, slash, name = key.rpartition("/")
    if not _is_name(name) or (slash and not _is_domain(prefix)):
        raise SettingError(f"{path}: {key!r} is no label key", "a key is NAME or DOMAIN/NAME, like istio.io/rev")
    return key


def _value(value: object, path: str) -> str:
    text = _text(value, path)
    if text and not _is_name(text):
        raise SettingError(
            f"{path}: {text!r} is no label value",
            "a value has at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends",
        )
    return text


def _requirement(value: object, path: str) -> Requirement:
    fields = _fields(value, path, ("key", "operator", "values"))
    key = _key(fields.get("key", ""), f"{path}.key")
    try:
        operator = Operator(fields.get("operator"))
    except ValueError:
        allowed = ", ".join(one.value for one in Operator)
        raise SettingError(f"{path}.operator is {fields.get('operator')!r}", f"it is one of {allowed}") from None
    listed = fields.get("values") or []
    if not isinstance(listed, list):
        raise SettingError(f"{path}.values is {listed!r}, expected a list")
    values = tuple(_value(one, f"{path}.values[{index}]") for index, one in enumerate(listed))
    if (operator in (Operator.IN, Operator.NOT_IN)) != bool(values):
        raise SettingError(
            f"{path}: operator {operator.value} with {len(values)} values",
            "In and NotIn need at least one value, Exists and DoesNotExist take none",
        )
    return Requirement(key, operator, values)


def parse_label_selector(value: object, path: str) -> LabelSelector:
    """Read one decoded selector; null or `{}` is the empty one. `path` names it in a SettingError."""
    fields = _fields(value, path, ("matchLabels", "matchExpressions"))
    labels = fields.get("matchLabels") or {}
    expressions = fields.get("matchExpressions") or []
    if not isinstance(labels, Mapping):
        raise SettingError(f"{path}.matchLabels is {labels!r}, expected an object")
    if not isinstance(expressions, list):
        raise SettingError(f"{path}.matchExpressions is {expressions!r}, expected a list")
    return LabelSelector(
        match_labels=tuple(
            (_key(key, f"{path}.matchLabels"), _value(text, f"{path}.matchLabels[{key}]"))
            for key, text in labels.items()
        ),
        match_expressions=tuple(
            _requirement(one, f"{path}.matchExpressions[{index}]") for index, one in enumerate(expressions)
        ),
    )


def parse_enablement_selectors(objects: object, setting: str = SETTING) -> tuple[EnablementSelector, ...]:
    """Read the decoded list of `{podSelector, namespaceSelector}`; null or `[]` takes no pod. Errors name `setting`."""
    if objects is None:
        return ()
    if not isinstance(objects, list):
        raise SettingError(
            f"{setting} is {objects!r}, expected a list", "write a YAML list of {podSelector, namespaceSelector}"
        )
    selectors = []
    for index, item in enumerate(objects):
        path = f"{setting}[{index}]"
        fields = _fields(item, path, ("podSelector", "namespaceSelector"))
        selectors.append(
            EnablementSelector(
                parse_label_selector(fields.get("podSelector"), f"{path}.podSelector"),
                parse_label_selector(fields.get("namespaceSelector"), f"{path}.namespaceSelector"),
            )
        )
    return tuple(selectors)
