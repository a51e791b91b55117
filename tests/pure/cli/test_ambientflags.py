"""The command lines of ambient rules, read without effects: flags, the agent's variables, wrong values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
import yaml  # noqa: F401  (read_policy imports it late, and a pure test may not look into folders)
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cli.ambientflags import (
    HOST_FLAGS,
    POD_FLAGS,
    AmbientCommand,
    Machine,
    read_host_command,
    read_pod_command,
)
from meshcni.errors import KubeletNotFoundError, SettingError, UsageError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.ambientsettings import SANDBOXED_RUNTIMES
from meshcni.pods.eligibility import Policy
from meshcni.pods.selectors import EnablementSelector, LabelSelector
from meshcni.rules.model import Backend, Family

V4, DUAL = frozenset({Family.V4}), frozenset(Family)
OWN: dict[tuple[int, str], IPv4Address | IPv6Address] = {
    (4, ""): IPv4Address("10.9.9.9"),
    (6, ""): IPv6Address("fd00::9"),
    (4, "/run/netns/host"): IPv4Address("10.8.8.8"),
}
MACHINE = Machine(lambda version, path: OWN.get((version, path)), lambda: 990)


def no_kubelet() -> int:
    raise KubeletNotFoundError("no process under /proc is a kubelet", "set KUBELET_UID")


NOBODY = Machine(lambda _version, _path: None, no_kubelet)


def read(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, machine: Machine = MACHINE
) -> AmbientCommand:
    command = read_pod_command(arguments, environment or {}, machine)
    assert command is not None
    return command


def read_host(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, machine: Machine = MACHINE
) -> AmbientCommand:
    command = read_host_command(arguments, environment or {}, machine)
    assert command is not None
    return command


def test_the_defaults_are_the_agents() -> None:
    command = read([], {}, NOBODY)
    assert (command.parameters, command.families) == (AmbientParameters(), V4)
    assert (command.backend, command.format, command.apply, command.verify) == (
        Backend.IPTABLES,
        "script",
        False,
        False,
    )
    assert (command.kubelet_uid, command.warnings, command.policy) == (None, (), Policy())
    assert command.node.sandboxed_runtimes == SANDBOXED_RUNTIMES
    assert set(command.origins.values()) == {"default"}


# --- a pod's parameters -----------------------------------------------------------------------------------------------

P4, P6 = IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7")
# Flags, variables, parameters, families, and the origin of the one that is not the default's.
PARAMETERS: dict[str, tuple[list[str], dict[str, str], dict[str, Any], frozenset[Family], str]] = {
    "DNS": (["--dns"], {}, {"dns_capture": True}, V4, "flag --dns"),
    "DNS with a value": (["--dns=true"], {}, {"dns_capture": True}, V4, "flag --dns"),
    "DNS by variable": ([], {"AMBIENT_DNS_CAPTURE": "true"}, {"dns_capture": True}, V4, "env AMBIENT_DNS_CAPTURE"),
    "no DNS beats the variable": (["--dns=false"], {"AMBIENT_DNS_CAPTURE": "true"}, {}, V4, "flag --dns"),
    "ingress": (["--ingress"], {}, {"ingress": True}, V4, "flag --ingress"),
    "interfaces": (
        ["--virtual-interfaces", "vnet0, k6t+,,"],
        {},
        {"virtual_interfaces": ("vnet0", "k6t+")},
        V4,
        "flag --virtual-interfaces",
    ),
    "probes": (
        [f"--host-probe-snat-ip={P4}", "--host-probe-snat-ipv6", str(P6)],
        {},
        {"probe_v4": P4, "probe_v6": P6},
        V4,
        "flag --host-probe-snat-ip",
    ),
    "probe by variable": ([], {"HOST_PROBE_SNAT_IP": str(P4)}, {"probe_v4": P4}, V4, "env HOST_PROBE_SNAT_IP"),
    "IPv6 probe by variable": ([], {"HOST_PROBE_SNAT_IPV6": str(P6)}, {"probe_v6": P6}, V4, "env HOST_PROBE_SNAT_IPV6"),
    "the node's own": ([], {"HOST_PROBE_SNAT_IP": "hostIP"}, {"probe_v4": OWN[4, ""]}, V4, "env HOST_PROBE_SNAT_IP"),
    "the node's own IPv6": (
        ["--host-probe-snat-ipv6=hostip"],
        {},
        {"probe_v6": OWN[6, ""]},
        V4,
        "flag --host-probe-snat-ipv6",
    ),
    "IPv6": (["--ipv6"], {}, {}, DUAL, "default"),
    "IPv6 by variable": ([], {"AMBIENT_IPV6": "1"}, {}, DUAL, "default"),
    "no IPv6 beats the variable": (["--ipv6=false"], {"AMBIENT_IPV6": "true"}, {}, V4, "default"),
    "empty variables are unset": ([], {"AMBIENT_IPV6": "", "DRY_RUN": ""}, {}, V4, "default"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "environment", "values", "families", "origin"), PARAMETERS.values(), ids=PARAMETERS
)
def test_parameters(
    arguments: list[str],
    environment: dict[str, str],
    values: dict[str, Any],
    families: frozenset[Family],
    origin: str,
) -> None:
    command = read(arguments, environment)
    assert (command.parameters, command.families) == (replace(AmbientParameters(), **values), families)
    assert set(command.origins.values()) - {"default"} <= {origin, "flag --host-probe-snat-ipv6"}
    assert origin in command.origins.values()


def test_a_node_without_an_ipv6_address_has_the_usual_probe() -> None:
    command = read(["--host-probe-snat-ipv6=hostIP"], {}, NOBODY)
    assert command.parameters == AmbientParameters()
    with pytest.raises(SettingError, match="the node has no IPv4 address"):
        read(["--host-probe-snat-ip=hostIP"], {}, NOBODY)


def test_a_pod_and_what_decides_about_it() -> None:
    environment = {
        "AMBIENT_ENABLED": "true",
        "AMBIENT_ENABLEMENT_SELECTOR": "[{podSelector: {matchLabels: {a: b}}}]",
        "EXCLUDE_NAMESPACES": "kube-system",
        "AMBIENT_SANDBOXED_RUNTIMES": "none",
    }
    command = read(["--pod", "pod.yaml", "--namespace-file=ns.yaml", "--dns"], environment)
    assert (command.pod_file, command.namespace_file) == ("pod.yaml", "ns.yaml")
    selector = EnablementSelector(pod=LabelSelector((("a", "b"),)))
    assert command.policy == Policy(frozenset({"kube-system"}), "", True, (selector,))
    assert (command.node.enabled, command.node.sandboxed_runtimes) == (True, ())
    assert command.node.defaults.dns_capture


# --- the host ---------------------------------------------------------------------------------------------------------

NFT = ["--backend", "nftables"]
UIDS: dict[str, tuple[list[str], dict[str, str], int | None]] = {
    "iptables needs none": ([], {}, None),
    "iptables takes none": (["--kubelet-uid=5"], {}, None),
    "found": (NFT, {}, 990),
    "found in words": ([*NFT, "--kubelet-uid", "auto"], {"KUBELET_UID": "3"}, 990),
    "flag": ([*NFT, "--kubelet-uid=5"], {"KUBELET_UID": "3"}, 5),
    "root": ([*NFT, "--kubelet-uid=0"], {}, 0),
    "variable": (NFT, {"KUBELET_UID": "3"}, 3),
    "empty variable": (NFT, {"KUBELET_UID": ""}, 990),
    "native nftables by variable": (["--kubelet-uid=5"], {"NATIVE_NFTABLES": "true"}, 5),
    "cleanup needs none": ([*NFT, "--cleanup", "--apply"], {}, None),
}


@pytest.mark.parametrize(("arguments", "environment", "uid"), UIDS.values(), ids=UIDS)
def test_kubelet_uid(arguments: list[str], environment: dict[str, str], uid: int | None) -> None:
    command = read_host(arguments, environment)
    assert (command.kubelet_uid, command.warnings) == (uid, ())


def test_without_a_kubelet_rules_can_be_printed_and_nothing_else() -> None:
    command = read_host(NFT, {}, NOBODY)
    assert command.kubelet_uid == 0
    (warning,) = command.warnings
    assert warning.startswith("no process under /proc is a kubelet; the rules are shown for user 0, --kubelet-uid N")
    assert read_host([*NFT, "--apply", "--dry-run"], {}, NOBODY).kubelet_uid == 0
    for flag in ("--apply", "--verify"):
        with pytest.raises(KubeletNotFoundError) as caught:
            read_host([*NFT, flag], {}, NOBODY)
        assert "--kubelet-uid N" in caught.value.hint


def test_the_host_asks_for_addresses_where_its_rules_go() -> None:
    arguments = ["--host-probe-snat-ip=hostIP", "--network-namespace"]
    assert read_host([*arguments, "/run/netns/host"]).parameters.probe_v4 == OWN[4, "/run/netns/host"]
    assert read([*arguments, "/run/netns/host"]).parameters.probe_v4 == OWN[4, ""]


def test_the_host_takes_a_pods_flags_and_a_pod_the_hosts() -> None:
    plain = read_host([])
    assert replace(read_host(["--dns", "--ingress", "--virtual-interfaces=a"]), node=plain.node) == replace(
        plain, parameters=AmbientParameters(dns_capture=True), origins={**plain.origins, "dns_capture": "flag --dns"}
    )
    assert read(["--kubelet-uid=auto"]).parameters == AmbientParameters()


# --- what to do -------------------------------------------------------------------------------------------------------

ACTIONS: dict[str, tuple[list[str], dict[str, str], dict[str, Any]]] = {
    "apply": (["--apply"], {}, {"apply": True}),
    "dry run": (["--apply", "-n"], {}, {"apply": False}),
    "dry run by variable": (["--apply"], {"DRY_RUN": "true"}, {"apply": False}),
    "native nftables": (["--native-nftables"], {}, {"backend": Backend.NFTABLES}),
    "native nftables by variable": ([], {"NATIVE_NFTABLES": "true"}, {"backend": Backend.NFTABLES}),
    "backend beats the variable": (["--backend=iptables"], {"NATIVE_NFTABLES": "true"}, {"backend": Backend.IPTABLES}),
    "forced": (["--force-iptables-binary=legacy"], {}, {"force_iptables": "legacy"}),
    "forced by variable": ([], {"FORCE_IPTABLES_BINARY": "nft"}, {"force_iptables": "nft"}),
    "format": (["--format", "json"], {}, {"format": "json"}),
    "cleanup": (["--cleanup"], {}, {"cleanup_only": True}),
    "the sidecar's word for it": (["--cleanup-only"], {}, {"cleanup_only": True}),
    "verify": (["--verify"], {}, {"verify": True}),
    "netns": (["--network-namespace=/run/netns/a"], {}, {"netns_path": "/run/netns/a"}),
}


@pytest.mark.parametrize(("arguments", "environment", "values"), ACTIONS.values(), ids=ACTIONS)
def test_actions(arguments: list[str], environment: dict[str, str], values: dict[str, Any]) -> None:
    assert read(arguments, environment) == replace(read([]), **values)
    if "--kubelet-uid" not in arguments:
        found = read_host(arguments, environment)
        assert all(getattr(found, name) == value for name, value in values.items())


@pytest.mark.parametrize("flags", [POD_FLAGS, HOST_FLAGS], ids=["pod", "host"])
def test_every_flag_explains_itself(flags: tuple[Any, ...]) -> None:
    assert all(flag.help for flag in flags)
    assert len({flag.name for flag in flags}) == len(flags)


def test_help() -> None:
    assert read_pod_command(["--ipv6", "--help"], {}, NOBODY) is None
    assert read_host_command(["-h"], {}, NOBODY) is None


BOTH_REFUSE: dict[str, tuple[list[str], dict[str, str], str]] = {
    "unknown flag": (["--dsn"], {}, "unknown flag: --dsn"),
    "argument": (["apply"], {}, "unexpected argument 'apply'"),
    "switch": (["--ipv6=maybe"], {}, "flag --ipv6 is 'maybe': 'maybe' is not a boolean"),
    "switch of a variable": ([], {"AMBIENT_IPV6": "yes"}, "env AMBIENT_IPV6 is 'yes': 'yes' is not a boolean"),
    "native nftables": ([], {"NATIVE_NFTABLES": "on"}, "env NATIVE_NFTABLES is 'on'"),
    "forced": (
        [],
        {"FORCE_IPTABLES_BINARY": "auto"},
        "env FORCE_IPTABLES_BINARY is 'auto': write nothing, legacy, nft",
    ),
    "probe": ([], {"HOST_PROBE_SNAT_IP": "1.2.3"}, "env HOST_PROBE_SNAT_IP is '1.2.3'"),
    "probe of the other family": (["--host-probe-snat-ip=fd00::1"], {}, "flag --host-probe-snat-ip is 'fd00::1'"),
    "IPv6 probe": ([], {"HOST_PROBE_SNAT_IPV6": "::1"}, "env HOST_PROBE_SNAT_IPV6 is '::1': no packet from elsewhere"),
    "format": (["--format=yaml"], {}, "flag --format is 'yaml': write script, json, words"),
    "backend": (["--backend=ebpf"], {}, "flag --backend is 'ebpf'"),
    "verify and cleanup": (["--verify", "--cleanup"], {}, "--verify together with --cleanup"),
    "dry run": (["--dry-run=maybe"], {}, "flag -n, --dry-run is 'maybe'"),
}
POD_REFUSES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "DNS": ([], {"AMBIENT_DNS_CAPTURE": "ja"}, "env AMBIENT_DNS_CAPTURE is 'ja'"),
    "interface": (["--virtual-interfaces=eth0 -j ACCEPT"], {}, "flag --virtual-interfaces holds 'eth0 -j ACCEPT'"),
    "runtimes": ([], {"AMBIENT_SANDBOXED_RUNTIMES": "A B"}, "env AMBIENT_SANDBOXED_RUNTIMES is 'A B'"),
    "ambient": ([], {"AMBIENT_ENABLED": "yes"}, "env AMBIENT_ENABLED is 'yes'"),
    "selector": (["--ambient-enablement-selector=a"], {}, "flag --ambient-enablement-selector is 'a', expected a list"),
    "pod and ingress": (["--pod=a", "--ingress"], {}, "--pod together with --ingress"),
    "pod and interfaces": (["--pod=a", "--virtual-interfaces=b"], {}, "--pod together with --virtual-interfaces"),
    "namespace without a pod": (["--namespace-file=a"], {}, "--namespace-file without --pod"),
}
HOST_REFUSES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "uid": ([*NFT, "--kubelet-uid=root"], {}, "flag --kubelet-uid is 'root'"),
    "uid too high": (NFT, {"KUBELET_UID": "4294967295"}, "env KUBELET_UID is '4294967295'"),
    "a pod": (["--pod=a"], {}, "unknown flag: --pod"),
}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"), (BOTH_REFUSE | POD_REFUSES).values(), ids=BOTH_REFUSE | POD_REFUSES
)
def test_refused_for_a_pod(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(arguments, environment)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "environment", "message"), (BOTH_REFUSE | HOST_REFUSES).values(), ids=BOTH_REFUSE | HOST_REFUSES
)
def test_refused_for_the_host(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_host(arguments, environment)
    assert message in caught.value.message


def test_a_switch_with_a_word_is_told_how_to_write_it() -> None:
    with pytest.raises(UsageError) as caught:
        read(["--ipv6", "true"])
    assert caught.value.hint == "a switch takes its value with an equals sign: --flag=true"


WORDS = st.text(alphabet="*,-:/.x0159 +@a", max_size=8)
WORDS.validate()  # hypothesis reads its table of characters now: a pure test may not
NAMES = [flag.name for flag in POD_FLAGS if flag.name != "ambient-enablement-selector"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), WORDS), max_size=5))
def test_any_value_is_understood_or_refused(pairs: list[tuple[str, str]]) -> None:
    """What passes names interfaces that the kernel can have."""
    try:
        command = read_pod_command([f"--{name}={text}" for name, text in pairs], {}, MACHINE)
    except UsageError:
        return
    assert command is not None
    assert all(1 <= len(name) <= 15 and "/" not in name for name in command.parameters.virtual_interfaces)
