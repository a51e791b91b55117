"""Pods of the kernel tier: network namespaces of the tests' own, known by descriptor only, so that none can be left."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from typing import TypeVar

from meshcni.host.backends.detection import VariantChoice
from meshcni.host.netns import call_in_netns, new_netns
from meshcni.host.redirection import Applied, apply_ruleset, apply_sidecar, remove_sidecar
from meshcni.pods.interception import Interception
from meshcni.rules import nft
from meshcni.rules.model import Backend, Family, Ruleset

T = TypeVar("T")

VARIANTS = ("nftables", "nft", "legacy")
KIND = {"nftables": Backend.NFTABLES, "nft": Backend.IPTABLES, "legacy": Backend.IPTABLES}
COMMAND = {Family.V4: "iptables", Family.V6: "ip6tables"}
TABLES = ("filter", "mangle", "nat", "raw")
OUR_NFT_TABLES = ("istio-proxy-nat", "istio-proxy-mangle", "istio-proxy-raw")
IPV4, IPV6 = "10.77.0.2", "fd00:77::2"


class Netns:
    """A network namespace; everything runs inside on a thread made for it."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = new_netns() if fd is None else fd

    def close(self) -> None:
        os.close(self.fd)

    def call(self, function: Callable[[], T]) -> T:
        return call_in_netns(self.fd, function)

    def shell(self, *command: str, text: str = "") -> str:
        """Run a command inside, fail on a status other than 0, return what it prints."""
        done = self.call(lambda: subprocess.run(command, input=text, capture_output=True, text=True, check=False))
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def ip(self, *lines: str, family: Family | None = None) -> None:
        """Run `ip` commands; `family` is needed where no address tells it."""
        self.shell("ip", *([f"-{family.value}"] if family else []), "-batch", "-", text="\n".join(lines) + "\n")


def make_pod(families: frozenset[Family] = frozenset(Family)) -> Netns:
    """Make a namespace with lo up and eth0 with an address of each family."""
    pod = Netns()
    lines = ["link set lo up", "link add eth0 type veth peer name peer0", "link set eth0 up", "link set peer0 up"]
    if Family.V4 in families:
        lines.append(f"addr add {IPV4}/24 dev eth0")
    if Family.V6 in families:
        lines.append(f"addr add {IPV6}/64 dev eth0 nodad")
    pod.ip(*lines)
    return pod


def apply(pod: Netns, parameters: Interception, variant: str) -> Applied:
    """What an ADD does, on a node that has chosen `variant`."""
    return pod.call(lambda: apply_sidecar(parameters, KIND[variant], choice=node_choice(variant)))


def apply_rules(pod: Netns, ruleset: Ruleset, variant: str) -> Applied:
    return pod.call(lambda: apply_ruleset(ruleset, KIND[variant], choice=node_choice(variant)))


def remove(pod: Netns, parameters: Interception | None = None) -> None:
    pod.call(lambda: remove_sidecar(parameters))


def node_choice(variant: str) -> VariantChoice | None:
    return None if variant == "nftables" else VariantChoice(variant, "the test says so")


# --- what the kernel says, by its own tools ---------------------------------------------------------------------------


def save(pod: Netns, variant: str, family: Family) -> str:
    """Return what iptables-save prints without comments and counters, tables in alphabetical order.

    Left out are the built-in chains' declarations, and tables without anything else: legacy shows whatever was ever
    looked at.
    """
    text = pod.shell(f"{COMMAND[family]}-{variant}-save")
    tables: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            current = tables.setdefault(line[1:], [])
        elif line.startswith((":", "-A")) and not re.fullmatch(r":[A-Z]+ (ACCEPT|DROP) \[\d+:\d+\]", line):
            current.append(re.sub(r" \[\d+:\d+\]$", "", line))
    return "".join("\n".join([f"*{name}", *tables[name], "COMMIT", ""]) for name in TABLES if tables.get(name))


def nft_list(pod: Netns) -> str:
    """Return what `nft list ruleset` prints of tables that are not iptables', in the words of nft 1.0.6, no counts."""
    text = nft.canonical(pod.shell("nft", "--stateless", "list", "ruleset"))
    blocks = re.findall(r"^table .*?^\}\n", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(block for block in blocks if block.startswith("table inet "))


def policy(pod: Netns) -> str:
    """Return policy rules, local routes, and addresses of lo, as `ip` prints them once the kernel has settled them."""
    for _attempt in range(100):
        if "tentative" not in pod.shell("ip", "-6", "addr", "show", "dev", "lo"):
            break
    wanted = [
        ("ip", "-4", "rule"),
        ("ip", "-6", "rule"),
        ("ip", "-4", "route", "show", "table", "all", "type", "local"),
        ("ip", "-6", "route", "show", "table", "all", "type", "local"),
        ("ip", "-o", "addr", "show", "dev", "lo"),
    ]
    return "".join(pod.shell(*command) for command in wanted)


def state(pod: Netns) -> str:
    """Return everything that rules can consist of, in every backend, without making legacy tables appear."""
    parts = [nft_list(pod), policy(pod)]
    for family, name in ((Family.V4, "ip_tables_names"), (Family.V6, "ip6_tables_names")):
        if "table ip" in pod.shell("nft", "list", "tables"):
            parts.append(f"nft {family}\n" + save(pod, "nft", family))
        if legacy_names(pod, name):
            parts.append(f"legacy {family}\n" + save(pod, "legacy", family))
    return "\n".join(part for part in parts if part.count("\n") > 1)


def legacy_names(pod: Netns, name: str = "ip_tables_names") -> list[str]:
    def read() -> list[str]:
        with open(f"/proc/thread-self/net/{name}") as file:
            return sorted(file.read().split())

    return pod.call(read)


def nft_tables(pod: Netns) -> list[str]:
    return sorted(pod.shell("nft", "list", "tables").splitlines())
