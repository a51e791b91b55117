"""Every setting of the agent, in one table: the fields of `Settings`.

Each field is a row: its name, type and default, the flag and the environment variables that set it, what it means.
Upstream: cni/pkg/cmd/root.go, cni/pkg/config/config.go, cni/pkg/nodeagent/options.go, pkg/log/options.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from meshcni import istio
from meshcni.agent.settingkinds import (
    AGENT_WAIT,
    BOOLEAN,
    CONFLIST_NAME,
    DIRECTORY,
    FIELD_SELECTOR,
    FILE_MODE,
    FILE_NAME,
    GROUPS,
    GROUPS_EXCLUDED,
    INTEGER,
    LABEL_SELECTOR,
    LOG_LEVELS,
    LOOPBACK,
    NAMES,
    OPTIONAL_PORT,
    OPTIONAL_UID,
    PATTERNS,
    PORT,
    PROBE_V4,
    PROBE_V6,
    SECONDS,
    SELECTORS,
    SOCKET,
    TARGETS,
    TEXT,
    VERIFY_SECONDS,
    Kind,
    choice,
)
from meshcni.pods.ambientsettings import SANDBOXED_RUNTIMES, HostIp
from meshcni.pods.selectors import EnablementSelector

# ruff: noqa: RUF009  (the calls in the table make dataclass fields)

T = TypeVar("T")


class Effect(Enum):
    """What a setting does in this version."""

    ACTS = "acts"
    IGNORED = "accepted and ignored"


class Section(Enum):
    """The part of the reference page that shows a setting."""

    INSTALL = "Installing"
    PODS = "Pods and rules"
    CLUSTER = "Cluster and node"
    SERVING = "Ports and sockets"
    LOGGING = "Logging"
    SHUTDOWN = "Shutting down"
    AMBIENT = "Ambient"
    REPAIR = "Repair"
    UNUSED = "Accepted and ignored"


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: `flag` may be empty, `variables` stand strongest first; `ours`: the original has no such setting."""

    name: str
    section: Section
    kind: Kind
    default: object
    flag: str
    variables: tuple[str, ...]
    meaning: str
    effect: Effect
    ours: bool


def _setting(
    default: T,
    kind: Kind,
    section: Section,
    meaning: str,
    *,
    flag: str = "",
    env: str | tuple[str, ...] = "",
    effect: Effect = Effect.ACTS,
    ours: bool = False,
) -> T:
    """Describe the field it is assigned to; a flag without `env` has the variable that viper derives from its name."""
    variables = (env,) if isinstance(env, str) else env
    derived = flag.upper().replace("-", "_") if flag and "_" not in flag else ""
    names = tuple(name for name in (derived, *variables) if name)
    acts = Effect.IGNORED if section is Section.UNUSED else effect
    return field(default=default, metadata={"row": (section, kind, flag, names, meaning, acts, ours)})


INSTALL, PODS, CLUSTER, SERVING, LOGGING, SHUTDOWN, AMBIENT, REPAIR, UNUSED = Section
Levels = tuple[tuple[str, str], ...]  # (scope, level) in the order given


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one process, parsed; `origins` says for each that is not at its default where it came from."""

    # One row is one or two lines here; the formatter would give every argument a line of its own.
    # fmt: off
    # --- installing ---------------------------------------------------------------------------------------------------
    cni_conf_name: str = _setting(
        "", FILE_NAME, INSTALL,
        f"conf to edit (chained) or make (standalone); empty: the first valid one, or {istio.STANDALONE_CONF_NAME}",
        flag="cni-conf-name")
    chained_cni_plugin: bool = _setting(
        True, BOOLEAN, INSTALL, "insert our entry into another plugin's list; false: a conf of our own",
        flag="chained-cni-plugin")
    istio_owned_cni_config: bool = _setting(
        False, BOOLEAN, INSTALL, "keep a conflist of our own, a copy of the primary one with our entry",
        flag="istio-owned-cni-config")
    istio_owned_cni_config_filename: str = _setting(
        "", CONFLIST_NAME, INSTALL, f"its file name; empty: {istio.OWNED_CONF_NAME}",
        flag="istio-owned-cni-config-filename", env="ISTIO_OWNED_CNI_CONF_FILENAME")
    mounted_cni_net_dir: str = _setting(
        istio.HOST_CONF_DIR, DIRECTORY, INSTALL, "the runtime's conf directory as the agent sees it",
        flag="mounted-cni-net-dir")
    cni_agent_run_dir: str = _setting(
        istio.RUN_DIR, DIRECTORY, INSTALL, "sockets, kubeconfig, plugin log; the same path on the host",
        flag="cni-agent-run-dir")
    kubeconfig_mode: int = _setting(0o600, FILE_MODE, INSTALL, "file mode of the kubeconfig", flag="kubeconfig-mode")
    cni_conf_group_read: bool = _setting(
        False, BOOLEAN, INSTALL, "new conf files get mode 0640 instead of 0600", flag="cni-conf-group-read")
    kube_ca_file: str = _setting(
        "", TEXT, INSTALL, "CA to write into the kubeconfig; empty: ca.crt of the service account", flag="kube-ca-file")
    skip_tls_verify: bool = _setting(
        False, BOOLEAN, INSTALL, "readers of the kubeconfig check no server certificate", flag="skip-tls-verify")
    cni_binary_source_dir: str = _setting(
        istio.BINARY_SOURCE_DIR, DIRECTORY, INSTALL, "where the plugin is in the image", env="CNI_BINARY_SOURCE_DIR",
        ours=True)
    cni_binary_target_dir: str = _setting(
        istio.HOST_BINARY_DIR, DIRECTORY, INSTALL, "the runtime's plugin directory as the agent sees it",
        env="CNI_BINARY_TARGET_DIR", ours=True)
    cni_conf_original_conversion: bool = _setting(
        False, BOOLEAN, INSTALL,
        "a converted .conf gets name k8s-pod-network and version 0.3.1, as upstream; false: it keeps its own",
        env="CNI_CONF_ORIGINAL_CONVERSION", ours=True)
    install_resync_seconds: float = _setting(
        60, SECONDS, INSTALL, "how often files are verified without an event", env="INSTALL_RESYNC_SECONDS", ours=True)

    # --- pods and rules -----------------------------------------------------------------------------------------------
    exclude_namespaces: tuple[str, ...] = _setting(
        (), NAMES, PODS, "namespaces whose pods are never touched", env="EXCLUDE_NAMESPACES")
    native_nftables: bool = _setting(
        False, BOOLEAN, PODS, "program with nftables instead of iptables", env="NATIVE_NFTABLES")
    force_iptables_binary: str = _setting(
        "", choice("", "legacy", "nft"), PODS, "iptables variant to use instead of the detected one",
        env="FORCE_IPTABLES_BINARY")
    family_policy: str = _setting(
        "by-address", choice("by-address", "original"), PODS,
        "IPv6 rules: when the netns has a global IPv6 address; original: when its first one is, or ISTIO_DUAL_STACK",
        env="FAMILY_POLICY", ours=True)
    agent_wait_seconds: float = _setting(
        20, AGENT_WAIT, PODS, "how long the plugin waits for the agent before the ADD fails; goes into the conf",
        env="AGENT_WAIT_SECONDS", ours=True)
    sidecar_drift: str = _setting(
        "heal", choice("heal", "report", "off"), PODS,
        "running sidecar pods that are not captured: heal: put their rules in place; report: say so; off: do not look",
        flag="sidecar-reconcile", ours=True)
    outbound_ipv4_loopback_cidr: str = _setting(
        "", LOOPBACK, PODS, "loopback range, for proxies that do not set it", env="ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR")
    outbound_owner_groups: str = _setting(
        "", GROUPS, PODS, "groups to capture, for proxies that do not set it", env="ISTIO_OUTBOUND_OWNER_GROUPS")
    outbound_owner_groups_exclude: str = _setting(
        "", GROUPS_EXCLUDED, PODS, "groups to leave out, for proxies that do not set it",
        env="ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE")

    # --- cluster and node ---------------------------------------------------------------------------------------------
    kubernetes_service_host: str = _setting("", TEXT, CLUSTER, "API server address", env="KUBERNETES_SERVICE_HOST")
    kubernetes_service_port: str = _setting("", TEXT, CLUSTER, "API server port", env="KUBERNETES_SERVICE_PORT")
    kubernetes_service_protocol: str = _setting(
        "https", choice("https", "http"), CLUSTER, "API server scheme", env="KUBERNETES_SERVICE_PROTOCOL")
    service_account_dir: str = _setting(
        istio.SERVICE_ACCOUNT_DIR, DIRECTORY, CLUSTER, "token and ca.crt of the agent", env="SERVICE_ACCOUNT_DIR",
        ours=True)
    api_timeout_seconds: float = _setting(
        4, SECONDS, CLUSTER, "bound of one direct question to the API server", env="API_TIMEOUT_SECONDS", ours=True)
    kubernetes_node_name: str = _setting(
        "", TEXT, CLUSTER, "name of this node, second choice; after it the host name", env="KUBERNETES_NODE_NAME")
    node_name: str = _setting("", TEXT, CLUSTER, "name of this node: whose pods are watched", env="NODE_NAME")
    pod_name: str = _setting("", TEXT, CLUSTER, "name of the agent's own pod", env="POD_NAME")
    pod_namespace: str = _setting("", TEXT, CLUSTER, "namespace of the agent's own pod", env="POD_NAMESPACE")
    revision: str = _setting(
        "", TEXT, CLUSTER, "revision label of this installation; nothing depends on it", env="REVISION",
        effect=Effect.IGNORED)
    system_namespace: str = _setting(
        istio.SYSTEM_NAMESPACE, TEXT, CLUSTER, "namespace of the control plane; ztunnel's own pods are known by it",
        env="SYSTEM_NAMESPACE")
    allow_switch_to_host_ns: bool = _setting(
        False, BOOLEAN, CLUSTER, f"the host's netns is {istio.HOST_NETNS}; false: the agent's own",
        env="ALLOW_SWITCH_TO_HOST_NS")

    # --- ports and sockets --------------------------------------------------------------------------------------------
    monitoring_port: int = _setting(
        istio.METRICS_PORT, OPTIONAL_PORT, SERVING, "port of /metrics", flag="monitoring-port")
    monitoring_address: str = _setting(
        "*", TEXT, SERVING, "address of /metrics; * is every one", env="MONITORING_ADDRESS", ours=True)
    health_port: int = _setting(
        istio.HEALTH_PORT, PORT, SERVING, f"port of {istio.READY_PATH} and {istio.LIVE_PATH}", env="HEALTH_PORT",
        ours=True)
    health_address: str = _setting(
        "*", TEXT, SERVING, "address of the health endpoints; * is every one", env="HEALTH_ADDRESS", ours=True)
    liveness_stale_seconds: float = _setting(
        30, SECONDS, SERVING, f"{istio.LIVE_PATH} fails when the event loop stood still for longer",
        env="LIVENESS_STALE_SECONDS", ours=True)
    ctrlz_port: int = _setting(
        istio.CONTROLZ_PORT, INTEGER, UNUSED, "port of ControlZ, which this agent does not have", flag="ctrlz_port")
    ctrlz_address: str = _setting(
        "localhost", TEXT, UNUSED, "address of ControlZ, which this agent does not have", flag="ctrlz_address")

    # --- logging ------------------------------------------------------------------------------------------------------
    log_output_level: Levels = _setting(
        (), LOG_LEVELS, LOGGING, "levels, added to default:info; scope all overrides every other",
        flag="log_output_level")
    log_stacktrace_level: Levels = _setting(
        (), LOG_LEVELS, LOGGING, "levels from which a line carries the call stack", flag="log_stacktrace_level")
    log_caller: tuple[str, ...] = _setting(
        (), NAMES, LOGGING, "scopes whose lines name file and line of code", flag="log_caller")
    log_as_json: bool = _setting(False, BOOLEAN, LOGGING, "JSON lines instead of text", flag="log_as_json")
    log_target: tuple[str, ...] = _setting(("stdout",), TARGETS, LOGGING, "where lines go", flag="log_target")

    # --- shutting down ------------------------------------------------------------------------------------------------
    disable_safe_upgrade: bool = _setting(
        False, BOOLEAN, SHUTDOWN, "clean the node up at every stop, as the original does in sidecar mode",
        env="DISABLE_SAFE_UPGRADE", ours=True)
    ambient_disable_safe_upgrade: bool = _setting(
        False, BOOLEAN, SHUTDOWN, "the same, with ambient enabled", env="AMBIENT_DISABLE_SAFE_UPGRADE")
    shutdown_grace_seconds: float = _setting(
        25, SECONDS, SHUTDOWN, "from the first signal to the exit; below the pod's terminationGracePeriodSeconds",
        env="SHUTDOWN_GRACE_SECONDS", ours=True)
    uninstall_removes_binary: bool = _setting(
        False, BOOLEAN, SHUTDOWN, "cleaning up removes the plugin too; false: it stays and lets pods pass",
        env="UNINSTALL_REMOVES_BINARY", ours=True)

    # --- ambient ------------------------------------------------------------------------------------------------------
    ambient_enabled: bool = _setting(
        False, BOOLEAN, AMBIENT, "ambient mode: enroll the pods that the enablement selectors take",
        flag="ambient-enabled")
    enable_ambient_detection_retry: bool = _setting(
        False, BOOLEAN, AMBIENT, "goes into the conf for the original's plugin; ours never falls through on an error",
        flag="enable-ambient-detection-retry")
    ambient_enablement_selector: tuple[EnablementSelector, ...] = _setting(
        (), SELECTORS, AMBIENT, "which pods are ambient; none when empty", env="AMBIENT_ENABLEMENT_SELECTOR")
    ztunnel_uds_address: str = _setting(
        istio.ZTUNNEL_SOCKET, SOCKET, AMBIENT, "socket that ztunnel connects to", flag="ztunnel-uds-address")
    ambient_dns_capture: bool = _setting(
        False, BOOLEAN, AMBIENT, f"capture DNS of pods without annotation {istio.AMBIENT_DNS_CAPTURE}",
        env="AMBIENT_DNS_CAPTURE")
    ambient_ipv6: bool = _setting(
        False, BOOLEAN, AMBIENT, "rules, routes and sets for IPv6 too; false: IPv6 traffic passes by the mesh",
        env="AMBIENT_IPV6")
    ambient_reconcile_pod_rules_on_startup: bool = _setting(
        False, BOOLEAN, AMBIENT, "of no effect: rules of running pods are always verified, at start and later",
        env="AMBIENT_RECONCILE_POD_RULES_ON_STARTUP", effect=Effect.IGNORED)
    host_probe_snat_ip: IPv4Address | HostIp = _setting(
        IPv4Address(istio.PROBE_SNAT_V4), PROBE_V4, AMBIENT, "source address that marks probes of the node's kubelet",
        env="HOST_PROBE_SNAT_IP")
    host_probe_snat_ipv6: IPv6Address | HostIp = _setting(
        IPv6Address(istio.PROBE_SNAT_V6), PROBE_V6, AMBIENT, "the same for IPv6", env="HOST_PROBE_SNAT_IPV6")
    ambient_use_scoped_xtables_locking: bool = _setting(
        True, BOOLEAN, AMBIENT, "of no effect: each netns always has an iptables lock of its own",
        env="AMBIENT_USE_SCOPED_XTABLES_LOCKING", effect=Effect.IGNORED)
    ambient_enable_aws_branch_eni_probe: bool = _setting(
        True, BOOLEAN, AMBIENT, "policy rules for probes of pods behind AWS branch interfaces",
        env="AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE")
    host_proc_dir: str = _setting(
        "", DIRECTORY, AMBIENT, f"the host's procfs; empty: {istio.HOST_PROC} if it is there, else /proc",
        env="HOST_PROC_DIR", ours=True)
    kubelet_uid: int | None = _setting(
        None, OPTIONAL_UID, AMBIENT, "user whose connections are probes (nftables); empty: that of the kubelet process",
        env="KUBELET_UID", ours=True)
    ambient_ztunnel_wait_seconds: float = _setting(
        15, SECONDS, AMBIENT, "how long an ADD waits for a ztunnel to connect; below AGENT_WAIT_SECONDS",
        env="AMBIENT_ZTUNNEL_WAIT_SECONDS", ours=True)
    ambient_verify_seconds: float = _setting(
        45, VERIFY_SECONDS, AMBIENT, "how often running mesh pods, of sidecars too, and the host's rules are verified",
        env="AMBIENT_VERIFY_SECONDS", ours=True)
    ambient_sandboxed_runtimes: tuple[str, ...] = _setting(
        SANDBOXED_RUNTIMES, PATTERNS, AMBIENT,
        "RuntimeClasses whose pods are refused, because rules in the netns do not hold them",
        env="AMBIENT_SANDBOXED_RUNTIMES", ours=True)
    ambient_unenroll_on_uninstall: bool = _setting(
        False, BOOLEAN, AMBIENT, "an uninstall takes running pods out of the mesh first; false: they stay captured",
        env="AMBIENT_UNENROLL_ON_UNINSTALL", ours=True)

    # --- repair -------------------------------------------------------------------------------------------------------
    repair_enabled: bool = _setting(
        True, BOOLEAN, REPAIR, "look for pods of this node that were started without redirection",
        flag="repair-enabled")
    repair_repair_pods: bool = _setting(
        False, BOOLEAN, REPAIR, "put the rules into broken pods; wins over deleting and labelling",
        env="REPAIR_REPAIR_PODS")
    repair_delete_pods: bool = _setting(
        False, BOOLEAN, REPAIR, "delete broken pods; wins over labelling", flag="repair-delete-pods")
    repair_label_pods: bool = _setting(False, BOOLEAN, REPAIR, "label broken pods", flag="repair-label-pods")
    repair_broken_pod_label_key: str = _setting(
        "cni.istio.io/uninitialized", TEXT, REPAIR, "label key", flag="repair-broken-pod-label-key")
    repair_broken_pod_label_value: str = _setting(
        "true", TEXT, REPAIR, "label value", flag="repair-broken-pod-label-value")
    repair_node_name: str = _setting(
        "", TEXT, REPAIR, "whose pods, empty: those of this node; also the third choice for this node's name",
        flag="repair-node-name")
    repair_sidecar_annotation: str = _setting(
        istio.SIDECAR_STATUS, TEXT, REPAIR, "annotation of an injected pod; empty: any pod",
        flag="repair-sidecar-annotation")
    repair_init_container_name: str = _setting(
        istio.VALIDATION_CONTAINER, TEXT, REPAIR, "init container whose failure shows a broken pod; empty: any",
        flag="repair-init-container-name")
    repair_init_container_termination_message: str = _setting(
        "", TEXT, REPAIR, "its termination message; empty: any", flag="repair-init-container-termination-message")
    repair_init_container_exit_code: int = _setting(
        istio.VALIDATION_EXIT_CODE, INTEGER, REPAIR, "its exit status; 0: any but success",
        flag="repair-init-container-exit-code")
    repair_label_selectors: str = _setting(
        "", LABEL_SELECTOR, REPAIR, "labels of the pods to look at; empty: all", flag="repair-label-selectors")
    repair_field_selectors: str = _setting(
        "", FIELD_SELECTOR, REPAIR, "fields of the pods to look at; empty: all", flag="repair-field-selectors")
    host_netns_dir: str = _setting(
        "", DIRECTORY, REPAIR,
        f"where the runtime binds network namespaces, for pods without a process; empty: {istio.HOST_NETNS_DIR}",
        env="HOST_NETNS_DIR", ours=True)

    # --- accepted and ignored, so that every chart and script keeps working -------------------------------------------
    cni_network_config: str = _setting(
        "", TEXT, UNUSED, "registered upstream, read by nothing", flag="cni-network-config")
    cni_network_config_file: str = _setting(
        "", TEXT, UNUSED, "registered upstream, read by nothing", flag="cni-network-config-file")
    log_level: str = _setting(
        "warn", TEXT, UNUSED, "registered upstream, read by nothing; see log_output_level", flag="log-level")
    repair_run_as_daemon: str = _setting(
        "", TEXT, UNUSED, "set by the chart, read by nothing", env="REPAIR_RUN_AS_DAEMON")
    current_agent_version: str = _setting(
        "", TEXT, UNUSED, "set by the chart, read by nothing", env="CURRENT_AGENT_VERSION")
    gomemlimit: str = _setting("", TEXT, UNUSED, "a knob of Go's runtime", env="GOMEMLIMIT")
    envoy_user: str = _setting(
        "", TEXT, UNUSED, f"of no effect in CNI mode, where a proxy without a user of its own has {istio.PROXY_UID}",
        env=istio.ENV_ENVOY_USER)
    istio_watch_namespace: str = _setting(
        "", TEXT, UNUSED, "the pods of the node are watched in every namespace", env="ISTIO_WATCH_NAMESPACE")
    dry_run_file_path: str = _setting(
        "", TEXT, UNUSED, "the agent programs nothing dry; `meshcni rules` prints rules", env="DRY_RUN_FILE_PATH")

    # fmt: on
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def node(self) -> str:
        """Name of this node as far as settings know it; empty when none says."""
        return self.node_name or self.kubernetes_node_name or self.repair_node_name

    @property
    def owned_conf_name(self) -> str:
        """File name of the conflist of our own."""
        return self.istio_owned_cni_config_filename or istio.OWNED_CONF_NAME

    @property
    def cleans_up_always(self) -> bool:
        """Whether every stop cleans the node up, whatever the cluster says."""
        return self.disable_safe_upgrade or (self.ambient_enabled and self.ambient_disable_safe_upgrade)

    @property
    def rule_environment(self) -> Mapping[str, str]:
        """The variables that rule building reads from the programming process' environment, where they are set."""
        values = {
            istio.ENV_LOOPBACK_CIDR: self.outbound_ipv4_loopback_cidr,
            istio.ENV_OWNER_GROUPS: self.outbound_owner_groups,
            istio.ENV_OWNER_GROUPS_EXCLUDE: self.outbound_owner_groups_exclude,
        }
        return {name: value for name, value in values.items() if value}


def _row(column: Field[object]) -> Row:
    section, kind, flag, variables, meaning, effect, ours = column.metadata["row"]
    return Row(column.name, section, kind, column.default, flag, variables, meaning, effect, ours)


ROWS: tuple[Row, ...] = tuple(_row(column) for column in fields(Settings) if "row" in column.metadata)
