"""The table of settings against the contract's list, and how values are settled."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
import yaml  # noqa: F401  (selectors import it when they are read; no file may be opened during a test)
from hypothesis import given
from hypothesis import strategies as st

from meshcni.agent.resolution import resolve, show
from meshcni.agent.settings import ROWS, Effect, Settings
from meshcni.errors import SettingError, UsageError
from meshcni.pods.ambientsettings import HOST_IP

# flag, variable, value without either: cni/pkg/cmd/root.go and pkg/log/options.go, written down independently.
ORIGINAL_FLAGS = """
cni-conf-name CNI_CONF_NAME ''
chained-cni-plugin CHAINED_CNI_PLUGIN true
istio-owned-cni-config ISTIO_OWNED_CNI_CONFIG false
istio-owned-cni-config-filename ISTIO_OWNED_CNI_CONFIG_FILENAME ''
mounted-cni-net-dir MOUNTED_CNI_NET_DIR /host/etc/cni/net.d
cni-agent-run-dir CNI_AGENT_RUN_DIR /var/run/istio-cni
kubeconfig-mode KUBECONFIG_MODE 0600
cni-conf-group-read CNI_CONF_GROUP_READ false
kube-ca-file KUBE_CA_FILE ''
skip-tls-verify SKIP_TLS_VERIFY false
monitoring-port MONITORING_PORT 15014
ztunnel-uds-address ZTUNNEL_UDS_ADDRESS /var/run/ztunnel/ztunnel.sock
ambient-enabled AMBIENT_ENABLED false
enable-ambient-detection-retry ENABLE_AMBIENT_DETECTION_RETRY false
repair-enabled REPAIR_ENABLED true
repair-delete-pods REPAIR_DELETE_PODS false
repair-label-pods REPAIR_LABEL_PODS false
repair-broken-pod-label-key REPAIR_BROKEN_POD_LABEL_KEY cni.istio.io/uninitialized
repair-broken-pod-label-value REPAIR_BROKEN_POD_LABEL_VALUE true
repair-node-name REPAIR_NODE_NAME ''
repair-sidecar-annotation REPAIR_SIDECAR_ANNOTATION sidecar.istio.io/status
repair-init-container-name REPAIR_INIT_CONTAINER_NAME istio-validation
repair-init-container-termination-message REPAIR_INIT_CONTAINER_TERMINATION_MESSAGE ''
repair-init-container-exit-code REPAIR_INIT_CONTAINER_EXIT_CODE 126
repair-label-selectors REPAIR_LABEL_SELECTORS ''
repair-field-selectors REPAIR_FIELD_SELECTORS ''
cni-network-config CNI_NETWORK_CONFIG ''
cni-network-config-file CNI_NETWORK_CONFIG_FILE ''
log-level LOG_LEVEL warn
log_output_level - ''
log_stacktrace_level - ''
log_caller - ''
log_as_json - false
log_target - stdout
ctrlz_port - 9876
ctrlz_address - localhost
"""
ORIGINAL_VARIABLES = """
EXCLUDE_NAMESPACES POD_NAMESPACE AMBIENT_ENABLEMENT_SELECTOR AMBIENT_DNS_CAPTURE AMBIENT_IPV6
AMBIENT_DISABLE_SAFE_UPGRADE AMBIENT_RECONCILE_POD_RULES_ON_STARTUP NATIVE_NFTABLES REPAIR_REPAIR_PODS
FORCE_IPTABLES_BINARY KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_SERVICE_PROTOCOL KUBERNETES_NODE_NAME
ALLOW_SWITCH_TO_HOST_NS SYSTEM_NAMESPACE NODE_NAME POD_NAME REVISION HOST_PROBE_SNAT_IP HOST_PROBE_SNAT_IPV6
AMBIENT_USE_SCOPED_XTABLES_LOCKING AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR
ISTIO_OUTBOUND_OWNER_GROUPS ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE ENVOY_USER DRY_RUN_FILE_PATH REPAIR_RUN_AS_DAEMON
CURRENT_AGENT_VERSION GOMEMLIMIT ISTIO_OWNED_CNI_CONF_FILENAME ISTIO_WATCH_NAMESPACE
"""
VARIABLES = set(ORIGINAL_VARIABLES.split())
IGNORED = {"CNI_NETWORK_CONFIG", "LOG_LEVEL", "REPAIR_RUN_AS_DAEMON", "CURRENT_AGENT_VERSION", "GOMEMLIMIT"}
IGNORED |= {"ISTIO_WATCH_NAMESPACE", "REVISION"}
FLAG_CASES = [line.split() for line in ORIGINAL_FLAGS.strip().splitlines()]


@pytest.mark.parametrize(("flag", "variable", "default"), FLAG_CASES)
def test_flag_of_the_original(flag: str, variable: str, default: str) -> None:
    row = next(row for row in ROWS if row.flag == flag)
    assert row.variables[:1] == (() if variable == "-" else (variable,))
    assert row.kind.show(row.default) == default.strip("'")
    assert not row.ours


@pytest.mark.parametrize("variable", sorted(VARIABLES))
def test_variable_of_the_original(variable: str) -> None:
    rows = [row for row in ROWS if variable in row.variables]
    assert len(rows) == 1
    assert not rows[0].ours


def test_nothing_is_set_by_two_rows() -> None:
    names = [name for row in ROWS for name in (row.flag, *row.variables) if name]
    assert len(names) == len(set(names))


def test_what_the_table_adds_is_marked() -> None:
    known = {flag for flag, _, _ in FLAG_CASES}
    for row in ROWS:
        original = row.flag in known or bool(set(row.variables) & VARIABLES)
        assert row.ours is not original, row.name


def test_ignored_ones_take_anything() -> None:
    settings = resolve([], dict.fromkeys(IGNORED, "\x00 whatever"))
    assert {name for row in ROWS if row.effect is Effect.IGNORED for name in row.variables} >= IGNORED
    assert settings.gomemlimit == "\x00 whatever"


def test_defaults_need_nothing() -> None:
    assert resolve([], {}) == Settings()


def test_flag_wins_over_variable_over_default() -> None:
    assert resolve([], {}).monitoring_port == 15014
    assert resolve([], {"MONITORING_PORT": "1"}).monitoring_port == 1
    settings = resolve(["--monitoring-port=2", "--monitoring-port", "3"], {"MONITORING_PORT": "1"})
    assert (settings.monitoring_port, settings.origins["monitoring_port"]) == (3, "flag --monitoring-port")


@pytest.mark.parametrize("row", [row for row in ROWS if row.variables], ids=lambda row: row.name)
def test_empty_variable_is_the_default(row: object) -> None:
    settings = resolve([], dict.fromkeys(row.variables, ""))  # type: ignore[attr-defined]
    assert settings == Settings()


def test_both_names_of_the_owned_conf() -> None:
    for name in ("ISTIO_OWNED_CNI_CONFIG_FILENAME", "ISTIO_OWNED_CNI_CONF_FILENAME"):
        settings = resolve([], {name: "01-a.conflist"})
        assert (settings.owned_conf_name, settings.origins["istio_owned_cni_config_filename"]) == (
            "01-a.conflist",
            f"environment variable {name}",
        )
    both = {"ISTIO_OWNED_CNI_CONFIG_FILENAME": "a.conflist", "ISTIO_OWNED_CNI_CONF_FILENAME": "b.conflist"}
    assert resolve([], both).owned_conf_name == "a.conflist"


@pytest.mark.parametrize(("text", "mode"), [("0600", 0o600), ("600", 600), ("0x180", 0o600), ("0o640", 0o640)])
def test_mode_has_go_bases(text: str, mode: int) -> None:
    assert resolve([], {"KUBECONFIG_MODE": text}).kubeconfig_mode == mode


VALUES = [
    ("EXCLUDE_NAMESPACES", " a, b ,,c ", "exclude_namespaces", ("a", "b", "c")),
    ("AMBIENT_ENABLED", "T", "ambient_enabled", True),
    ("CHAINED_CNI_PLUGIN", "0", "chained_cni_plugin", False),
    ("HOST_PROBE_SNAT_IP", "10.0.0.1", "host_probe_snat_ip", IPv4Address("10.0.0.1")),
    ("HOST_PROBE_SNAT_IP", "hostIP", "host_probe_snat_ip", HOST_IP),
    ("HOST_PROBE_SNAT_IP", "HOSTIP", "host_probe_snat_ip", HOST_IP),
    ("HOST_PROBE_SNAT_IPV6", "hostip", "host_probe_snat_ipv6", HOST_IP),
    ("HOST_PROBE_SNAT_IPV6", "fd00::7", "host_probe_snat_ipv6", IPv6Address("fd00::7")),
    ("ZTUNNEL_UDS_ADDRESS", "/" + "x" * 106, "ztunnel_uds_address", "/" + "x" * 106),
    ("HOST_PROC_DIR", "/host/proc/", "host_proc_dir", "/host/proc"),
    ("KUBELET_UID", "0", "kubelet_uid", 0),
    ("KUBELET_UID", "4294967294", "kubelet_uid", 2**32 - 2),
    ("AMBIENT_VERIFY_SECONDS", "1", "ambient_verify_seconds", 1),
    ("AMBIENT_VERIFY_SECONDS", "3600", "ambient_verify_seconds", 3600),
    ("AMBIENT_ZTUNNEL_WAIT_SECONDS", "0.5", "ambient_ztunnel_wait_seconds", 0.5),
    ("AMBIENT_UNENROLL_ON_UNINSTALL", "true", "ambient_unenroll_on_uninstall", True),
    ("AMBIENT_SANDBOXED_RUNTIMES", "kata-*, gvisor ", "ambient_sandboxed_runtimes", ("kata-*", "gvisor")),
    ("AMBIENT_SANDBOXED_RUNTIMES", "none", "ambient_sandboxed_runtimes", ()),
    ("MONITORING_PORT", "-1", "monitoring_port", -1),
    ("AGENT_WAIT_SECONDS", "1.5", "agent_wait_seconds", 1.5),
    ("MOUNTED_CNI_NET_DIR", "/etc/cni/net.d/", "mounted_cni_net_dir", "/etc/cni/net.d"),
    ("CNI_CONF_NAME", "undetectable.file", "cni_conf_name", "undetectable.file"),
    ("FORCE_IPTABLES_BINARY", "legacy", "force_iptables_binary", "legacy"),
]


@pytest.mark.parametrize(("variable", "text", "name", "value"), VALUES)
def test_value(variable: str, text: str, name: str, value: object) -> None:
    assert getattr(resolve([], {variable: text}), name) == value


SHOWN = [
    ({"HOST_PROBE_SNAT_IP": "HostIp"}, "host_probe_snat_ip", "hostIP"),
    ({}, "host_probe_snat_ipv6", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
    ({}, "kubelet_uid", ""),
    ({"KUBELET_UID": "0"}, "kubelet_uid", "0"),
    ({}, "ambient_sandboxed_runtimes", "gvisor,runsc,kata*,firecracker*"),
    ({"AMBIENT_SANDBOXED_RUNTIMES": "none"}, "ambient_sandboxed_runtimes", "none"),
]


@pytest.mark.parametrize(("variables", "name", "text"), SHOWN)
def test_a_value_is_shown_as_it_can_be_written(variables: dict[str, str], name: str, text: str) -> None:
    settings = resolve([], variables)
    (shown,) = [one for one in show(settings) if one.row.name == name]
    assert shown.value == text
    written = dict.fromkeys(shown.row.variables, shown.value)
    assert getattr(resolve([], written), name) == getattr(settings, name)


def test_selectors() -> None:
    text = "- podSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}\n"
    (selector,) = resolve([], {"AMBIENT_ENABLEMENT_SELECTOR": text}).ambient_enablement_selector
    assert selector.to_object() == {
        "podSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}},
        "namespaceSelector": {},
    }


BAD_VALUES = [
    ("AMBIENT_ENABLED", "yes", "true or false"),
    ("CHAINED_CNI_PLUGIN", " true", "true or false"),
    ("MONITORING_PORT", "70000", "a port"),
    ("HEALTH_PORT", "0", "1 to 65535"),
    ("HEALTH_PORT", "http", "1 to 65535"),
    ("KUBECONFIG_MODE", "0800", "a file mode"),
    ("KUBECONFIG_MODE", "rw", "a file mode"),
    ("MOUNTED_CNI_NET_DIR", "etc/cni", "an absolute path"),
    ("CNI_CONF_NAME", "../x.conflist", "a file name"),
    ("ISTIO_OWNED_CNI_CONFIG_FILENAME", "x.conf", "ends in .conflist"),
    ("ISTIO_OWNED_CNI_CONF_FILENAME", "a/x.conflist", "a file name"),
    ("AGENT_WAIT_SECONDS", "nan", "seconds"),
    ("AGENT_WAIT_SECONDS", "0", "seconds"),
    ("AGENT_WAIT_SECONDS", "20s", "seconds"),
    ("AGENT_WAIT_SECONDS", "601", "at most 600"),  # the plugin would refuse every ADD with such a conf
    ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8", "within 127.0.0.0/8"),
    ("ISTIO_OUTBOUND_OWNER_GROUPS", "admins", "group ids"),
    ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "*", "group ids"),
    ("FORCE_IPTABLES_BINARY", "ebtables", "legacy, nft"),
    ("FAMILY_POLICY", "both", "by-address, original"),
    ("HOST_PROBE_SNAT_IP", "::1", "an IPv4 address"),
    ("HOST_PROBE_SNAT_IPV6", "1.2.3.4", "an IPv6 address"),
    ("HOST_PROBE_SNAT_IP", "0.0.0.0", "hostIP for the node's own"),
    ("HOST_PROBE_SNAT_IP", "224.0.0.1", "as its source"),
    ("HOST_PROBE_SNAT_IPV6", "::1", "as its source"),
    ("HOST_PROBE_SNAT_IPV6", "fe80::1%eth0", "as its source"),
    ("ZTUNNEL_UDS_ADDRESS", "ztunnel.sock", "an absolute path"),
    ("ZTUNNEL_UDS_ADDRESS", "/run/ztunnel/", "an absolute path of a file"),
    ("ZTUNNEL_UDS_ADDRESS", "/" + "x" * 107, "it has 108 bytes"),
    ("HOST_PROC_DIR", "proc", "an absolute path"),
    ("KUBELET_UID", "-1", "a user id"),
    ("KUBELET_UID", "4294967295", "a user id"),
    ("KUBELET_UID", "root", "a user id"),
    ("AMBIENT_VERIFY_SECONDS", "0.5", "1 to 3600"),
    ("AMBIENT_VERIFY_SECONDS", "3601", "1 to 3600"),
    ("AMBIENT_ZTUNNEL_WAIT_SECONDS", "0", "seconds"),
    ("AMBIENT_SANDBOXED_RUNTIMES", "kata|x", "no name matches 'kata|x'"),
    ("AMBIENT_ENABLEMENT_SELECTOR", "{", "failed to parse ambient enablement selector"),
    ("AMBIENT_ENABLEMENT_SELECTOR", "a: b", "failed to parse ambient enablement selector"),
    ("REPAIR_INIT_CONTAINER_EXIT_CODE", "1.5", "an integer"),
]


@pytest.mark.parametrize(("variable", "text", "form"), BAD_VALUES)
def test_unreadable_value_names_setting_value_origin_and_form(variable: str, text: str, form: str) -> None:
    row = next(row for row in ROWS if variable in row.variables)
    with pytest.raises(SettingError) as caught:
        resolve([], {variable: text})
    said = str(caught.value)
    assert row.name in said
    assert repr(text) in said
    assert f"environment variable {variable}" in said
    assert form in said
    assert caught.value.exit_code == 1


def test_the_socket_of_ztunnel_must_not_be_taken_away() -> None:
    with pytest.raises(SettingError, match=r"ztunnel_uds_address cannot be ''.*it must not be empty.*an absolute path"):
        resolve(["--ztunnel-uds-address="], {})


def test_unreadable_flag_names_the_flag() -> None:
    with pytest.raises(SettingError, match="given by flag --kubeconfig-mode"):
        resolve(["--kubeconfig-mode=x"], {})


@pytest.mark.parametrize("level", ["loud", "default:loud", ":info", "a:b:loud"])
def test_unknown_level(level: str) -> None:
    with pytest.raises(SettingError, match="log_output_level"):
        resolve([f"--log_output_level={level}"], {})


def test_log_flags() -> None:
    levels = "--log_output_level=default:debug,cni-plugin:warn,error"
    settings = resolve([levels, "--log_target=a", "--log_target", "b", "--log_as_json"], {})
    assert settings.log_output_level == (("default", "debug"), ("cni-plugin", "warn"), ("default", "error"))
    assert settings.log_target == ("a", "b")
    assert settings.log_as_json is True
    assert resolve(["--log_output_level="], {}) == Settings(origins={"log_output_level": "flag --log_output_level"})


@pytest.mark.parametrize("arguments", [["--nonsense"], ["serve"], ["--monitoring-port"], ["-z"]])
def test_command_line_that_is_none(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        resolve(arguments, {})


@pytest.mark.parametrize(
    ("variables", "node"),
    [
        ({"NODE_NAME": "a", "KUBERNETES_NODE_NAME": "b", "REPAIR_NODE_NAME": "c"}, "a"),
        ({"KUBERNETES_NODE_NAME": "b", "REPAIR_NODE_NAME": "c"}, "b"),
        ({"REPAIR_NODE_NAME": "c"}, "c"),
        ({}, ""),
    ],
)
def test_name_of_the_node(variables: dict[str, str], node: str) -> None:
    assert resolve([], variables).node == node


@pytest.mark.parametrize(
    ("variables", "always"),
    [
        ({}, False),
        ({"DISABLE_SAFE_UPGRADE": "true"}, True),
        ({"AMBIENT_DISABLE_SAFE_UPGRADE": "true"}, False),
        ({"AMBIENT_DISABLE_SAFE_UPGRADE": "true", "AMBIENT_ENABLED": "true"}, True),
    ],
)
def test_when_every_stop_cleans_up(variables: dict[str, str], always: bool) -> None:
    assert resolve([], variables).cleans_up_always is always


def test_rule_environment_has_only_what_is_set() -> None:
    assert dict(resolve([], {"ISTIO_OUTBOUND_OWNER_GROUPS": "1,2", "ENVOY_USER": ""}).rule_environment) == {
        "ISTIO_OUTBOUND_OWNER_GROUPS": "1,2"
    }


def test_show_tells_value_and_origin() -> None:
    shown = {one.row.name: one for one in show(resolve(["--ambient-enabled"], {"KUBECONFIG_MODE": "0640"}))}
    assert (shown["ambient_enabled"].value, shown["ambient_enabled"].origin) == ("true", "flag --ambient-enabled")
    assert (shown["kubeconfig_mode"].value, shown["kubeconfig_mode"].origin) == (
        "0640",
        "environment variable KUBECONFIG_MODE",
    )
    assert shown["cni_conf_name"].origin == "default"
    assert shown["kubeconfig_mode"].as_object()["default"] == "0600"


TEXT = st.text(alphabet="truefals019-x.:,/ {}[]é\x00\n", max_size=20)


@given(TEXT, st.sampled_from([name for row in ROWS for name in row.variables]))
def test_any_text_is_a_value_or_a_setting_error(text: str, variable: str) -> None:
    try:
        settings = resolve([], {variable: text})
    except SettingError:
        return
    assert len(show(settings)) == len(ROWS)
