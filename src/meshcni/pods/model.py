"""What this project keeps of a Kubernetes pod: a small frozen projection, parsed once from the API's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from meshcni import istio
from meshcni.errors import PodSpecError

NO_PAIRS: Mapping[str, str] = MappingProxyType({})


def _no_pairs() -> Mapping[str, str]:
    return NO_PAIRS  # a dataclass takes no unhashable default, though this one cannot change


@dataclass(frozen=True, slots=True)
class Container:
    """One container, init or regular, with the fields that decide interception.

    `env` holds literal values only; names whose value comes from elsewhere (`valueFrom`) are in `env_from_elsewhere`.
    """

    name: str
    is_init: bool = False
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=_no_pairs)
    env_from_elsewhere: frozenset[str] = frozenset()
    run_as_user: int | None = None
    run_as_group: int | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's identity, metadata and the parts of its spec and status that decisions need."""

    namespace: str
    name: str
    uid: str = ""
    node_name: str = ""
    labels: Mapping[str, str] = field(default_factory=_no_pairs)
    annotations: Mapping[str, str] = field(default_factory=_no_pairs)
    host_network: bool = False
    containers: tuple[Container, ...] = ()  # init containers first, in the order of the spec
    run_as_user: int | None = None  # of the pod's own securityContext
    run_as_group: int | None = None
    ips: tuple[str, ...] = ()
    phase: str = ""
    terminating: bool = False
    resource_version: str = ""

    @property
    def full_name(self) -> str:
        """`namespace/name`, as people write it."""
        return f"{self.namespace}/{self.name}"

    @property
    def proxy(self) -> Container | None:
        """The sidecar proxy's container, init or regular; the last one of the name, as upstream scans them."""
        return next((one for one in reversed(self.containers) if one.name == istio.PROXY_CONTAINER), None)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A Kubernetes namespace: its name and labels."""

    name: str
    labels: Mapping[str, str] = field(default_factory=_no_pairs)


# --- from the API's JSON ----------------------------------------------------------------------------------------------
# Missing and null fields count as empty, as the API server omits them; a field of another type is an error that names
# the path of the field, because guessing would let a mesh pod pass as none.

T = TypeVar("T")
_TYPE_WORDS: Mapping[type, str] = {str: "a string", int: "an integer", bool: "true or false", list: "a list"}
_HIGHEST_ID = 2**32 - 2  # (uid_t) -1 means "no user" to the kernel


def _wrong(path: str, value: object, expected: str) -> PodSpecError:
    hint = "quote the value" if expected == "a string" and isinstance(value, int | float | bool) else ""
    return PodSpecError(f"{path} is {value!r}, expected {expected}", hint)


def _read(parent: Mapping[str, Any], key: str, path: str, kind: type[T], default: T) -> T:
    """Return `parent[key]` checked for its type, `default` when missing or null; a boolean is no integer."""
    value = parent.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(f"{path}{key}", value, _TYPE_WORDS[kind])
    return value


def _read_object(parent: Mapping[str, Any], key: str, path: str = "") -> Mapping[str, Any]:
    value = parent.get(key)
    if value is None:
        return NO_PAIRS
    if not isinstance(value, Mapping):
        raise _wrong(f"{path}{key}", value, "an object")
    return value


def _read_objects(parent: Mapping[str, Any], key: str, path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the objects of a list, each with the path of its fields."""
    objects = []
    for index, value in enumerate(_read(parent, key, path, list, [])):
        if not isinstance(value, Mapping):
            raise _wrong(f"{path}{key}[{index}]", value, "an object")
        objects.append((f"{path}{key}[{index}].", value))
    return objects


def _read_pairs(parent: Mapping[str, Any], key: str, path: str) -> Mapping[str, str]:
    pairs = _read_object(parent, key, path)
    for name, value in pairs.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise _wrong(f"{path}{key}[{name}]", value, "a string")
    return MappingProxyType(dict(pairs))


def _read_id(parent: Mapping[str, Any], key: str, path: str) -> int | None:
    """Return a user or group id of a securityContext, None when it is not set."""
    if parent.get(key) is None:
        return None
    number = _read(parent, key, path, int, 0)
    if not 0 <= number <= _HIGHEST_ID:
        raise _wrong(f"{path}{key}", number, f"an id from 0 to {_HIGHEST_ID}")
    return number


def _container(fields: Mapping[str, Any], path: str, is_init: bool) -> Container:
    env: dict[str, str] = {}
    elsewhere: set[str] = set()
    for env_path, entry in _read_objects(fields, "env", path):
        name = _read(entry, "name", env_path, str, "")
        if entry.get("valueFrom") is None:
            env[name] = _read(entry, "value", env_path, str, "")
            elsewhere.discard(name)
        else:  # of repeated names the last one counts
            env.pop(name, None)
            elsewhere.add(name)
    args = _read(fields, "args", path, list, [])
    for index, argument in enumerate(args):
        if not isinstance(argument, str):
            raise _wrong(f"{path}args[{index}]", argument, "a string")
    security = _read_object(fields, "securityContext", path)
    return Container(
        name=_read(fields, "name", path, str, ""),
        is_init=is_init,
        args=tuple(args),
        env=MappingProxyType(env),
        env_from_elsewhere=frozenset(elsewhere),
        run_as_user=_read_id(security, "runAsUser", f"{path}securityContext."),
        run_as_group=_read_id(security, "runAsGroup", f"{path}securityContext."),
    )


def pod_from_object(obj: Mapping[str, Any]) -> Pod:
    """Project a pod as the Kubernetes API gives it, decoded; PodSpecError names the field of a wrong type."""
    metadata, spec, status = (_read_object(obj, key) for key in ("metadata", "spec", "status"))
    security = _read_object(spec, "securityContext", "spec.")
    containers = [
        _container(fields, path, is_init)
        for key, is_init in (("initContainers", True), ("containers", False))
        for path, fields in _read_objects(spec, key, "spec.")
    ]
    ips = [_read(entry, "ip", path, str, "") for path, entry in _read_objects(status, "podIPs", "status.")]
    ips = ips or [_read(status, "podIP", "status.", str, "")]
    return Pod(
        namespace=_read(metadata, "namespace", "metadata.", str, ""),
        name=_read(metadata, "name", "metadata.", str, ""),
        uid=_read(metadata, "uid", "metadata.", str, ""),
        node_name=_read(spec, "nodeName", "spec.", str, ""),
        labels=_read_pairs(metadata, "labels", "metadata."),
        annotations=_read_pairs(metadata, "annotations", "metadata."),
        host_network=_read(spec, "hostNetwork", "spec.", bool, False),
        containers=tuple(containers),
        run_as_user=_read_id(security, "runAsUser", "spec.securityContext."),
        run_as_group=_read_id(security, "runAsGroup", "spec.securityContext."),
        ips=tuple(ip for ip in ips if ip),
        phase=_read(status, "phase", "status.", str, ""),
        terminating=metadata.get("deletionTimestamp") is not None,
        resource_version=_read(metadata, "resourceVersion", "metadata.", str, ""),
    )


def namespace_from_object(obj: Mapping[str, Any]) -> Namespace:
    """Project a namespace, whole or only its metadata, as the Kubernetes API gives it."""
    metadata = _read_object(obj, "metadata")
    return Namespace(
        name=_read(metadata, "name", "metadata.", str, ""), labels=_read_pairs(metadata, "labels", "metadata.")
    )
