"""Named parameter sets of ambient mode: the overrides of pods that meet in one chain, and the host's.

`scripts/expected` writes each case's rules to expected-ambient/<case>/, where a change of behaviour is seen as a diff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from tests.pure.rules.cases import BOTH, V4

from meshcni.pods.ambient import AmbientParameters
from meshcni.rules import iproute, iptables, nft
from meshcni.rules.ambient import host_ruleset, pod_ruleset
from meshcni.rules.model import Backend, Family, Ruleset


@dataclass(frozen=True)
class PodCase:
    """A pod's parameters, and the node's families."""

    parameters: AmbientParameters
    families: frozenset[Family] = V4

    def ruleset(self, backend: Backend) -> Ruleset:
        return pod_ruleset(self.parameters, self.families, backend)


@dataclass(frozen=True)
class HostCase:
    """The addresses that probes come from, the kubelet's user, and the node's families."""

    families: frozenset[Family] = V4
    probe_v4: IPv4Address = AmbientParameters().probe_v4
    probe_v6: IPv6Address = AmbientParameters().probe_v6
    kubelet_uid: int = 0

    def ruleset(self, backend: Backend) -> Ruleset:
        return host_ruleset(self.probe_v4, self.probe_v6, self.families, backend, self.kubelet_uid)


DEFAULT = AmbientParameters()
DNS = replace(DEFAULT, dns_capture=True)
INGRESS = replace(DEFAULT, ingress=True)
INTERFACES = replace(DEFAULT, virtual_interfaces=("fake1s0f0", "fake1s0f1"))
OTHER_PROBE_V4, OTHER_PROBE_V6 = IPv4Address("192.0.2.77"), IPv6Address("2001:db8::77")
OTHER_PROBES = replace(DEFAULT, probe_v4=OTHER_PROBE_V4, probe_v6=OTHER_PROBE_V6)

AMBIENT_CASES: Mapping[str, PodCase | HostCase] = {
    "default": PodCase(DEFAULT),
    "default-ipv6": PodCase(DEFAULT, BOTH),
    "dns": PodCase(DNS),
    "dns-ipv6": PodCase(DNS, BOTH),
    "ingress": PodCase(INGRESS),
    "ingress-ipv6": PodCase(INGRESS, BOTH),
    "ingress-dns-ipv6": PodCase(replace(DNS, ingress=True), BOTH),
    "virtual-interface": PodCase(replace(DEFAULT, virtual_interfaces=("k6t-eth0",))),
    "virtual-interfaces-ipv6": PodCase(INTERFACES, BOTH),
    "virtual-interface-wildcard": PodCase(replace(DEFAULT, virtual_interfaces=("k6t+", "ip"))),
    "ingress-virtual-interfaces": PodCase(replace(INTERFACES, ingress=True)),
    "everything-ipv6": PodCase(replace(INTERFACES, dns_capture=True), BOTH),
    "other-probes-ipv6": PodCase(OTHER_PROBES, BOTH),
    "host": HostCase(),
    "host-ipv6": HostCase(BOTH),
    "host-other-probes-ipv6": HostCase(BOTH, OTHER_PROBE_V4, OTHER_PROBE_V6, kubelet_uid=1000),
}


def texts(case: PodCase | HostCase) -> dict[str, str]:
    """Return the files of a case: name and content; what has no content has no file."""
    for_iptables, for_nft = case.ruleset(Backend.IPTABLES), case.ruleset(Backend.NFTABLES)
    files = {
        "iptables-v4.txt": iptables.render(for_iptables, Family.V4, with_whys=True),
        "iptables-v6.txt": iptables.render(for_iptables, Family.V6, with_whys=True),
        "nft.txt": nft.render(for_nft, with_whys=True),
        "ip.txt": iproute.render(for_nft),
    }
    return {name: text for name, text in files.items() if text}
