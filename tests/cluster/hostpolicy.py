"""What an engine of network policies leaves on a node: pods get TCP from the node and from named clients only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lab.cluster import KubeNode

TABLE = "lab-policy"
HOOKS = {"INPUT": "-s", "OUTPUT": "-d", "FORWARD": "-d"}
RESTORE = {4: "iptables-restore", 6: "ip6tables-restore"}


@contextmanager
def denied_by_default(
    node: KubeNode, allowed: Sequence[str], ports: Sequence[int], *, nftables: bool
) -> Iterator[None]:
    """Have the node drop TCP to its pods but from itself and from `allowed`, and TCP that pods begin to itself.

    New connections of the node itself to `ports` are counted: see `host_connections`.
    """
    rules = by_nftables(node, allowed, ports) if nftables else by_iptables(node, allowed, ports)
    try:
        for command, text in rules:
            run_with_text(node, command, text)
        yield
    finally:
        node.run(["sh", "-c", f"nft delete table inet {TABLE}; true" if nftables else undo()])


def host_connections(node: KubeNode, ports: Sequence[int], *, nftables: bool) -> Mapping[int, int]:
    """Return how many connections the node itself has begun to each port of its pods, by either family."""
    if nftables:
        listed = json.loads(node.run(["nft", "-j", "list", "counters", "table", "inet", TABLE]))["nftables"]
        found = {each["counter"]["name"]: each["counter"]["packets"] for each in listed if "counter" in each}
        return {port: found[f"port-{port}"] for port in ports}
    text = "".join(node.run([tool, "-w", "-nvxL", "LAB-OUTPUT"]) for tool in ("iptables", "ip6tables"))
    return {port: sum(int(line.split()[0]) for line in text.splitlines() if f"dpt:{port}" in line) for port in ports}


def by_iptables(node: KubeNode, allowed: Sequence[str], ports: Sequence[int]) -> Iterator[tuple[str, str]]:
    known = "-m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"
    for family, subnet in ((4, node.addresses.pods_v4), (6, node.addresses.pods_v6)):
        clients = [each for each in allowed if (":" in each) == (family == 6)]
        lines = [f":LAB-{hook} - [0:0]" for hook in HOOKS]
        lines += [f"-I {hook} 1 {flag} {subnet} -p tcp -j LAB-{hook}" for hook, flag in HOOKS.items()]
        lines += [f"-A LAB-INPUT {known}", "-A LAB-INPUT -j DROP"]
        lines += [f"-A LAB-OUTPUT -p tcp --dport {port} -m conntrack --ctstate NEW -j ACCEPT" for port in ports]
        lines += ["-A LAB-OUTPUT -m addrtype --src-type LOCAL -j ACCEPT", "-A LAB-OUTPUT -j DROP"]
        lines += [f"-A LAB-FORWARD {known}", *(f"-A LAB-FORWARD -s {each} -j RETURN" for each in clients)]
        lines += ["-A LAB-FORWARD -j DROP"]
        yield f"{RESTORE[family]} -w --noflush", "\n".join(["*filter", *lines, "COMMIT", ""])


def undo() -> str:
    """Return a script that takes the rules of `by_iptables` away."""
    lines = []
    for tool in ("iptables", "ip6tables"):
        lines += [f"{tool} -w -S {hook} | grep LAB- | sed s/^-A/-D/ | xargs -r -L1 {tool} -w" for hook in HOOKS]
        lines += [f"{tool} -w -F LAB-{hook}; {tool} -w -X LAB-{hook}" for hook in HOOKS]
    return "\n".join([*lines, "true"])


def by_nftables(node: KubeNode, allowed: Sequence[str], ports: Sequence[int]) -> Iterator[tuple[str, str]]:
    counters, inside, outside, forward = [], [], [], []
    for port in ports:
        counters.append(f"counter port-{port} {{ }}")
        outside.append(f"fib saddr type local tcp dport {port} ct state new counter name port-{port}")
    for family, subnet in (("ip", node.addresses.pods_v4), ("ip6", node.addresses.pods_v6)):
        clients = ", ".join(each for each in allowed if (":" in each) == (family == "ip6"))
        to_pods, from_pods = (f"{family} {end} {subnet} meta l4proto tcp" for end in ("daddr", "saddr"))
        inside += [f"{from_pods} ct state established,related accept", f"{from_pods} drop"]
        outside += [f"{to_pods} fib saddr type != local drop"]
        forward += [
            f"{to_pods} ct state established,related accept",
            f"{to_pods} {family} saddr {{ {clients} }} accept",
        ]
        forward += [f"{to_pods} drop"]
    chains = [
        f"chain {hook} {{\ntype filter hook {hook} priority -10;\n" + "\n".join(rules) + "\n}"
        for hook, rules in (("input", inside), ("output", outside), ("forward", forward))
    ]
    yield "nft -f -", "\n".join([f"table inet {TABLE} {{", *counters, *chains, "}", ""])


def run_with_text(node: KubeNode, command: str, text: str) -> None:
    """Run a command in the node with a text on its stdin."""
    node.run(["sh", "-c", f"{command} <<'END'\n{text}END\n"])
