"""The node's own address, which probes keep as their source when HOST_PROBE_SNAT_IP is `hostIP`."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

from meshcni.errors import ApplyError
from meshcni.host.rtnetlink import LOOPBACK_INDEX, Rtnetlink
from meshcni.rules.model import Family

_SCOPE_UNIVERSE = 0  # linux/rtnetlink.h: not limited to a link or to this host
# Addresses for documentation (RFC 5737, RFC 3849): nobody has a route to them but the default one. Nothing is sent.
_ELSEWHERE = {Family.V4: ip_address("192.0.2.1"), Family.V6: ip_address("2001:db8::1")}


def node_address(family: Family) -> IPv4Address | IPv6Address | None:
    """Return the node's own address of a family, in the network namespace of the calling thread, which is the host's.

    That is what the kernel takes as source towards everywhere else. Without a way there it is the first address that
    is good beyond its link, of any interface but `lo`. None when there is none; raises ApplyError.
    """
    try:
        with Rtnetlink() as netlink:
            try:
                source = netlink.source_for(_ELSEWHERE[family].packed)
            except OSError:
                source = b""  # unreachable, blocked, or no such address family
            wide = [source] + [
                entry.packed
                for entry in netlink.addresses()
                if entry.scope == _SCOPE_UNIVERSE and entry.interface != LOOPBACK_INDEX
            ]
    except OSError as error:
        raise ApplyError(f"cannot read the node's addresses: {error.strerror or error}") from None
    addresses = (ip_address(packed) for packed in wide if len(packed) in (4, 16))
    return next((address for address in addresses if address.version == family.value and _is_usable(address)), None)


def _is_usable(address: IPv4Address | IPv6Address) -> bool:
    return not (address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast)
