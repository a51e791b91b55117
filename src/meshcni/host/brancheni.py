"""Policy rules for pods on an AWS branch ENI, without which the node's kubelet cannot probe them.

With security groups for pods, AWS sends what comes from such a pod's interface, whoever it is for, to the pod's own
routing table, and that leads out to the VPC: the answers to the kubelet never arrive. Two rules put that right for one
pod: `to POD lookup ITS TABLE`, by which the probe takes the interface of the pod, and `iif INTERFACE lookup local`
before AWS's own rule, by which the answer arrives. AWS's layout: amazon-vpc-cni-k8s, pkg/networkutils.

Everything here happens in the network namespace of the calling thread, which has to be the host's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import EAFNOSUPPORT, ENOENT, EOPNOTSUPP, EPERM
from ipaddress import IPv4Address, IPv6Address, ip_address

from meshcni.errors import ApplyError
from meshcni.host import rtnetlink
from meshcni.host.procfs import read_text
from meshcni.host.rtnetlink import PlainRule, Rtnetlink

IpAddress = IPv4Address | IPv6Address

TO_POD_PRIORITY = 512  # AWS's own rules to pods have it as well, but look into the main table
TABLE_LOCAL = 255  # linux/rtnetlink.h
SHARED_TABLES = frozenset((0, 253, 254, TABLE_LOCAL))  # none, default, main: not a pod's own
INTERFACE_PREFIX = "vlan"  # of a branch ENI pod's interface on the host: amazon-vpc-cni-k8s, pkg/sgpp
_ADDRESS_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_EARLY_DEMUX = "sys/net/ipv4/tcp_early_demux"


@dataclass(frozen=True, slots=True)
class BranchRules:
    """The policy rules of ours for one pod address; None when only rules of a pod that is gone are left of it."""

    address: IpAddress | None
    rules: tuple[PlainRule, ...]


def is_enabled(proc_root: str) -> bool:
    """Tell whether AWS's plugin has prepared this node for probes of branch ENI pods, by switching early demux off.

    `proc_root` is the path of a procfs; the kernel answers for the network namespace of the thread that reads.
    """
    return (read_text(os.path.join(proc_root, _EARLY_DEMUX)) or "").startswith("0")


def ensure(address: IpAddress, connect: Callable[[], Rtnetlink] = Rtnetlink) -> BranchRules | None:
    """Make the rules for a pod, None when its address is not on a branch ENI; raises ApplyError, then adds neither.

    Rules that are there already count as made. The answer may differ from that for the same address before: what only
    the old one has is then to be removed, `remove(old, keep=[new])`.
    """
    with _kernel(connect) as netlink:
        layout = _read_layout(netlink, _ADDRESS_FAMILY[address.version])
        wanted = layout.rules_for(address)
        if wanted is None:
            return None
        _add_all(netlink, [rule for rule in wanted.rules if rule not in layout.rules])
    return wanted


def remove(branch: BranchRules, keep: Iterable[BranchRules] = (), connect: Callable[[], Rtnetlink] = Rtnetlink) -> None:
    """Delete the rules of one pod, except those that `keep` has too; what is not there is fine. Raises ApplyError.

    Two pods that have, or had, the same address or the same interface may share a rule: so name those that live on.
    """
    kept = {rule for other in keep for rule in other.rules}
    gone = {rule for rule in branch.rules if rule not in kept}
    failures: list[ApplyError] = []
    with _kernel(connect) as netlink:
        for family in sorted({rule.family for rule in gone}):
            for rule in _read_rules(netlink, family):
                if rule not in gone:
                    continue
                try:
                    _change(netlink, rtnetlink.RTM_DELRULE, rule)
                except ApplyError as failure:
                    failures.append(failure)
    if failures:
        raise ApplyError("; ".join(failure.message for failure in failures), failures[0].hint)


def observe(connect: Callable[[], Rtnetlink] = Rtnetlink) -> tuple[BranchRules, ...]:
    """Return the rules of ours that are here, an item for each pod address, as an agent that has just started needs.

    Raises ApplyError.
    """
    with _kernel(connect) as netlink:
        layouts = [_read_layout(netlink, family) for family in _ADDRESS_FAMILY.values()]
    return tuple(item for layout in layouts for item in layout.ours())


# --- the layout that AWS's plugin makes, and ours in it ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """The rules of one family, and what they lead to.

    `behind` has the single addresses by the table and the interface of their routes, `interfaces` the names of all.
    """

    rules: tuple[PlainRule, ...]
    behind: Mapping[tuple[int, str], frozenset[bytes]]
    interfaces: frozenset[str]

    def rules_for(self, address: IpAddress) -> BranchRules | None:
        """Return the rules that a pod needs, None when no rule from an interface leads to a route to it there."""
        packed = address.packed
        for rule in branch_rules(self.rules):  # by priority
            if packed in self.behind.get((rule.table, rule.interface), ()):
                to_pod = PlainRule(rule.family, TO_POD_PRIORITY, rule.table, packed, 8 * len(packed))
                before = max(rule.priority - 1, 0)
                return BranchRules(
                    address, (to_pod, PlainRule(rule.family, before, TABLE_LOCAL, interface=rule.interface))
                )
        return None

    def ours(self) -> Iterator[BranchRules]:
        """Recognise rules of ours by their form alone, so that the original's count too.

        One is a rule to a single address that looks into a table of its own. The other one comes from an interface and
        looks into the local table: it is ours when there is a pod address behind that interface, or when the interface
        is gone and had a name that AWS's plugin gives.
        """
        from_pods = [
            rule for rule in self.rules if rule.interface and not rule.destination and rule.table == TABLE_LOCAL
        ]
        paired: set[PlainRule] = set()
        for rule in filter(_is_to_pod, self.rules):
            answers = [answer for answer in from_pods if rule.destination in self._behind(answer.interface)]
            paired.update(answers)
            yield BranchRules(ip_address(rule.destination), (rule, *answers))
        for answer in from_pods:
            if answer in paired:
                continue
            addresses = sorted(self._behind(answer.interface))
            if addresses:
                yield BranchRules(ip_address(addresses[0]), (answer,))
            elif answer.interface not in self.interfaces and answer.interface.startswith(INTERFACE_PREFIX):
                yield BranchRules(None, (answer,))

    def _behind(self, interface: str) -> frozenset[bytes]:
        return frozenset().union(*(found for (_, name), found in self.behind.items() if name == interface))


def branch_rules(rules: Iterable[PlainRule]) -> Iterator[PlainRule]:
    """Yield the rules that send what comes from an interface to a table that is not shared."""
    return (rule for rule in rules if rule.interface and not rule.destination and rule.table not in SHARED_TABLES)


def _is_to_pod(rule: PlainRule) -> bool:
    is_single = bool(rule.destination) and rule.destination_length == 8 * len(rule.destination)
    is_plain = is_single and not rule.interface and rule.table not in SHARED_TABLES
    return is_plain and rule.priority == TO_POD_PRIORITY


def _read_rules(netlink: Rtnetlink, family: int) -> list[PlainRule]:
    try:
        return netlink.plain_rules(family)
    except OSError as error:
        if error.errno in (EAFNOSUPPORT, EOPNOTSUPP):
            return []  # the kernel has no policy rules of this family
        raise ApplyError(f"cannot read the node's policy rules: {error.strerror or error}") from None


def _read_layout(netlink: Rtnetlink, family: int) -> Layout:
    """Read rules and, only where there are rules that branch ENI pods would have, routes and interfaces."""
    rules = _read_rules(netlink, family)
    names = dict(socket.if_nameindex()) if any(rule.interface for rule in rules) else {}
    tables = frozenset(rule.table for rule in branch_rules(rules))
    try:
        routes = netlink.device_routes(family, tables) if tables else {}
    except OSError as error:
        raise ApplyError(f"cannot read the node's routes: {error.strerror or error}") from None
    behind: dict[tuple[int, str], frozenset[bytes]] = {}
    for table, found in routes.items():
        for route in found:
            if route.destination and route.prefix_length == 8 * len(route.destination) and route.interface in names:
                key = (table, names[route.interface])
                behind[key] = behind.get(key, frozenset()) | {route.destination}
    return Layout(tuple(rules), behind, frozenset(names.values()))


def _kernel(connect: Callable[[], Rtnetlink]) -> Rtnetlink:
    try:
        return connect()
    except OSError as error:
        raise ApplyError(f"no route socket: {error}", "is the descriptor limit reached?") from None


def _add_all(netlink: Rtnetlink, rules: Iterable[PlainRule]) -> None:
    """Add all rules or, when the kernel refuses one, none."""
    added: list[PlainRule] = []
    for rule in rules:
        try:
            _change(netlink, rtnetlink.RTM_NEWRULE, rule)
        except ApplyError:
            for earlier in added:
                _change(netlink, rtnetlink.RTM_DELRULE, earlier)
            raise
        added.append(rule)


def _change(netlink: Rtnetlink, message: int, rule: PlainRule) -> None:
    """Add or delete a rule; one to delete that has just gone is fine."""
    try:
        netlink.change_plain_rule(message, rule)
    except OSError as error:
        if error.errno == ENOENT and message == rtnetlink.RTM_DELRULE:
            return
        what = "add" if message == rtnetlink.RTM_NEWRULE else "delete"
        hint = "CAP_NET_ADMIN is needed in the host's network namespace" if error.errno == EPERM else ""
        raise ApplyError(f"cannot {what} the policy rule {describe(rule)}: {error.strerror or error}", hint) from None


def describe(rule: PlainRule) -> str:
    """Return a rule in the words of `ip rule`."""
    words = [f"priority {rule.priority}"]
    if rule.destination:
        words.append(f"to {ip_address(rule.destination)}/{rule.destination_length}")
    if rule.interface:
        words.append(f"iif {rule.interface}")
    return " ".join([*words, f"lookup {rule.table}"])
