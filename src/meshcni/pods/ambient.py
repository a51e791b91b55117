"""What a pod says about its ambient redirection: the overrides in its annotations, parsed into parameters.

Upstream: cni/pkg/util/podutil.go, cni/pkg/nodeagent/net_linux.go (getPodLevelTrafficOverrides).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from meshcni import istio
from meshcni.errors import PodSpecError
from meshcni.pflag import go_bool

DEFAULT_PROBE_V4 = IPv4Address(istio.PROBE_SNAT_V4)
DEFAULT_PROBE_V6 = IPv6Address(istio.PROBE_SNAT_V6)
MAX_INTERFACE_BYTES = 15  # IFNAMSIZ - 1, linux/if.h
MAX_INTERFACES = 100  # so that nobody who annotates a pod decides what the node's agent weighs
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_.:@\-]+\+?", re.ASCII)


@dataclass(frozen=True, slots=True)
class AmbientParameters:
    """Everything but the address families that decides a pod's ambient rules, parsed.

    `ingress`: only outbound traffic is captured. `virtual_interfaces` are names of at most 15 bytes; a final `+` stands
    for any rest. `probe_v4`, `probe_v6`: the addresses that the kubelet's probes come from.
    """

    dns_capture: bool = False
    ingress: bool = False
    virtual_interfaces: tuple[str, ...] = ()
    probe_v4: IPv4Address = DEFAULT_PROBE_V4
    probe_v6: IPv6Address = DEFAULT_PROBE_V6

    @property
    def size(self) -> int:
        """How many items its lists hold."""
        return len(self.virtual_interfaces)


@dataclass(frozen=True, slots=True)
class DerivedAmbient:
    """Parameters, where each that is not the node's default came from, and what was passed over, as sentences."""

    parameters: AmbientParameters
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def derive_ambient(annotations: Mapping[str, str], defaults: AmbientParameters = AmbientParameters()) -> DerivedAmbient:
    """Read a pod's overrides on top of the node's `defaults`.

    A switch that is no boolean is passed over with a warning, as upstream does. An interface name that is none raises
    PodSpecError: upstream writes it unchecked into a script that runs as root.
    """
    origins: dict[str, str] = {}
    warnings: list[str] = []
    dns = _switch(annotations, istio.AMBIENT_DNS_CAPTURE, "dns_capture", origins, warnings)
    ingress = _switch(annotations, istio.AMBIENT_BYPASS_INBOUND, "ingress", origins, warnings)
    interfaces = defaults.virtual_interfaces
    if istio.REROUTE_VIRTUAL_INTERFACES in annotations:
        origins["virtual_interfaces"] = f"annotation {istio.REROUTE_VIRTUAL_INTERFACES}"
        interfaces = read_interfaces(annotations[istio.REROUTE_VIRTUAL_INTERFACES], origins["virtual_interfaces"])
    parameters = AmbientParameters(
        dns_capture=defaults.dns_capture if dns is None else dns,
        ingress=defaults.ingress if ingress is None else ingress,
        virtual_interfaces=interfaces,
        probe_v4=defaults.probe_v4,
        probe_v6=defaults.probe_v6,
    )
    return DerivedAmbient(parameters, origins, tuple(warnings))


def _switch(
    annotations: Mapping[str, str], name: str, field: str, origins: dict[str, str], warnings: list[str]
) -> bool | None:
    text = annotations.get(name)
    if text is None:
        return None
    try:
        value = go_bool(text)
    except ValueError:
        warnings.append(f"annotation {name}={text[:80]!r} is no boolean and was passed over")
        return None
    origins[field] = f"annotation {name}"
    return value


def read_interfaces(text: str, origin: str) -> tuple[str, ...]:
    """Split at commas and drop blanks; raises PodSpecError naming `origin` for what names no interface."""
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    if len(names) > MAX_INTERFACES:
        raise PodSpecError(f"{origin} names {len(names)} interfaces, more than {MAX_INTERFACES}", "use a final +")
    for name in names:
        if not _INTERFACE_NAME.fullmatch(name) or len(name.encode()) > MAX_INTERFACE_BYTES:
            raise PodSpecError(
                f"{origin} holds {name[:80]!r}, which names no interface",
                f"write 1 to {MAX_INTERFACE_BYTES} letters, digits or _ . : @ - for each, separated by commas",
            )
    return names
