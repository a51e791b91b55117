"""Named parameter sets: every parameter on its own, and the combinations that meet in one chain.

`scripts/expected` writes each case's rules to expected/<case>/, where a reviewer sees a change of behaviour as a diff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, ip_address, ip_network

from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, Network, NumberRange
from meshcni.rules import iproute, iptables, nft
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

V4 = frozenset({Family.V4})
V6 = frozenset({Family.V6})
BOTH = frozenset(Family)


@dataclass(frozen=True)
class Case:
    """Parameters, and the families that the netns has."""

    parameters: Interception
    families: frozenset[Family] = V4


def ranges(text: str) -> tuple[NumberRange, ...]:
    """Read `80,90-99`."""
    pairs = [item.partition("-") for item in text.split(",")]
    return tuple(NumberRange(int(first), int(last or first)) for first, _, last in pairs)


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


DEFAULT = Interception()
TPROXY = replace(DEFAULT, mode=InterceptionMode.TPROXY)
DNS = replace(DEFAULT, redirect_dns=True, capture_all_dns=True)
RESOLVERS = replace(
    DEFAULT,
    redirect_dns=True,
    dns_servers=(ip_address("10.96.0.10"), ip_address("fd00:10:96::a"), ip_address("169.254.20.10")),
)

CASES: Mapping[str, Case] = {
    "default": Case(DEFAULT),
    "default-ipv6": Case(DEFAULT, BOTH),
    "default-ipv6-only": Case(DEFAULT, V6),
    "proxy-port": Case(replace(DEFAULT, proxy_port=16001)),
    "inbound-capture-port": Case(replace(DEFAULT, inbound_capture_port=16006)),
    "inbound-tunnel-port": Case(replace(DEFAULT, inbound_tunnel_port=16008)),
    "proxy-ids": Case(replace(DEFAULT, proxy_uids=ranges("1000"), proxy_gids=ranges("2000"))),
    "proxy-ids-several": Case(replace(DEFAULT, proxy_uids=ranges("3,4"), proxy_gids=ranges("1,2")), BOTH),
    "proxy-ids-several-dns": Case(replace(DNS, proxy_uids=ranges("3,4"), proxy_gids=ranges("1,2"))),
    "inbound-none": Case(replace(DEFAULT, inbound_ports=())),
    "inbound-ports": Case(replace(DEFAULT, inbound_ports=ranges("80,443,9000-9010")), BOTH),
    "inbound-exclude-ports": Case(replace(DEFAULT, inbound_exclude_ports=ranges("22,3306,15020,15021,15090"))),
    "inbound-exclude-nothing": Case(replace(DEFAULT, inbound_exclude_ports=())),
    "outbound-ports": Case(replace(DEFAULT, outbound_ports=ranges("8080,9090-9099"), outbound_cidrs=())),
    "outbound-ports-everything": Case(replace(DEFAULT, outbound_ports=EVERYTHING, outbound_cidrs=())),
    "outbound-exclude-ports": Case(replace(DEFAULT, outbound_exclude_ports=ranges("53,27017"))),
    "outbound-none": Case(replace(DEFAULT, outbound_cidrs=())),
    "outbound-cidrs": Case(replace(DEFAULT, outbound_cidrs=networks("10.0.0.0/8", "fd00::/8", "192.0.2.1/32"))),
    "outbound-cidrs-ipv6": Case(
        replace(DEFAULT, outbound_cidrs=networks("10.0.0.0/8", "fd00::/8", "192.0.2.1/32")), BOTH
    ),
    "outbound-cidrs-loopback": Case(replace(DEFAULT, outbound_cidrs=networks("10.0.0.0/8", "127.1.2.3/32")), BOTH),
    "outbound-cidrs-loopback-dns": Case(replace(DNS, outbound_cidrs=networks("::1/128")), BOTH),
    "outbound-exclude-cidrs": Case(
        replace(DEFAULT, outbound_exclude_cidrs=networks("10.1.0.0/16", "fd00:1::/32", "198.51.100.7/32")), BOTH
    ),
    "outbound-ports-and-exclusions": Case(
        replace(
            DEFAULT,
            outbound_ports=ranges("443"),
            outbound_exclude_ports=ranges("5432"),
            outbound_cidrs=networks("10.0.0.0/8"),
            outbound_exclude_cidrs=networks("10.9.0.0/16"),
        )
    ),
    "exclude-interfaces": Case(replace(DEFAULT, exclude_interfaces=("net1", "eth0.100")), BOTH),
    "exclude-interfaces-tproxy": Case(replace(TPROXY, exclude_interfaces=("net1", "eth0.100"))),
    "interface-wildcards": Case(replace(DEFAULT, exclude_interfaces=("eth+",), virtual_interfaces=("k6t-+",))),
    "virtual-interfaces": Case(replace(DEFAULT, virtual_interfaces=("k6t-eth0", "k6t-net1")), BOTH),
    "virtual-interfaces-cidrs": Case(
        replace(
            DEFAULT,
            virtual_interfaces=("k6t-eth0", "k6t-net1"),
            outbound_cidrs=networks("10.0.0.0/8", "192.0.2.0/24", "fd00::/8"),
        ),
        BOTH,
    ),
    "virtual-interfaces-outbound-none": Case(
        replace(DEFAULT, virtual_interfaces=("k6t-eth0",), outbound_cidrs=(), exclude_interfaces=("net1",))
    ),
    "dns-all": Case(DNS),
    "dns-all-ipv6": Case(DNS, BOTH),
    "dns-resolvers": Case(RESOLVERS),
    "dns-resolvers-ipv6": Case(RESOLVERS, BOTH),
    "dns-resolvers-ipv6-without-ipv6": Case(replace(RESOLVERS, dns_servers=(ip_address("fd00:10:96::a"),))),
    "dns-without-resolvers": Case(replace(DEFAULT, redirect_dns=True)),
    "dns-all-not-redirected": Case(replace(DEFAULT, capture_all_dns=True)),
    "drop-invalid": Case(replace(DEFAULT, drop_invalid=True), BOTH),
    "drop-invalid-tproxy": Case(replace(TPROXY, drop_invalid=True)),
    "loopback-cidr": Case(replace(DEFAULT, loopback_cidr=IPv4Network("127.0.0.0/8"))),
    "owner-groups": Case(replace(DEFAULT, owner_groups=ranges("888,1000-2000"))),
    "owner-groups-none": Case(replace(DEFAULT, owner_groups=())),
    "owner-groups-exclude": Case(replace(DEFAULT, owner_groups_exclude=ranges("888,1000-2000"))),
    "owner-groups-include-wins": Case(replace(DEFAULT, owner_groups=ranges("888"), owner_groups_exclude=ranges("999"))),
    "owner-groups-exclude-dns": Case(replace(DNS, owner_groups_exclude=ranges("888"))),
    "tproxy": Case(TPROXY),
    "tproxy-ipv6": Case(TPROXY, BOTH),
    "tproxy-inbound-none": Case(replace(TPROXY, inbound_ports=()), BOTH),
    "tproxy-inbound-ports": Case(replace(TPROXY, inbound_ports=ranges("80,9000-9010")), BOTH),
    "tproxy-mark-and-table": Case(replace(TPROXY, tproxy_mark=99, tproxy_table=177)),
    "tproxy-dns": Case(replace(TPROXY, redirect_dns=True, capture_all_dns=True), BOTH),
    "everything": Case(
        Interception(
            mode=InterceptionMode.TPROXY,
            proxy_uids=ranges("1337,1400-1500"),
            inbound_exclude_ports=ranges("22,15020"),
            outbound_ports=ranges("3306"),
            outbound_exclude_ports=ranges("15020,5432"),
            outbound_cidrs=networks("10.0.0.0/8", "fd00::/8"),
            outbound_exclude_cidrs=networks("10.9.0.0/16", "fd09::/16"),
            exclude_interfaces=("net1",),
            virtual_interfaces=("k6t-eth0",),
            redirect_dns=True,
            dns_servers=RESOLVERS.dns_servers,
            drop_invalid=True,
            owner_groups_exclude=ranges("888"),
        ),
        BOTH,
    ),
}


def texts(case: Case) -> dict[str, str]:
    """Return the files of a case: name and content; what has no content has no file."""
    for_iptables = sidecar_ruleset(case.parameters, case.families, Backend.IPTABLES)
    for_nft = sidecar_ruleset(case.parameters, case.families, Backend.NFTABLES)
    files = {
        "iptables-v4.txt": iptables.render(for_iptables, Family.V4, with_whys=True),
        "iptables-v6.txt": iptables.render(for_iptables, Family.V6, with_whys=True),
        "nft.txt": nft.render(for_nft, with_whys=True),
        "ip.txt": iproute.render(for_nft),
    }
    return {name: text for name, text in files.items() if text}
