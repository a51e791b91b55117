"""What Istio's own chart makes of values, as far as this tier compares with it: rights and the ConfigMap's keys.

From the description of its templates (manifests/charts/istio-cni at commit 86c9f01fd735), not from running them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

Right = tuple[str, str, str, str]  # group, resource, name of the object or *, verb

READ = ("get", "list", "watch")
KEYS = {
    "CURRENT_AGENT_VERSION",
    "AMBIENT_ENABLED",
    "AMBIENT_ENABLEMENT_SELECTOR",
    "AMBIENT_DNS_CAPTURE",
    "AMBIENT_IPV6",
    "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP",
    "ENABLE_AMBIENT_DETECTION_RETRY",
    "ISTIO_OWNED_CNI_CONFIG",
    "CHAINED_CNI_PLUGIN",
    "EXCLUDE_NAMESPACES",
    "REPAIR_ENABLED",
    "REPAIR_LABEL_PODS",
    "REPAIR_DELETE_PODS",
    "REPAIR_REPAIR_PODS",
    "REPAIR_INIT_CONTAINER_NAME",
    "REPAIR_BROKEN_POD_LABEL_KEY",
    "REPAIR_BROKEN_POD_LABEL_VALUE",
    "NATIVE_NFTABLES",
}
OWNED_NAME_KEY = "ISTIO_OWNED_CNI_CONF_FILENAME"  # the one that its chart writes
# The values that have a default there; maps that are one value as a whole are not gone into.
_VALUES = """
    hub tag variant image pullPolicy logging.level cniBinDir cniConfDir cniConfFileName cniNetnsDir
    istioOwnedCNIConfig istioOwnedCNIConfigFileName excludeNamespaces affinity daemonSetLabels podLabels
    podAnnotations chained provider ambient.enabled ambient.enablementSelectors ambient.configDir ambient.dnsCapture
    ambient.ipv6 ambient.reconcileIptablesOnStartup ambient.shareHostNetworkNamespace
    ambient.enableAmbientDetectionRetry repair.enabled repair.hub repair.tag repair.labelPods repair.deletePods
    repair.repairPods repair.initContainerName repair.brokenPodLabelKey repair.brokenPodLabelValue seccompProfile
    seLinuxOptions useAppArmorAnnotation resources resourceQuotas.enabled resourceQuotas.pods tolerations
    updateStrategy terminationGracePeriodSeconds revision ownerName env global.hub global.tag global.variant
    global.imagePullPolicy global.imagePullSecrets global.logging.level global.logAsJson global.defaultResources
    global.networkPolicy.enabled global.nativeNftables global.resourceScope
"""
VALUES = set(_VALUES.split())
OWN_DAEMONSET: Right = ("apps", "daemonsets", "istio-cni-node", "get")


@dataclass(frozen=True)
class Mode:
    """The values that its roles depend on."""

    ambient: bool = False
    openshift: bool = False
    repair: str = "repairPods"  # or deletePods, labelPods, "" for none of them, "off"


def rights(mode: Mode) -> set[Right]:
    """The rights of the account istio-cni."""
    found = set(_rights("", ("pods", "nodes", "namespaces"), READ))
    if mode.openshift:
        found.add(("security.openshift.io", "securitycontextconstraints", "privileged", "use"))
    if mode.repair != "off":
        found |= set(_rights("", ("events",), ("create", "patch")))
    if mode.repair == "deletePods":
        found |= set(_rights("", ("pods",), ("delete",)))
    if mode.repair == "labelPods":
        found |= set(_rights("", ("pods/status",), ("patch", "update")))
    if mode.ambient:
        found |= set(_rights("", ("pods/status",), ("patch", "update")))
        found.add(OWN_DAEMONSET)
    return found


def _rights(group: str, resources: tuple[str, ...], verbs: tuple[str, ...]) -> list[Right]:
    return [(group, resource, "*", verb) for resource, verb in product(resources, verbs)]


def flattened(roles: list[Mapping[str, Any]]) -> set[Right]:
    """Every single right of some ClusterRoles."""
    return {
        right
        for role in roles
        for rule in role["rules"]
        for right in product(rule["apiGroups"], rule["resources"], rule.get("resourceNames", ["*"]), rule["verbs"])
    }
