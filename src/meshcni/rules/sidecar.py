"""The rules of a pod with a sidecar proxy, as a sequence of steps that one reads from top to bottom.

Upstream: tools/istio-iptables/pkg/capture/run.go and tools/istio-nftables/pkg/capture/run.go. The order of the steps
is part of the contract: it decides the order of rules in the kernel's listing. The dialects differ in few rules only
(see the uses of `draft.backend`).

`outbound_ports` EVERYTHING captures all TCP ports. The original passes the `*` on as a port, which no tool accepts;
whoever writes `*` means all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv6Address

from meshcni import istio
from meshcni.errors import RulesError
from meshcni.pods.interception import Everything, Interception
from meshcni.rules.draft import Draft
from meshcni.rules.model import (
    Backend,
    ConnectionState,
    Destination,
    DestinationPort,
    Drop,
    Family,
    InInterface,
    Jump,
    LoopbackAddress,
    Match,
    OtherSocketGroup,
    OutInterface,
    Redirect,
    Return,
    Ruleset,
    SocketGroup,
    SocketUser,
    Source,
    TableName,
)
from meshcni.rules.remember import remembered
from meshcni.rules.sidecar_dns import DNS_PORT, capture_dns, captures_dns
from meshcni.rules.sidecar_terms import (
    DIVERT,
    DROP,
    IN_REDIRECT,
    INBOUND,
    INTO_LOOPBACK,
    OUTBOUND,
    OUTPUT,
    PREROUTING,
    REDIRECT,
    TCP,
    TPROXY,
    Owner,
    is_transparent,
    loopback,
    not_owner,
    owners,
    proxy_source,
    tcp_not_to,
    tcp_to,
    udp_to,
)
from meshcni.rules.sidecar_tproxy import deliver_to_proxy, route_marked_packets, tell_own_connections_apart

NAT = TableName.NAT
MANGLE = TableName.MANGLE
_INTERFACE_NAME = re.compile(r"""[^\s"'`;:{}\\/#$]+""")
# All included groups stand in one rule, and iptables-restore takes 255 words in a line (MAX_ARGC, iptables/xshared.h).
MAX_IPTABLES_OWNER_GROUPS = 49
_MAX_INTERFACE_BYTES = 15  # IFNAMSIZ - 1, linux/if.h


@remembered
def sidecar_ruleset(parameters: Interception, families: frozenset[Family], backend: Backend) -> Ruleset:
    """Return what `parameters` ask for in a netns that has `families`, as `backend` spells it.

    Raises RulesError when the parameters make no valid rule set.
    """
    _check(parameters, families, backend)
    draft = Draft(families, backend)
    for step in STEPS:
        step(parameters, draft)
    return draft.finish()


def _check(parameters: Interception, families: frozenset[Family], backend: Backend) -> None:
    if not families:
        raise RulesError("no address family to make rules for", "the netns needs an IPv4 or a global IPv6 address")
    groups = parameters.owner_groups
    most = MAX_IPTABLES_OWNER_GROUPS if backend is Backend.IPTABLES else istio.MAX_OWNER_GROUPS
    if not isinstance(groups, Everything) and len(groups) > most:
        raise RulesError(
            f"{len(groups)} owner groups in {istio.ENV_OWNER_GROUPS}, more than the {most} that {backend.value} can do",
            f"use ranges, or {istio.ENV_OWNER_GROUPS_EXCLUDE} with the groups not to be captured",
        )
    network = parameters.loopback_cidr
    if not network.is_loopback or network.prefixlen < 8:
        raise RulesError(
            f"{istio.ENV_LOOPBACK_CIDR} {network} is no IPv4 loopback network", "it must lie within 127.0.0.0/8"
        )
    for name in (*parameters.exclude_interfaces, *parameters.virtual_interfaces):
        if not _INTERFACE_NAME.fullmatch(name) or len(name.encode()) > _MAX_INTERFACE_BYTES:
            raise RulesError(f"{name!r} is no interface name", f"1 to {_MAX_INTERFACE_BYTES} bytes without spaces")


# --- interfaces, broken packets ---------------------------------------------------------------------------------------


def leave_excluded_interfaces(parameters: Interception, draft: Draft) -> None:
    """Step 1."""
    for table in (NAT, MANGLE) if is_transparent(parameters) else (NAT,):
        for name in parameters.exclude_interfaces:
            why = f"Interface {name} is excluded."
            draft.append(table, PREROUTING, (InInterface(name),), Return(), why)
            draft.append(table, OUTPUT, (OutInterface(name),), Return(), why)


def leave_virtual_interfaces(parameters: Interception, draft: Draft) -> None:
    """Step 2: what of a virtual machine's traffic is not outbound is none of the pod's."""
    for name in parameters.virtual_interfaces:
        why = f"What comes from virtual interface {name} and is not captured as outbound traffic is left alone."
        draft.insert(NAT, PREROUTING, 0, (InInterface(name),), Return(), why)


def drop_invalid(parameters: Interception, draft: Draft) -> None:
    """Step 3: all protocols with iptables, TCP only with nft, as the original does."""
    if not parameters.drop_invalid:
        return
    matches: tuple[Match, ...] = (ConnectionState(("invalid",)),)
    if draft.backend is Backend.NFTABLES:
        matches = (TCP, *matches)
    why = "A packet of no known connection is not translated, and the application's side would answer it with a reset."
    draft.append(MANGLE, PREROUTING, matches, Jump(DROP), why)
    draft.append(MANGLE, DROP, (), Drop(), "Invalid packets are discarded.")


# --- inbound ----------------------------------------------------------------------------------------------------------


def prepare_redirects(parameters: Interception, draft: Draft) -> None:
    """Steps 4 to 6: the chains that lead to the proxy's two ports."""
    why = "Tunnelled traffic already comes to the proxy's own port."
    draft.append(NAT, INBOUND, (TCP, tcp_to(parameters.inbound_tunnel_port)), Return(), why)
    why = "The connection goes to the proxy's outbound port."
    draft.append(NAT, REDIRECT, (TCP,), Redirect(parameters.proxy_port), why)
    why = "The connection goes to the proxy's inbound port."
    draft.append(NAT, IN_REDIRECT, (TCP,), Redirect(parameters.inbound_capture_port), why)


def capture_inbound(parameters: Interception, draft: Draft) -> None:
    """Step 7: nothing, everything but the excluded ports, or only the listed ports (exclusions do not count then)."""
    ports = parameters.inbound_ports
    if not ports:
        return
    transparent = is_transparent(parameters)
    table = MANGLE if transparent else NAT
    if transparent:
        deliver_to_proxy(parameters, draft)
    draft.append(table, PREROUTING, (TCP,), Jump(INBOUND), "Arriving TCP connections are looked at.")
    if isinstance(ports, Everything):
        for port in parameters.inbound_exclude_ports:
            why = f"Inbound port {port} is excluded."
            draft.append(table, INBOUND, (TCP, tcp_to(port)), Return(), why)
    selections: list[tuple[DestinationPort, ...]] = (
        [()] if isinstance(ports, Everything) else [(tcp_to(port),) for port in ports]
    )
    for selection in selections:
        wanted = f"Inbound port {selection[0].ports[0]}" if selection else "Every other inbound port"
        if transparent:
            established = ConnectionState(("related", "established"))
            why = f"{wanted} is captured: a connection the proxy already has."
            draft.append(MANGLE, INBOUND, (TCP, established, *selection), Jump(DIVERT), why)
            why = f"{wanted} is captured: a new connection."
            draft.append(MANGLE, INBOUND, (TCP, *selection), Jump(TPROXY), why)
        else:
            draft.append(NAT, INBOUND, (TCP, *selection), Jump(IN_REDIRECT), f"{wanted} is captured.")


# --- outbound ---------------------------------------------------------------------------------------------------------


def look_at_outbound(_parameters: Interception, draft: Draft) -> None:
    """Step 8."""
    draft.append(NAT, OUTPUT, (), Jump(OUTBOUND), "Outgoing connections are looked at.")


def leave_excluded_ports(parameters: Interception, draft: Draft) -> None:
    """Step 9: before everything else, so nobody's traffic to these ports is captured, not even the proxy's."""
    for port in parameters.outbound_exclude_ports:
        why = f"Outbound port {port} is excluded."
        draft.append(NAT, OUTBOUND, (tcp_to(port),), Return(), why)
        draft.append(NAT, OUTBOUND, (udp_to(port),), Return(), why)


def leave_proxy_to_application(_parameters: Interception, draft: Draft) -> None:
    """Step 10."""
    for family in draft.families:
        why = "The proxy's connections to the application are at their goal."
        draft.append(NAT, OUTBOUND, (INTO_LOOPBACK, Source(proxy_source(family))), Return(), why, family)


def treat_proxy_traffic(parameters: Interception, draft: Draft) -> None:
    """Steps 11 and 12: for each user, then for each group the proxy runs as."""
    dns = captures_dns(parameters)
    # The application reaching itself through loopback is left alone, unless loopback is to be captured.
    leave_loopback = not _includes_loopback(parameters)
    for owner in owners(parameters):
        _capture_calls_to_self(parameters, draft, owner, dns=dns and isinstance(owner, SocketUser))
        if leave_loopback:
            matches: tuple[Match, ...] = (INTO_LOOPBACK, not_owner(owner))
            why = "The application talking to itself is left alone."
            if dns:
                matches = (INTO_LOOPBACK, TCP, tcp_not_to(DNS_PORT), not_owner(owner))
                why = "The application talking to itself is left alone, unless it asks a local DNS server."
            draft.append(NAT, OUTBOUND, matches, Return(), why)
        draft.append(NAT, OUTBOUND, (owner,), Return(), "What the proxy sends must not come back to it.")


def _capture_calls_to_self(parameters: Interception, draft: Draft, owner: Owner, *, dns: bool) -> None:
    tunnel = parameters.inbound_tunnel_port
    # Upstream exempts DNS for users only, not for groups.
    ports = tcp_not_to(DNS_PORT, tunnel) if dns else tcp_not_to(tunnel)
    for family in draft.families:
        away = Destination(loopback(parameters, family), negated=True)
        why = "The application calling its own pod through the proxy enters by the proxy's inbound side."
        draft.append(NAT, OUTBOUND, (INTO_LOOPBACK, TCP, away, ports, owner), Jump(IN_REDIRECT), why, family)


def _includes_loopback(parameters: Interception) -> bool:
    networks = parameters.outbound_cidrs
    return not isinstance(networks, Everything) and any(network.network_address.is_loopback for network in networks)


def leave_other_owners(parameters: Interception, draft: Draft) -> None:
    """Step 13: all groups but the excluded, or only those listed; an empty list captures nobody."""
    groups = parameters.owner_groups
    if isinstance(groups, Everything):
        for group in parameters.owner_groups_exclude:
            draft.append(NAT, OUTBOUND, (SocketGroup(group),), Return(), f"Owner group {group} is excluded.")
        return
    matches = (OtherSocketGroup(groups),) if groups else ()
    listed = ", ".join(map(str, groups)) or "none"
    draft.append(NAT, OUTBOUND, matches, Return(), f"Only the traffic of these owner groups is captured: {listed}.")


def leave_destinations(parameters: Interception, draft: Draft) -> None:
    """Steps 15 and 16."""
    for family in draft.families:
        matches = (Destination(loopback(parameters, family)),)
        draft.append(NAT, OUTBOUND, matches, Return(), "Loopback is left alone.", family)
    for family in draft.families:
        for network in parameters.outbound_exclude_cidrs:
            if network.version == family.value:
                why = f"Destination {network} is excluded."
                draft.append(NAT, OUTBOUND, (Destination(network),), Return(), why, family)


def capture_outbound(parameters: Interception, draft: Draft) -> None:
    """Steps 17 and 18."""
    ports = parameters.outbound_ports
    if isinstance(ports, Everything):
        draft.append(NAT, OUTBOUND, (TCP,), Jump(REDIRECT), "Every outbound TCP port is captured.")
    else:
        for port in ports:
            draft.append(NAT, OUTBOUND, (tcp_to(port),), Jump(REDIRECT), f"Outbound port {port} is captured.")
    networks = parameters.outbound_cidrs
    if isinstance(networks, Everything):
        why = "Everything else is captured (the target chain takes TCP only)."
        draft.append(NAT, OUTBOUND, (), Jump(REDIRECT), why)
        for name in parameters.virtual_interfaces:
            why = f"What comes from virtual interface {name} is captured as outbound traffic."
            draft.insert(NAT, PREROUTING, 0, (InInterface(name),), Jump(REDIRECT), why)
        return
    for family in draft.families:
        for network in networks:
            if network.version != family.value:
                continue
            destination = Destination(network)
            for name in parameters.virtual_interfaces:
                why = f"What comes from virtual interface {name} to {network} is captured as outbound traffic."
                draft.insert(NAT, PREROUTING, 0, (InInterface(name), destination), Jump(REDIRECT), why, family)
            draft.append(NAT, OUTBOUND, (destination,), Jump(REDIRECT), f"Destination {network} is captured.", family)


# --- addresses --------------------------------------------------------------------------------------------------------


def give_proxy_its_source(_parameters: Interception, draft: Draft) -> None:
    """Give `lo` the proxy's IPv6 source address; 127.0.0.6 needs none, all of 127.0.0.0/8 is local."""
    if Family.V6 in draft.families:
        draft.add_address(LoopbackAddress(IPv6Address("::6"), 128))


Step = Callable[[Interception, Draft], None]

STEPS: tuple[Step, ...] = (
    leave_excluded_interfaces,
    leave_virtual_interfaces,
    drop_invalid,
    prepare_redirects,
    capture_inbound,
    look_at_outbound,
    leave_excluded_ports,
    leave_proxy_to_application,
    treat_proxy_traffic,
    leave_other_owners,
    capture_dns,
    leave_destinations,
    capture_outbound,
    tell_own_connections_apart,
    give_proxy_its_source,
    route_marked_packets,
)
