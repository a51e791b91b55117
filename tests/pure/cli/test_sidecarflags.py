"""The command line of `rules sidecar`, read without effects: every flag, shorthand and variable, and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cli.ruleparameters import Lookups, name_servers
from meshcni.cli.sidecarflags import FLAGS, PARAMETERS, SidecarCommand, read_command
from meshcni.errors import UsageError
from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, NumberRange
from meshcni.rules.model import Backend, Family

RESOLVER = "search a\nnameserver 10.0.0.53\nnameserver ::127.0.0.53\n# nameserver 9.9.9.9\nnameserver x\n"
LOOKUPS = Lookups(
    service={"http": 80, "http-alt": 8080}.get,
    user={"istio-proxy": 1500, "envoy": 1600}.get,
    group={"mesh": 2000, "envoy": 2600}.get,
    resolver_text=lambda: RESOLVER,
)
NOBODY = replace(LOOKUPS, user=lambda _: None, resolver_text=lambda: "")


def one(*numbers: int) -> tuple[NumberRange, ...]:
    return tuple(map(NumberRange.single, numbers))


# What the original's command line programs without any flag, on a machine without its user.
DEFAULTS = replace(
    Interception(),
    inbound_ports=(),
    inbound_exclude_ports=(),
    outbound_exclude_ports=(),
    outbound_cidrs=(),
)


def read(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, lookups: Lookups = NOBODY
) -> SidecarCommand:
    command = read_command(arguments, environment or {}, lookups)
    assert command is not None
    return command


def test_the_defaults() -> None:
    assert read([]) == SidecarCommand(
        interception=DEFAULTS,
        pod_file="",
        backend=Backend.IPTABLES,
        format="script",
        families=frozenset(Family),
        family_policy="by-address",
        apply=False,
        cleanup_only=False,
        force_iptables="",
        netns_path="",
        validate=False,
        probe_port=15002,
        probe_timeout_seconds=5.0,
        warnings=(),
    )


# The original's table: flag, shorthand, variable; then a text and the fields that it sets.
CONTRACT: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("envoy-port", "p", "", "15101", {"proxy_port": 15101}),
    ("inbound-capture-port", "z", "INBOUND_CAPTURE_PORT", "15106", {"inbound_capture_port": 15106}),
    ("inbound-tunnel-port", "e", "INBOUND_TUNNEL_PORT", "15108", {"inbound_tunnel_port": 15108}),
    ("proxy-uid", "u", "PROXY_UID", "5,6", {"proxy_uids": one(5, 6), "proxy_gids": one(5, 6)}),
    ("proxy-gid", "g", "PROXY_GID", "7", {"proxy_gids": one(7)}),
    (
        "istio-inbound-interception-mode", "m", "ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY",
        {"mode": InterceptionMode.TPROXY},
    ),
    ("istio-inbound-ports", "b", "ISTIO_INBOUND_PORTS", "*", {"inbound_ports": EVERYTHING}),
    ("istio-local-exclude-ports", "d", "ISTIO_LOCAL_EXCLUDE_PORTS", "22,80", {"inbound_exclude_ports": one(22, 80)}),
    (
        "istio-exclude-interfaces", "c", "ISTIO_EXCLUDE_INTERFACES", "eth1,eth2",
        {"exclude_interfaces": ("eth1", "eth2")},
    ),
    ("istio-service-cidr", "i", "ISTIO_SERVICE_CIDR", "10.0.0.0/8", {"outbound_cidrs": (ip_network("10.0.0.0/8"),)}),
    (
        "istio-service-exclude-cidr", "x", "ISTIO_SERVICE_EXCLUDE_CIDR", "fd00::/8",
        {"outbound_exclude_cidrs": (ip_network("fd00::/8"),)},
    ),
    ("istio-outbound-ports", "q", "ISTIO_OUTBOUND_PORTS", "443", {"outbound_ports": one(443)}),
    (
        "istio-local-outbound-ports-exclude", "o", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", "25",
        {"outbound_exclude_ports": one(25)},
    ),
    ("kube-virt-interfaces", "k", "KUBE_VIRT_INTERFACES", "vnet0", {"virtual_interfaces": ("vnet0",)}),
    ("istio-inbound-tproxy-mark", "t", "ISTIO_INBOUND_TPROXY_MARK", "1234", {"tproxy_mark": 1234}),
    ("istio-inbound-tproxy-route-table", "r", "ISTIO_INBOUND_TPROXY_ROUTE_TABLE", "99", {"tproxy_table": 99}),
    ("capture-all-dns", "", "CAPTURE_ALL_DNS", "true", {"capture_all_dns": True}),
    ("drop-invalid", "", "DROP_INVALID", "1", {"drop_invalid": True}),
    ("drop-invalid", "", "INVALID_DROP", "t", {"drop_invalid": True}),
    ("dual-stack", "", "DUAL_STACK", "TRUE", {"dual_stack": True}),
    ("dual-stack", "", "ISTIO_DUAL_STACK", "T", {"dual_stack": True}),
)  # fmt: skip
IDS = [variable or flag for flag, _, variable, _, _ in CONTRACT]


@pytest.mark.parametrize(("flag", "short", "variable", "text", "values"), CONTRACT, ids=IDS)
def test_contract(flag: str, short: str, variable: str, text: str, values: dict[str, Any]) -> None:
    expected = replace(DEFAULTS, **values)
    assert read([f"--{flag}={text}"]).interception == expected
    if short:
        spellings: tuple[list[str], ...] = ([f"-{short}", text], [f"-{short}{text}"], [f"-{short}={text}"])
        assert all(read(spelling).interception == expected for spelling in spellings)
    if variable:
        assert read([], {variable: text}).interception == expected


def test_the_contract_holds_every_parameter() -> None:
    assert {flag for flag, *_ in CONTRACT} | {"redirect-dns"} == {flag.name for flag in PARAMETERS}
    assert read([], {"ENVOY_PORT": "1"}).interception == DEFAULTS  # the one flag without a variable


PRECEDENCE: dict[str, tuple[list[str], dict[str, str], dict[str, Any]]] = {
    "a flag beats a variable": (["-b", "80"], {"ISTIO_INBOUND_PORTS": "*"}, {"inbound_ports": one(80)}),
    "an empty flag beats a variable": (["-b", ""], {"ISTIO_INBOUND_PORTS": "*"}, {}),
    "a false flag beats a variable": (["--drop-invalid=false"], {"DROP_INVALID": "true"}, {}),
    "the extra variable beats the first": ([], {"DROP_INVALID": "true", "INVALID_DROP": "false"}, {}),
    "an unreadable extra variable leaves it to the first": (
        [],
        {"DROP_INVALID": "true", "INVALID_DROP": "yes"},
        {"drop_invalid": True},
    ),
    "an empty text variable counts as set": ([], {"PROXY_UID": ""}, {}),
    "an empty switch variable does not": ([], {"INVALID_DROP": "", "DROP_INVALID": "1"}, {"drop_invalid": True}),
    "the last flag wins": (["-b1", "-b2"], {}, {"inbound_ports": one(2)}),
}


@pytest.mark.parametrize(("arguments", "environment", "values"), PRECEDENCE.values(), ids=PRECEDENCE)
def test_precedence(arguments: list[str], environment: dict[str, str], values: dict[str, Any]) -> None:
    assert read(arguments, environment).interception == replace(DEFAULTS, **values)


@pytest.mark.parametrize("variable", ["DROP_INVALID", "DUAL_STACK", "NATIVE_NFTABLES", "RECONCILE", "PROBE_TIMEOUT"])
def test_an_unreadable_variable_is_passed_over_and_said(variable: str) -> None:
    command = read([], {variable: "maybe"})
    assert command.interception == DEFAULTS
    (warning,) = command.warnings
    assert warning.startswith(f"env {variable} was passed over: 'maybe'")


TEXTS: dict[str, tuple[list[str], dict[str, Any]]] = {  # what iptables takes, we take
    "range of ports": (["-b", "8000:8010"], {"inbound_ports": (NumberRange(8000, 8010),)}),
    "range of ports, nft's way": (["-d", "80-90"], {"inbound_exclude_ports": (NumberRange(80, 90),)}),
    "range without a first port": (["-d", ":90"], {"inbound_exclude_ports": (NumberRange(0, 90),)}),
    "range without a last port": (["-d", "90:"], {"inbound_exclude_ports": (NumberRange(90, 65535),)}),
    "service": (["-o", "http,http-alt"], {"outbound_exclude_ports": one(80, 8080)}),
    "hexadecimal port": (["-o", "0x50"], {"outbound_exclude_ports": one(80)}),
    "order and repetitions stay": (["-d", "90,80,90"], {"inbound_exclude_ports": one(90, 80, 90)}),
    "empty items are dropped": (["-d", ",80,,90,"], {"inbound_exclude_ports": one(80, 90)}),
    "nothing is added to exclusions": (
        ["-b*", "-d", "80"],
        {"inbound_ports": EVERYTHING, "inbound_exclude_ports": one(80)},
    ),
    "user by name, whose group has another number": (
        ["-u", "envoy"],
        {"proxy_uids": one(1600), "proxy_gids": one(2600)},
    ),
    "user by name without such a group": (["-u", "istio-proxy"], {"proxy_uids": one(1500), "proxy_gids": one(1500)}),
    "range of users": (["-u", "5-9"], {"proxy_uids": (NumberRange(5, 9),), "proxy_gids": (NumberRange(5, 9),)}),
    "group by name": (["-g", "mesh"], {"proxy_uids": one(1500), "proxy_gids": one(2000)}),
    "no user: the one of the proxy": ([], {"proxy_uids": one(1500), "proxy_gids": one(1500)}),
    "host bits are masked": (["-i", "10.1.2.3/8"], {"outbound_cidrs": (ip_network("10.0.0.0/8"),)}),
    "every destination": (["-i", "*"], {"outbound_cidrs": EVERYTHING}),
    "any other mode is REDIRECT": (["-m", "tproxy"], {}),
    "interface wildcard": (["-c", "eth+"], {"exclude_interfaces": ("eth+",)}),
    "interface wildcard of nft": (["-c", "eth*,net1"], {"exclude_interfaces": ("eth+", "net1")}),
    "hexadecimal mark": (["-t", "0x539"], {"tproxy_mark": 1337}),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "values"), TEXTS.values(), ids=TEXTS)
def test_texts(arguments: list[str], values: dict[str, Any]) -> None:
    named = {"proxy_uids": one(1500), "proxy_gids": one(1500)}
    assert read(arguments, {}, LOOKUPS).interception == replace(DEFAULTS, **{**named, **values})


ENVIRONMENT_ONLY: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "loopback": ({"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.0.0.0/8"}, {"loopback_cidr": IPv4Network("127.0.0.0/8")}),
    "groups": ({"ISTIO_OUTBOUND_OWNER_GROUPS": "5,mesh,7-9"}, {"owner_groups": (*one(5, 2000), NumberRange(7, 9))}),
    "every group": ({"ISTIO_OUTBOUND_OWNER_GROUPS": "*"}, {}),
    "an empty list of groups captures nobody": ({"ISTIO_OUTBOUND_OWNER_GROUPS": ""}, {"owner_groups": ()}),
    "excluded groups": ({"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "5"}, {"owner_groups_exclude": one(5)}),
    "user of Envoy": ({"ENVOY_USER": "envoy"}, {"proxy_uids": one(1600), "proxy_gids": one(1600)}),
    "unknown user of Envoy": ({"ENVOY_USER": "nobody-here"}, {"proxy_uids": one(1337), "proxy_gids": one(1337)}),
}


@pytest.mark.parametrize(("environment", "values"), ENVIRONMENT_ONLY.values(), ids=ENVIRONMENT_ONLY)
def test_environment_only(environment: dict[str, str], values: dict[str, Any]) -> None:
    named = {"proxy_uids": one(1500), "proxy_gids": one(1500)}
    assert read([], environment, LOOKUPS).interception == replace(DEFAULTS, **{**named, **values})


# --- DNS --------------------------------------------------------------------------------------------------------------

SERVERS = (ip_address("10.0.0.53"), ip_address("::127.0.0.53"))


def test_the_resolvers_servers_are_captured() -> None:
    interception = read(["--redirect-dns"], {}, LOOKUPS).interception
    assert interception is not None
    assert (interception.redirect_dns, interception.dns_servers) == (True, SERVERS)


@pytest.mark.parametrize("variable", ["REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"])
def test_capturing_all_dns_reads_no_resolver(variable: str) -> None:
    def unreadable() -> str:
        raise AssertionError("read the resolver's configuration")

    command = read(["--capture-all-dns"], {variable: "true"}, replace(NOBODY, resolver_text=unreadable))
    assert command.interception == replace(DEFAULTS, redirect_dns=True, capture_all_dns=True)


def test_without_a_server_dns_is_not_captured_and_that_is_said() -> None:
    command = read(["--redirect-dns"])
    assert command.interception == DEFAULTS
    assert "DNS is not captured" in command.warnings[0]


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        (RESOLVER, SERVERS),
        ("", ()),
        ("nameserver", ()),
        ("  nameserver\t1.1.1.1 # comment", (ip_address("1.1.1.1"),)),
        ("nameserver fe80::1%eth0", (ip_address("fe80::1"),)),
        ("nameservers 1.1.1.1\noptions nameserver 1.1.1.1", ()),
    ],
)
def test_name_servers(text: str, servers: tuple[object, ...]) -> None:
    assert name_servers(text) == servers


# --- what to do -------------------------------------------------------------------------------------------------------

ACTIONS: dict[str, tuple[list[str], dict[str, str], dict[str, Any]]] = {
    "apply": (["--apply"], {}, {"apply": True}),
    "dry run": (["--apply", "-n"], {}, {"apply": False}),
    "dry run by variable": (["--apply"], {"DRY_RUN": "true"}, {"apply": False}),
    "skip": (["--apply", "--skip-rule-apply"], {}, {"apply": False}),
    "native nftables": (["--native-nftables"], {}, {"backend": Backend.NFTABLES}),
    "native nftables by variable": ([], {"NATIVE_NFTABLES": "true"}, {"backend": Backend.NFTABLES}),
    "backend": (["--backend", "nftables"], {}, {"backend": Backend.NFTABLES}),
    "backend beats native nftables": (["--backend=iptables", "--native-nftables"], {}, {"backend": Backend.IPTABLES}),
    "forced": (["--force-iptables-binary", "legacy"], {}, {"force_iptables": "legacy"}),
    "forced by variable": ([], {"FORCE_IPTABLES_BINARY": "nft"}, {"force_iptables": "nft"}),
    "format": (["--format=words"], {}, {"format": "words"}),
    "families": (["--families", "ipv6"], {}, {"families": frozenset({Family.V6})}),
    "family policy": ([], {"FAMILY_POLICY": "original"}, {"family_policy": "original"}),
    "an empty family policy": ([], {"FAMILY_POLICY": ""}, {"family_policy": "by-address"}),
    "cleanup": (["--cleanup-only"], {}, {"cleanup_only": True}),
    "cleanup in short": (["--cleanup"], {}, {"cleanup_only": True}),
    "netns": (["--network-namespace", "/run/netns/a"], {}, {"netns_path": "/run/netns/a"}),
    "validation": (
        ["--run-validation", "--iptables-probe-port", "0x10", "--probe-timeout=1m"],
        {},
        {"validate": True, "probe_port": 16, "probe_timeout_seconds": 60.0},
    ),
    "validation by variable": ([], {"RUN_VALIDATION": "true"}, {"validate": True}),
    "accepted": (["--reconcile", "--force-apply", "--cni-mode"], {}, {}),
    "log flags": (["--log_output_level=all:debug", "--log_target", "stderr", "--log_as_json"], {}, {}),
}


@pytest.mark.parametrize(("arguments", "environment", "values"), ACTIONS.values(), ids=ACTIONS)
def test_actions(arguments: list[str], environment: dict[str, str], values: dict[str, Any]) -> None:
    assert read(arguments, environment) == replace(read([]), **values)


def test_a_pod_gives_the_parameters() -> None:
    command = read(["--pod", "pod.yaml", "--apply"])
    assert (command.interception, command.pod_file, command.apply) == (None, "pod.yaml", True)


def test_help() -> None:
    assert read_command(["-b*", "--help"], {}, NOBODY) is None


def test_every_flag_explains_itself() -> None:
    assert all(flag.help for flag in FLAGS)
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)


REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "unknown flag": (["--istio-ports=1"], {}, "unknown flag: --istio-ports"),
    "argument": (["apply"], {}, "unexpected argument 'apply'"),
    "boolean with a word": (["--dry-run", "false"], {}, "unexpected argument 'false'"),
    "boolean": (["--dry-run=maybe"], {}, "flag -n, --dry-run is 'maybe': 'maybe' is not a boolean"),
    "duration": (["--probe-timeout=5"], {}, "flag --probe-timeout is '5': '5' is not a duration"),
    "probe port": (["--iptables-probe-port=x"], {}, "flag --iptables-probe-port is 'x'"),
    "port": (["-b", "80,nonsense"], {}, "flag -b, --istio-inbound-ports is '80,nonsense': 'nonsense' is no port"),
    "port of a variable": ([], {"ISTIO_INBOUND_PORTS": "x"}, "env ISTIO_INBOUND_PORTS is 'x': 'x' is no port"),
    "port too high": (["-d", "65536"], {}, "'65536' is no port"),
    "star among excluded ports": (["-d", "*"], {}, "'*' is no port"),
    "empty range": (["-d", "90:80"], {}, "'90:80' is an empty range"),
    "half a range": (["-d", "90:x"], {}, "flag -d, --istio-local-exclude-ports is '90:x'"),
    "proxy port": (["-p", "http"], {}, "flag -p, --envoy-port is 'http'"),
    "empty proxy port": (["-p", ""], {}, "flag -p, --envoy-port is ''"),
    "empty variable of a port": ([], {"INBOUND_CAPTURE_PORT": ""}, "env INBOUND_CAPTURE_PORT is ''"),
    "user": (["-u", "ghost"], {}, "flag -u, --proxy-uid is 'ghost': 'ghost' is no id"),
    "user too high": (["-u", "4294967295"], {}, "'4294967295' is no id"),
    "group": (["-g", "ghost"], {}, "flag -g, --proxy-gid is 'ghost'"),
    "prefix": (["-i", "10.0.0.1"], {}, "flag -i, --istio-service-cidr is '10.0.0.1': '10.0.0.1' is no prefix"),
    "excluded star": (["-x", "*"], {}, "'*' cannot be excluded"),
    "excluded prefix": (["-x", "10.0.0.0/33"], {}, "'10.0.0.0/33' is no prefix"),
    "interface": (["-c", "eth0 -j ACCEPT"], {}, "'eth0 -j ACCEPT' is no interface name"),
    "any interface": (["-c", "+"], {}, "'+' is every interface"),
    "any interface of nft": (["-k", "*"], {}, "'*' is every interface"),
    "long interface": (["-k", "a" * 16], {}, "is no interface name"),
    "mark": (["-t", "4294967296"], {}, "'4294967296' is not within 0 to 4294967295"),
    "table": (["-r", "main"], {}, "flag -r, --istio-inbound-tproxy-route-table is 'main'"),
    "loopback": ([], {"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "10.0.0.0/8"}, "is no IPv4 loopback prefix"),
    "groups": ([], {"ISTIO_OUTBOUND_OWNER_GROUPS": ",".join(map(str, range(65)))}, "65 groups: at most 64"),
    "excluded group": ([], {"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "ghost"}, "'ghost' is no id"),
    "format": (["--format", "xml"], {}, "flag --format is 'xml': write script, json, words"),
    "backend": (["--backend", "ebpf"], {}, "flag --backend is 'ebpf': write iptables, nftables"),
    "forced": (["--force-iptables-binary=auto"], {}, "flag --force-iptables-binary is 'auto'"),
    "families": (["--families=4"], {}, "flag --families is '4'"),
    "family policy": (["--family-policy=x"], {}, "flag --family-policy is 'x'"),
    "probe port too high": (["--iptables-probe-port=65536"], {}, "'65536' is not within 0 to 65535"),
    "pod and parameters": (["--pod", "a", "-b", "80"], {}, "--pod together with -b, --istio-inbound-ports"),
}


@pytest.mark.parametrize(("arguments", "environment", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(arguments, environment)
    assert message in caught.value.message


WORDS = st.text(alphabet="*,-:/.x0159 ", max_size=8)
WORDS.validate()  # hypothesis reads its table of characters now: a pure test may not


@given(st.lists(st.tuples(st.sampled_from([flag.name for flag in FLAGS]), WORDS), max_size=5))
def test_any_value_is_understood_or_refused(pairs: list[tuple[str, str]]) -> None:
    """What passes is within the ranges that the kernel knows."""
    try:
        command = read_command([f"--{name}={text}" for name, text in pairs], {}, NOBODY)
    except UsageError:
        return
    assert command is not None
    if command.interception is not None:
        for port in command.interception.inbound_exclude_ports + command.interception.outbound_exclude_ports:
            assert 0 <= port.first <= port.last <= 65535
