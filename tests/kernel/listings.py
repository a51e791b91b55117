"""Namespaces with addresses to compare, and everything that the kernel's own tools list of what rules consist of."""

from __future__ import annotations

import re

from tests.kernel.world import Netns

IPV4, IPV6 = "240.240.240.240", "fd00:77::2"
ADDRESSES = {"v4": [IPV4], "v6": [IPV6], "dual": [IPV4, IPV6], "none": [], "link-local": ["fe80::77"]}
LIST = """
while [ -n "$(ip -6 -o addr show tentative)" ]; do :; done
for table in filter mangle nat raw; do for command in $SAVE; do $command -t $table; done; done
for family in -4 -6; do
ip $family -batch - <<END
rule
route show table all
addr show dev lo
END
done
"""
# One family at a time, because nft misreads targets of iptables when it lists IPv6 before IPv4.
LIST_NFT = {
    "nftables": "nft --stateless list ruleset",
    "nft": "for family in ip ip6 inet; do nft --stateless list ruleset $family 2>/dev/null; done",
    "legacy": "nft --stateless list ruleset",
}
Listing = list[str]


def new_netns(kind: str) -> Netns:
    netns = Netns()
    netns.ip("link set lo up", *(f"addr add {address} dev lo" for address in ADDRESSES[kind]))
    return netns


def listing(netns: Netns, variant: str) -> Listing:
    """Return all that rules, routes and addresses can be seen in, without comments and counters."""
    save = "" if variant == "nftables" else f"iptables-{variant}-save ip6tables-{variant}-save"
    text = netns.shell("sh", "-c", f"SAVE='{save}'\n{LIST_NFT[variant]}\n{LIST}")
    return [re.sub(r" \[\d+:\d+\]$", "", line) for line in text.splitlines() if not line.startswith("#")]


def settled(lines: Listing) -> Listing:
    """Return the listing without nft's view of the tables of iptables-nft, which iptables-save shows as well.

    It differs in what makes no difference: empty tables and chains stay, and a chain keeps the place it first had.
    """
    text = "".join(f"{line}\n" for line in lines)
    return re.sub(r"^table ip6? .*?^\}\n", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
