"""From the texts of flags and variables to a sidecar's parameters, as the original's `istio-iptables` understands them.

Unlike a pod's annotations, what is written here is kept as it is: nothing is added, order and repetitions stay, names
of services, users and groups are looked up, and a text may say more than a number. What the kernel could not take is
refused here. Upstream: tools/common/config/config.go; what texts may be is what `iptables` takes for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, TypeVar

from meshcni import istio
from meshcni.cli.given import Given
from meshcni.pflag import go_bool, go_int
from meshcni.pods.interception import (
    EVERYTHING,
    Everything,
    GroupSelection,
    Interception,
    InterceptionMode,
    Network,
    NumberRange,
)
from meshcni.pods.values import HIGHEST_ID, HIGHEST_PORT, check_owner_groups, read_loopback, read_prefix

T = TypeVar("T")
DEFAULT_ENVOY_USER: Final = "istio-proxy"
HIGHEST_MARK: Final = 2**32 - 1
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.:@+\-]{1,15}", re.ASCII)
_NUMBERS_WITH_DASH: Final = re.compile(r"(?P<first>[0-9]\w*)-(?P<last>[0-9]\w*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Lookups:
    """What this machine knows: numbers of names (None: no such name), and the resolver's configuration.

    Passed in, so that reading a command line has no effects of its own.
    """

    service: Callable[[str], int | None]
    user: Callable[[str], int | None]
    group: Callable[[str], int | None]
    resolver_text: Callable[[], str]


# --- texts ------------------------------------------------------------------------------------------------------------


def split(text: str, read_item: Callable[[str], T]) -> tuple[T, ...]:
    """Split at commas, drop what is empty and read the rest."""
    return tuple(read_item(item.strip()) for item in text.split(",") if item.strip())


def or_everything(read: Callable[[str], T]) -> Callable[[str], T | Everything]:
    """Return a reader that takes `*` besides what `read` takes."""
    return lambda text: EVERYTHING if text == "*" else read(text)


def read_number(text: str, highest: int) -> int:
    """Read a number from 0 to `highest`; 0x means hexadecimal and a leading 0 octal, as for iptables."""
    number = go_int(text)
    if not 0 <= number <= highest:
        raise ValueError(f"{text!r} is not within 0 to {highest}")
    return number


def read_port(text: str) -> int:
    """Read one port."""
    return read_number(text, HIGHEST_PORT)


def read_mark(text: str) -> int:
    """Read a packet mark or the number of a routing table."""
    return read_number(text, HIGHEST_MARK)


def read_ports(text: str, service: Callable[[str], int | None]) -> NumberRange:
    """Read a port, the name of a service, or a range `FIRST:LAST` (either end may be missing) or `FIRST-LAST`."""

    def end(part: str) -> int:
        number = None if part[:1].isdigit() else service(part)
        return read_port(part) if number is None else number

    if ":" in text:
        first, _, last = text.partition(":")
        return _range(text, end(first or "0"), end(last or str(HIGHEST_PORT)))
    if dashed := _NUMBERS_WITH_DASH.fullmatch(text):
        return _range(text, end(dashed["first"]), end(dashed["last"]))
    try:
        return NumberRange.single(end(text))
    except ValueError:
        raise ValueError(
            f"{text!r} is no port, no range of ports like 8000:8010 and no service in /etc/services"
        ) from None


def read_owners(text: str, lookup: Callable[[str], int | None]) -> NumberRange:
    """Read an id, a range `FIRST-LAST` of ids, or a name that `lookup` knows."""
    named = lookup(text)
    if named is not None:
        return NumberRange.single(named)
    first, dash, last = text.partition("-")
    try:
        return _range(text, read_number(first, HIGHEST_ID), read_number(last if dash else first, HIGHEST_ID))
    except ValueError:
        raise ValueError(f"{text!r} is no id, no range of ids like 1000-1999 and no name known here") from None


def read_interface(text: str) -> str:
    """Read the name of an interface; a final `+`, or `*` as nft writes it, stands for any rest."""
    name = f"{text[:-1]}+" if text.endswith("*") else text
    if not _INTERFACE.fullmatch(name):
        raise ValueError(f"{text!r} is no interface name: at most 15 letters, digits and '_.:@-'")
    if name == "+":
        raise ValueError(f"{text!r} is every interface, so that nothing would be redirected")
    return name


def read_excluded_prefix(text: str) -> Network:
    """Read a prefix; `*` gets an answer of its own."""
    if text == "*":
        raise ValueError("'*' cannot be excluded: list prefixes, or include none")
    return read_prefix(text)


def read_mode(text: str) -> InterceptionMode:
    """Read the mode: everything but TPROXY is REDIRECT."""
    return InterceptionMode.TPROXY if text == InterceptionMode.TPROXY.value else InterceptionMode.REDIRECT


def name_servers(resolver_text: str) -> tuple[IPv4Address | IPv6Address, ...]:
    """Return the servers of a resolv.conf; lines that name none are passed over."""
    servers: list[IPv4Address | IPv6Address] = []
    for line in resolver_text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            servers.append(ip_address(words[1].partition("%")[0]))
        except ValueError:
            continue
    return tuple(servers)


def _range(text: str, first: int, last: int) -> NumberRange:
    if first > last:
        raise ValueError(f"{text!r} is an empty range")
    return NumberRange(first, last)


# --- the parameters ---------------------------------------------------------------------------------------------------


def read_interception(
    given: Mapping[str, Given], environment: Mapping[str, str], lookups: Lookups
) -> tuple[Interception, tuple[str, ...]]:
    """Read all parameters; `given` is by flag name. Returns them with warnings; UsageError names what is wrong."""

    def ports(text: str) -> tuple[NumberRange, ...]:
        return split(text, lambda item: read_ports(item, lookups.service))

    def groups(text: str) -> tuple[NumberRange, ...]:
        return split(text, lambda item: read_owners(item, lookups.group))

    def users(text: str) -> tuple[NumberRange, ...]:
        return split(text, lambda item: read_owners(item, lookups.user)) or _envoy_user(environment, lookups)

    def prefixes(text: str) -> tuple[Network, ...]:
        return split(text, read_prefix)

    def interfaces(text: str) -> tuple[str, ...]:
        return split(text, read_interface)

    flags: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
        ("proxy_port", "envoy-port", read_port),
        ("inbound_capture_port", "inbound-capture-port", read_port),
        ("inbound_tunnel_port", "inbound-tunnel-port", read_port),
        ("proxy_uids", "proxy-uid", users),
        ("mode", "istio-inbound-interception-mode", read_mode),
        ("inbound_ports", "istio-inbound-ports", or_everything(ports)),
        ("inbound_exclude_ports", "istio-local-exclude-ports", ports),
        ("exclude_interfaces", "istio-exclude-interfaces", interfaces),
        ("outbound_cidrs", "istio-service-cidr", or_everything(prefixes)),
        ("outbound_exclude_cidrs", "istio-service-exclude-cidr", lambda text: split(text, read_excluded_prefix)),
        ("outbound_ports", "istio-outbound-ports", or_everything(ports)),
        ("outbound_exclude_ports", "istio-local-outbound-ports-exclude", ports),
        ("virtual_interfaces", "kube-virt-interfaces", interfaces),
        ("tproxy_mark", "istio-inbound-tproxy-mark", read_mark),
        ("tproxy_table", "istio-inbound-tproxy-route-table", read_mark),
        ("redirect_dns", "redirect-dns", go_bool),
        ("capture_all_dns", "capture-all-dns", go_bool),
        ("drop_invalid", "drop-invalid", go_bool),
        ("dual_stack", "dual-stack", go_bool),
    )
    variables: tuple[tuple[str, str, str, Callable[[str], Any]], ...] = (
        ("owner_groups", istio.ENV_OWNER_GROUPS, "*", lambda text: _limited(or_everything(groups)(text))),
        ("owner_groups_exclude", istio.ENV_OWNER_GROUPS_EXCLUDE, "", groups),
        ("loopback_cidr", istio.ENV_LOOPBACK_CIDR, istio.LOOPBACK_CIDR, read_loopback),
    )
    values = {field: given[flag].read(reader) for field, flag, reader in flags}
    for field, name, default, reader in variables:
        values[field] = Given(environment.get(name, default), f"env {name}").read(reader)
    values["proxy_gids"] = given["proxy-gid"].read(groups) or _groups_of_users(given, lookups) or values["proxy_uids"]
    warnings: list[str] = []
    if values["redirect_dns"] and not values["capture_all_dns"]:
        values["dns_servers"] = name_servers(lookups.resolver_text())
        if not values["dns_servers"]:
            warnings.append("the resolver has no name server, so DNS is not captured; --capture-all-dns needs none")
            values["redirect_dns"] = False
    return Interception(**values), tuple(warnings)


def _groups_of_users(given: Mapping[str, Given], lookups: Lookups) -> tuple[NumberRange, ...]:
    """Read the text of the users as groups, which it stands for too when no group is given; a name may be both."""

    def either(name: str) -> int | None:
        number = lookups.group(name)
        return lookups.user(name) if number is None else number

    return given["proxy-uid"].read(lambda text: split(text, lambda item: read_owners(item, either)))


def _limited(groups: GroupSelection) -> GroupSelection:
    check_owner_groups(groups)
    return groups


def _envoy_user(environment: Mapping[str, str], lookups: Lookups) -> tuple[NumberRange, ...]:
    named = lookups.user(environment.get(istio.ENV_ENVOY_USER, DEFAULT_ENVOY_USER))
    return (NumberRange.single(istio.PROXY_UID if named is None else named),)
