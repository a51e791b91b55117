"""The words that the steps of a sidecar's rule set share: chains, recurring matches, addresses.

Upstream: tools/istio-iptables/pkg/constants/constants.go.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

from meshcni import istio
from meshcni.pods.interception import Interception, InterceptionMode, Network, NumberRange
from meshcni.rules.model import (
    DestinationPort,
    Family,
    InInterface,
    OutInterface,
    Protocol,
    SocketGroup,
    SocketUser,
    SourcePort,
)

PREROUTING = "PREROUTING"
OUTPUT = "OUTPUT"
INBOUND = "ISTIO_INBOUND"
IN_REDIRECT = "ISTIO_IN_REDIRECT"
REDIRECT = "ISTIO_REDIRECT"
OUTBOUND = "ISTIO_OUTPUT"
OUTBOUND_DNS = "ISTIO_OUTPUT_DNS"
DIVERT = "ISTIO_DIVERT"
TPROXY = "ISTIO_TPROXY"
DROP = "ISTIO_DROP"

TCP = Protocol("tcp")
INTO_LOOPBACK = OutInterface("lo")
FROM_LOOPBACK = InInterface("lo")

Owner = SocketUser | SocketGroup


def tcp_to(*ports: NumberRange | int) -> DestinationPort:
    """Match TCP to one of `ports`."""
    return DestinationPort("tcp", _ranges(ports))


def tcp_not_to(*ports: NumberRange | int) -> DestinationPort:
    """Match TCP to none of `ports`."""
    return DestinationPort("tcp", _ranges(ports), negated=True)


def udp_to(*ports: NumberRange | int) -> DestinationPort:
    """Match UDP to one of `ports`."""
    return DestinationPort("udp", _ranges(ports))


def udp_from(port: int) -> SourcePort:
    """Match UDP from `port`."""
    return SourcePort("udp", _ranges((port,)))


def _ranges(ports: tuple[NumberRange | int, ...]) -> tuple[NumberRange, ...]:
    return tuple(NumberRange.single(port) if isinstance(port, int) else port for port in ports)


def owners(parameters: Interception) -> tuple[Owner, ...]:
    """Return a match for each identity the proxy runs as: first the users, then the groups."""
    return (*map(SocketUser, parameters.proxy_uids), *map(SocketGroup, parameters.proxy_gids))


def not_owner(owner: Owner) -> Owner:
    """Return the opposite of `owner`."""
    return replace(owner, negated=True)


def loopback(parameters: Interception, family: Family) -> Network:
    """Return the addresses by which the application reaches itself on purpose."""
    return parameters.loopback_cidr if family is Family.V4 else IPv6Network(istio.LOOPBACK_CIDR_V6)


def proxy_source(family: Family) -> Network:
    """Return the source address of the connections that the proxy opens to the application."""
    return IPv4Network(istio.SELF_V4) if family is Family.V4 else IPv6Network(istio.SELF_V6)


def is_transparent(parameters: Interception) -> bool:
    """Tell whether inbound connections keep their addresses (TPROXY)."""
    return parameters.mode is InterceptionMode.TPROXY
