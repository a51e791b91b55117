"""What of the kernel's netfilter our rules need and this node does not have, by the names of its modules.

Tried with single rules in a network namespace made for it, which nobody else sees and which is gone afterwards. Only
what the chosen backend would use for pods anyway is tried, and no module is loaded by us: the kernel does that for the
rules of the first pod as well, where it can.
"""

from __future__ import annotations

import os
import re
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

    `iptables` is table and rule, `nft` the chain's type line and the statement, in which `{ip}` stands for the family's
    word. `ambient`: whether ambient mode needs it too, in the pod or on the host.
    """

    module: str
    iptables: tuple[str, str]
    nft_module: str
    nft: tuple[str, str]
    without: str
    ambient: bool = True


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
            (_MANGLE, "ct state established,related return"), TPROXY_PODS, ambient=False),
    Feature("xt_connmark", ("mangle", "PREROUTING -j CONNMARK --restore-mark"), "nft_ct",
            (_MANGLE, "meta mark set ct mark"), f"{TPROXY_PODS}, nor ambient pods"),
    Feature("xt_TPROXY", ("mangle", "PREROUTING -p tcp -j TPROXY --on-port 15006 --tproxy-mark 0x539"), "nft_tproxy",
            (_MANGLE, "meta l4proto tcp tproxy {ip} to :15006"), TPROXY_PODS, ambient=False),
    Feature("xt_CT", ("raw", "OUTPUT -p udp --dport 53 -j CT --zone 1"), "nft_ct",
            (_RAW, "udp dport 53 ct zone set 1"), DNS_PODS),
)  # fmt: skip
_LEGACY_TABLES = {Family.V4: ("ip_tables", "iptable_"), Family.V6: ("ip6_tables", "ip6table_")}
_NFT_FAMILY = {Family.V4: "ip", Family.V6: "ip6"}
# How the commands of both variants say that the kernel has not even the table, whatever the rule was.
_NO_TABLE = re.compile(r"(?:initialize (?:ip6?tables )?|_ADD failed \([^)]*\): )table [`']?(\w+)")
_NATIVE = "NATIVE_NFTABLES=true"

Attempt = Callable[[Family, tuple[Feature, ...]], str]  # why rules of these features cannot be loaded; empty: they can


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that the kernel does not have: which modules, in which family, what cannot be done, and its reason.

    `instead` is the setting that does without them, empty when there is none.
    """

    modules: str
    family: Family
    without: str
    reason: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.without} ({self.reason}); {self.remedy}"

    @property
    def what(self) -> str:
        """The first words: what is missing."""
        return f"the kernel lacks {self.modules} for IPv{self.family.value}"

    @property
    def remedy(self) -> str:
        """What a person can do about it; the agent loads no modules."""
        other = f", or set {self.instead}" if self.instead else ""
        text = "load them on the node (modprobe, /etc/modules-load.d)"
        if self.family is Family.V4:
            return text + other
        return (
            f"{text}, for ambient mode start the agent again then{other}; pods without IPv6 addresses lose nothing and "
            "get IPv4 rules; AMBIENT_IPV6=false leaves IPv6 outside of the mesh in ambient mode, "
            "FAMILY_POLICY=original that of dual-stack sidecar pods"
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
    return _lacks(backend, variant, families, features, attempt)


def lacks_for_ipv6_alone(backend: Backend, variant: str, *, attempt: Attempt | None = None) -> tuple[Lack, ...]:
    """Return what of ambient mode's rules the kernel takes for IPv4 and not for IPv6; blocks, as `lacks` does.

    Empty with nftables without a trial: its tables of family inet are there for both, or for none.
    """
    if backend is Backend.NFTABLES:
        return ()
    features = tuple(feature for feature in FEATURES if feature.ambient)
    found = _lacks(backend, variant, (Family.V6,), features, attempt)
    return () if found and _lacks(backend, variant, (Family.V4,), features, attempt) else found


def _lacks(
    backend: Backend,
    variant: str,
    families: tuple[Family, ...],
    features: tuple[Feature, ...],
    attempt: Attempt | None,
) -> tuple[Lack, ...]:
    if attempt is not None:
        return tuple(_found(backend, variant, families, features, attempt))
    tools = find_tools(variant) if backend is Backend.IPTABLES else None
    if backend is Backend.IPTABLES and tools is None:
        return ()  # an incomplete image, of which the choice of the variant has told
    trial: Attempt = _try_nft if tools is None else lambda family, features: _try_iptables(tools, family, features)
    try:
        return call_in_new_netns(lambda: tuple(_found(backend, variant, families, features, trial)))
    except NetnsError:
        return ()


def _found(
    backend: Backend, variant: str, families: tuple[Family, ...], features: tuple[Feature, ...], attempt: Attempt
) -> Iterator[Lack]:
    """All at once first, which is one command; one by one only to find out which of them it is."""
    native = backend is Backend.NFTABLES
    for family in families:
        if not attempt(family, features):
            continue
        failures = [(feature, reason) for feature in features if (reason := attempt(family, (feature,)))]
        if len(failures) == len(features) > 1 and (native or _is_nothing_there(failures)):
            modules, instead = _base(backend, variant, family)
            yield Lack(modules, family, _words(EVERY_POD, family), failures[0][1], instead)
            continue
        told: set[str] = set()
        for feature, reason in failures:
            module = feature.nft_module if native else _table_module(variant, family, reason) or feature.module
            if module not in told:  # a table is told of once, with the rule that most pods need
                yield Lack(module, family, _words(feature.without, family), reason, "" if native else _NATIVE)
            told.add(module)


def _is_nothing_there(failures: list[tuple[Feature, str]]) -> bool:
    reasons = {reason for _feature, reason in failures}
    return len(reasons) == 1 or all(_NO_TABLE.search(reason) for reason in reasons)


def _base(backend: Backend, variant: str, family: Family) -> tuple[str, str]:
    """What everything of a family stands on, and the setting that does without it."""
    if backend is Backend.NFTABLES:
        return "nf_tables (family inet)", "NATIVE_NFTABLES=false"
    if variant == "nft":
        return f"nf_tables (family {_NFT_FAMILY[family]})", "FORCE_IPTABLES_BINARY=legacy"
    base, prefix = _LEGACY_TABLES[family]
    return f"{base}, {prefix}{{nat,mangle,raw}}", _NATIVE


def _table_module(variant: str, family: Family, reason: str) -> str:
    """The name of a table that is missing as a whole; empty when the rule alone was refused."""
    table = _NO_TABLE.search(reason)
    if table is None:
        return ""
    return f"{_LEGACY_TABLES[family][1]}{table[1]}" if variant == "legacy" else f"nf_tables (table {table[1]})"


def _words(without: str, family: Family) -> str:
    return without if family is Family.V4 else f"with an IPv6 address, {without}"


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
    word = _NFT_FAMILY[family]
    lines = [f"table inet {_TABLE} {{"]
    for number, (kind, statement) in enumerate(feature.nft for feature in features):
        lines.append(f"chain c{number} {{ {kind} meta nfproto ipv{family.value} {statement.format(ip=word)}; }}")
    try:
        Nft().change("\n".join([*lines, "}"]))
        Nft().change(f"delete table inet {_TABLE}")
    except NftUnavailableError as error:
        return error.message
    except ApplyError as error:
        return _first_line(error.message.removeprefix("nft refused the rules: "))
    except MeshCniError as error:
        return error.message
    return ""


def _first_line(text: str) -> str:
    """The first one that says something: `ip6tables-nft-restore v1.8.9 (nf_tables):` stands alone above the reason."""
    lines = [line.strip()[:200] for line in text.splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith("):")), lines[0] if lines else "")
