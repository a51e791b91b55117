"""What an API server keeps and how it changes: objects, versions, selectors, history, lists in pages. No I/O."""

from __future__ import annotations

import base64
import json
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

Object = dict[str, Any]
Key = tuple[str, str]  # namespace, name


class Refusal(Exception):
    """An answer with a Status object instead of what was asked."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details or {},
            "code": code,
        }


class Kind(NamedTuple):
    """One kind of object: where it lives and what it is called."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        """`v1` or `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version


KINDS: tuple[Kind, ...] = (
    Kind("", "v1", "pods", "Pod", True),
    Kind("", "v1", "namespaces", "Namespace", False),
    Kind("", "v1", "nodes", "Node", False),
    Kind("", "v1", "events", "Event", True),
    Kind("", "v1", "serviceaccounts", "ServiceAccount", True),
    Kind("apps", "v1", "daemonsets", "DaemonSet", True),
)
BY_PLURAL: Mapping[str, Kind] = {kind.plural: kind for kind in KINDS}
# Fields that a real API server lets a client select by, and how to read them.
COMMON_FIELDS: Mapping[str, tuple[str, ...]] = {
    "metadata.name": ("metadata", "name"),
    "metadata.namespace": ("metadata", "namespace"),
}
FIELDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "pods": {
        "spec.nodeName": ("spec", "nodeName"),
        "status.phase": ("status", "phase"),
        "status.podIP": ("status", "podIP"),
        "spec.serviceAccountName": ("spec", "serviceAccountName"),
    },
    "events": {
        "involvedObject.name": ("involvedObject", "name"),
        "involvedObject.uid": ("involvedObject", "uid"),
        "reason": ("reason",),
        "type": ("type",),
    },
}
DEFAULT_GRACE_SECONDS = 30
FIXED_METADATA = ("name", "namespace", "uid", "creationTimestamp")


@dataclass(frozen=True)
class HistoryEntry:
    """One change of one object; `before` is None for a new one, `after` the last state of a deleted one."""

    version: int
    plural: str
    key: Key
    before: Object | None
    after: Object
    deleted: bool


@dataclass(frozen=True)
class Selection:
    """Which objects of a kind a list or watch is about."""

    namespace: str = ""
    labels: tuple[tuple[str, str, frozenset[str]], ...] = ()  # key, operator, values
    fields: tuple[tuple[tuple[str, ...], bool, str], ...] = ()  # path, equal or not, value

    def matches(self, obj: Object) -> bool:
        """Whether `obj` is selected."""
        metadata = obj["metadata"]
        if self.namespace and metadata.get("namespace") != self.namespace:
            return False
        labels = metadata.get("labels") or {}
        return all(_label_matches(labels, *one) for one in self.labels) and all(
            (_field(obj, path) == value) is equal for path, equal, value in self.fields
        )


def parse_selection(kind: Kind, namespace: str, label_selector: str, field_selector: str) -> Selection:
    """The selectors of a query. Raises Refusal for a field that cannot be selected by."""
    known = {**COMMON_FIELDS, **FIELDS.get(kind.plural, {})}
    fields = []
    for part in filter(None, field_selector.split(",")):
        name, operator, value = _split_operator(part)
        if name not in known:
            raise Refusal(400, "BadRequest", f'field label not supported: "{name}"')
        fields.append((known[name], operator == "=", value))
    return Selection(namespace, _parse_labels(label_selector), tuple(fields))


class Cluster:
    """All objects, their versions and their history.

    `keep_history` changes can be watched from; older ones are 410. Objects are never changed in place, so that history
    and lists may share them.
    """

    def __init__(self, *, keep_history: int = 10_000, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.version = 1
        self.oldest = 1  # watches from before this version are too old
        self.history: deque[HistoryEntry] = deque()
        self._keep_history = keep_history
        self._now = now
        self._objects: dict[str, dict[Key, Object]] = {kind.plural: {} for kind in KINDS}
        self._listeners: set[Callable[[HistoryEntry], None]] = set()
        self._snapshots: dict[str, tuple[int, list[Object]]] = {}

    def listen(self, listener: Callable[[HistoryEntry], None]) -> Callable[[], None]:
        """Call `listener` for every change from now on; returns what ends it."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """One object. Raises Refusal 404."""
        try:
            return self._objects[kind.plural][namespace if kind.namespaced else "", name]
        except KeyError:
            raise Refusal(
                404,
                "NotFound",
                f'{_qualified(kind)} "{name}" not found',
                {"name": name, "kind": kind.plural, **({"group": kind.group} if kind.group else {})},
            ) from None

    def has(self, plural: str, namespace: str, name: str) -> bool:
        """Whether an object exists."""
        return (namespace, name) in self._objects[plural]

    def objects(self, plural: str) -> list[Object]:
        """All objects of a kind, by namespace and name."""
        found = self._objects[plural]
        return [found[key] for key in sorted(found)]

    def list_page(
        self, kind: Kind, selection: Selection, *, resource_version: str, limit: int, go_on: str
    ) -> tuple[list[Object], int, str, int | None]:
        """Items, version, continue token and remaining count of a list, as the API's query parameters ask."""
        if go_on:
            if resource_version not in ("", "0"):
                raise Refusal(400, "BadRequest", "specifying resource version is not allowed when using continue")
            version, left = self._resume(go_on)
        else:
            wanted = parse_version(resource_version)
            if wanted > self.version:
                raise too_large(wanted, self.version)
            version, left = self.version, [obj for obj in self.objects(kind.plural) if selection.matches(obj)]
            if resource_version == "0":
                limit = 0  # as served from a real one's watch cache
        if not limit or len(left) <= limit:
            return left, version, "", None
        remaining = None if selection.labels or selection.fields else len(left) - limit
        return left[:limit], version, self._keep_rest(version, left[limit:]), remaining

    def create(self, kind: Kind, namespace: str, obj: Object) -> Object:
        """Add an object; fills in what a server fills in. Raises Refusal 409, 404, 422."""
        new = deepcopy(obj)
        metadata = new.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if not metadata.get("name"):
            raise Refusal(422, "Invalid", f'{kind.kind} "" is invalid: metadata.name: Required value: name is required')
        if kind.namespaced:
            if metadata.setdefault("namespace", namespace) != namespace:
                raise Refusal(
                    400,
                    "BadRequest",
                    "the namespace of the provided object does not match the namespace sent on the request",
                )
            if ("", namespace) not in self._objects["namespaces"]:
                raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found', {"name": namespace})
        key = (namespace if kind.namespaced else "", metadata["name"])
        if key in self._objects[kind.plural]:
            raise Refusal(
                409,
                "AlreadyExists",
                f'{_qualified(kind)} "{key[1]}" already exists',
                {"name": key[1], "kind": kind.plural},
            )
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", self._timestamp())
        new = {"kind": kind.kind, "apiVersion": kind.api_version, **new}
        if kind.plural == "pods":
            new.setdefault("spec", {})
            new.setdefault("status", {"phase": "Pending"})
        return self._write(kind, key, new)

    def replace(self, kind: Kind, key: Key, new: Object) -> Object:
        """Put another state of an existing object in place; one that is equal is no change."""
        before = self.get(kind, *key)
        new["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
        return before if new == before else self._write(kind, key, new)

    def patch(self, kind: Kind, namespace: str, name: str, patch: Object, subresource: str = "") -> Object:
        """A JSON merge patch (RFC 7386). `status` changes status and metadata, the object itself all but status.

        Raises Refusal 404, 409 for a resourceVersion and 422 for a UID that are not the object's.
        """
        before = self.get(kind, namespace, name)
        wanted = patch.get("metadata") or {}
        if wanted.get("resourceVersion") not in (None, before["metadata"]["resourceVersion"]):
            raise Refusal(409, "Conflict", f'Operation cannot be fulfilled on {_qualified(kind)} "{name}"')
        if wanted.get("uid") and wanted["uid"] != before["metadata"]["uid"]:
            raise immutable(kind, name, "metadata.uid", wanted["uid"])
        merged = merge_patch(deepcopy(before), patch)
        if subresource == "status":
            new = before | {part: merged[part] for part in ("metadata", "status") if part in merged}
            kept = (*FIXED_METADATA, "ownerReferences")
        else:
            new = merged | {part: before[part] for part in ("status", "kind", "apiVersion") if part in before}
            kept = FIXED_METADATA
        own = before["metadata"]
        metadata = {field: value for field, value in new["metadata"].items() if field not in kept}
        new["metadata"] = metadata | {field: own[field] for field in kept if field in own}
        return self.replace(kind, (own.get("namespace", ""), name), new)

    def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        grace_seconds: int | None = None,
        preconditions: Mapping[str, str] | None = None,
    ) -> Object:
        """Delete an object. A pod on a node is marked first and goes when deleted with grace 0, as a kubelet does.

        Raises Refusal 409 when `uid` or `resourceVersion` of `preconditions` are not the object's.
        """
        obj = self.get(kind, namespace, name)
        for field, words in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            asked, has = (preconditions or {}).get(field), obj["metadata"][field]
            if asked not in (None, has):
                may_have = "been deleted and then recreated" if field == "uid" else "been modified"
                raise Refusal(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {_qualified(kind)} "{name}": the {words} in the precondition '
                    f"({asked}) does not match the {words} in record ({has}). The object might have {may_have}",
                    {"name": name, "kind": kind.plural},
                )
        key = (obj["metadata"].get("namespace", ""), name)
        on_node = kind.plural == "pods" and obj.get("spec", {}).get("nodeName")
        if on_node and grace_seconds != 0:
            if "deletionTimestamp" in obj["metadata"]:
                return obj
            seconds = DEFAULT_GRACE_SECONDS if grace_seconds is None else grace_seconds
            marks = {"deletionTimestamp": self._timestamp(), "deletionGracePeriodSeconds": seconds}
            return self._write(kind, key, {**obj, "metadata": {**obj["metadata"], **marks}})
        return self._write(kind, key, obj, deleted=True)

    def compact(self) -> None:
        """Forget all history and open lists: every watch resumed and every list continued from here on is too old."""
        self.oldest = self.version + 1
        self.version += 1
        self.history.clear()
        self._snapshots.clear()

    def since(self, version: int) -> list[HistoryEntry]:
        """The changes after `version`. Raises Refusal 410 when they are not all kept."""
        if version < self.oldest:
            raise Refusal(410, "Expired", f"too old resource version: {version} ({self.oldest})")
        return [entry for entry in self.history if entry.version > version]

    def _write(self, kind: Kind, key: Key, new: Object, *, deleted: bool = False) -> Object:
        self.version += 1
        new = {**new, "metadata": {**new["metadata"], "resourceVersion": str(self.version)}}
        store = self._objects[kind.plural]
        before = store.pop(key, None)
        if not deleted:
            store[key] = new
        entry = HistoryEntry(self.version, kind.plural, key, before, new, deleted)
        self.history.append(entry)
        if len(self.history) > self._keep_history:
            self.oldest = self.history.popleft().version
        for listener in tuple(self._listeners):
            listener(entry)
        return new

    def _keep_rest(self, version: int, rest: list[Object]) -> str:
        token = base64.urlsafe_b64encode(json.dumps({"v": version, "id": uuid.uuid4().hex}).encode()).decode()
        self._snapshots[token] = (version, rest)
        while len(self._snapshots) > 64:
            self._snapshots.pop(next(iter(self._snapshots)))
        return token

    def _resume(self, token: str) -> tuple[int, list[Object]]:
        try:
            return self._snapshots[token]
        except KeyError:
            raise Refusal(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result. You can start a new "
                "list without the continue parameter.",
            ) from None

    def _timestamp(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%SZ")


def event_of(entry: HistoryEntry, selection: Selection) -> tuple[str, Object] | None:
    """What a watch with `selection` tells of a change: leaving the selection is DELETED, entering it ADDED."""
    matched = entry.before is not None and selection.matches(entry.before)
    matches = not entry.deleted and selection.matches(entry.after)
    if matches:
        return ("MODIFIED" if matched else "ADDED"), entry.after
    return ("DELETED", entry.after) if matched else None


def merge_patch(target: Any, patch: Any) -> Any:  # noqa: ANN401 - any JSON
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def parse_version(text: str) -> int:
    """A resourceVersion parameter. Raises Refusal 400."""
    if not text:
        return 0
    if not text.isdecimal():
        raise Refusal(400, "BadRequest", f'Invalid value: "{text}": resourceVersion is not a number')
    return int(text)


def too_large(wanted: int, current: int) -> Refusal:
    """What a server behind the wanted version answers after waiting."""
    return Refusal(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {wanted}, current: {current}",
        {
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            "retryAfterSeconds": 1,
        },
    )


def immutable(kind: Kind, name: str, field: str, value: str) -> Refusal:
    """What a server answers to a patch of a field that cannot change."""
    detail = f'Invalid value: "{value}": field is immutable'
    return Refusal(
        422,
        "Invalid",
        f'{kind.kind} "{name}" is invalid: {field}: {detail}',
        {
            "name": name,
            "kind": kind.kind,
            "causes": [{"reason": "FieldValueInvalid", "message": detail, "field": field}],
        },
    )


def _qualified(kind: Kind) -> str:
    return f"{kind.plural}.{kind.group}" if kind.group else kind.plural


def _field(obj: Object, path: tuple[str, ...]) -> str:
    found: Any = obj
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return "" if found is None else str(found)


def _split_operator(part: str) -> tuple[str, str, str]:
    for written, meant in (("!=", "!="), ("==", "="), ("=", "=")):
        name, found, value = part.partition(written)
        if found:
            return name.strip(), meant, value.strip()
    raise Refusal(400, "BadRequest", f'invalid selector: "{part}"; can\'t understand it')


def _parse_labels(text: str) -> tuple[tuple[str, str, frozenset[str]], ...]:
    found = []
    for part in _outside_parentheses(text):
        words = part.split(None, 2)
        if len(words) >= 2 and words[1].split("(")[0] in ("in", "notin"):
            values = part[part.index("(") + 1 : part.rindex(")")]
            found.append((words[0], words[1].split("(")[0], frozenset(v.strip() for v in values.split(","))))
        elif "=" in part:
            name, operator, value = _split_operator(part)
            found.append((name, "in" if operator == "=" else "notin", frozenset([value])))
        elif part.startswith("!"):
            found.append((part[1:].strip(), "absent", frozenset()))
        else:
            found.append((part, "present", frozenset()))
    return tuple(found)


def _outside_parentheses(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _label_matches(labels: Mapping[str, str], name: str, operator: str, values: frozenset[str]) -> bool:
    if operator == "present":
        return name in labels
    if operator == "absent":
        return name not in labels
    return (labels.get(name) in values) if operator == "in" else (labels.get(name) not in values)
