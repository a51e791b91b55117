"""From `Settings` to the configuration of each part, in one place."""

from __future__ import annotations

import os

from meshcni import istio
from meshcni.agent.hostmounts import in_container
from meshcni.agent.installconfig import InstallConfig
from meshcni.agent.programming import BackendConfig
from meshcni.agent.settings import ROWS, Settings
from meshcni.cni.conf import EntryConfig
from meshcni.host.redirection import FamilyPolicy
from meshcni.kube import proxies
from meshcni.kube.credentials import InCluster
from meshcni.pods.eligibility import Policy
from meshcni.pods.selectors import to_objects
from meshcni.rules.model import Backend

HEALED_WITHIN_SECONDS = 60  # what drifts is to be healed within a minute
CONF_KEYS = ("agent_wait_seconds", "system_namespace")  # ours, for the plugin: in the conf when not at their default


def install_config(settings: Settings, plugin_log_level: str) -> InstallConfig:
    """What the installer keeps in place."""
    defaults = {row.name: row.default for row in ROWS}
    extra = {name: getattr(settings, name) for name in CONF_KEYS if getattr(settings, name) != defaults[name]}
    entry = EntryConfig(
        run_dir=settings.cni_agent_run_dir,
        plugin_log_level=plugin_log_level,
        ambient_enabled=settings.ambient_enabled,
        enablement_selectors=tuple(to_objects(settings.ambient_enablement_selector)),
        exclude_namespaces=settings.exclude_namespaces,
        pod_namespace=settings.pod_namespace,
        native_nftables=settings.native_nftables,
        ambient_detection_retry=settings.enable_ambient_detection_retry,
        extra=extra,
    )
    return InstallConfig(
        entry=entry,
        conf_dir=settings.mounted_cni_net_dir,
        conf_name=settings.cni_conf_name,
        chained=settings.chained_cni_plugin,
        owned=settings.istio_owned_cni_config,
        owned_name=settings.owned_conf_name,
        original_conversion=settings.cni_conf_original_conversion,
        conf_group_read=settings.cni_conf_group_read,
        binary_source_dir=settings.cni_binary_source_dir,
        binary_target_dirs=(settings.cni_binary_target_dir,),
        run_dir=settings.cni_agent_run_dir,
        kubeconfig_mode=settings.kubeconfig_mode,
        kube_ca_file=settings.kube_ca_file,
        skip_tls_verify=settings.skip_tls_verify,
        service_account_dir=settings.service_account_dir,
        api_protocol=settings.kubernetes_service_protocol,
        api_host=settings.kubernetes_service_host,
        api_port=settings.kubernetes_service_port,
        uninstall_removes_binary=settings.uninstall_removes_binary,
        resync_seconds=settings.install_resync_seconds,
        host_root=f"{settings.host_proc_dir or istio.HOST_PROC}/1/root" if in_container(settings) else "",
    )


def warnings(settings: Settings) -> tuple[str, ...]:
    """Settings that are fine each and surprising together, as sentences."""
    found = []
    if settings.native_nftables and settings.force_iptables_binary:
        found.append("FORCE_IPTABLES_BINARY is of no effect: NATIVE_NFTABLES is set, and nftables wins")
    if settings.ambient_enabled:
        found += _ambient_warnings(settings)
    if not settings.pod_namespace:
        found.append(
            "POD_NAMESPACE is not set: the plugin cannot tell this agent's own pod from others, needed to start "
            "after a reboot, and an uninstall is not noticed; set it from metadata.namespace"
        )
    if settings.cleans_up_always:
        found.append("every stop of this agent takes the plugin off the node: pods started then are outside the mesh")
    return tuple(found)


def _ambient_warnings(settings: Settings) -> list[str]:
    found = []
    if not settings.node_name:
        name = repr(settings.node) if settings.node else "that is the host name"
        found.append(
            f"NODE_NAME is not set: the pods of the node {name} are watched, and if this node has another name, no "
            "running pod is ever enrolled or taken out; set it from spec.nodeName"
        )
    if not settings.ambient_enablement_selector:
        found.append("AMBIENT_ENABLEMENT_SELECTOR is empty: ambient mode is enabled and takes no pod")
    if settings.ambient_ztunnel_wait_seconds >= settings.agent_wait_seconds:
        found.append(
            f"AMBIENT_ZTUNNEL_WAIT_SECONDS ({settings.ambient_ztunnel_wait_seconds:g}) is not below AGENT_WAIT_SECONDS "
            f"({settings.agent_wait_seconds:g}): the plugin gives up first and cannot say that ztunnel is missing"
        )
    if settings.ambient_verify_seconds > HEALED_WITHIN_SECONDS:
        found.append(
            f"AMBIENT_VERIFY_SECONDS is {settings.ambient_verify_seconds:g}: what others change in an enrolled pod may "
            f"stay for longer than {HEALED_WITHIN_SECONDS} s"
        )
    return found


def policy(settings: Settings) -> Policy:
    """What decides about pods."""
    return Policy(
        exclude_namespaces=frozenset(settings.exclude_namespaces),
        agent_namespace=settings.pod_namespace,
        ambient_enabled=settings.ambient_enabled,
        enablement_selectors=settings.ambient_enablement_selector,
        system_namespace=settings.system_namespace,
        sandboxed_runtimes=settings.ambient_sandboxed_runtimes,
    )


def backend_config(settings: Settings) -> BackendConfig:
    """What programs the rules."""
    return BackendConfig(
        backend=Backend.NFTABLES if settings.native_nftables else Backend.IPTABLES,
        forced_variant=settings.force_iptables_binary,
        family_policy=FamilyPolicy(settings.family_policy),
        run_dir=settings.cni_agent_run_dir,
        host_netns=istio.HOST_NETNS if settings.allow_switch_to_host_ns else istio.OWN_NETNS,
    )


def api_access(settings: Settings) -> InCluster:
    """Where the API server is."""
    return InCluster(
        environment={
            "KUBERNETES_SERVICE_HOST": settings.kubernetes_service_host,
            "KUBERNETES_SERVICE_PORT": settings.kubernetes_service_port,
            "KUBERNETES_SERVICE_PROTOCOL": settings.kubernetes_service_protocol,
            **proxies.variables(os.environ),  # no settings: those are logged, and a proxy's address holds a password
        },
        service_account_dir=settings.service_account_dir,
    )
