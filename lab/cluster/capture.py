"""Whether a pod's traffic is redirected, judged by what happens to a connection, not by looking at rules."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lab import namespaces
from lab.cluster.addresses import NOWHERE_V4, NOWHERE_V6
from meshcni import istio

PORT = 80  # of an address to which no node has a route
PATIENCE_SECONDS = 5.0
NO_ROUTE = {errno.EHOSTUNREACH, errno.ENETUNREACH}
LISTEN = "0A"  # state of a socket, net/tcp_states.h
LEGACY_TABLES = ("ip_tables_names", "ip6_tables_names")


@dataclass(frozen=True, slots=True)
class Captured:
    """What was found in a pod's netns.

    `v4`, `v6`: whether an outbound connection to nowhere is led somewhere else (to be taken or refused there).
    `tunnel`: whether ztunnel listens for HBONE inside. `tables`: the tables with something of somebody's, such as
    `inet istio…`.
    """

    v4: bool
    v6: bool
    tunnel: bool
    tables: tuple[str, ...] = ()

    @property
    def both(self) -> bool:
        """Whether both families are redirected."""
        return self.v4 and self.v6

    @property
    def is_untouched(self) -> bool:
        """Whether nothing at all of a mesh is in the netns."""
        return not (self.v4 or self.v6 or self.tunnel or self.tables)


def capture(netns: str) -> Captured:
    """Look at the netns at a path."""

    def work() -> Captured:
        return Captured(
            v4=is_redirected(NOWHERE_V4),
            v6=is_redirected(NOWHERE_V6),
            tunnel=listens(istio.ZTUNNEL_INBOUND_PORT),
            tables=tables(),
        )

    return namespaces.call_in_netns(netns, work)


def is_redirected(address: str) -> bool:
    """Tell, in the calling thread's netns, whether a connection to an address without a route ends elsewhere.

    OSError when it does neither: then something drops packets.
    """
    with socket.socket(namespaces.family_of(address), socket.SOCK_STREAM) as made:
        made.settimeout(PATIENCE_SECONDS)
        number = made.connect_ex((address, PORT))
    if number in NO_ROUTE:
        return False
    if number in (0, errno.ECONNREFUSED, errno.ECONNRESET):
        return True
    raise OSError(number, f"a connection to {address} is neither redirected nor without route")


def listens(port: int) -> bool:
    """Tell, in the calling thread's netns, whether somebody listens on a TCP port, without connecting."""
    wanted = f":{port:04X}"
    for name in ("tcp", "tcp6"):
        with open(f"/proc/thread-self/net/{name}", encoding="ascii") as file:
            for fields in map(str.split, file):
                if fields[1].endswith(wanted) and fields[3] == LISTEN:
                    return True
    return False


def tables() -> tuple[str, ...]:
    """Return the tables of rules in the calling thread's netns: nftables' (iptables-nft is there too), and legacy ones.

    Those without rules or chains of somebody's are left out: iptables makes its own tables and never takes them away.
    """
    listed = subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    found = list(dict.fromkeys(table for each in json.loads(listed)["nftables"] for table in holder(each)))
    for name in LEGACY_TABLES:
        found += legacy_tables(name)
    return tuple(found)


def holder(listed: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Give the table that an entry of nft's JSON shows not to be empty."""
    for kind, entry in listed.items():
        is_idle = kind == "chain" and entry.get("policy") == "accept"  # a base chain, which alone does nothing
        if "table" in entry and not is_idle:
            yield f"{entry['family']} {entry['table']}"


def legacy_tables(name: str, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[str]:
    """Return the non-empty legacy tables of a family; /proc of this thread names those of its own netns."""
    try:
        with open(f"/proc/thread-self/net/{name}", encoding="ascii") as file:
            names = file.read().split()
    except FileNotFoundError:
        return []
    if not names:
        return []
    program = "iptables-legacy-save" if name == LEGACY_TABLES[0] else "ip6tables-legacy-save"
    saved = run([program], capture_output=True, text=True, check=True).stdout
    used = any(line.startswith("-A") for line in saved.splitlines())
    return [f"{program.partition('-')[0]} {each}" for each in names] if used else []
