"""What Istio's own `istio-iptables` leaves in the kernel, written down a second time and without any cleverness.

`contract(flags, env, addresses, resolv_conf)` takes the raw strings of the original's command line and gives the texts
that the original feeds to `iptables-restore --noflush`, `ip6tables-restore --noflush` and `nft -f -`, and what its
netlink calls amount to as `ip` commands. Nothing here comes from meshcni: a mistake has to be made twice.

Upstream: tools/common/config, tools/istio-iptables/pkg/{cmd,capture,builder}, cni/pkg/plugin/sidecar_redirect.go,
tools/istio-nftables/pkg/{capture,builder}. Steps are numbered in the order in which the original emits rules.
"""

from __future__ import annotations

import ipaddress
import pwd
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# flag: (short, environment variables from least to most important, default)
FLAGS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "--envoy-port": ("-p", (), "15001"),
    "--inbound-capture-port": ("-z", ("INBOUND_CAPTURE_PORT",), "15006"),
    "--inbound-tunnel-port": ("-e", ("INBOUND_TUNNEL_PORT",), "15008"),
    "--proxy-uid": ("-u", ("PROXY_UID",), ""),
    "--proxy-gid": ("-g", ("PROXY_GID",), ""),
    "--istio-inbound-interception-mode": ("-m", ("ISTIO_INBOUND_INTERCEPTION_MODE",), ""),
    "--istio-inbound-ports": ("-b", ("ISTIO_INBOUND_PORTS",), ""),
    "--istio-local-exclude-ports": ("-d", ("ISTIO_LOCAL_EXCLUDE_PORTS",), ""),
    "--istio-exclude-interfaces": ("-c", ("ISTIO_EXCLUDE_INTERFACES",), ""),
    "--istio-service-cidr": ("-i", ("ISTIO_SERVICE_CIDR",), ""),
    "--istio-service-exclude-cidr": ("-x", ("ISTIO_SERVICE_EXCLUDE_CIDR",), ""),
    "--istio-outbound-ports": ("-q", ("ISTIO_OUTBOUND_PORTS",), ""),
    "--istio-local-outbound-ports-exclude": ("-o", ("ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE",), ""),
    "--kube-virt-interfaces": ("-k", ("KUBE_VIRT_INTERFACES",), ""),
    "--istio-inbound-tproxy-mark": ("-t", ("ISTIO_INBOUND_TPROXY_MARK",), "1337"),
    "--istio-inbound-tproxy-route-table": ("-r", ("ISTIO_INBOUND_TPROXY_ROUTE_TABLE",), "133"),
    "--redirect-dns": ("", ("REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"), "false"),
    "--drop-invalid": ("", ("DROP_INVALID", "INVALID_DROP"), "false"),
    "--dual-stack": ("", ("DUAL_STACK", "ISTIO_DUAL_STACK"), "false"),
    "--capture-all-dns": ("", ("CAPTURE_ALL_DNS",), "false"),
    "--skip-rule-apply": ("", ("SKIP_RULE_APPLY",), "false"),
    "--cleanup-only": ("", ("CLEANUP_ONLY",), "false"),
}
BOOLEANS = {name for name, (_, _, default) in FLAGS.items() if default == "false"}
TRUE = {"1", "t", "T", "TRUE", "true", "True"}
FALSE = {"0", "f", "F", "FALSE", "false", "False"}


@dataclass(frozen=True)
class Contract:
    """The texts of one run; empty where the original programs nothing."""

    iptables: str
    ip6tables: str
    nft: str
    nft_declared: str  # not the original's: with the chains declared that have no rules and are jumped to all the same
    ip: str  # for sh


@dataclass(frozen=True)
class Parameters:
    """The command line, with everything read from the machine filled in."""

    proxy_port: str
    capture_port: str
    tunnel_port: str
    uids: list[str]
    gids: list[str]
    tproxy: bool
    mark: str
    table: str
    inbound: str
    inbound_exclude: list[str]
    exclude_interfaces: list[str]
    virtual_interfaces: list[str]
    cidrs: str
    exclude_cidrs: list[str]
    outbound_ports: list[str]
    outbound_ports_exclude: list[str]
    groups: str
    groups_exclude: list[str]
    loopback: str
    dns: bool
    capture_all: bool
    servers: dict[int, list[str]]
    drop_invalid: bool
    ipv6: bool


def contract(flags: Sequence[str], env: Mapping[str, str], addresses: Sequence[str], resolv_conf: str = "") -> Contract:
    """Return what the original does for a command line in a netns with these addresses, in the kernel's order."""
    raw = read_flags(flags, env)
    if raw["--skip-rule-apply"] in TRUE:
        return Contract("", "", "", "", "")
    p = parameters(raw, env, addresses, resolv_conf)
    if raw["--cleanup-only"] in TRUE:
        return Contract("", "", "", "", ip_commands(p))
    nft = nft_transaction(p)
    return Contract(
        iptables=iptables_text(p, 4),
        ip6tables=iptables_text(p, 6) if p.ipv6 else "",
        nft=nft.text(),
        nft_declared=nft.text(nft.targets()),
        ip=ip_commands(p),
    )


# --- the command line -------------------------------------------------------------------------------------------------


def read_flags(flags: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """Return the raw string of every flag: an explicit flag before the environment before the default."""
    raw = {}
    for name, (_, variables, default) in FLAGS.items():
        raw[name] = default
        for variable in variables:
            if variable in env and (name not in BOOLEANS or env[variable] in TRUE | FALSE):
                raw[name] = env[variable]
    rest = list(flags)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            name = next(long for long, (short, _, _) in FLAGS.items() if short == word[:2])
            value = word[2:].removeprefix("=")
            equals = word[2:]
        if not equals:
            value = "true" if name in BOOLEANS else rest.pop(0)
        raw[name] = value
    return raw


def split(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def family_of(prefix: str) -> int:
    return ipaddress.ip_address(prefix.partition("/")[0]).version


def parameters(
    raw: Mapping[str, str], env: Mapping[str, str], addresses: Sequence[str], resolv_conf: str
) -> Parameters:
    uid = raw["--proxy-uid"]
    if uid == "":
        try:
            uid = str(pwd.getpwnam(env.get("ENVOY_USER", "istio-proxy")).pw_uid)
        except KeyError:
            uid = "1337"
    gid = raw["--proxy-gid"] or uid

    candidates = [ipaddress.ip_address(address) for address in addresses]
    candidates = [a for a in candidates if not a.is_loopback and not a.is_link_local]
    if not candidates:
        raise ValueError("no valid local IP address found")
    if raw["--dual-stack"] in TRUE:
        ipv6 = any(address.version == 6 for address in candidates)
    else:
        ipv6 = candidates[0].version == 6

    dns = raw["--redirect-dns"] in TRUE
    capture_all = raw["--capture-all-dns"] in TRUE
    servers: dict[int, list[str]] = {4: [], 6: []}
    if dns and not capture_all:
        for line in resolv_conf.splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                try:
                    servers[family_of(words[1])].append(words[1])
                except ValueError:
                    continue
        if not servers[4] and not servers[6]:
            dns = False

    return Parameters(
        proxy_port=raw["--envoy-port"],
        capture_port=raw["--inbound-capture-port"],
        tunnel_port=raw["--inbound-tunnel-port"],
        uids=split(uid),
        gids=split(gid),
        tproxy=raw["--istio-inbound-interception-mode"] == "TPROXY",
        mark=raw["--istio-inbound-tproxy-mark"],
        table=raw["--istio-inbound-tproxy-route-table"],
        inbound=raw["--istio-inbound-ports"],
        inbound_exclude=split(raw["--istio-local-exclude-ports"]),
        exclude_interfaces=split(raw["--istio-exclude-interfaces"]),
        virtual_interfaces=split(raw["--kube-virt-interfaces"]),
        cidrs=raw["--istio-service-cidr"],
        exclude_cidrs=split(raw["--istio-service-exclude-cidr"]),
        outbound_ports=split(raw["--istio-outbound-ports"]),
        outbound_ports_exclude=split(raw["--istio-local-outbound-ports-exclude"]),
        groups=env.get("ISTIO_OUTBOUND_OWNER_GROUPS", "*"),
        groups_exclude=split(env.get("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "")),
        loopback=env.get("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1/32"),
        dns=dns,
        capture_all=capture_all,
        servers=servers,
        drop_invalid=raw["--drop-invalid"] in TRUE,
        ipv6=ipv6,
    )


def include_list(p: Parameters) -> list[str]:
    return [] if p.cidrs == "*" else split(p.cidrs)


def has_loopback(p: Parameters) -> bool:
    return any(ipaddress.ip_address(prefix.partition("/")[0]).is_loopback for prefix in include_list(p))


# --- iptables ---------------------------------------------------------------------------------------------------------


def iptables_text(p: Parameters, family: int) -> str:
    """Return the restore text of one family: tables in alphabetical order, `-N` lines, then rules as emitted."""
    lines: list[tuple[str, str]] = iptables_rules(p, family)
    text = ""
    for table in ("filter", "mangle", "nat", "raw"):
        rules = [rule for of, rule in lines if of == table]
        if not rules:
            continue
        built_in = ["INPUT", "OUTPUT", "FORWARD", "PREROUTING", "POSTROUTING", "ACCEPT", "RETURN", "DROP"]
        built_in += ["REDIRECT", "TPROXY", "MARK", "CONNMARK", "CT"]  # a jump to these is never the last `-j CHAIN`
        chains: list[str] = []
        for rule in rules:
            if rule.split()[1] not in chains:
                chains.append(rule.split()[1])
        for rule in rules:
            target = rule.partition(" -j ")[2].split()[0]
            if target not in chains:
                chains.append(target)
        text += f"* {table}\n"
        text += "".join(f"-N {chain}\n" for chain in chains if chain not in built_in)
        text += "".join(f"{rule}\n" for rule in rules)
        text += "COMMIT\n"
    return text


def iptables_rules(p: Parameters, family: int) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []

    def nat(rule: str) -> None:
        out.append(("nat", rule))

    def mangle(rule: str) -> None:
        out.append(("mangle", rule))

    lb = p.loopback if family == 4 else "::1/128"
    self = "127.0.0.6/32" if family == 4 else "::6/128"
    tp = p.tunnel_port

    # 1, 1b
    for name in p.exclude_interfaces:
        nat(f"-A PREROUTING -i {name} -j RETURN")
        nat(f"-A OUTPUT -o {name} -j RETURN")
    if p.tproxy:
        for name in p.exclude_interfaces:
            mangle(f"-A PREROUTING -i {name} -j RETURN")
            mangle(f"-A OUTPUT -o {name} -j RETURN")
    # 2
    for name in p.virtual_interfaces:
        nat(f"-I PREROUTING 1 -i {name} -j RETURN")
    # 3
    if p.drop_invalid:
        mangle("-A PREROUTING -m conntrack --ctstate INVALID -j ISTIO_DROP")
        mangle("-A ISTIO_DROP -j DROP")
    # 4, 5, 6
    nat(f"-A ISTIO_INBOUND -p tcp --dport {tp} -j RETURN")
    nat(f"-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {p.proxy_port}")
    nat(f"-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {p.capture_port}")
    # 7
    if p.inbound != "":
        established = "-m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT"
        if p.tproxy:
            mangle(f"-A ISTIO_DIVERT -j MARK --set-mark {p.mark}")
            mangle("-A ISTIO_DIVERT -j ACCEPT")
            mangle(
                f"-A ISTIO_TPROXY ! -d {lb} -p tcp -j TPROXY "
                f"--tproxy-mark {p.mark}/0xffffffff --on-port {p.capture_port}"
            )
        here = mangle if p.tproxy else nat
        here("-A PREROUTING -p tcp -j ISTIO_INBOUND")
        if p.inbound == "*":
            for port in p.inbound_exclude:
                here(f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN")
            if p.tproxy:
                mangle(f"-A ISTIO_INBOUND -p tcp {established}")
                mangle("-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY")
            else:
                nat("-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT")
        else:
            for port in split(p.inbound):
                if p.tproxy:
                    mangle(f"-A ISTIO_INBOUND -p tcp --dport {port} {established}")
                    mangle(f"-A ISTIO_INBOUND -p tcp --dport {port} -j ISTIO_TPROXY")
                else:
                    nat(f"-A ISTIO_INBOUND -p tcp --dport {port} -j ISTIO_IN_REDIRECT")
    # 8
    nat("-A OUTPUT -j ISTIO_OUTPUT")
    # 9
    for port in p.outbound_ports_exclude:
        nat(f"-A ISTIO_OUTPUT -p tcp --dport {port} -j RETURN")
        nat(f"-A ISTIO_OUTPUT -p udp --dport {port} -j RETURN")
    # 10
    nat(f"-A ISTIO_OUTPUT -o lo -s {self} -j RETURN")
    # 11
    for uid in p.uids:
        who = f"-m owner --uid-owner {uid}"
        if p.dns:
            nat(f"-A ISTIO_OUTPUT -o lo ! -d {lb} -p tcp -m multiport ! --dports 53,{tp} {who} -j ISTIO_IN_REDIRECT")
        else:
            nat(f"-A ISTIO_OUTPUT -o lo ! -d {lb} -p tcp ! --dport {tp} {who} -j ISTIO_IN_REDIRECT")
        if not has_loopback(p):
            not_dns = "-p tcp ! --dport 53 " if p.dns else ""
            nat(f"-A ISTIO_OUTPUT -o lo {not_dns}-m owner ! --uid-owner {uid} -j RETURN")
        nat(f"-A ISTIO_OUTPUT {who} -j RETURN")
    # 12
    for gid in p.gids:
        who = f"-m owner --gid-owner {gid}"
        nat(f"-A ISTIO_OUTPUT -o lo ! -d {lb} -p tcp ! --dport {tp} {who} -j ISTIO_IN_REDIRECT")
        if not has_loopback(p):
            not_dns = "-p tcp ! --dport 53 " if p.dns else ""
            nat(f"-A ISTIO_OUTPUT -o lo {not_dns}-m owner ! --gid-owner {gid} -j RETURN")
        nat(f"-A ISTIO_OUTPUT {who} -j RETURN")
    # 13
    if p.groups == "*":
        for group in p.groups_exclude:
            nat(f"-A ISTIO_OUTPUT -m owner --gid-owner {group} -j RETURN")
    else:
        others = "".join(f" -m owner ! --gid-owner {group}" for group in split(p.groups))
        nat(f"-A ISTIO_OUTPUT{others} -j RETURN")
    # 14
    if p.dns:
        out.extend(iptables_dns(p, family))
    # 15
    nat(f"-A ISTIO_OUTPUT -d {lb} -j RETURN")
    # 16
    for prefix in p.exclude_cidrs:
        if family_of(prefix) == family:
            nat(f"-A ISTIO_OUTPUT -d {prefix} -j RETURN")
    # 17
    for port in p.outbound_ports:
        nat(f"-A ISTIO_OUTPUT -p tcp --dport {port} -j ISTIO_REDIRECT")
    # 18
    if p.cidrs == "*":
        nat("-A ISTIO_OUTPUT -j ISTIO_REDIRECT")
        for name in p.virtual_interfaces:
            nat(f"-I PREROUTING 1 -i {name} -j ISTIO_REDIRECT")
    for prefix in include_list(p):
        if family_of(prefix) == family:
            for name in p.virtual_interfaces:
                nat(f"-I PREROUTING 1 -i {name} -d {prefix} -j ISTIO_REDIRECT")
            nat(f"-A ISTIO_OUTPUT -d {prefix} -j ISTIO_REDIRECT")
    # 19
    if p.tproxy:
        mangle(f"-A PREROUTING -p tcp -m mark --mark {p.mark} -j CONNMARK --save-mark")
        mangle(f"-A OUTPUT -p tcp -o lo -m mark --mark {p.mark} -j RETURN")
        for uid in p.uids:
            mangle(f"-A OUTPUT ! -d {lb} -p tcp -o lo -m owner --uid-owner {uid} -j MARK --set-mark 1338")
        for gid in p.gids:
            mangle(f"-A OUTPUT ! -d {lb} -p tcp -o lo -m owner --gid-owner {gid} -j MARK --set-mark 1338")
        mangle(f"-A OUTPUT -p tcp -m connmark --mark {p.mark} -j CONNMARK --restore-mark")
        mangle(f"-I ISTIO_INBOUND 1 -p tcp -m mark --mark {p.mark} -j RETURN")
        mangle(f"-I ISTIO_INBOUND 2 -p tcp -s {self} -i lo -j RETURN")
        mangle("-I ISTIO_INBOUND 3 -p tcp -i lo -m mark ! --mark 1338 -j RETURN")
    return out


def iptables_dns(p: Parameters, family: int) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []

    def nat(rule: str) -> None:
        out.append(("nat", rule))

    def raw(rule: str) -> None:
        out.append(("raw", rule))

    raw("-A OUTPUT -j ISTIO_OUTPUT_DNS")
    servers = [f"{server}/{32 if family == 4 else 128}" for server in p.servers[family]]
    captured = p.capture_all or bool(servers)
    if captured:
        nat("-A ISTIO_OUTPUT -j ISTIO_OUTPUT_DNS")
    if p.capture_all:
        nat("-A ISTIO_OUTPUT_DNS -p tcp --dport 53 -j REDIRECT --to-ports 15053")
        nat("-A ISTIO_OUTPUT_DNS -p udp --dport 53 -j REDIRECT --to-port 15053")
    for server in servers:
        nat(f"-A ISTIO_OUTPUT_DNS -p tcp --dport 53 -d {server} -j REDIRECT --to-ports 15053")
    for server in servers:
        nat(f"-A ISTIO_OUTPUT_DNS -p udp --dport 53 -d {server} -j REDIRECT --to-port 15053")
    for option, names in (("--uid-owner", p.uids), ("--gid-owner", p.gids)):
        for name in names:
            raw(f"-A ISTIO_OUTPUT_DNS -p udp --dport 53 -m owner {option} {name} -j CT --zone 1")
            raw(f"-A ISTIO_OUTPUT_DNS -p udp --sport 15053 -m owner {option} {name} -j CT --zone 2")
    if captured:
        raw("-A PREROUTING -j ISTIO_INBOUND")
    if p.capture_all:
        raw("-A ISTIO_OUTPUT_DNS -p udp --dport 53 -j CT --zone 2")
        raw("-A ISTIO_INBOUND -p udp --sport 53 -j CT --zone 1")
    for server in servers:
        raw(f"-A ISTIO_OUTPUT_DNS -p udp --dport 53 -d {server} -j CT --zone 2")
        raw(f"-A ISTIO_INBOUND -p udp --sport 53 -s {server} -j CT --zone 1")
    return out


# --- nftables ---------------------------------------------------------------------------------------------------------

NFT_CHAINS = {
    "nat": {
        "prerouting": "{ type nat hook prerouting priority -100 ; }",
        "output": "{ type nat hook output priority -100 ; }",
        "istio-inbound": "",
        "istio-redirect": "",
        "istio-in-redirect": "",
        "istio-output": "",
        "istio-output-dns": "",
    },
    "mangle": {
        "prerouting": "{ type filter hook prerouting priority -150 ; }",
        "output": "{ type route hook output priority -150 ; }",
        "istio-divert": "",
        "istio-tproxy": "",
        "istio-inbound": "",
        "istio-drop": "",
    },
    "raw": {
        "prerouting": "{ type filter hook prerouting priority -300 ; }",
        "output": "{ type filter hook output priority -300 ; }",
        "istio-inbound": "",
        "istio-output-dns": "",
    },
}


class Transaction:
    """Statements for `nft -f -`. It counts the rules of a chain, since an insert into too short a chain appends."""

    def __init__(self) -> None:
        self.rules: dict[str, list[str]] = {"nat": [], "mangle": [], "raw": []}
        self.sizes: dict[tuple[str, str], int] = {}

    def add(self, table: str, chain: str, expression: str) -> None:
        self.sizes[table, chain] = self.sizes.get((table, chain), 0) + 1
        self.rules[table].append(f"add rule inet istio-proxy-{table} {chain} {expression}")

    def insert(self, table: str, chain: str, index: int, expression: str) -> None:
        if index >= self.sizes.get((table, chain), 0):
            self.add(table, chain, expression)
            return
        self.sizes[table, chain] += 1
        self.rules[table].append(f"insert rule inet istio-proxy-{table} {chain} index {index} {expression}")

    def targets(self) -> set[tuple[str, str]]:
        jumps = [(table, rule) for table, rules in self.rules.items() for rule in rules if " jump " in rule]
        return {(table, rule.rpartition(" ")[2]) for table, rule in jumps}

    def text(self, declared: Collection[tuple[str, str]] = ()) -> str:
        lines: list[str] = []
        for table, rules in self.rules.items():
            if not rules:
                continue
            lines += [f"add table inet istio-proxy-{table}", f"flush table inet istio-proxy-{table}"]
            for chain, base in NFT_CHAINS[table].items():
                if (table, chain) in self.sizes or (table, chain) in declared:
                    lines.append(f"add chain inet istio-proxy-{table} {chain} {base}".rstrip())
            lines += rules
        return "\n".join(lines) + "\n"


def nft_transaction(p: Parameters) -> Transaction:
    out = Transaction()
    lbs = [f"ip daddr != {p.loopback}"] + (["ip6 daddr != ::1/128"] if p.ipv6 else [])

    def nat(chain: str, expression: str) -> None:
        out.add("nat", chain, expression)

    def mangle(chain: str, expression: str) -> None:
        out.add("mangle", chain, expression)

    # 1, 1b
    for name in p.exclude_interfaces:
        nat("prerouting", f"iifname {name} counter return")
        nat("output", f"oifname {name} counter return")
    if p.tproxy:
        for name in p.exclude_interfaces:
            mangle("prerouting", f"iifname {name} counter return")
            mangle("output", f"oifname {name} counter return")
    # 2
    for name in p.virtual_interfaces:
        out.insert("nat", "prerouting", 0, f"iifname {name} counter return")
    # 3
    if p.drop_invalid:
        mangle("prerouting", "meta l4proto tcp ct state invalid counter jump istio-drop")
        mangle("istio-drop", "counter drop")
    # 4, 5, 6
    nat("istio-inbound", f"meta l4proto tcp tcp dport {p.tunnel_port} counter return")
    nat("istio-redirect", f"meta l4proto tcp counter redirect to :{p.proxy_port}")
    nat("istio-in-redirect", f"meta l4proto tcp counter redirect to :{p.capture_port}")
    # 7
    if p.inbound != "":
        if p.tproxy:
            mangle("istio-divert", f"counter meta mark set {p.mark}")
            mangle("istio-divert", "counter accept")
            for lb in lbs:
                mangle(
                    "istio-tproxy",
                    f"meta l4proto tcp {lb} tproxy {lb.split()[0]} to :{p.capture_port} "
                    f"meta mark set {p.mark} counter accept",
                )
        here = mangle if p.tproxy else nat
        here("prerouting", "meta l4proto tcp counter jump istio-inbound")
        if p.inbound == "*":
            for port in p.inbound_exclude:
                here("istio-inbound", f"meta l4proto tcp tcp dport {port} counter return")
            if p.tproxy:
                mangle("istio-inbound", "meta l4proto tcp ct state related,established counter jump istio-divert")
                mangle("istio-inbound", "meta l4proto tcp counter jump istio-tproxy")
            else:
                nat("istio-inbound", "meta l4proto tcp counter jump istio-in-redirect")
        else:
            for port in split(p.inbound):
                if p.tproxy:
                    mangle(
                        "istio-inbound",
                        f"meta l4proto tcp ct state related,established tcp dport {port} counter jump istio-divert",
                    )
                    mangle("istio-inbound", f"meta l4proto tcp tcp dport {port} counter jump istio-tproxy")
                else:
                    nat("istio-inbound", f"meta l4proto tcp tcp dport {port} counter jump istio-in-redirect")
    # 8
    nat("output", "counter jump istio-output")
    # 9
    for port in p.outbound_ports_exclude:
        nat("istio-output", f"tcp dport {port} counter return")
        nat("istio-output", f"udp dport {port} counter return")
    # 10
    nat("istio-output", "oifname lo ip saddr 127.0.0.6/32 counter return")
    if p.ipv6:
        nat("istio-output", "oifname lo ip6 saddr ::6/128 counter return")
    # 11
    for uid in p.uids:
        ports = f"{{ 53, {p.tunnel_port} }}" if p.dns else p.tunnel_port
        nft_owner(p, out, lbs, ports, "skuid", uid)
    # 12
    for gid in p.gids:
        nft_owner(p, out, lbs, p.tunnel_port, "skgid", gid)
    # 13
    if p.groups == "*":
        for group in p.groups_exclude:
            nat("istio-output", f"skgid {group} counter return")
    else:
        nat("istio-output", "".join(f"skgid != {group} " for group in split(p.groups)) + "counter return")
    # 14
    if p.dns:
        nft_dns(p, out)
    # 15
    nat("istio-output", f"ip daddr {p.loopback} counter return")
    if p.ipv6:
        nat("istio-output", "ip6 daddr ::1/128 counter return")
    # 16
    for prefix in by_family(p, p.exclude_cidrs):
        nat("istio-output", f"{nft_ip(prefix)} daddr {prefix} counter return")
    # 17
    for port in p.outbound_ports:
        nat("istio-output", f"tcp dport {port} counter jump istio-redirect")
    # 18
    if p.cidrs == "*":
        nat("istio-output", "counter jump istio-redirect")
        for name in p.virtual_interfaces:
            out.insert("nat", "prerouting", 0, f"iifname {name} counter jump istio-redirect")
    for prefix in by_family(p, include_list(p)):
        for name in p.virtual_interfaces:
            expression = f"iifname {name} {nft_ip(prefix)} daddr {prefix} counter jump istio-redirect"
            out.insert("nat", "prerouting", 0, expression)
        nat("istio-output", f"{nft_ip(prefix)} daddr {prefix} counter jump istio-redirect")
    # 19
    if p.tproxy:
        mangle("prerouting", f"meta l4proto tcp mark {p.mark} counter ct mark set mark")
        mangle("output", f"oifname lo meta l4proto tcp mark {p.mark} counter return")
        for key, names in (("skuid", p.uids), ("skgid", p.gids)):
            for name in names:
                for lb in lbs:
                    mangle("output", f"oifname lo meta l4proto tcp {lb} {key} {name} counter meta mark set 1338")
        mangle("output", f"meta l4proto tcp ct mark {p.mark} counter meta mark set ct mark")
        inbound = "mangle", "istio-inbound"
        out.insert(*inbound, 0, f"meta l4proto tcp mark {p.mark} counter return")
        out.insert(*inbound, 1, "iifname lo meta l4proto tcp ip saddr 127.0.0.6/32 counter return")
        if p.ipv6:
            out.insert(*inbound, 1, "iifname lo meta l4proto tcp ip6 saddr ::6/128 counter return")
        out.insert(*inbound, 2, "iifname lo meta l4proto tcp mark != 1338 counter return")
    return out


def nft_ip(prefix: str) -> str:
    return "ip" if family_of(prefix) == 4 else "ip6"


def by_family(p: Parameters, prefixes: Iterable[str]) -> list[str]:
    """Return the prefixes of IPv4, then those of IPv6 if it is on."""
    prefixes = list(prefixes)
    return [x for x in prefixes if family_of(x) == 4] + [x for x in prefixes if family_of(x) == 6 and p.ipv6]


def nft_owner(p: Parameters, out: Transaction, lbs: list[str], ports: str, key: str, name: str) -> None:
    for lb in lbs:
        expression = (
            f"oifname lo meta l4proto tcp {lb} tcp dport != {ports} {key} {name} counter jump istio-in-redirect"
        )
        out.add("nat", "istio-output", expression)
    if not has_loopback(p):
        not_dns = "meta l4proto tcp tcp dport != 53 " if p.dns else ""
        out.add("nat", "istio-output", f"oifname lo {not_dns}{key} != {name} counter return")
    out.add("nat", "istio-output", f"{key} {name} counter return")


def nft_dns(p: Parameters, out: Transaction) -> None:
    out.add("raw", "output", "counter jump istio-output-dns")
    servers = [f"ip daddr {server}/32" for server in p.servers[4]]
    if p.ipv6:
        servers += [f"ip6 daddr {server}/128" for server in p.servers[6]]
    captured = p.capture_all or bool(p.servers[4]) or bool(p.servers[6])
    if captured:
        out.add("nat", "istio-output", "counter jump istio-output-dns")
    if p.capture_all:
        out.add("nat", "istio-output-dns", "meta l4proto tcp tcp dport 53 counter redirect to :15053")
        out.add("nat", "istio-output-dns", "udp dport 53 counter redirect to :15053")
    for server in servers:
        out.add("nat", "istio-output-dns", f"{server} tcp dport 53 counter redirect to :15053")
    for server in servers:
        out.add("nat", "istio-output-dns", f"{server} udp dport 53 counter redirect to :15053")
    for key, names in (("skuid", p.uids), ("skgid", p.gids)):
        for name in names:
            out.add("raw", "istio-output-dns", f"udp dport 53 meta {key} {name} counter ct zone set 1")
            out.add("raw", "istio-output-dns", f"udp sport 15053 meta {key} {name} counter ct zone set 2")
    if captured:
        out.add("raw", "prerouting", "counter jump istio-inbound")
    if p.capture_all:
        out.add("raw", "istio-output-dns", "udp dport 53 counter ct zone set 2")
        out.add("raw", "istio-inbound", "udp sport 53 counter ct zone set 1")
    for server in servers:
        out.add("raw", "istio-output-dns", f"udp dport 53 {server} counter ct zone set 2")
        out.add("raw", "istio-inbound", f"udp sport 53 {server.replace('daddr', 'saddr')} counter ct zone set 1")


# --- addresses, policy rules, routes ----------------------------------------------------------------------------------


def ip_commands(p: Parameters) -> str:
    lines = []
    if p.ipv6:
        lines.append("ip -6 addr add ::6/128 dev lo")
    if p.tproxy and p.inbound != "":
        lines.append(f"ip -4 rule add fwmark {p.mark} lookup {p.table}")
        lines.append(f"ip -4 route add local 0.0.0.0/0 dev lo table {p.table}")
        if p.ipv6:
            lines.append(f"ip -6 rule add fwmark {p.mark} lookup {p.table}")
            lines.append(f"ip -6 route add local ::/0 dev lo table {p.table}")
    return "".join(f"{line}\n" for line in lines)


# --- a pod's command line ---------------------------------------------------------------------------------------------


def pod_flags(pod: Mapping[str, Any]) -> list[str]:
    """Return the command line that stands for what the plugin reads from a pod's manifest."""
    annotations = pod["metadata"].get("annotations", {})
    containers = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    security: dict[str, int] = {}
    variables: dict[str, str] = {}
    for container in containers:
        if container["name"] == "istio-proxy":
            security = container.get("securityContext", {})
            variables = {item["name"]: item.get("value", "") for item in container.get("env", [])}

    excluded = annotations.get("traffic.sidecar.istio.io/excludeInboundPorts", "15020").strip()
    if excluded and not excluded.endswith(","):
        excluded += ","
    excluded = ",".join(dict.fromkeys((excluded + "15020,15021,15090").split(",")))
    virtual = annotations.get("traffic.sidecar.istio.io/kubevirtInterfaces", "")
    dns = "true" if variables.get("ISTIO_META_DNS_CAPTURE", "") in TRUE else "false"
    return [
        f"--proxy-uid={security.get('runAsUser', 0) or 1337}",
        f"--proxy-gid={security.get('runAsGroup', 0) or 1337}",
        f"--istio-inbound-interception-mode={annotations.get('sidecar.istio.io/interceptionMode', 'REDIRECT')}",
        f"--istio-service-cidr={annotations.get('traffic.sidecar.istio.io/includeOutboundIPRanges', '*')}",
        f"--istio-service-exclude-cidr={annotations.get('traffic.sidecar.istio.io/excludeOutboundIPRanges', '')}",
        f"--istio-inbound-ports={annotations.get('traffic.sidecar.istio.io/includeInboundPorts', '*')}",
        f"--istio-local-exclude-ports={excluded}",
        f"--istio-outbound-ports={annotations.get('traffic.sidecar.istio.io/includeOutboundPorts', '')}",
        "--istio-local-outbound-ports-exclude="
        + annotations.get("traffic.sidecar.istio.io/excludeOutboundPorts", "15020"),
        f"--istio-exclude-interfaces={annotations.get('traffic.sidecar.istio.io/excludeInterfaces', '')}",
        f"--kube-virt-interfaces={annotations.get('istio.io/reroute-virtual-interfaces', virtual)}",
        f"--redirect-dns={dns}",
        f"--capture-all-dns={dns}",
        f"--dual-stack={'true' if variables.get('ISTIO_DUAL_STACK', '') in TRUE else 'false'}",
        f"--drop-invalid={'true' if variables.get('INVALID_DROP', '') in TRUE else 'false'}",
    ]
