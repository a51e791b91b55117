"""What the node's settings say about ambient pods, read from text: for the agent and for the people's commands.

Upstream: cni/pkg/config/config.go (HOST_PROBE_SNAT_IP, HOST_PROBE_SNAT_IPV6). The rest is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeVar

from meshcni import istio
from meshcni.errors import PodSpecError, SettingError
from meshcni.pods.ambient import DEFAULT_PROBE_V6, AmbientParameters
from meshcni.pods.model import Pod

A = TypeVar("A", IPv4Address, IPv6Address)
OwnAddress = Callable[[int], IPv4Address | IPv6Address | None]  # the node's own of an IP version, None if it has none

SANDBOXED_RUNTIMES: Final = ("gvisor", "runsc", "kata*", "firecracker*")
NOTHING_WORD: Final = "none"  # for lists that are not empty by default: an empty variable means the default
_PATTERN: Final = re.compile(r"[a-z0-9.*?-]+", re.ASCII)  # names of API objects, with the wildcards of a shell


class HostIp(Enum):
    """In place of an address: the node's own, which whoever needs it finds out. Compare with `is HOST_IP`."""

    WORD = "hostIP"


HOST_IP: Final = HostIp.WORD


@dataclass(frozen=True, slots=True)
class AmbientNode:
    """The settings of a node that decide what becomes of its ambient pods.

    `defaults` are the parameters that a pod's annotations override; `ipv6` tells whether IPv6 is captured too;
    `sandboxed_runtimes` are patterns of RuntimeClass names whose pods cannot be enrolled.
    """

    defaults: AmbientParameters
    enabled: bool = False
    ipv6: bool = False
    sandboxed_runtimes: tuple[str, ...] = SANDBOXED_RUNTIMES


def read_probe_v4(text: str) -> IPv4Address | HostIp:
    """Read an IPv4 address that probes can come from, or the word `hostIP` in any case."""
    return _probe_address(text, IPv4Address)


def read_probe_v6(text: str) -> IPv6Address | HostIp:
    """Read an IPv6 address that probes can come from, or the word `hostIP` in any case."""
    return _probe_address(text, IPv6Address)


def _probe_address(text: str, read: Callable[[str], A]) -> A | HostIp:
    if text.lower() == HOST_IP.value.lower():
        return HOST_IP
    found = read(text)
    if found.is_unspecified or found.is_multicast or found.is_loopback or "%" in text:
        raise ValueError("no packet from elsewhere can have it as its source")
    return found


def probe_addresses(
    v4: IPv4Address | HostIp, v6: IPv6Address | HostIp, own_address: OwnAddress
) -> tuple[IPv4Address, IPv6Address]:
    """Return the two addresses, asking `own_address` for the node's own where the setting is `hostIP`.

    A node without IPv6 has no IPv6 probes either. Raises SettingError when it has no IPv4 address.
    """
    found_v4 = own_address(4) if v4 is HOST_IP else v4
    if not isinstance(found_v4, IPv4Address):
        raise SettingError("HOST_PROBE_SNAT_IP=hostIP, and the node has no IPv4 address", "name an address instead")
    found_v6 = own_address(6) if v6 is HOST_IP else v6
    return found_v4, found_v6 if isinstance(found_v6, IPv6Address) else DEFAULT_PROBE_V6


def read_runtime_patterns(text: str) -> tuple[str, ...]:
    """Read names with `*` and `?`, separated by commas; the word `none` alone is no pattern."""
    patterns = () if text == NOTHING_WORD else tuple(name for part in text.split(",") if (name := part.strip()))
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f"no name matches {pattern!r}")
    return patterns


def refuse_sandboxed(pod: Pod, patterns: tuple[str, ...]) -> None:
    """Raise PodSpecError when the pod's RuntimeClass matches one of `patterns`: no rules of ours would hold it."""
    if not any(fnmatchcase(pod.runtime_class, pattern) for pattern in patterns):
        return
    has_sidecar = istio.SIDECAR_STATUS in pod.annotations
    unreached = (
        "rules in its netns do not reach it" if has_sidecar else "neither rules nor ztunnel's listeners reach it"
    )
    out = f"{istio.INJECT_KEY}=false" if has_sidecar else "istio.io/dataplane-mode=none"
    raise PodSpecError(
        f"pod {pod.full_name} has runtime class {pod.runtime_class}: "
        f"its network is inside its sandbox, where {unreached}",
        f"label it {out}, or see AMBIENT_SANDBOXED_RUNTIMES",
    )
