"""Network namespaces that the command line is run in."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = "240.240.240.240/32"  # the pod's one address; class E is nobody's
_numbers = iter(range(10**6))


class Netns:
    """A network namespace with one address, entered by `ip netns exec`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"
        self.prefix = ["ip", "netns", "exec", name]

    def __call__(self, *command: str, stdin: str | None = None) -> str:
        done = subprocess.run([*self.prefix, *command], input=stdin, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def listing(self, variant: str = "nft") -> str:
        """All that we may program here, counters set to zero, comments left out; `variant` is that of iptables."""
        parts = [self(f"{command}-{variant}-save") for command in ("iptables", "ip6tables")]
        # ipset's own command makes sets of the newest revision, which has a size of buckets; a number is random.
        sets = re.sub(r" (bucketsize|initval) \S+", "", self("ipset", "save"))
        parts += [self("nft", "list", "ruleset", "inet"), sets]
        parts += [
            self("ip", family, *what.split()) for family in ("-4", "-6") for what in ("rule", "route list table all")
        ]
        parts += [self("ip", "address", "show", "dev", "lo")]
        text = "\n".join(line for part in parts for line in part.splitlines() if not line.startswith("#"))
        return re.sub(r"packets \d+ bytes \d+", "packets 0 bytes 0", re.sub(r"\[\d+:\d+\]", "[0:0]", text))


@contextmanager
def new_netns() -> Iterator[Netns]:
    """Make a network namespace with lo up and one address, and delete it at the end."""
    name = f"mc-cli-{os.getpid()}-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        inside = Netns(name)
        inside("ip", "link", "set", "lo", "up")
        inside("ip", "address", "add", ADDRESS, "dev", "lo")
        yield inside
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
