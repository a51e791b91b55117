"""The parameters of a sidecar's rules, read from the pod's annotations and its proxy container.

Upstream: cni/pkg/plugin/sidecar_redirect.go, cni/pkg/plugin/kubernetes.go. One row of a table per parameter; every
value remembers where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

from meshcni import istio
from meshcni.errors import PodSpecError
from meshcni.pflag import go_bool
from meshcni.pods.interception import Interception, InterceptionMode, NumberRange
from meshcni.pods.model import NO_PAIRS, Pod
from meshcni.pods.values import (
    read_cidr_selection,
    read_group_selection,
    read_id_ranges,
    read_interfaces,
    read_loopback,
    read_port_selection,
    read_ports,
    read_prefixes,
)

DEFAULT_ORIGIN: Final = "default"
MAX_ITEMS: Final = 2000  # of all lists of a pod; annotations could hold 50,000, which would keep other pods waiting


@dataclass(frozen=True, slots=True)
class Derived:
    """Interception parameters; `origins` says for every field of `Interception` where its value came from."""

    interception: Interception
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def _read_mode(text: str) -> InterceptionMode:
    try:
        return InterceptionMode(text)
    except ValueError:
        raise ValueError(f"{text!r} is no interception mode: write REDIRECT, TPROXY or NONE") from None


def _read_inbound_exclude(text: str) -> tuple[NumberRange, ...]:
    """Read excluded inbound ports; the ports of the proxy's own endpoints are always among them."""
    always = tuple(NumberRange.single(port) for port in istio.ALWAYS_EXCLUDED_INBOUND_PORTS)
    return tuple(dict.fromkeys(read_ports(text) + always))


@dataclass(frozen=True, slots=True)
class Source:
    """A parameter and the annotations that set it: the first one present counts, the others are not looked at."""

    field: str
    annotations: tuple[str, ...]
    read: Callable[[str], Any]


ANNOTATIONS: Final = (
    Source("mode", (istio.INTERCEPTION_MODE,), _read_mode),
    Source("outbound_cidrs", (istio.INCLUDE_OUTBOUND_CIDRS,), read_cidr_selection),
    Source("outbound_exclude_cidrs", (istio.EXCLUDE_OUTBOUND_CIDRS,), read_prefixes),
    Source("inbound_ports", (istio.INCLUDE_INBOUND_PORTS,), read_port_selection),
    Source("inbound_exclude_ports", (istio.EXCLUDE_INBOUND_PORTS,), _read_inbound_exclude),
    Source("outbound_ports", (istio.INCLUDE_OUTBOUND_PORTS,), read_port_selection),
    Source("outbound_exclude_ports", (istio.EXCLUDE_OUTBOUND_PORTS,), read_ports),
    Source("exclude_interfaces", (istio.EXCLUDE_INTERFACES,), read_interfaces),
    Source("virtual_interfaces", (istio.REROUTE_VIRTUAL_INTERFACES, istio.KUBEVIRT_INTERFACES), read_interfaces),
)

SWITCHES: Final = (  # variable of the proxy container, and the fields it switches
    (istio.ENV_DNS_CAPTURE, ("redirect_dns", "capture_all_dns")),
    (istio.ENV_DUAL_STACK, ("dual_stack",)),
    (istio.ENV_DROP_INVALID, ("drop_invalid",)),
)

VARIABLES: Final[tuple[tuple[str, str, Callable[[str], Any]], ...]] = (  # also read from the given environment
    (istio.ENV_OWNER_GROUPS, "owner_groups", read_group_selection),
    (istio.ENV_OWNER_GROUPS_EXCLUDE, "owner_groups_exclude", read_id_ranges),
    (istio.ENV_LOOPBACK_CIDR, "loopback_cidr", read_loopback),
)


class _Collection:
    """What has been found so far."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.env = pod.proxy.env if pod.proxy else NO_PAIRS
        self.values: dict[str, Any] = {}
        self.origins = {one.name: DEFAULT_ORIGIN for one in fields(Interception)}
        self.warnings: list[str] = []

    def put(self, field: str, value: object, origin: str) -> None:
        self.values[field] = value
        self.origins[field] = origin

    def read(self, field: str, text: str, read: Callable[[str], Any], origin: str) -> None:
        """Read `text` into `field`; PodSpecError names the pod, the origin, the value and the accepted form."""
        try:
            self.put(field, read(text), origin)
        except ValueError as error:
            raise PodSpecError(
                f"pod {self.pod.full_name}: {origin} is {text!r}: {error}", "correct it and create the pod anew"
            ) from error


def derive_interception(pod: Pod, environment: Mapping[str, str] = NO_PAIRS) -> Derived:
    """Derive the parameters of a sidecar pod's rules; PodSpecError for a value that cannot be used.

    `environment` is that of the program that asks; of it only owner groups and loopback prefix are taken, and only
    where the proxy container does not set them itself. An empty variable counts as unset.
    """
    found = _Collection(pod)
    _take_annotations(found)
    _take_proxy_ids(found)
    _take_switches(found)
    _take_variables(found, environment)
    interception = Interception(**found.values)
    if interception.size > MAX_ITEMS:
        raise PodSpecError(
            f"pod {pod.full_name}: annotations and variables list {interception.size} ports, prefixes, interfaces and "
            f"groups, at most {MAX_ITEMS} together can be used",
            "join prefixes, or list what is to be captured instead of what is not",
        )
    return Derived(interception, MappingProxyType(found.origins), tuple(found.warnings))


def _take_annotations(found: _Collection) -> None:
    for source in ANNOTATIONS:
        name = next((name for name in source.annotations if name in found.pod.annotations), None)
        if name is not None:
            found.read(source.field, found.pod.annotations[name], source.read, f"annotation {name}")


def _take_proxy_ids(found: _Collection) -> None:
    """Take the proxy's user and group: the container's, else the pod's; root and unset mean the injector's number."""
    pod, proxy = found.pod, found.pod.proxy
    own_uid, own_gid = (proxy.run_as_user, proxy.run_as_group) if proxy else (None, None)
    as_root = known = False
    for field, own, of_pod, name in (
        ("proxy_uids", own_uid, pod.run_as_user, "runAsUser"),
        ("proxy_gids", own_gid, pod.run_as_group, "runAsGroup"),
    ):
        number, origin = of_pod, f"securityContext.{name} of the pod"
        if own is not None:
            number, origin = own, f"securityContext.{name} of container {istio.PROXY_CONTAINER}"
        if number:
            found.put(field, (NumberRange.single(number),), origin)
            known = True
        as_root |= number == 0
    if as_root and not known:  # with TPROXY the injector makes the proxy root, and only its group tells it apart
        found.warnings.append(
            f"the proxy runs as root and has no group of its own: the rules expect user {istio.PROXY_UID} or group "
            f"{istio.PROXY_GID}, and send back to the proxy whatever it sends as another"
        )


def _take_switches(found: _Collection) -> None:
    for name, targets in SWITCHES:
        origin = f"env {name} of container {istio.PROXY_CONTAINER}"
        _warn_of_value_from(found, name)
        text = found.env.get(name, "")
        if not text:
            continue
        try:
            value = go_bool(text)
        except ValueError as error:
            found.warnings.append(f"{origin}: {error}; taken as false")
            value = False
        for field in targets:
            found.put(field, value, origin)


def _take_variables(found: _Collection, environment: Mapping[str, str]) -> None:
    for name, field, read in VARIABLES:
        _warn_of_value_from(found, name)
        if found.env.get(name):
            found.read(field, found.env[name], read, f"env {name} of container {istio.PROXY_CONTAINER}")
        elif environment.get(name):
            found.read(field, environment[name], read, f"env {name} of the agent")


def _warn_of_value_from(found: _Collection, name: str) -> None:
    if found.pod.proxy is not None and name in found.pod.proxy.env_from_elsewhere:
        found.warnings.append(
            f"env {name} of container {istio.PROXY_CONTAINER} comes from elsewhere (valueFrom) and was passed over: "
            "only literal values are seen here"
        )
