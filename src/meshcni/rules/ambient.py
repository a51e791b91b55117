"""The rules of ambient mode, as sequences of steps that one reads from top to bottom: a pod's, and the host's.

ztunnel has sockets in the pod's own network namespace, and every packet they send carries a mark. What is not marked is
redirected to them. ztunnel opens connections to the application with the client's address as their source; the
application's answers come back to it by way of the connection's mark, a policy rule and a route.

Upstream: cni/pkg/iptables/iptables.go, cni/pkg/nftables/nftables.go. The order of the steps and of the matches in a
rule is part of the contract: it decides what the kernel lists. The dialects differ in few rules only (see the uses of
`draft.backend`).
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from meshcni import istio
from meshcni.errors import RulesError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.interception import NumberRange
from meshcni.rules.draft import Draft
from meshcni.rules.model import (
    Accept,
    Backend,
    ConnectionMark,
    ConntrackZone,
    Destination,
    DestinationInSet,
    DestinationPort,
    Family,
    InInterface,
    Jump,
    LocalRoute,
    Match,
    OtherOutInterface,
    OutInterface,
    PacketMark,
    PolicyRule,
    Protocol,
    ProtocolExtension,
    Purpose,
    Redirect,
    RestoreMark,
    Return,
    Ruleset,
    SetConnectionMark,
    SocketExists,
    SocketUser,
    Source,
    SourcePort,
    SourceTranslation,
    TableName,
)
from meshcni.rules.remember import remembered

NAT, MANGLE, RAW = TableName.NAT, TableName.MANGLE, TableName.RAW
PREROUTING, OUTPUT, POSTROUTING = "PREROUTING", "OUTPUT", "POSTROUTING"
INBOUND, OUTBOUND = "ISTIO_PRERT", "ISTIO_OUTPUT"
HOST_CHAIN = istio.AMBIENT_HOST_CHAIN

TCP = Protocol("tcp")
_DNS_PORT = (NumberRange.single(53),)
_DNS_OVER_TCP = DestinationPort("tcp", _DNS_PORT)
_DNS_OVER_UDP = DestinationPort("udp", _DNS_PORT)
_DNS_ANSWER = SourcePort("udp", _DNS_PORT)
_NOT_TUNNELLED = DestinationPort("tcp", (NumberRange.single(istio.ZTUNNEL_INBOUND_PORT),), negated=True)
_FROM_ZTUNNEL = PacketMark(istio.ZTUNNEL_MARK, istio.AMBIENT_MARK_MASK)
_NOT_FROM_ZTUNNEL = PacketMark(istio.ZTUNNEL_MARK, istio.AMBIENT_MARK_MASK, negated=True)
_RETURNING = PacketMark(istio.AMBIENT_TPROXY_MARK, istio.AMBIENT_MARK_MASK)
_RETURNING_CONNECTION = ConnectionMark(istio.AMBIENT_TPROXY_MARK, istio.AMBIENT_MARK_MASK)
_EVERYWHERE: dict[Family, IPv4Network | IPv6Network] = {
    Family.V4: IPv4Network("0.0.0.0/0"),
    Family.V6: IPv6Network("::/0"),
}
_NOT_LOOPBACK = {
    Family.V4: Destination(ip_network(istio.LOOPBACK_CIDR), negated=True),
    Family.V6: Destination(ip_network(istio.LOOPBACK_CIDR_V6), negated=True),
}
_SETS = {Family.V4: istio.PROBE_SET_V4, Family.V6: istio.PROBE_SET_V6}


@remembered
def pod_ruleset(parameters: AmbientParameters, families: frozenset[Family], backend: Backend) -> Ruleset:
    """Return the ambient rules of a pod, as `backend` spells them.

    `families` is the node's choice, whatever addresses the pod has. Raises RulesError without any.
    """
    _check(families)
    draft = Draft(families, backend, Purpose.AMBIENT_POD)
    for step in STEPS:
        step(parameters, draft)
    return draft.finish()


def route_ruleset(families: frozenset[Family]) -> Ruleset:
    """Return what of a pod's rules is no packet rule, and changes nothing as long as no packet is marked."""
    _check(families)
    draft = Draft(families, Backend.NFTABLES, Purpose.AMBIENT_POD)
    route_returning_packets(AmbientParameters(), draft)
    return draft.finish()


def host_ruleset(
    probe_v4: IPv4Address,
    probe_v6: IPv6Address,
    families: frozenset[Family],
    backend: Backend,
    kubelet_uid: int | None = None,
) -> Ruleset:
    """Return the host's rules: the kubelet's probes of enrolled pods get a source address that the pods' rules know.

    `kubelet_uid` is the user that the kubelet runs as, which nft rules need: nft cannot ask whether a socket exists.
    Raises RulesError.
    """
    _check(families)
    draft = Draft(families, backend, Purpose.AMBIENT_HOST)
    why = "What this host itself sends to an enrolled pod is taken for a probe, which must not be captured there."
    chain = POSTROUTING
    sender: tuple[Match, ...] = (SocketExists(), TCP)
    if backend is Backend.IPTABLES:
        chain = HOST_CHAIN
        jump_why = "Before every other rule, because another tool's translation would give probes another source."
        draft.insert(NAT, POSTROUTING, 0, (), Jump(HOST_CHAIN), jump_why)
    elif kubelet_uid is None:
        raise RulesError(
            "nftables rules for probes need the kubelet's user id", "run the agent with hostPID, or use iptables"
        )
    else:
        sender = (TCP, SocketUser(NumberRange.single(kubelet_uid)))
        why = "What the kubelet sends to an enrolled pod is taken for a probe, which must not be captured there."
    probes: dict[Family, IPv4Address | IPv6Address] = {Family.V4: probe_v4, Family.V6: probe_v6}
    for family in draft.families:
        matches = (*sender, DestinationInSet(_SETS[family], family))
        draft.append(NAT, chain, matches, SourceTranslation(probes[family]), why, family)
    return draft.finish()


def _check(families: frozenset[Family]) -> None:
    if not families:
        raise RulesError("no address family to make rules for", "ambient rules are always made for IPv4")


# --- a pod: entry -----------------------------------------------------------------------------------------------------


def look_at_packets(parameters: AmbientParameters, draft: Draft) -> None:
    """Rules 1 to 6: the jumps into our chains, which nft does not count."""
    arriving, sent = "Arriving packets are looked at.", "Packets that this pod sends are looked at."

    def enter(table: TableName, chain: str, target: str, why: str) -> None:
        draft.append(table, chain, (), Jump(target), why, is_counted=False)

    enter(MANGLE, PREROUTING, INBOUND, arriving)
    enter(MANGLE, OUTPUT, OUTBOUND, sent)
    enter(NAT, OUTPUT, OUTBOUND, sent)
    if parameters.dns_capture:
        enter(RAW, PREROUTING, INBOUND, arriving)
        enter(RAW, OUTPUT, OUTBOUND, sent)
    enter(NAT, PREROUTING, INBOUND, arriving)


def capture_virtual_interfaces(parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 7: what a virtual machine in the pod sends arrives on an interface."""
    for name in parameters.virtual_interfaces:
        matches = (InInterface(name), TCP)
        why = f"What comes from virtual interface {name} is captured as outbound traffic."
        draft.append(NAT, INBOUND, matches, Redirect(istio.ZTUNNEL_OUTBOUND_PORT), why)
        draft.append(NAT, INBOUND, matches, Return(), f"Nothing else applies to virtual interface {name}.")


# --- a pod: inbound ---------------------------------------------------------------------------------------------------


def remember_ztunnel(_parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 8."""
    why = "A connection that ztunnel opened to the application with the client's address is remembered."
    action = SetConnectionMark(istio.AMBIENT_TPROXY_MARK, istio.AMBIENT_MARK_MASK)
    draft.append(MANGLE, INBOUND, (_FROM_ZTUNNEL,), action, why)


def leave_probes(parameters: AmbientParameters, draft: Draft) -> None:
    """Rules 9 and 10."""
    # The original types `-m tcp` here, and the kernel keeps it.
    bare = (ProtocolExtension("tcp"),) if draft.backend is Backend.IPTABLES else ()
    probes: dict[Family, IPv4Network | IPv6Network] = {
        Family.V4: IPv4Network(parameters.probe_v4),
        Family.V6: IPv6Network(parameters.probe_v6),
    }
    if not parameters.ingress:
        for family in draft.families:
            matches = (TCP, Source(probes[family]), *bare)
            draft.append(
                NAT, INBOUND, matches, Accept(), "The kubelet's probes go to the application directly.", family
            )
    for family in draft.families:
        matches = (TCP, Destination(probes[family]), *bare)
        draft.append(NAT, OUTBOUND, matches, Accept(), "What goes to the kubelet's probes is left alone.", family)


def capture_inbound(parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 11."""
    if parameters.ingress:
        return
    why = "Inbound connections go to ztunnel, but for those that are tunnelled to its own port already."
    for family in draft.families:
        matches = (_NOT_LOOPBACK[family], _NOT_TUNNELLED, _NOT_FROM_ZTUNNEL)
        draft.append(NAT, INBOUND, matches, Redirect(istio.ZTUNNEL_INBOUND_PLAINTEXT_PORT), why, family)


def return_to_ztunnel(_parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 12."""
    why = "The application's answers to ztunnel get the mark back, so that the route delivers them here."
    draft.append(MANGLE, OUTBOUND, (_RETURNING_CONNECTION,), RestoreMark(), why)


# --- a pod: outbound --------------------------------------------------------------------------------------------------


def capture_dns(parameters: AmbientParameters, draft: Draft) -> None:
    """Rules 13 to 16."""
    if not parameters.dns_capture:
        return
    action = Redirect(istio.ZTUNNEL_DNS_PORT)
    over_udp: tuple[Match, ...] = (OtherOutInterface("lo"), _NOT_FROM_ZTUNNEL, _DNS_OVER_UDP)
    draft.append(NAT, OUTBOUND, over_udp, action, "DNS queries of the application are answered by ztunnel.")
    for family in draft.families:
        matches = (_NOT_LOOPBACK[family], _DNS_OVER_TCP, _NOT_FROM_ZTUNNEL)
        why = "DNS queries over TCP are answered by ztunnel too, but for those to a resolver of the pod's own."
        draft.append(NAT, OUTBOUND, matches, action, why, family)
    zone = ConntrackZone(istio.CONNTRACK_ZONE_RESOLVER)
    query: tuple[Match, ...] = (_DNS_OVER_UDP, _FROM_ZTUNNEL)
    answer: tuple[Match, ...] = (_DNS_ANSWER, _NOT_FROM_ZTUNNEL)
    if draft.backend is Backend.IPTABLES:
        query, answer = query[::-1], answer[::-1]
    draft.append(RAW, OUTBOUND, query, zone, "ztunnel's own queries are tracked apart from the application's.")
    draft.append(RAW, INBOUND, answer, zone, "Answers of the real DNS servers belong to ztunnel's queries.")


def leave_returning(_parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 17."""
    draft.append(NAT, OUTBOUND, (TCP, _RETURNING), Accept(), "The application's answers to ztunnel are at their goal.")


def leave_calls_to_self(_parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 18."""
    for family in draft.families:
        matches = (OutInterface("lo"), _NOT_LOOPBACK[family])
        draft.append(NAT, OUTBOUND, matches, Accept(), "The application calling its own pod is left alone.", family)


def capture_outbound(_parameters: AmbientParameters, draft: Draft) -> None:
    """Rule 19."""
    for family in draft.families:
        matches = (TCP, _NOT_LOOPBACK[family], _NOT_FROM_ZTUNNEL)
        why = "Every other outbound TCP connection that is not ztunnel's own goes to ztunnel."
        draft.append(NAT, OUTBOUND, matches, Redirect(istio.ZTUNNEL_OUTBOUND_PORT), why, family)


def route_returning_packets(_parameters: AmbientParameters, draft: Draft) -> None:
    """Deliver marked packets locally, whatever their destination."""
    mark, mask = istio.AMBIENT_TPROXY_MARK, istio.AMBIENT_MARK_MASK
    for family in draft.families:
        rule = PolicyRule(family, mark, istio.AMBIENT_TABLE, mask, istio.AMBIENT_RULE_PRIORITY)
        draft.add_policy_rule(rule)
        draft.add_route(LocalRoute(_EVERYWHERE[family], istio.AMBIENT_TABLE))


Step = Callable[[AmbientParameters, Draft], None]

STEPS: tuple[Step, ...] = (
    look_at_packets,
    capture_virtual_interfaces,
    remember_ztunnel,
    leave_probes,
    capture_inbound,
    return_to_ztunnel,
    capture_dns,
    leave_returning,
    leave_calls_to_self,
    capture_outbound,
    route_returning_packets,
)
