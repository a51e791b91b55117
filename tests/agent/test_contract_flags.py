"""The command line and environment of the original, seen from outside: all of it is accepted, in every spelling."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.agent.contract import BRIDGE, Node
from tests.agent.scene import wait_until

from meshcni import __version__, istio
from meshcni.agent.resolution import FLAGS as FLAGS_OF_THE_AGENT
from meshcni.agent.subcommands import PERSISTENT

# Flag, and a value that is not its default; directories come with each test. cni/pkg/cmd/root.go
FLAGS = {
    "cni-conf-name": "10-a.conflist",
    "istio-owned-cni-config-filename": "01-own.conflist",
    "kubeconfig-mode": "0640",
    "kube-ca-file": "",
    "monitoring-port": "15015",
    "ztunnel-uds-address": "/run/other/ztunnel.sock",
    "repair-broken-pod-label-key": "a/b",
    "repair-broken-pod-label-value": "yes",
    "repair-node-name": "some-node",
    "repair-sidecar-annotation": "a/c",
    "repair-init-container-name": "other-validation",
    "repair-init-container-termination-message": "message, with = and spaces",
    "repair-init-container-exit-code": "0x7f",
    "repair-label-selectors": "a=b,c!=d",
    "repair-field-selectors": "status.phase=Running",
    "cni-network-config": '{"a": 1}',
    "cni-network-config-file": "/nowhere",
    "log-level": "nonsense",
}
BOOLEANS = {
    "chained-cni-plugin": "true",
    "istio-owned-cni-config": "false",
    "cni-conf-group-read": "true",
    "skip-tls-verify": "true",
    "ambient-enabled": "true",
    "enable-ambient-detection-retry": "true",
    "repair-enabled": "false",
    "repair-delete-pods": "true",
    "repair-label-pods": "true",
}
WITHOUT_VARIABLE = {
    "log_output_level": "all:debug",
    "log_stacktrace_level": "default:none",
    "log_caller": "nobody,else",
    "log_target": "stdout",
    "ctrlz_port": "9877",
    "ctrlz_address": "*",
}
VARIABLES = {  # read from the environment only
    "EXCLUDE_NAMESPACES": "kube-system, istio-system,",
    "POD_NAMESPACE": "istio-system",
    "AMBIENT_ENABLEMENT_SELECTOR": "- podSelector: {matchLabels: {a: b}}",
    "AMBIENT_DNS_CAPTURE": "true",
    "AMBIENT_IPV6": "true",
    "AMBIENT_DISABLE_SAFE_UPGRADE": "false",
    "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP": "true",
    "NATIVE_NFTABLES": "true",
    "REPAIR_REPAIR_PODS": "true",
    "FORCE_IPTABLES_BINARY": "nft",
    "KUBERNETES_NODE_NAME": "some-node",
    "ALLOW_SWITCH_TO_HOST_NS": "false",
    "SYSTEM_NAMESPACE": "other-system",
    "NODE_NAME": "some-node",
    "POD_NAME": "istio-cni-node-x",
    "REVISION": "rev",
    "HOST_PROBE_SNAT_IP": "169.254.7.128",
    "HOST_PROBE_SNAT_IPV6": "fd16:9254:7127:1337:ffff:ffff:ffff:fffe",
    "AMBIENT_USE_SCOPED_XTABLES_LOCKING": "false",
    "AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE": "false",
    "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.0.0.1/32",
    "ISTIO_OUTBOUND_OWNER_GROUPS": "*",
    "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "1,2",
    "ENVOY_USER": "istio-proxy",
    "DRY_RUN_FILE_PATH": "/nowhere",
    "REPAIR_RUN_AS_DAEMON": "true",
    "CURRENT_AGENT_VERSION": "1.31",
    "GOMEMLIMIT": "500000000",
    "GOMAXPROCS": "1",
}


def variable(flag: str) -> str:
    return flag.upper().replace("-", "_")


def flags(node: Node) -> dict[str, str]:
    """All that take a value; the CA file must be there, because it is read."""
    (node.scene.directory / "other.crt").write_text("PEM")
    places = {"kube-ca-file": str(node.scene.directory / "other.crt")}
    places |= {"mounted-cni-net-dir": str(node.conf), "cni-agent-run-dir": str(node.run)}
    return FLAGS | WITHOUT_VARIABLE | places


def works(node: Node, *arguments: str, **environment: str) -> None:
    """It starts, installs, and says it is ready."""
    node.write("10-a.conflist", BRIDGE)
    node.start(*arguments, **environment).wait_ready()
    entry = node.entry("10-a.conflist")
    assert (entry["ambient_enabled"], entry["enable_ambient_detection_retry"]) == (True, True)
    assert node.kubeconfig.stat().st_mode & 0o777 == 0o640
    assert "insecure-skip-tls-verify: true" in node.kubeconfig.read_text()


def test_every_flag_with_an_equals_sign(node: Node) -> None:
    works(node, *(f"--{flag}={value}" for flag, value in (flags(node) | BOOLEANS).items()))


def test_every_flag_and_its_value_as_two_arguments(node: Node) -> None:
    given = [part for flag, value in flags(node).items() for part in (f"--{flag}", value)]
    given += [f"--{flag}" if value == "true" else f"--{flag}=F" for flag, value in BOOLEANS.items()]
    works(node, *given, "--log_as_json")


def test_every_variable(node: Node) -> None:
    given = {flag: value for flag, value in flags(node).items() if flag not in WITHOUT_VARIABLE} | BOOLEANS
    works(node, **{variable(flag): value for flag, value in given.items()}, **VARIABLES)


def test_every_variable_empty(node: Node) -> None:
    """As the chart and users set them: an empty one is as good as none (W-45)."""
    node.write("10-a.conflist", BRIDGE)
    kept = {"MOUNTED_CNI_NET_DIR", "CNI_AGENT_RUN_DIR"}
    names = {variable(flag) for flag in (*FLAGS, *BOOLEANS)} | set(VARIABLES)
    agent = node.start(**dict.fromkeys(names - kept, ""))
    wait_until("the entry", lambda: node.types("10-a.conflist") == ["bridge", "istio-cni"])
    assert node.entry("10-a.conflist")["pod_namespace"] == ""
    assert agent.process.poll() is None


def settings(node: Node, *arguments: str, **environment: str) -> dict[str, Any]:
    """What it makes of a command line and an environment."""
    done = node.scene.run("settings", "-o", "json", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row["value"] for row in json.loads(done.stdout)}


def test_order_and_reading(node: Node) -> None:
    found = settings(
        node,
        "--ambient-enabled=T",
        "--repair-enabled",
        "--monitoring-port=1",
        "--monitoring-port",
        "0x10",
        AMBIENT_ENABLED="false",
        REPAIR_ENABLED="0",
        SKIP_TLS_VERIFY="TRUE",
        CHAINED_CNI_PLUGIN="f",
        KUBECONFIG_MODE="600",
        MONITORING_PORT="7",
        REPAIR_INIT_CONTAINER_EXIT_CODE="0b11",
    )
    assert {
        "ambient_enabled": "true",
        "repair_enabled": "true",
        "skip_tls_verify": "true",
        "chained_cni_plugin": "false",
        "kubeconfig_mode": "01130",
        "monitoring_port": "16",
        "repair_init_container_exit_code": "3",
    }.items() <= found.items()


DEFAULTS = {
    "cni_conf_name": "",
    "chained_cni_plugin": "true",
    "istio_owned_cni_config": "false",
    "kubeconfig_mode": "0600",
    "cni_conf_group_read": "false",
    "skip_tls_verify": "false",
    "monitoring_port": "15014",
    "ztunnel_uds_address": "/var/run/ztunnel/ztunnel.sock",
    "ambient_enabled": "false",
    "enable_ambient_detection_retry": "false",
    "repair_enabled": "true",
    "repair_delete_pods": "false",
    "repair_label_pods": "false",
    "repair_broken_pod_label_key": "cni.istio.io/uninitialized",
    "repair_broken_pod_label_value": "true",
    "repair_sidecar_annotation": "sidecar.istio.io/status",
    "repair_init_container_name": "istio-validation",
    "repair_init_container_exit_code": "126",
    "host_probe_snat_ip": "169.254.7.127",
    "host_probe_snat_ipv6": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
    "ambient_use_scoped_xtables_locking": "true",
    "ambient_enable_aws_branch_eni_probe": "true",
    "system_namespace": "istio-system",
    "kubernetes_service_protocol": "https",
    "log_target": "stdout",
    "ctrlz_port": "9876",
    "ctrlz_address": "localhost",
}


def test_defaults(node: Node) -> None:
    found = settings(node, NATIVE_NFTABLES="", KUBERNETES_SERVICE_PROTOCOL="")
    assert DEFAULTS.items() <= found.items()
    done = node.scene.run("settings", "-o", "json", MOUNTED_CNI_NET_DIR="", CNI_AGENT_RUN_DIR="")
    places = {row["name"]: row["value"] for row in json.loads(done.stdout)}
    assert places["mounted_cni_net_dir"] == "/host/etc/cni/net.d"
    assert places["cni_agent_run_dir"] == "/var/run/istio-cni"


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--ambient-enabled=yes",), {}, ("'yes'", "ambient_enabled", "flag --ambient-enabled")),
        ((), {"SKIP_TLS_VERIFY": "on"}, ("'on'", "skip_tls_verify", "environment variable SKIP_TLS_VERIFY")),
        ((), {"KUBECONFIG_MODE": "rw"}, ("'rw'", "kubeconfig_mode", "environment variable KUBECONFIG_MODE")),
        ((), {"KUBECONFIG_MODE": "0900"}, ("'0900'", "kubeconfig_mode")),
        (("--monitoring-port", "http"), {}, ("'http'", "monitoring_port", "flag --monitoring-port")),
        (("--log_output_level=cni-agent:loud",), {}, ("'cni-agent:loud'", "flag --log_output_level")),
        ((), {"HOST_PROBE_SNAT_IP": "fd00::1"}, ("'fd00::1'", "environment variable HOST_PROBE_SNAT_IP")),
        ((), {"AMBIENT_ENABLEMENT_SELECTOR": "{"}, ("failed to parse ambient enablement selector",)),
        ((), {"FORCE_IPTABLES_BINARY": "ebtables"}, ("'ebtables'", "FORCE_IPTABLES_BINARY")),
    ],
)
def test_value_that_cannot_be_read_ends_the_start(
    node: Node, arguments: tuple[str, ...], environment: dict[str, str], words: tuple[str, ...]
) -> None:
    node.write("10-a.conflist", BRIDGE)
    done = node.scene.run(*arguments, **environment)
    assert done.returncode == 1
    for part in words:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert node.text("10-a.conflist") == BRIDGE


@pytest.mark.parametrize(
    "arguments",
    [("--nonsense",), ("--nonsense=1",), ("-x",), ("--monitoring-port",), ("nonsense",), ("--no-ambient-enabled",)],
)
def test_command_line_that_cannot_be_understood(node: Node, arguments: tuple[str, ...]) -> None:
    done = node.scene.run(*arguments)
    assert done.returncode not in (0, -9)
    assert arguments[0].partition("=")[0].lstrip("-") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("version",), ("version", "--output=")])
def test_version_as_text(node: Node, arguments: tuple[str, ...]) -> None:
    done = node.scene.run(*arguments)
    assert done.returncode == 0
    assert __version__ in done.stdout


@pytest.mark.parametrize("short", ["-s", "--short", "--short=true", "-s=true"])
def test_short_version(node: Node, short: str) -> None:
    assert node.scene.run("version", short).stdout == f"{__version__}\n"


@pytest.mark.parametrize("spelling", [("-o", "json"), ("-ojson",), ("-o=json",), ("--output=json",), ("-s", "-ojson")])
def test_version_as_json(node: Node, spelling: tuple[str, ...]) -> None:
    document = json.loads(node.scene.run("version", *spelling).stdout)
    assert document["clientVersion"]["version"] == __version__


def test_version_as_yaml(node: Node) -> None:
    lines = node.scene.run("version", "-o", "yaml").stdout.splitlines()
    assert lines[0] == "clientVersion:"
    assert f'  version: "{__version__}"' in lines


def test_version_in_a_form_that_is_none(node: Node) -> None:
    assert node.scene.run("version", "-o", "xml").returncode != 0


@pytest.mark.parametrize("command", ["version", "settings"])
def test_logging_flags_go_with_every_command(node: Node, command: str) -> None:
    """They are persistent flags of the program, before or after the command."""
    assert {flag.name for flag in PERSISTENT} == {flag.name for flag in FLAGS_OF_THE_AGENT if "_" in flag.name}
    for arguments in (("--log_as_json", command), (command, "--log_output_level=debug"), ("--ctrlz_port=1", command)):
        done = node.scene.run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")


def test_help(node: Node) -> None:
    done = node.scene.run("--help")
    assert done.returncode == 0
    for flag in (*FLAGS, *BOOLEANS, *WITHOUT_VARIABLE, "log_as_json", "mounted-cni-net-dir", "cni-agent-run-dir"):
        assert f"--{flag}" in done.stdout
    assert istio.PLUGIN_NAME in done.stdout
