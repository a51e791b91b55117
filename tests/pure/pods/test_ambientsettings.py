"""What the node's settings say about ambient pods."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from meshcni.errors import PodSpecError, SettingError
from meshcni.pods.ambient import DEFAULT_PROBE_V6
from meshcni.pods.ambientsettings import (
    HOST_IP,
    SANDBOXED_RUNTIMES,
    HostIp,
    probe_addresses,
    read_probe_v4,
    read_probe_v6,
    read_runtime_patterns,
    refuse_sandboxed,
)
from meshcni.pods.model import Pod

V4, V6 = IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")
OWN: Mapping[int, IPv4Address | IPv6Address] = {4: ip_address("10.0.0.9"), 6: ip_address("fd00::9")}


@pytest.mark.parametrize("text", ["hostIP", "HOSTIP", "hostip"])
def test_the_word_for_the_nodes_own_address(text: str) -> None:
    assert read_probe_v4(text) is HOST_IP
    assert read_probe_v6(text) is HOST_IP


@pytest.mark.parametrize("text", ["", "0.0.0.0", "127.0.0.1", "224.0.0.1", "fd00::1", "1.2.3", "host"])
def test_no_ipv4_probe(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_probe_v4(text)


@pytest.mark.parametrize("text", ["", "::", "::1", "ff02::1", "fe80::1%eth0", "192.0.2.1"])
def test_no_ipv6_probe(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_probe_v6(text)


@pytest.mark.parametrize(
    ("v4", "v6", "own", "found"),
    [
        (V4, V6, {}, (V4, V6)),
        (HOST_IP, V6, OWN, (OWN[4], V6)),
        (V4, HOST_IP, OWN, (V4, OWN[6])),
        (V4, HOST_IP, {}, (V4, DEFAULT_PROBE_V6)),
    ],
)
def test_probe_addresses(
    v4: IPv4Address | HostIp,
    v6: IPv6Address | HostIp,
    own: Mapping[int, IPv4Address | IPv6Address],
    found: tuple[IPv4Address, IPv6Address],
) -> None:
    assert probe_addresses(v4, v6, lambda version: own.get(version)) == found


def test_a_node_without_an_ipv4_address() -> None:
    with pytest.raises(SettingError, match="no IPv4 address"):
        probe_addresses(HOST_IP, V6, lambda _version: None)


def test_runtime_patterns() -> None:
    assert read_runtime_patterns(",".join(SANDBOXED_RUNTIMES)) == SANDBOXED_RUNTIMES
    assert read_runtime_patterns("none") == ()
    with pytest.raises(ValueError, match="no name matches 'A B'"):
        read_runtime_patterns("kata*, A B")


@pytest.mark.parametrize(
    ("runtime_class", "patterns", "is_refused"),
    [
        ("kata-qemu", SANDBOXED_RUNTIMES, True),
        ("gvisor", SANDBOXED_RUNTIMES, True),
        ("gvisor-not", SANDBOXED_RUNTIMES, False),
        ("", SANDBOXED_RUNTIMES, False),
        ("kata-qemu", (), False),
    ],
)
def test_sandboxed_pods_are_refused(runtime_class: str, patterns: tuple[str, ...], is_refused: bool) -> None:
    pod = Pod("shop", "cart", runtime_class=runtime_class)
    if not is_refused:
        refuse_sandboxed(pod, patterns)
        return
    with pytest.raises(PodSpecError) as caught:
        refuse_sandboxed(pod, patterns)
    assert runtime_class in caught.value.message
