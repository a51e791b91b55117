"""TPROXY: inbound connections reach the proxy with both addresses unchanged, so the proxy needs marks and a route.

Packets to be delivered to the proxy carry the mark; a policy rule sends marked packets to a routing table in which
every address is local. The proxy's own connections to the application carry the mark too, and are recognised by it.

Upstream: tools/istio-iptables/pkg/capture/run.go and run_linux.go (ConfigureRoutes).
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from meshcni import istio
from meshcni.pods.interception import Interception
from meshcni.rules.draft import Draft
from meshcni.rules.model import (
    Accept,
    Backend,
    ConnectionMark,
    Destination,
    Family,
    LocalRoute,
    PacketMark,
    PolicyRule,
    RestoreMark,
    Return,
    SaveMark,
    SetMark,
    Source,
    TableName,
    TransparentProxy,
)
from meshcni.rules.sidecar_terms import (
    DIVERT,
    FROM_LOOPBACK,
    INBOUND,
    INTO_LOOPBACK,
    OUTPUT,
    PREROUTING,
    TCP,
    TPROXY,
    is_transparent,
    loopback,
    owners,
    proxy_source,
)


def deliver_to_proxy(parameters: Interception, draft: Draft) -> None:
    """Step 7a: the two ways to the proxy, for connections it already has and for new ones."""
    mark = parameters.tproxy_mark
    why = "Packets of connections the proxy already has are marked, so that the route delivers them here."
    draft.append(TableName.MANGLE, DIVERT, (), SetMark(mark), why)
    draft.append(TableName.MANGLE, DIVERT, (), Accept(), "Such packets need no further rule.")
    for family in draft.families:
        draft.append(
            TableName.MANGLE,
            TPROXY,
            (TCP, Destination(loopback(parameters, family), negated=True)),
            TransparentProxy(parameters.inbound_capture_port, mark),
            "A new connection is handed to the proxy's inbound port with its addresses unchanged.",
            family,
        )


def tell_own_connections_apart(parameters: Interception, draft: Draft) -> None:
    """Step 19: the mark goes from packet to connection and back; the proxy's own connections are left alone."""
    if not is_transparent(parameters):
        return
    mark = PacketMark(parameters.tproxy_mark)
    why = "A connection that the proxy opened to the application carries the mark, which is remembered."
    draft.append(TableName.MANGLE, PREROUTING, (TCP, mark), SaveMark(), why)
    why = "The proxy's packets to the application are marked already."
    draft.append(TableName.MANGLE, OUTPUT, (INTO_LOOPBACK, TCP, mark), Return(), why)
    for owner in owners(parameters):
        for family in draft.families:
            draft.append(
                TableName.MANGLE,
                OUTPUT,
                (INTO_LOOPBACK, TCP, Destination(loopback(parameters, family), negated=True), owner),
                SetMark(istio.OUTBOUND_MARK),
                "What the proxy sends to this pod's own address is an outbound call that has to pass the inbound side.",
                family,
            )
    why = "The application's answers to the proxy get the mark back, so that the route returns them to the proxy."
    draft.append(TableName.MANGLE, OUTPUT, (TCP, ConnectionMark(parameters.tproxy_mark)), RestoreMark(), why)
    _insert_exceptions(parameters, draft)


def _insert_exceptions(parameters: Interception, draft: Draft) -> None:
    """Put what must not be captured again in front of ISTIO_INBOUND."""

    def skip_marked(index: int) -> None:
        why = "What the proxy itself sent must not be captured again."
        draft.insert(TableName.MANGLE, INBOUND, index, (TCP, PacketMark(parameters.tproxy_mark)), Return(), why)

    def skip_own_source(index: int, family: Family) -> None:
        why = "The proxy's own connections to the application must not be captured again."
        matches = (FROM_LOOPBACK, TCP, Source(proxy_source(family)))
        draft.insert(TableName.MANGLE, INBOUND, index, matches, Return(), why, family)

    def skip_local(index: int) -> None:
        why = "Local traffic is left alone, except what the proxy sends to this pod's own address."
        matches = (FROM_LOOPBACK, TCP, PacketMark(istio.OUTBOUND_MARK, negated=True))
        draft.insert(TableName.MANGLE, INBOUND, index, matches, Return(), why)

    skip_marked(0)
    for family in draft.families:
        skip_own_source(1, family)
    # iptables counts the rules of one family, nft those of both.
    skip_local(1 + len(draft.families) if draft.backend is Backend.IPTABLES else 2)


def route_marked_packets(parameters: Interception, draft: Draft) -> None:
    """Deliver marked packets locally, whatever their destination."""
    if not is_transparent(parameters) or not parameters.inbound_ports:
        return
    for family in draft.families:
        everywhere = IPv4Network("0.0.0.0/0") if family is Family.V4 else IPv6Network("::/0")
        draft.add_policy_rule(PolicyRule(family, parameters.tproxy_mark, parameters.tproxy_table))
        draft.add_route(LocalRoute(everywhere, parameters.tproxy_table))
