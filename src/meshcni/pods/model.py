"""What this project keeps of a Kubernetes pod: a small frozen projection, parsed once from the API's JSON.

The plugin reads pods with this too, so no more of the standard library may be used than native/plugin/stubs has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import MappingProxyType
from typing import Any, TypeVar

from meshcni import istio
from meshcni.errors import PodSpecError

COMPLETED = "Completed"  # kubernetes/pkg/kubelet: reason of a container that ended with status 0
NO_PAIRS: Mapping[str, str] = MappingProxyType({})
TERMINAL_PHASES = frozenset({"Succeeded", "Failed"})  # k8s.io/api core/v1 PodPhase: no container will ever run again
Address = IPv4Address | IPv6Address


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
class Termination:
    """One end of a container."""

    exit_code: int
    reason: str = ""
    message: str = ""

    @property
    def is_success(self) -> bool:
        """Whether the container did what it was for."""
        return self.exit_code == 0 or self.reason == COMPLETED


@dataclass(frozen=True, slots=True)
class InitStatus:
    """An init container that failed: `current` is its end when it is not running again, `last` the end before."""

    name: str
    current: Termination | None = None
    last: Termination | None = None
    restarts: int = 0


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
    service_account: str = ""
    runtime_class: str = ""
    restart_policy: str = ""
    init_statuses: tuple[InitStatus, ...] = ()  # of init containers that failed and have not succeeded since
    container_ids: frozenset[str] = frozenset()  # the runtime's, of every container made; without `containerd://`

    @property
    def full_name(self) -> str:
        """`namespace/name`, as people write it."""
        return f"{self.namespace}/{self.name}"

    @property
    def has_terminated(self) -> bool:
        """Whether all its containers have ended for good; a pod that is only `terminating` still runs."""
        return self.phase in TERMINAL_PHASES

    @property
    def proxy(self) -> Container | None:
        """The sidecar proxy's container, init or regular; the last one of the name, as upstream scans them."""
        return next((one for one in reversed(self.containers) if one.name == istio.PROXY_CONTAINER), None)


def pod_addresses(pod: Pod) -> tuple[tuple[Address, ...], tuple[str, ...]]:
    """Parse the pod's addresses: each that is one, once and an IPv4-mapped one as IPv4; then the texts that are none.

    One that cannot be read must not keep the others from being used.
    """
    read = [(_address(text), text) for text in pod.ips]
    good = dict.fromkeys(address for address, _ in read if address is not None)
    return tuple(good), tuple(text for address, text in read if address is None)


def _address(text: str) -> Address | None:
    """Read one address; with a zone (`fe80::1%eth0`) it is none that a pod is reached by."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return None if address.scope_id is not None else address.ipv4_mapped or address


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
_STATUS_LISTS = ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses")
# core/v1 ContainerStatus: `<type>://<id>`
_RUNTIME_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789-"
_ID_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_." + _RUNTIME_CHARACTERS


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


def _container_ids(status: Mapping[str, Any]) -> Iterator[str]:
    """Give the ids of the pod's containers; they only help to find its processes, so what is malformed is left out."""
    for key in _STATUS_LISTS:
        entries = status.get(key)
        for entry in entries if isinstance(entries, list) else ():
            text = entry.get("containerID") if isinstance(entry, Mapping) else None
            runtime, _, identifier = text.partition("://") if isinstance(text, str) else ("", "", "")
            if runtime and identifier and not (runtime.strip(_RUNTIME_CHARACTERS) or identifier.strip(_ID_CHARACTERS)):
                yield identifier


def _init_statuses(status: Mapping[str, Any]) -> tuple[InitStatus, ...]:
    """Read leniently: a status that makes no sense must not make its pod unreadable; the ADD needs the pod, not it."""
    entries = status.get("initContainerStatuses")
    found = (_init_status(entry) for entry in entries) if isinstance(entries, list) else ()
    return tuple(one for one in found if one is not None)


def _init_status(entry: object) -> InitStatus | None:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(name, str):
        return None
    current, last = _termination(entry.get("state")), _termination(entry.get("lastState"))
    if current is not None and current.is_success:
        return None
    last = None if last is not None and last.is_success else last
    if current is None and last is None:
        return None
    return InitStatus(name, current, last, _integer(entry.get("restartCount")) or 0)


def _termination(state: object) -> Termination | None:
    ended = state.get("terminated") if isinstance(state, Mapping) else None
    exit_code = _integer(ended.get("exitCode")) if isinstance(ended, Mapping) else None
    if not isinstance(ended, Mapping) or exit_code is None:
        return None
    return Termination(exit_code, _text(ended.get("reason")), _text(ended.get("message")))


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


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
    ips = [ip for ip in ips if ip] or [_read(status, "podIP", "status.", str, "")]
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
        service_account=_read(spec, "serviceAccountName", "spec.", str, ""),
        runtime_class=_read(spec, "runtimeClassName", "spec.", str, ""),
        restart_policy=_read(spec, "restartPolicy", "spec.", str, ""),
        init_statuses=_init_statuses(status),
        container_ids=frozenset(_container_ids(status)),
    )


def namespace_from_object(obj: Mapping[str, Any]) -> Namespace:
    """Project a namespace, whole or only its metadata, as the Kubernetes API gives it."""
    metadata = _read_object(obj, "metadata")
    return Namespace(
        name=_read(metadata, "name", "metadata.", str, ""), labels=_read_pairs(metadata, "labels", "metadata.")
    )
