"""What of the kernel's netfilter our rules need and this node does not have, by the names of its modules.

Tried with single rules in a network namespace made for it, which nobody else sees and which is gone afterwards. Only
what the chosen backend would use for pods anyway is tried, and no module is loaded by us: the kernel does that for the
rules of the first pod as well, where it can.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshcni.errors import ApplyError, MeshCniError, NetnsError
from meshcni.host.backends.iptables import ENVIRONMENT, Tools, find_tools
from meshcni.host.backends.libnftables import Nft, NftUnavailableError
from meshcni.host.netns import call_in_new_netns
from meshcni.rules.model import Backend, Family

IPV6_SETTINGS = "/proc/sys/net/ipv6"  # absent when the kernel has no IPv6, or was started with ipv6.disable=1
TRY_SECONDS = 10.0
_TABLE = "meshcni-preflight"

EVERY_POD = "no pod of the mesh can start on this node"
TPROXY_PODS = "pods with interception mode TPROXY cannot start on this node"
DNS_PODS = "pods with DNS capture cannot start on this node"


@dataclass(frozen=True, slots=True)
class Feature:
    """A kernel module, or what a kernel is built with; a rule that needs it in both dialects, and who needs the rule.

    `iptables` is table and rule, `nft` the chain's type line and the statement; empty where the dialect needs none.
    """

    module: str
    iptables: tuple[str, str]
    nft_module: str
    nft: tuple[str, str]
    without: str


_NAT, _MANGLE = "type nat hook output priority -100;", "type filter hook prerouting priority -150;"
_RAW = "type filter hook output priority -300;"
FEATURES = (
    Feature("xt_owner", ("nat", "OUTPUT -m owner --uid-owner 1337 -j RETURN"), "nf_tables",
            (_NAT, "meta skuid 1337 return"), EVERY_POD),
    Feature("xt_REDIRECT", ("nat", "OUTPUT -p tcp -j REDIRECT --to-ports 15001"), "nft_redir",
            (_NAT, "meta l4proto tcp redirect to :15001"), EVERY_POD),
    Feature("xt_mark", ("mangle", "PREROUTING -m mark --mark 0x539 -j RETURN"), "nf_tables",
            (_MANGLE, "meta mark 0x539 return"), EVERY_POD),
    Feature("xt_conntrack", ("mangle", "PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN"), "nft_ct",
            (_MANGLE, "ct state established,related return"), TPROXY_PODS),
    Feature("xt_connmark", ("mangle", "PREROUTING -j CONNMARK --restore-mark"), "nft_ct",
            (_MANGLE, "meta mark set ct mark"), f"{TPROXY_PODS}, nor ambient pods"),
    Feature("xt_TPROXY", ("mangle", "PREROUTING -p tcp -j TPROXY --on-port 15006 --tproxy-mark 0x539"), "nft_tproxy",
            (_MANGLE, "meta l4proto tcp tproxy to :15006"), TPROXY_PODS),
    Feature("xt_CT", ("raw", "OUTPUT -p udp --dport 53 -j CT --zone 1"), "nft_ct",
            (_RAW, "udp dport 53 ct zone set 1"), DNS_PODS),
)  # fmt: skip
_TABLE_MODULES = {Family.V4: "ip_tables, iptable_", Family.V6: "ip6_tables, ip6table_"}

Attempt = Callable[[Family, tuple[Feature, ...]], str]  # why rules of these features cannot be loaded; empty: they can


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that the kernel does not have: which modules, in which family, what cannot be done, and its reason."""

    modules: str
    family: Family
    without: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the kernel lacks {self.modules} for {self.family.name.replace('V', 'IPv')}: {self.without} "
            f"({self.reason}); {self.remedy}"
        )

    @property
    def remedy(self) -> str:
        """What a person can do about it; the agent loads no modules."""
        other = "" if self.modules.startswith("nf") else ", or set NATIVE_NFTABLES=true"
        text = f"load them on the node (modprobe, /etc/modules-load.d){other}"
        if self.family is Family.V4:
            return text
        return (
            f"{text}; where pods have no IPv6 addresses nothing is lost, and AMBIENT_IPV6=false says so in ambient mode"
        )


def has_ipv6(settings: str = IPV6_SETTINGS) -> bool:
    """Whether the kernel speaks IPv6 at all: where it does not, nothing has to be done about it."""
    return os.path.isdir(settings)


def lacks(
    backend: Backend,
    variant: str,
    *,
    ipv6: bool,
    features: tuple[Feature, ...] = FEATURES,
    attempt: Attempt | None = None,
) -> tuple[Lack, ...]:
    """Try what `backend` (with iptables in `variant`) needs; blocks for some ten milliseconds.

    `attempt` stands in for the kernel. Empty where nothing can be tried, which the privileges' check tells of.
    """
    families = (Family.V4, Family.V6) if ipv6 else (Family.V4,)
    if attempt is not None:
        return tuple(_found(backend, families, features, attempt))
    tools = find_tools(variant) if backend is Backend.IPTABLES else None
    if backend is Backend.IPTABLES and tools is None:
        return ()  # an incomplete image, of which the choice of the variant has told
    trial: Attempt = _try_nft if tools is None else lambda family, features: _try_iptables(tools, family, features)
    try:
        return call_in_new_netns(lambda: tuple(_found(backend, families, features, trial)))
    except NetnsError:
        return ()


def _found(
    backend: Backend, families: tuple[Family, ...], features: tuple[Feature, ...], attempt: Attempt
) -> Iterator[Lack]:
    """All at once first, which is one command; one by one only to find out which of them it is."""
    for family in families:
        if not attempt(family, features):
            continue
        failures = [(feature, reason) for feature in features if (reason := attempt(family, (feature,)))]
        reasons = {reason for _feature, reason in failures}
        if len(failures) == len(features) > 1 and (backend is Backend.NFTABLES or len(reasons) == 1):
            base = "nf_tables" if backend is Backend.NFTABLES else _TABLE_MODULES[family] + "{nat,mangle,raw}"
            yield Lack(base, family, EVERY_POD if family is Family.V4 else _v6(EVERY_POD), failures[0][1])
            continue
        for feature, reason in failures:
            name = feature.module if backend is Backend.IPTABLES else feature.nft_module
            yield Lack(name, family, feature.without if family is Family.V4 else _v6(feature.without), reason)


def _v6(without: str) -> str:
    return f"with an IPv6 address, {without}"


def _try_iptables(tools: Tools, family: Family, features: tuple[Feature, ...]) -> str:
    command = tools.restore[family]
    if not command:
        return f"no {'ip6tables' if family is Family.V6 else 'iptables'}-{tools.variant}-restore in the image"
    tables = dict.fromkeys(feature.iptables[0] for feature in features)
    lines = []
    for table in tables:
        rules = [f"-A {feature.iptables[1]}" for feature in features if feature.iptables[0] == table]
        lines += [f"*{table}", *rules, "COMMIT"]
    try:
        done = subprocess.run(
            [command, "--noflush", "--wait=5"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
            cwd="/",
            timeout=TRY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else _first_line(done.stderr) or f"status {done.returncode}"


def _try_nft(family: Family, features: tuple[Feature, ...]) -> str:
    name = "ip" if family is Family.V4 else "ip6"
    lines = [f"table {name} {_TABLE} {{"]
    for number, (kind, statement) in enumerate(feature.nft for feature in features):
        lines.append(f"chain c{number} {{ {kind} {statement}; }}")
    try:
        Nft().change("\n".join([*lines, "}"]))
        Nft().change(f"delete table {name} {_TABLE}")
    except NftUnavailableError as error:
        return error.message
    except ApplyError as error:
        return _first_line(error.message.removeprefix("nft refused the rules: "))
    except MeshCniError as error:
        return error.message
    return ""


def _first_line(text: str) -> str:
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")
