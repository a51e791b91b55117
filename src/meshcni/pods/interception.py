"""The parameters of sidecar interception: the values that a rule set is built from.

Upstream: tools/istio-iptables/pkg/config, cni/pkg/plugin/sidecar_redirect.go.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from meshcni import istio


class InterceptionMode(Enum):
    """How inbound connections reach the proxy."""

    REDIRECT = "REDIRECT"
    TPROXY = "TPROXY"


@dataclass(frozen=True, slots=True, order=True)
class NumberRange:
    """An inclusive range of ports, user ids or group ids; one number when `first == last`."""

    first: int
    last: int

    @classmethod
    def single(cls, number: int) -> NumberRange:
        """Return the range that holds just `number`."""
        return cls(number, number)

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Everything:
    """`*`: no restriction."""

    def __str__(self) -> str:
        return "*"


EVERYTHING = Everything()
DEFAULT_LOOPBACK = IPv4Network(istio.LOOPBACK_CIDR)
NO_INTERCEPTION = "NONE"  # the injector's mode for a sidecar that captures nothing; such a pod has no parameters

PortSelection = Everything | tuple[NumberRange, ...]
CidrSelection = Everything | tuple[Network, ...]
GroupSelection = Everything | tuple[NumberRange, ...]


@dataclass(frozen=True, slots=True)
class Interception:
    """Everything that decides a sidecar's rules, parsed; defaults are those of a pod without annotations.

    Ports are 0..65535, marks and tables unsigned 32 bit; networks keep no host bits (the kernel lists them masked).
    An empty selection captures nothing, `EVERYTHING` captures all but the exclusions.
    """

    mode: InterceptionMode = InterceptionMode.REDIRECT
    proxy_port: int = istio.PROXY_PORT
    inbound_capture_port: int = istio.INBOUND_CAPTURE_PORT
    inbound_tunnel_port: int = istio.INBOUND_TUNNEL_PORT
    proxy_uids: tuple[NumberRange, ...] = (NumberRange(istio.PROXY_UID, istio.PROXY_UID),)
    proxy_gids: tuple[NumberRange, ...] = (NumberRange(istio.PROXY_GID, istio.PROXY_GID),)
    inbound_ports: PortSelection = EVERYTHING
    inbound_exclude_ports: tuple[NumberRange, ...] = tuple(
        NumberRange(port, port) for port in istio.ALWAYS_EXCLUDED_INBOUND_PORTS
    )
    outbound_ports: PortSelection = ()  # EVERYTHING is accepted by the annotation; see rules.sidecar for its meaning
    outbound_exclude_ports: tuple[NumberRange, ...] = (
        NumberRange(istio.DEFAULT_EXCLUDED_PORT, istio.DEFAULT_EXCLUDED_PORT),
    )
    outbound_cidrs: CidrSelection = EVERYTHING
    outbound_exclude_cidrs: tuple[Network, ...] = ()
    exclude_interfaces: tuple[str, ...] = ()
    virtual_interfaces: tuple[str, ...] = ()
    redirect_dns: bool = False
    capture_all_dns: bool = False
    dns_servers: tuple[IPv4Address | IPv6Address, ...] = ()
    drop_invalid: bool = False
    dual_stack: bool = False
    owner_groups: GroupSelection = EVERYTHING
    owner_groups_exclude: tuple[NumberRange, ...] = ()
    tproxy_mark: int = istio.TPROXY_MARK
    tproxy_table: int = istio.TPROXY_TABLE
    loopback_cidr: IPv4Network = DEFAULT_LOOPBACK

    @property
    def size(self) -> int:
        """How many items its lists hold."""
        return sum(len(value) for name in self.__dataclass_fields__ if isinstance(value := getattr(self, name), tuple))
