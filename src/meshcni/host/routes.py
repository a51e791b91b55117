"""The part of a rule set that is no packet rule: addresses on `lo`, policy rules for marked packets, local routes.

A sidecar's in a pod are: the address `::6`, policy rules of exactly (mark, table) with the full mask, and the local
default routes of their table. Ambient mode's are: policy rules of exactly (mark, mask, table, priority) and the local
default routes of their table. Everything else belongs to others and is not touched.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from errno import EACCES, EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, ENETDOWN, ENODEV, ENOENT, EOPNOTSUPP, EPERM, ESRCH
from functools import partial
from ipaddress import IPv6Network, ip_network

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host import rtnetlink
from meshcni.host.procfs import read_text
from meshcni.host.rtnetlink import FibRule, Rtnetlink
from meshcni.rules.ambient import route_ruleset
from meshcni.rules.iproute import mark_words
from meshcni.rules.model import Family, LocalRoute, LoopbackAddress, PolicyRule, Purpose, Ruleset

_ADDRESS_FAMILY = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_ABSENT = (ENOENT, ESRCH, EADDRNOTAVAIL, EOPNOTSUPP, EAFNOSUPPORT, ENODEV)
_HINTS = {
    EPERM: "CAP_NET_ADMIN is needed in the pod's network namespace",
    EACCES: "is IPv6 switched off on lo (net.ipv6.conf.lo.disable_ipv6)?",
    ENETDOWN: "interface lo of the pod is down",
    EOPNOTSUPP: "the kernel lacks policy routing for this address family",
    EAFNOSUPPORT: "the kernel lacks policy routing for this address family",
}
_DISABLE_IPV6 = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"  # of the reading thread's network namespace


@dataclass(frozen=True, slots=True)
class Own:
    """What of a namespace's routing is ours for a purpose, whatever the parameters were that it was made with."""

    rules: tuple[PolicyRule, ...] = ()
    routes: tuple[LocalRoute, ...] = ()
    addresses: tuple[LoopbackAddress, ...] = ()


_SELF_V6 = IPv6Network(istio.SELF_V6)
# What any run with the default mark and table may have left.
_SIDECAR = Own(
    tuple(PolicyRule(family, istio.TPROXY_MARK, istio.TPROXY_TABLE) for family in Family),
    tuple(LocalRoute(ip_network(everything), istio.TPROXY_TABLE) for everything in ("0.0.0.0/0", "::/0")),
    (LoopbackAddress(_SELF_V6.network_address, _SELF_V6.prefixlen),),
)
_AMBIENT = Own(route_ruleset(frozenset(Family)).policy_rules, route_ruleset(frozenset(Family)).routes)
_OWN = {Purpose.SIDECAR: _SIDECAR, Purpose.AMBIENT_POD: _AMBIENT, Purpose.AMBIENT_HOST: Own()}
# In a pod that is to be ambient, what an earlier sidecar left goes too, once the pod has its rules.
_LEFTOVERS = {Purpose.SIDECAR: Own(), Purpose.AMBIENT_POD: _SIDECAR, Purpose.AMBIENT_HOST: Own()}
NOTHING = Ruleset(frozenset(), ())


def establish(ruleset: Ruleset) -> bool:
    """Make sure that the addresses, policy rules and routes of `ruleset` are there; tell whether one was not.

    A policy rule without a priority counts as there at whatever priority. Raises ApplyError.
    """
    if not (ruleset.addresses or ruleset.policy_rules or ruleset.routes):
        return False
    with Rtnetlink() as netlink:
        changed = False
        for address in ruleset.addresses:
            changed |= _change_address(netlink, rtnetlink.RTM_NEWADDR, address)
        there = set(netlink.local_routes()) if ruleset.routes else set()
        for route in _possible_routes(ruleset):
            if _local_route(route) not in there:
                changed |= _change_route(netlink, rtnetlink.RTM_NEWROUTE, route)
        found = netlink.mark_rules() if ruleset.policy_rules else []
        for rule in ruleset.policy_rules:
            if not any(_is(there_already, rule) for there_already in found):
                changed |= _add_rule(netlink, rule)
    return changed


def clean(ruleset: Ruleset) -> bool:
    """Take out what of ours is not of `ruleset`; tell whether there was anything.

    Doubles of a policy rule (the original adds one in every run of a sidecar's) go too, the oldest stays.
    Raises ApplyError.
    """
    own, leftovers = _OWN[ruleset.purpose], _LEFTOVERS[ruleset.purpose]
    if ruleset.purpose is Purpose.AMBIENT_HOST:
        return False
    with Rtnetlink() as netlink:
        changed = _clean_rules(netlink, (*own.rules, *leftovers.rules), ruleset.policy_rules)
        for address in {*own.addresses, *leftovers.addresses}.difference(ruleset.addresses):
            changed |= _change_address(netlink, rtnetlink.RTM_DELADDR, address)
        for route in {*own.routes, *leftovers.routes}.difference(ruleset.routes):
            changed |= _change_route(netlink, rtnetlink.RTM_DELROUTE, route)
    return changed


def remove(ruleset: Ruleset = NOTHING) -> None:
    """Take out what `ruleset`, or another run for its purpose, put in; nothing there is fine.

    What fails does not keep the rest from being taken out. Raises ApplyError, with all that failed.
    """
    own, problems = _OWN[ruleset.purpose], []
    with Rtnetlink() as netlink:
        steps: list[Callable[[], bool]] = [lambda: _clean_rules(netlink, (*own.rules, *ruleset.policy_rules), ())]
        steps += [
            partial(_change_address, netlink, rtnetlink.RTM_DELADDR, address)
            for address in {*own.addresses, *ruleset.addresses}
        ]
        steps += [
            partial(_change_route, netlink, rtnetlink.RTM_DELROUTE, route) for route in {*own.routes, *ruleset.routes}
        ]
        for step in steps:
            try:
                step()
            except ApplyError as error:
                problems.append(error)
    if problems:
        raise ApplyError("; ".join(problem.message for problem in problems), problems[0].hint)


def missing(ruleset: Ruleset) -> tuple[str, ...]:
    """Name the addresses, policy rules and routes of `ruleset` that the kernel does not have."""
    if not (ruleset.addresses or ruleset.policy_rules or ruleset.routes):
        return ()
    with Rtnetlink() as netlink:
        rules = netlink.mark_rules() if ruleset.policy_rules else []
        addresses = {entry.packed for entry in netlink.addresses()} if ruleset.addresses else set()
        routes = set(netlink.local_routes()) if ruleset.routes else set()
    absent = [str(item.address) for item in ruleset.addresses if item.address.packed not in addresses]
    absent += [
        f"IPv{rule.family.value} rule fwmark {mark_words(rule)} lookup {rule.table}"
        for rule in ruleset.policy_rules
        if not any(_is(found, rule) for found in rules)
    ]
    absent += [
        f"local route {route.destination} in table {route.table}"
        for route in _possible_routes(ruleset)
        if _local_route(route) not in routes
    ]
    return tuple(absent)


def observe() -> tuple[PolicyRule, ...]:
    """Return the policy rules of this namespace that match a packet mark, ours and others', each with its priority."""
    families = {int(number): family for family, number in _ADDRESS_FAMILY.items()}
    with Rtnetlink() as netlink:
        found = netlink.mark_rules()
    return tuple(
        PolicyRule(families[rule.family], rule.mark, rule.table, rule.mask, rule.priority)
        for rule in found
        if rule.family in families
    )


def _is(found: FibRule, rule: PolicyRule) -> bool:
    same = (found.family, found.mark, found.mask, found.table) == (
        _ADDRESS_FAMILY[rule.family],
        rule.mark,
        rule.mask,
        rule.table,
    )
    return same and rule.priority in (None, found.priority)


def _clean_rules(netlink: Rtnetlink, own: tuple[PolicyRule, ...], wanted: tuple[PolicyRule, ...]) -> bool:
    left = list(wanted)
    changed = False
    for found in reversed(netlink.mark_rules()):  # each further one got a lower priority: the oldest stays
        if kept := next((rule for rule in left if _is(found, rule)), None):
            left.remove(kept)  # so that a second one like it is taken out below
        elif any(_is(found, rule) for rule in (*own, *wanted)):
            changed |= _tolerating(_ABSENT, rtnetlink.RTM_DELRULE, netlink.change_mark_rule, found)
    return changed


def _add_rule(netlink: Rtnetlink, rule: PolicyRule) -> bool:
    new = FibRule(_ADDRESS_FAMILY[rule.family], rule.mark, rule.mask, rule.table, rule.priority or 0)
    return _tolerating((EEXIST,), rtnetlink.RTM_NEWRULE, netlink.change_mark_rule, new)


def _possible_routes(ruleset: Ruleset) -> list[LocalRoute]:
    """Return the routes, in ambient mode without the IPv6 one where `lo` has IPv6 switched off: none could be added."""
    if ruleset.purpose is Purpose.AMBIENT_POD and (read_text(_DISABLE_IPV6) or "").strip() == "1":
        return [route for route in ruleset.routes if route.destination.version == 4]
    return list(ruleset.routes)


def _local_route(route: LocalRoute) -> rtnetlink.LocalRoute:
    network = route.destination
    packed = network.network_address.packed if network.prefixlen else b""
    return rtnetlink.LocalRoute(_ADDRESS_FAMILY[Family(network.version)], packed, network.prefixlen, route.table)


def _change_address(netlink: Rtnetlink, message: int, address: LoopbackAddress) -> bool:
    tolerated = (EEXIST,) if message == rtnetlink.RTM_NEWADDR else _ABSENT
    packed = address.address.packed
    return _tolerating(tolerated, message, netlink.change_address, packed, address.prefix_length)


def _change_route(netlink: Rtnetlink, message: int, route: LocalRoute) -> bool:
    tolerated = () if message == rtnetlink.RTM_NEWROUTE else _ABSENT
    network = route.destination
    arguments = (network.network_address.packed, network.prefixlen, route.table)
    return _tolerating(tolerated, message, netlink.change_local_route, *arguments)


def _tolerating(numbers: tuple[int, ...], message: int, change: Callable[..., None], *arguments: object) -> bool:
    """Make a change; tell whether it was one. Refusals with an errno in `numbers` mean that there was nothing to do."""
    try:
        change(message, *arguments)
    except OSError as error:
        if error.errno in numbers:
            return False
        what = f"{change.__name__.removeprefix('change_').replace('_', ' ')} {arguments}"
        raise ApplyError(f"the kernel refused a {what}: {error.strerror}", _HINTS.get(error.errno or 0, "")) from None
    return True
