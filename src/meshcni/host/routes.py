"""The part of a rule set that is no packet rule: addresses on `lo`, policy rules for marked packets, local routes.

Ours in a pod are: the address `::6`, policy rules of exactly (mark, table) with the full mask, and the local default
routes of their table. Everything else belongs to others and is not touched.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from errno import EACCES, EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, ENETDOWN, ENODEV, ENOENT, EOPNOTSUPP, EPERM, ESRCH
from ipaddress import IPv6Network, ip_network

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host import rtnetlink
from meshcni.host.rtnetlink import FibRule, Rtnetlink
from meshcni.rules.model import Family, LocalRoute, LoopbackAddress, PolicyRule, Ruleset

_ADDRESS_FAMILY = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_ABSENT = (ENOENT, ESRCH, EADDRNOTAVAIL, EOPNOTSUPP, EAFNOSUPPORT, ENODEV)
_HINTS = {
    EPERM: "CAP_NET_ADMIN is needed in the pod's network namespace",
    EACCES: "is IPv6 switched off on lo (net.ipv6.conf.lo.disable_ipv6)?",
    ENETDOWN: "interface lo of the pod is down",
    EOPNOTSUPP: "the kernel lacks policy routing for this address family",
    EAFNOSUPPORT: "the kernel lacks policy routing for this address family",
}

# What any run with the default mark and table may have left.
DEFAULT_RULES = tuple(PolicyRule(family, istio.TPROXY_MARK, istio.TPROXY_TABLE) for family in Family)
DEFAULT_ROUTES = tuple(LocalRoute(ip_network(everything), istio.TPROXY_TABLE) for everything in ("0.0.0.0/0", "::/0"))
_SELF_V6 = IPv6Network(istio.SELF_V6)
DEFAULT_ADDRESSES = (LoopbackAddress(_SELF_V6.network_address, _SELF_V6.prefixlen),)
NOTHING = Ruleset(frozenset(), ())


def converge(ruleset: Ruleset) -> bool:
    """Make addresses, policy rules and routes of ours those of `ruleset`; tell whether anything had to be done.

    A policy rule counts as there at whatever priority, and doubles of it (the original adds one in every run) are
    taken out. Raises ApplyError.
    """
    with Rtnetlink() as netlink:
        changed = False
        for address in ruleset.addresses:
            changed |= _change_address(netlink, rtnetlink.RTM_NEWADDR, address)
        for route in ruleset.routes:
            changed |= _change_route(netlink, rtnetlink.RTM_NEWROUTE, route)
        changed |= _converge_rules(netlink, ruleset.policy_rules)
        for address in set(DEFAULT_ADDRESSES).difference(ruleset.addresses):
            changed |= _change_address(netlink, rtnetlink.RTM_DELADDR, address)
        for route in set(DEFAULT_ROUTES).difference(ruleset.routes):
            changed |= _change_route(netlink, rtnetlink.RTM_DELROUTE, route)
    return changed


def remove(ruleset: Ruleset = NOTHING) -> None:
    """Take out what `ruleset` or a run with default mark and table put in; nothing there is fine. Raises ApplyError."""
    with Rtnetlink() as netlink:
        _converge_rules(netlink, (), ruleset.policy_rules)
        for address in {*DEFAULT_ADDRESSES, *ruleset.addresses}:
            _change_address(netlink, rtnetlink.RTM_DELADDR, address)
        for route in {*DEFAULT_ROUTES, *ruleset.routes}:
            _change_route(netlink, rtnetlink.RTM_DELROUTE, route)


def missing(ruleset: Ruleset) -> tuple[str, ...]:
    """Name the addresses and policy rules of `ruleset` that the kernel does not have (its routes hang on the rules)."""
    with Rtnetlink() as netlink:
        rules = {(rule.family, rule.mark, rule.mask, rule.table) for rule in netlink.mark_rules()}
        addresses = {entry.packed for entry in netlink.addresses()}
    absent = [str(item.address) for item in ruleset.addresses if item.address.packed not in addresses]
    absent += [
        f"IPv{rule.family.value} rule fwmark {rule.mark} lookup {rule.table}"
        for rule in ruleset.policy_rules
        if _key(rule) not in rules
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


def _key(rule: PolicyRule) -> tuple[int, int, int, int]:
    return _ADDRESS_FAMILY[rule.family], rule.mark, rule.mask, rule.table


def _converge_rules(netlink: Rtnetlink, desired: tuple[PolicyRule, ...], stale: tuple[PolicyRule, ...] = ()) -> bool:
    wanted = {_key(rule): rule for rule in desired}
    ours = {_key(rule) for rule in (*DEFAULT_RULES, *stale)} | wanted.keys()
    changed = False
    for found in reversed(netlink.mark_rules()):  # each further one got a lower priority: the oldest stays
        key = (found.family, found.mark, found.mask, found.table)
        if key in wanted:
            del wanted[key]  # so that a second one like it is taken out below
        elif key in ours:
            changed |= _tolerating(_ABSENT, rtnetlink.RTM_DELRULE, netlink.change_mark_rule, found)
    for (family, mark, mask, table), rule in wanted.items():
        new = FibRule(family, mark, mask, table, rule.priority or 0)
        changed |= _tolerating((EEXIST,), rtnetlink.RTM_NEWRULE, netlink.change_mark_rule, new)
    return changed


def _change_address(netlink: Rtnetlink, message: int, address: LoopbackAddress) -> bool:
    tolerated = (EEXIST,) if message == rtnetlink.RTM_NEWADDR else _ABSENT
    packed = address.address.packed
    return _tolerating(tolerated, message, netlink.change_address, packed, address.prefix_length)


def _change_route(netlink: Rtnetlink, message: int, route: LocalRoute) -> bool:
    tolerated = (EEXIST,) if message == rtnetlink.RTM_NEWROUTE else _ABSENT
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
