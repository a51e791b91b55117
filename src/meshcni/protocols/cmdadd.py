"""Body of `POST /cmdadd` on `pluginevent.sock`: what the original's plugin sends for an ambient pod.

Upstream: cni/pkg/pluginlistener (client), cni/pkg/nodeagent/cni-watcher.go (server). Go's decoder takes keys in any
letter case and keeps the last of several, so this one does too.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from meshcni.errors import ProtocolError

MAX_BODY_BYTES = 65536


@dataclass(frozen=True, slots=True)
class PodAdded:
    """A pod whose sandbox is being set up: host path of its netns, its name, the addresses the chain gave it.

    `uid`, `container_id` and `interface` are empty with the original's plugin, which does not send them.
    """

    netns: str
    pod_name: str
    pod_namespace: str
    ips: tuple[IPv4Address | IPv6Address, ...] = ()
    uid: str = ""
    container_id: str = ""
    interface: str = ""


def decode_pod_added(body: bytes) -> PodAdded:
    """Take the event apart; raises ProtocolError (`malformed`) naming the field that cannot be used."""
    if not body:
        raise ProtocolError("malformed", "event has no body")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("malformed", f"event is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ProtocolError("malformed", "event is not a JSON object")
    values = {key.lower(): value for key, value in document.items()}
    return PodAdded(
        netns=_text(values, "Netns"),
        pod_name=_text(values, "PodName"),
        pod_namespace=_text(values, "PodNamespace"),
        ips=_addresses(values.get("ips")),
        uid=_text(values, "PodUID"),
        container_id=_text(values, "ContainerID"),
        interface=_text(values, "IfName"),
    )


def _text(values: Mapping[str, Any], key: str) -> str:
    """The text at `key`, empty when it is absent or null."""
    value = values.get(key.lower())
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ProtocolError("malformed", f"event field {key} is {type(value).__name__}, not text")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half of a pair is U+FFFD for Go too


def _addresses(items: object) -> tuple[IPv4Address | IPv6Address, ...]:
    """The addresses of `IPs`, IPv4-mapped ones unwrapped; null is none."""
    if items is None:
        return ()
    if not isinstance(items, list):
        raise ProtocolError("malformed", f"event field IPs is {type(items).__name__}, not a list")
    return tuple(_address(item) for item in items)


def _address(item: object) -> IPv4Address | IPv6Address:
    """The IP part of one entry `{"Address":{"IP":..,"Mask":..}}`; the mask is only checked to be base64."""
    network = {key.lower(): value for key, value in item.items()}.get("address") if isinstance(item, dict) else None
    fields = {key.lower(): value for key, value in network.items()} if isinstance(network, dict) else {}
    text, mask = fields.get("ip"), fields.get("mask")
    try:
        if not isinstance(text, str):
            raise ValueError("no text in Address.IP")
        if mask is not None:
            binascii.a2b_base64(mask.encode(), strict_mode=True)
        address = ip_address(text)
    except (ValueError, AttributeError) as error:
        raise ProtocolError("malformed", f"event field IPs holds {json.dumps(item)[:200]}: {error}") from None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
