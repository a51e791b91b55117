"""What Istio's own node agent leaves in the kernel in ambient mode, written down a second time without any cleverness.

`pod(...)` and `host(...)` give the texts that the original feeds to `iptables-restore --noflush`, `ip6tables-restore
--noflush` and `nft -f -`, and what its netlink calls amount to as `ip` commands. Nothing here comes from meshcni: a
mistake has to be made twice.

Upstream: cni/pkg/iptables/iptables.go and iptables_linux.go, cni/pkg/nftables/nftables.go and nftables_linux.go,
tools/istio-iptables/pkg/builder, tools/istio-nftables/pkg/builder. Rules are numbered in the order in which the
original emits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

P4 = "169.254.7.127"
P6 = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"


@dataclass(frozen=True)
class Texts:
    """The texts of one run; empty where the original programs nothing. `ip` is for sh."""

    iptables: str
    ip6tables: str
    nft: str
    ip: str = ""


def pod(
    *, ipv6: bool, dns: bool = False, ingress: bool = False, interfaces: Sequence[str] = (), p4: str = P4, p6: str = P6
) -> Texts:
    """Return what the original does in a pod's network namespace."""
    return Texts(
        iptables=restore_text(pod_rules(4, dns, ingress, interfaces, p4)),
        ip6tables=restore_text(pod_rules(6, dns, ingress, interfaces, p6)) if ipv6 else "",
        nft=pod_transaction(ipv6, dns, ingress, interfaces, p4, p6),
        ip=pod_routing(ipv6),
    )


def host(*, ipv6: bool, uid: int, p4: str = P4, p6: str = P6) -> Texts:
    """Return what the original does in the host's network namespace, where the address sets are already."""
    return Texts(
        iptables=restore_text(host_rules("istio-inpod-probes-v4", p4)),
        ip6tables=restore_text(host_rules("istio-inpod-probes-v6", p6)) if ipv6 else "",
        nft=host_transaction(ipv6, uid, p4, p6),
    )


# --- iptables ---------------------------------------------------------------------------------------------------------


def restore_text(rules: Sequence[str]) -> str:
    """Return the restore text of rules that begin with their table: `-N` lines, then rules as emitted, per table."""
    built_in = ("INPUT", "OUTPUT", "FORWARD", "PREROUTING", "POSTROUTING", "ACCEPT", "RETURN", "DROP")
    text = ""
    for table in ("mangle", "nat", "raw"):
        lines = [rule.partition(" ")[2] for rule in rules if rule.partition(" ")[0] == table]
        if not lines:
            continue
        chains: list[str] = []
        for line in lines:
            if line.split()[1] not in (*built_in, *chains):
                chains.append(line.split()[1])
        for line in lines:
            *_, verb, target = line.split()
            if verb == "-j" and target not in (*built_in, *chains):
                chains.append(target)
        text += "".join(f"{line}\n" for line in (f"* {table}", *(f"-N {chain}" for chain in chains), *lines, "COMMIT"))
    return text


def pod_rules(family: int, dns: bool, ingress: bool, interfaces: Sequence[str], probe: str) -> list[str]:
    lo = "127.0.0.1/32" if family == 4 else "::1/128"
    rules = [
        "mangle -A PREROUTING -j ISTIO_PRERT",  # 1
        "mangle -A OUTPUT -j ISTIO_OUTPUT",  # 2
        "nat -A OUTPUT -j ISTIO_OUTPUT",  # 3
    ]
    if dns:
        rules += [
            "raw -A PREROUTING -j ISTIO_PRERT",  # 4
            "raw -A OUTPUT -j ISTIO_OUTPUT",  # 5
        ]
    rules += ["nat -A PREROUTING -j ISTIO_PRERT"]  # 6
    for name in interfaces:  # 7
        rules += [
            f"nat -A ISTIO_PRERT -i {name} -p tcp -j REDIRECT --to-ports 15001",
            f"nat -A ISTIO_PRERT -i {name} -p tcp -j RETURN",
        ]
    rules += ["mangle -A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff"]  # 8
    if not ingress:
        rules += [f"nat -A ISTIO_PRERT -s {probe} -p tcp -m tcp -j ACCEPT"]  # 9
    rules += [f"nat -A ISTIO_OUTPUT -d {probe} -p tcp -m tcp -j ACCEPT"]  # 10
    if not ingress:
        rules += [  # 11
            f"nat -A ISTIO_PRERT ! -d {lo} -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff "
            "-j REDIRECT --to-ports 15006"
        ]
    rules += [  # 12
        "mangle -A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff "
        "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
    ]
    if dns:
        rules += [
            # 13
            "nat -A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 "
            "-j REDIRECT --to-port 15053",
            # 14
            f"nat -A ISTIO_OUTPUT ! -d {lo} -p tcp --dport 53 -m mark ! --mark 0x539/0xfff "
            "-j REDIRECT --to-ports 15053",
            # 15
            "raw -A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1",
            # 16
            "raw -A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1",
        ]
    rules += [
        "nat -A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT",  # 17
        f"nat -A ISTIO_OUTPUT ! -d {lo} -o lo -j ACCEPT",  # 18
        f"nat -A ISTIO_OUTPUT ! -d {lo} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001",  # 19
    ]
    return rules


def host_rules(address_set: str, probe: str) -> list[str]:
    return [
        "nat -I POSTROUTING 1 -j ISTIO_POSTRT",
        "nat -A ISTIO_POSTRT -m owner --socket-exists -p tcp "
        f"-m set --match-set {address_set} dst -j SNAT --to-source {probe}",
    ]


def removal_commands() -> list[str]:
    """Return the commands of one family with which the original takes a pod's rules out, each of which may fail."""
    jumps = (
        "mangle -D PREROUTING -j ISTIO_PRERT",
        "mangle -D OUTPUT -j ISTIO_OUTPUT",
        "nat -D OUTPUT -j ISTIO_OUTPUT",
        "raw -D PREROUTING -j ISTIO_PRERT",
        "raw -D OUTPUT -j ISTIO_OUTPUT",
        "nat -D PREROUTING -j ISTIO_PRERT",
    )
    chains = [
        f"{table} {{}} {chain}" for table in ("mangle", "nat", "raw") for chain in ("ISTIO_PRERT", "ISTIO_OUTPUT")
    ]
    return [*jumps, *(chain.format("-F") for chain in chains), *(chain.format("-X") for chain in chains)]


# --- nftables ---------------------------------------------------------------------------------------------------------

BASE_CHAINS = {
    "nat prerouting": "type nat hook prerouting priority -100",
    "nat output": "type nat hook output priority -100",
    "mangle prerouting": "type filter hook prerouting priority -150",
    "mangle output": "type route hook output priority -150",
    "raw prerouting": "type filter hook prerouting priority -300",
    "raw output": "type filter hook output priority -300",
}


def transaction(rules: Sequence[str]) -> str:
    """Return the transaction of rules that begin with their table and chain."""
    text = ""
    for table in ("nat", "mangle", "raw"):
        lines = [rule for rule in rules if rule.split()[0] == table]
        if not lines:
            continue
        used = {line.split()[1] for line in lines} | {line.split()[-1] for line in lines if line.split()[-2] == "jump"}
        text += f"add table inet istio-ambient-{table}\nflush table inet istio-ambient-{table}\n"
        for chain in ("prerouting", "output", "istio-prerouting", "istio-output"):
            if chain in used:
                base = BASE_CHAINS.get(f"{table} {chain}")
                hook = f" {{ {base} ; }}" if base else ""
                text += f"add chain inet istio-ambient-{table} {chain}{hook}\n"
        text += "".join(f"add rule inet istio-ambient-{line}\n" for line in lines)
    return text


def pod_transaction(ipv6: bool, dns: bool, ingress: bool, interfaces: Sequence[str], p4: str, p6: str) -> str:
    rules = ["nat output jump istio-output", "nat prerouting jump istio-prerouting"]
    for name in interfaces:
        name = f'"{name[:-1]}*"' if name.endswith("+") else name
        rules += [
            f"nat istio-prerouting iifname {name} meta l4proto tcp counter redirect to :15001",
            f"nat istio-prerouting iifname {name} meta l4proto tcp counter return",
        ]
    if not ingress:
        rules += [f"nat istio-prerouting meta l4proto tcp ip saddr {p4} counter accept"]
        if ipv6:
            rules += [f"nat istio-prerouting meta l4proto tcp ip6 saddr {p6} counter accept"]
    rules += [f"nat istio-output meta l4proto tcp ip daddr {p4} counter accept"]
    if ipv6:
        rules += [f"nat istio-output meta l4proto tcp ip6 daddr {p6} counter accept"]
    if not ingress:
        rules += [
            "nat istio-prerouting ip daddr != 127.0.0.1/32 tcp dport != 15008 mark and 0xfff  != 0x539 counter "
            "redirect to :15006"
        ]
        if ipv6:
            rules += [
                "nat istio-prerouting ip6 daddr != ::1/128 tcp dport != 15008 mark and 0xfff != 0x539 counter "
                "redirect to :15006"
            ]
    if dns:
        rules += [
            "nat istio-output oifname != lo mark and 0xfff != 0x539 udp dport 53 counter redirect to :15053",
            "nat istio-output ip daddr != 127.0.0.1/32 tcp dport 53 mark and 0xfff != 0x539 counter redirect to :15053",
        ]
        if ipv6:
            rules += [
                "nat istio-output ip6 daddr != ::1/128 tcp dport 53 mark and 0xfff != 0x539 counter redirect to :15053"
            ]
    rules += [
        "nat istio-output meta l4proto tcp mark and 0xfff == 0x111 counter accept",
        "nat istio-output oifname lo ip daddr != 127.0.0.1/32 counter accept",
    ]
    if ipv6:
        rules += ["nat istio-output oifname lo ip6 daddr != ::1/128 counter accept"]
    rules += [
        "nat istio-output meta l4proto tcp ip daddr != 127.0.0.1/32 mark and 0xfff != 0x539 counter redirect to :15001"
    ]
    if ipv6:
        rules += [
            "nat istio-output meta l4proto tcp ip6 daddr != ::1/128 mark and 0xfff != 0x539 counter redirect to :15001"
        ]
    rules += [
        "mangle prerouting jump istio-prerouting",
        "mangle output jump istio-output",
        "mangle istio-prerouting meta mark & 0xfff == 0x539 counter ct mark set ct mark & 0xfffff000 |  0x111",
        "mangle istio-output ct mark and 0xfff == 0x111 counter meta mark set ct mark",
    ]
    if dns:
        rules += [
            "raw prerouting jump istio-prerouting",
            "raw output jump istio-output",
            "raw istio-output udp dport 53 meta mark and 0xfff == 0x539 counter ct zone set 1",
            "raw istio-prerouting udp sport 53 meta mark and 0xfff != 0x539 counter ct zone set 1",
        ]
    return transaction(rules)


def host_transaction(ipv6: bool, uid: int, p4: str, p6: str) -> str:
    text = "add table inet istio-ambient-nat\nflush table inet istio-ambient-nat\n"
    text += "add chain inet istio-ambient-nat postrouting { type nat hook postrouting priority 100 ; }\n"
    rule = f"add rule inet istio-ambient-nat postrouting meta l4proto tcp skuid {uid}"
    text += f"{rule} ip daddr @istio-inpod-probes-v4 counter snat to {p4}\n"
    if ipv6:
        text += f"{rule} ip6 daddr @istio-inpod-probes-v6 counter snat to {p6}\n"
    return text


# --- netlink ----------------------------------------------------------------------------------------------------------


def pod_routing(ipv6: bool) -> str:
    text = "ip route replace local 0.0.0.0/0 dev lo scope host table 100\n"
    text += "ip rule add fwmark 0x111/0xfff pref 32764 lookup 100\n"
    if ipv6:
        text += '[ "$(cat /proc/sys/net/ipv6/conf/lo/disable_ipv6)" = 1 ] ||'
        text += " ip -6 route replace local ::/0 dev lo scope host table 100\n"
        text += "ip -6 rule add fwmark 0x111/0xfff pref 32764 lookup 100\n"
    return text
