"""DNS capture: the application's queries go to the agent's DNS server, and connection tracking keeps them apart.

Two packets of the same five-tuple may pass the pod: the application's query to the agent, and the agent's own query to
the real server. Without a conntrack zone for each, one takes the other's translation.

Upstream: HandleDNSUDP and the DNS parts of Run in tools/istio-iptables/pkg/capture/run.go.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from meshcni import istio
from meshcni.pods.interception import Interception, Network
from meshcni.rules.draft import Draft
from meshcni.rules.model import (
    Backend,
    ConntrackZone,
    Destination,
    DestinationPort,
    Family,
    Jump,
    Match,
    Redirect,
    Source,
    SourcePort,
    TableName,
)
from meshcni.rules.sidecar_terms import (
    INBOUND,
    OUTBOUND,
    OUTBOUND_DNS,
    OUTPUT,
    PREROUTING,
    TCP,
    owners,
    tcp_to,
    udp_from,
    udp_to,
)

DNS_PORT = 53
_TO_AGENT = Redirect(istio.AGENT_DNS_PORT)
_RESOLVER_ZONE = ConntrackZone(istio.CONNTRACK_ZONE_RESOLVER)
_APPLICATION_ZONE = ConntrackZone(istio.CONNTRACK_ZONE_APPLICATION)


def captures_dns(parameters: Interception) -> bool:
    """Tell whether DNS is captured: asked for, and either all of it or that to known servers."""
    return parameters.redirect_dns and (parameters.capture_all_dns or bool(parameters.dns_servers))


def capture_dns(parameters: Interception, draft: Draft) -> None:
    """Step 14.

    The original puts the queries of excluded owner groups into a zone although nat leaves them alone. That is kept: the
    zone alone changes nothing for them, and the kernel's listing stays what tools compare with.
    """
    if not captures_dns(parameters):
        return
    draft.append(TableName.RAW, OUTPUT, (), Jump(OUTBOUND_DNS), "Outgoing packets are sorted into conntrack zones.")
    for family in _jumping_families(parameters, draft):
        why = "Outgoing DNS goes to the agent's DNS server before loopback and addresses are looked at."
        draft.append(TableName.NAT, OUTBOUND, (), Jump(OUTBOUND_DNS), why, family)
    _redirect_queries(parameters, draft)
    _separate_proxy_queries(parameters, draft)
    _separate_application_queries(parameters, draft)


def _jumping_families(parameters: Interception, draft: Draft) -> tuple[Family | None, ...]:
    """Return the families whose packets have to be looked at: None for both at once.

    An nft table is for both families, so there one jump does. The iptables rules of a family without any captured
    server stay as they are without DNS capture.
    """
    if parameters.capture_all_dns or draft.backend is Backend.NFTABLES:
        return (None,)
    return tuple(family for family in Family if any(_family(server) is family for server in parameters.dns_servers))


def _redirect_queries(parameters: Interception, draft: Draft) -> None:
    if parameters.capture_all_dns:
        why = "Every DNS query over {} is answered by the agent."
        tcp: tuple[Match, ...] = (TCP, tcp_to(DNS_PORT))
        draft.append(TableName.NAT, OUTBOUND_DNS, tcp, _TO_AGENT, why.format("TCP"))
        draft.append(TableName.NAT, OUTBOUND_DNS, (udp_to(DNS_PORT),), _TO_AGENT, why.format("UDP"))
        return
    for query, transport in ((tcp_to(DNS_PORT), "TCP"), (udp_to(DNS_PORT), "UDP")):
        for family, server in _servers(parameters):
            why = f"DNS queries over {transport} to {server.network_address} are answered by the agent."
            draft.append(TableName.NAT, OUTBOUND_DNS, (Destination(server), query), _TO_AGENT, why, family)


def _separate_proxy_queries(parameters: Interception, draft: Draft) -> None:
    for owner in owners(parameters):
        why = "The proxy's own queries to the real DNS servers are tracked apart from the application's."
        draft.append(TableName.RAW, OUTBOUND_DNS, (udp_to(DNS_PORT), owner), _RESOLVER_ZONE, why)
        why = "The agent's answers to the application belong to the application's queries."
        draft.append(TableName.RAW, OUTBOUND_DNS, (udp_from(istio.AGENT_DNS_PORT), owner), _APPLICATION_ZONE, why)


def _separate_application_queries(parameters: Interception, draft: Draft) -> None:
    for family in _jumping_families(parameters, draft):
        why = "Arriving DNS answers are sorted into conntrack zones."
        draft.append(TableName.RAW, PREROUTING, (), Jump(INBOUND), why, family)
    query: DestinationPort = udp_to(DNS_PORT)
    answer: SourcePort = udp_from(DNS_PORT)
    query_why = "The application's queries are tracked apart from the proxy's."
    answer_why = "Answers of the real DNS servers belong to the proxy's queries."
    if parameters.capture_all_dns:
        draft.append(TableName.RAW, OUTBOUND_DNS, (query,), _APPLICATION_ZONE, query_why)
        draft.append(TableName.RAW, INBOUND, (answer,), _RESOLVER_ZONE, answer_why)
        return
    for family, server in _servers(parameters):
        draft.append(TableName.RAW, OUTBOUND_DNS, (query, Destination(server)), _APPLICATION_ZONE, query_why, family)
        draft.append(TableName.RAW, INBOUND, (answer, Source(server)), _RESOLVER_ZONE, answer_why, family)


def _servers(parameters: Interception) -> list[tuple[Family, Network]]:
    """Return the DNS servers as single addresses, IPv4 first."""
    networks: list[Network] = [
        IPv4Network(server) if isinstance(server, IPv4Address) else IPv6Network(server)
        for server in parameters.dns_servers
    ]
    return [(family, network) for family in Family for network in networks if network.version == family.value]


def _family(address: IPv4Address | IPv6Address) -> Family:
    return Family(address.version)
