"""Values, and what they must do to the manifests: the table of test_values.py.

Paths are those of Release.at. A value of Istio's own chart is described in its documentation, ours in values.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.chart.releases import ABSENT, IMAGE, Values

Path = tuple[str, ...]
DIGEST = "sha256:" + "0123456789abcdef" * 4
HUB = "registry.example/istio"

DAEMONSET: Path = ("DaemonSet", "spec")
TEMPLATE: Path = (*DAEMONSET, "template")
POD: Path = (*TEMPLATE, "spec")
CONTAINER: Path = (*POD, "containers", "install-cni")
SECURITY: Path = (*CONTAINER, "securityContext")
LABELS: Path = (*TEMPLATE, "metadata", "labels")
ANNOTATIONS: Path = (*TEMPLATE, "metadata", "annotations")
IMAGE_AT: Path = (*CONTAINER, "image")
APPARMOR = "container.apparmor.security.beta.kubernetes.io/install-cni"


def config(key: str) -> Path:
    return ("ConfigMap", "data", key)


def volume(name: str) -> Path:
    return (*POD, "volumes", name, "hostPath", "path")


def mount(name: str) -> Path:
    return (*CONTAINER, "volumeMounts", name)


def env(name: str) -> Path:
    return (*CONTAINER, "env", name)


def role(name: str) -> Path:
    return (f"ClusterRole/{name}",)


Facts = Mapping[Path, Any]
HUGE = 12345678901  # a number that a float prints with an exponent
SELECTORS = [{"podSelector": {"matchExpressions": [{"key": "mesh", "operator": "Exists"}]}}, {}]

# fmt: off
IMAGES: dict[str, tuple[Values, Facts]] = {
    "whole": ({"image": IMAGE}, {IMAGE_AT: IMAGE}),
    "whole with a digest": ({"image": f"{HUB}/x@{DIGEST}"}, {IMAGE_AT: f"{HUB}/x@{DIGEST}"}),
    "whole and the digest apart": ({"image": IMAGE, "digest": DIGEST}, {IMAGE_AT: f"{IMAGE}@{DIGEST}"}),
    "the digest twice, the same": (
        {"image": f"{HUB}/x@{DIGEST}", "digest": DIGEST}, {IMAGE_AT: f"{HUB}/x@{DIGEST}"}),
    "whole without a path": ({"image": "install-cni:dev"}, {IMAGE_AT: "install-cni:dev"}),
    "whole, hub and tag do not count": ({"image": IMAGE, "hub": HUB, "tag": "1", "variant": "dev"}, {
        IMAGE_AT: IMAGE, config("CURRENT_AGENT_VERSION"): "1"}),
    "hub and tag": ({"image": None, "hub": HUB, "tag": "1.30.3"}, {
        IMAGE_AT: f"{HUB}/install-cni:1.30.3", config("CURRENT_AGENT_VERSION"): "1.30.3"}),
    "another name": ({"image": "cni", "hub": HUB, "tag": "1.30.3"}, {IMAGE_AT: f"{HUB}/cni:1.30.3"}),
    "empty name": ({"image": "", "hub": HUB, "tag": "1.30.3"}, {IMAGE_AT: f"{HUB}/install-cni:1.30.3"}),
    "global hub and tag": ({"image": None, "global": {"hub": HUB, "tag": "1.30.3"}}, {
        IMAGE_AT: f"{HUB}/install-cni:1.30.3"}),
    "own hub and tag before the global ones": (
        {"image": None, "hub": HUB, "tag": 7, "global": {"hub": "elsewhere.example", "tag": "1.30.3"}},
        {IMAGE_AT: f"{HUB}/install-cni:7", config("CURRENT_AGENT_VERSION"): "7"}),
    "hub with a slash at its end": ({"image": None, "hub": f"{HUB}/", "tag": "1"}, {IMAGE_AT: f"{HUB}/install-cni:1"}),
    "hub and digest": ({"image": None, "hub": HUB, "digest": DIGEST}, {IMAGE_AT: f"{HUB}/install-cni@{DIGEST}"}),
    "hub, tag and digest": (
        {"image": None, "hub": HUB, "tag": "1", "digest": DIGEST}, {IMAGE_AT: f"{HUB}/install-cni:1@{DIGEST}"}),
    "variant": ({"image": None, "hub": HUB, "tag": "1", "variant": "dev"}, {IMAGE_AT: f"{HUB}/install-cni:1-dev"}),
    "global variant": ({"image": None, "hub": HUB, "tag": "1", "global": {"variant": "distroless"}}, {
        IMAGE_AT: f"{HUB}/install-cni:1-distroless", config("CURRENT_AGENT_VERSION"): "1"}),
    "variant that the tag has": ({"image": None, "hub": HUB, "tag": "1-dev", "variant": "dev"}, {
        IMAGE_AT: f"{HUB}/install-cni:1-dev"}),
    "large number as tag": ({"image": None, "hub": HUB, "tag": HUGE}, {IMAGE_AT: f"{HUB}/install-cni:{HUGE}"}),
    "pull policy": ({"pullPolicy": "Always"}, {(*CONTAINER, "imagePullPolicy"): "Always"}),
    "global pull policy": ({"global": {"imagePullPolicy": "Never"}}, {(*CONTAINER, "imagePullPolicy"): "Never"}),
    "own pull policy first": ({"pullPolicy": "IfNotPresent", "global": {"imagePullPolicy": "Never"}}, {
        (*CONTAINER, "imagePullPolicy"): "IfNotPresent"}),
    "no pull policy": ({}, {(*CONTAINER, "imagePullPolicy"): ABSENT}),
    "pull secrets": ({"imagePullSecrets": ["b", {"name": "a"}], "global": {"imagePullSecrets": ["a", "c"]}}, {
        ("ServiceAccount", "imagePullSecrets"): [{"name": "a"}, {"name": "c"}, {"name": "b"}]}),
    "no pull secrets": ({}, {("ServiceAccount", "imagePullSecrets"): ABSENT}),
}
INSTALLING: dict[str, tuple[Values, Facts]] = {
    "directories": ({"cniBinDir": "/b", "cniConfDir": "/c", "cniNetnsDir": "/n", "ambient": {"enabled": True}}, {
        volume("cni-bin-dir"): "/b", volume("cni-net-dir"): "/c", volume("cni-netns-dir"): "/n",
        (*mount("cni-bin-dir"), "mountPath"): "/host/opt/cni/bin",
        (*mount("cni-netns-dir"), "mountPath"): "/host/var/run/netns"}),
    "empty directories": ({"cniBinDir": "", "cniConfDir": "", "cniNetnsDir": "", "ambient": {"enabled": True}}, {
        volume("cni-bin-dir"): "/opt/cni/bin", volume("cni-net-dir"): "/etc/cni/net.d",
        volume("cni-netns-dir"): "/var/run/netns"}),
    "conf name": ({"cniConfFileName": "10-x.conflist"}, {config("CNI_CONF_NAME"): "10-x.conflist"}),
    "no conf name": ({}, {config("CNI_CONF_NAME"): ABSENT}),
    "owned conf": ({"istioOwnedCNIConfig": True}, {
        config("ISTIO_OWNED_CNI_CONFIG"): "true", config("ISTIO_OWNED_CNI_CONFIG_FILENAME"): ABSENT,
        config("ISTIO_OWNED_CNI_CONF_FILENAME"): ABSENT}),
    "owned conf's name under both keys": (
        {"istioOwnedCNIConfig": True, "istioOwnedCNIConfigFileName": "00-i.conflist"},
        {config("ISTIO_OWNED_CNI_CONFIG_FILENAME"): "00-i.conflist",
         config("ISTIO_OWNED_CNI_CONF_FILENAME"): "00-i.conflist"}),
    "excluded namespaces": ({"excludeNamespaces": ["a", "b"]}, {config("EXCLUDE_NAMESPACES"): "a,b"}),
    "no excluded namespaces": ({"excludeNamespaces": []}, {config("EXCLUDE_NAMESPACES"): ""}),
    "null empties a list": ({"excludeNamespaces": None, "tolerations": None}, {
        config("EXCLUDE_NAMESPACES"): "", (*POD, "tolerations"): ABSENT}),
    "null says nothing": (
        {"cniBinDir": None, "chained": None, "repair": None, "resources": None, "terminationGracePeriodSeconds": None,
         "updateStrategy": None, "affinity": None, "healthPort": None, "global": {"resourceScope": None}},
        {volume("cni-bin-dir"): "/opt/cni/bin", config("CHAINED_CNI_PLUGIN"): "true",
         config("REPAIR_REPAIR_PODS"): "true", config("HEALTH_PORT"): ABSENT,
         (*CONTAINER, "resources"): {"requests": {"cpu": "100m", "memory": "100Mi"}},
         (*POD, "terminationGracePeriodSeconds"): 30, (*DAEMONSET, "updateStrategy", "type"): "RollingUpdate"}),
    "standalone": ({"chained": False}, {config("CHAINED_CNI_PLUGIN"): "false"}),
    "multus": ({"provider": "multus"}, {
        ("NetworkAttachmentDefinition", "apiVersion"): "k8s.cni.cncf.io/v1",
        ("NetworkAttachmentDefinition", "metadata", "name"): "istio-cni",
        ("NetworkAttachmentDefinition", "metadata", "namespace"): "default",
        ("NetworkAttachmentDefinition", "spec"): ABSENT}),
    "multus elsewhere": ({"provider": "multus", "nadNamespace": "mesh"}, {
        ("NetworkAttachmentDefinition", "metadata", "namespace"): "mesh"}),
    "nftables": ({"global": {"nativeNftables": True}}, {config("NATIVE_NFTABLES"): "true"}),
    "log level": ({"logging": {"level": "debug"}}, {(*CONTAINER, "args"): ["--log_output_level=debug"]}),
    "global log level": ({"global": {"logging": {"level": "default:warn"}, "logAsJson": True}}, {
        (*CONTAINER, "args"): ["--log_output_level=default:warn", "--log_as_json"]}),
    "no log level": ({"global": {"logging": {"level": ""}}}, {(*CONTAINER, "args"): ABSENT}),
    "environment": (
        {"env": {"AGENT_WAIT_SECONDS": 5, "KUBELET_UID": HUGE, "FORCE_IPTABLES_BINARY": "nft", "AMBIENT_IPV6": False}},
        {config("AGENT_WAIT_SECONDS"): "5", (*env("AGENT_WAIT_SECONDS"), "value"): "5",
         config("KUBELET_UID"): str(HUGE), (*env("FORCE_IPTABLES_BINARY"), "value"): "nft",
         config("AMBIENT_IPV6"): "false", (*env("AMBIENT_IPV6"), "value"): "false"}),
    "environment wins over the pod's fields": ({"env": {"NODE_NAME": "x", "ALLOW_SWITCH_TO_HOST_NS": "false"}}, {
        env("NODE_NAME"): {"name": "NODE_NAME", "value": "x"},
        env("ALLOW_SWITCH_TO_HOST_NS"): {"name": "ALLOW_SWITCH_TO_HOST_NS", "value": "false"}}),
}
MODES: dict[str, tuple[Values, Facts]] = {
    "ambient": ({"ambient": {"enabled": True}}, {
        config("AMBIENT_ENABLED"): "true", (*mount("cni-host-procfs"), "readOnly"): True,
        volume("cni-ztunnel-sock-dir"): "/var/run/ztunnel", (*POD, "hostNetwork"): ABSENT,
        (*env("ALLOW_SWITCH_TO_HOST_NS"), "value"): "true", mount("xtables-lock"): ABSENT}),
    "ambient's switches": (
        {"ambient": {"enabled": True, "dnsCapture": False, "ipv6": False, "reconcileIptablesOnStartup": False,
                     "enableAmbientDetectionRetry": True, "configDir": "/x", "unenrollOnUninstall": True}},
        {config("AMBIENT_DNS_CAPTURE"): "false", config("AMBIENT_IPV6"): "false",
         config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "false", config("ENABLE_AMBIENT_DETECTION_RETRY"): "true",
         config("AMBIENT_UNENROLL_ON_UNINSTALL"): "true"}),
    "ambient in the host's network": ({"ambient": {"enabled": True, "shareHostNetworkNamespace": True}}, {
        (*POD, "hostNetwork"): True, (*POD, "dnsPolicy"): "ClusterFirstWithHostNet",
        env("ALLOW_SWITCH_TO_HOST_NS"): ABSENT}),
    "the host's network without ambient": ({"ambient": {"shareHostNetworkNamespace": True}}, {
        (*POD, "hostNetwork"): ABSENT, (*env("ALLOW_SWITCH_TO_HOST_NS"), "value"): "true"}),
    "the host's xtables lock": ({"ambient": {"enabled": True, "hostXtablesLock": True}}, {
        (*POD, "volumes", "xtables-lock", "hostPath"): {"path": "/run/xtables.lock", "type": "FileOrCreate"},
        (*mount("xtables-lock"), "mountPath"): "/run/xtables.lock"}),
    "no selectors": ({"ambient": {"enablementSelectors": []}}, {config("AMBIENT_ENABLEMENT_SELECTOR"): "[]"}),
    "running pods": ({"sidecarReconcile": "report"}, {
        config("SIDECAR_RECONCILE"): "report", (*mount("cni-host-procfs"), "mountPath"): "/host/proc"}),
    "healing is the agent's own default": ({}, {config("SIDECAR_RECONCILE"): ABSENT}),
    "neither repair nor running pods": ({"sidecarReconcile": "off", "repair": {"repairPods": False}}, {
        config("SIDECAR_RECONCILE"): "off", mount("cni-host-procfs"): ABSENT, volume("cni-host-procfs"): ABSENT,
        mount("cni-netns-dir"): ABSENT, volume("cni-netns-dir"): ABSENT,
        (*role("istio-cni-repair-role"), "rules", "2"): ABSENT}),
    "no repair": ({"repair": {"enabled": False}}, {
        config("REPAIR_ENABLED"): "false", role("istio-cni-repair-role"): ABSENT,
        ("ClusterRoleBinding/istio-cni-repair-rolebinding",): ABSENT}),
    "deleting": ({"repair": {"repairPods": False, "deletePods": True}}, {
        config("REPAIR_DELETE_PODS"): "true", config("REPAIR_REPAIR_PODS"): "false",
        (*role("istio-cni-repair-role"), "rules", "2"): {
            "apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}}),
    "labelling": (
        {"repair": {"repairPods": False, "labelPods": True, "brokenPodLabelKey": "k", "brokenPodLabelValue": "v"}},
        {config("REPAIR_LABEL_PODS"): "true", config("REPAIR_BROKEN_POD_LABEL_KEY"): "k",
         config("REPAIR_BROKEN_POD_LABEL_VALUE"): "v",
         (*role("istio-cni-repair-role"), "rules", "2"): {
             "apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}}),
    "init container": ({"repair": {"initContainerName": "check", "hub": "h", "tag": 3}}, {
        config("REPAIR_INIT_CONTAINER_NAME"): "check"}),
    "endings": ({"disableSafeUpgrade": True, "uninstallRemovesBinary": True}, {
        config("DISABLE_SAFE_UPGRADE"): "true", config("AMBIENT_DISABLE_SAFE_UPGRADE"): "true",
        config("UNINSTALL_REMOVES_BINARY"): "true"}),
    "safe endings are the default": ({}, {
        config("DISABLE_SAFE_UPGRADE"): ABSENT, config("UNINSTALL_REMOVES_BINARY"): ABSENT,
        config("AMBIENT_UNENROLL_ON_UNINSTALL"): ABSENT}),
}
PODS: dict[str, tuple[Values, Facts]] = {
    "user": ({"runAsNonRoot": True}, {
        (*SECURITY, "runAsUser"): 65532, (*SECURITY, "runAsGroup"): 65532, (*SECURITY, "runAsNonRoot"): True,
        (*SECURITY, "allowPrivilegeEscalation"): True, (*SECURITY, "readOnlyRootFilesystem"): ABSENT}),
    "read-only": ({"readOnlyRootFilesystem": True}, {(*SECURITY, "readOnlyRootFilesystem"): True}),
    "seccomp": ({"seccompProfile": {"type": "RuntimeDefault"}}, {
        (*SECURITY, "seccompProfile"): {"type": "RuntimeDefault"}}),
    "SELinux level": ({"seLinuxOptions": {"level": "s0"}}, {
        (*SECURITY, "seLinuxOptions"): {"level": "s0", "type": "spc_t"}}),
    "SELinux type": ({"seLinuxOptions": {"type": "own_t"}}, {(*SECURITY, "seLinuxOptions"): {"type": "own_t"}}),
    "AppArmor by the field": ({"useAppArmorAnnotation": False}, {
        (*ANNOTATIONS, APPARMOR): ABSENT, (*SECURITY, "appArmorProfile"): {"type": "Unconfined"}}),
    "limits": ({"resources": {"limits": {"memory": "128Mi"}, "requests": {"cpu": 0.2}}}, {
        (*CONTAINER, "resources"): {"limits": {"memory": "128Mi"}, "requests": {"cpu": 0.2, "memory": "100Mi"}}}),
    "default resources": ({"_internal_defaults_do_not_set": {"resources": None}, "global": {
        "defaultResources": {"requests": {"cpu": "1"}}}}, {(*CONTAINER, "resources", "requests", "cpu"): "1"}),
    "quota": ({"resourceQuotas": {"enabled": True, "pods": 70}}, {
        ("ResourceQuota", "metadata", "name"): "istio-cni-resource-quota",
        ("ResourceQuota", "spec", "hard"): {"pods": "70"},
        ("ResourceQuota", "spec", "scopeSelector", "matchExpressions"): [
            {"operator": "In", "scopeName": "PriorityClass", "values": ["system-node-critical"]}]}),
    "labels and annotations": (
        {"daemonSetLabels": {"a": "1"}, "podLabels": {"b": "2"},
         "podAnnotations": {"c": "3", "prometheus.io/scrape": "false"}},
        {("DaemonSet", "metadata", "labels", "a"): "1", (*LABELS, "b"): "2", (*LABELS, "a"): ABSENT,
         (*ANNOTATIONS, "c"): "3", (*ANNOTATIONS, "prometheus.io/scrape"): "false",
         (*LABELS, "k8s-app"): "istio-cni-node"}),
    "what others are told by labels stays": (
        {"podLabels": {"k8s-app": "x", "istio.io/dataplane-mode": "ambient"}, "daemonSetLabels": {"k8s-app": "x"}},
        {(*LABELS, "k8s-app"): "istio-cni-node", (*LABELS, "istio.io/dataplane-mode"): "none",
         ("DaemonSet", "metadata", "labels", "k8s-app"): "istio-cni-node"}),
    "where": ({"nodeSelector": {"pool": "mesh"}, "affinity": {"nodeAffinity": {"x": 1}}, "tolerations": [
        {"operator": "Exists"}], "priorityClassName": "high"}, {
        (*POD, "nodeSelector"): {"kubernetes.io/os": "linux", "pool": "mesh"},
        (*POD, "affinity"): {"nodeAffinity": {"x": 1}}, (*POD, "tolerations"): [{"operator": "Exists"}],
        (*POD, "priorityClassName"): "high"}),
    "no priority": ({"priorityClassName": "", "tolerations": []}, {
        (*POD, "priorityClassName"): ABSENT, (*POD, "tolerations"): ABSENT}),
    "slower update": ({"updateStrategy": {"rollingUpdate": {"maxUnavailable": "10%"}}}, {
        (*DAEMONSET, "updateStrategy"): {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}}}),
    "surge": ({"updateStrategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}}, {
        (*DAEMONSET, "updateStrategy", "rollingUpdate"): {"maxUnavailable": 0, "maxSurge": 1}}),
    "by hand": ({"updateStrategy": {"type": "OnDelete"}}, {(*DAEMONSET, "updateStrategy"): {"type": "OnDelete"}}),
    "longer ending": ({"terminationGracePeriodSeconds": 60}, {
        (*POD, "terminationGracePeriodSeconds"): 60, config("SHUTDOWN_GRACE_SECONDS"): ABSENT}),
    "shorter ending": ({"terminationGracePeriodSeconds": 12}, {config("SHUTDOWN_GRACE_SECONDS"): "10"}),
    "no time to end": ({"terminationGracePeriodSeconds": 0}, {config("SHUTDOWN_GRACE_SECONDS"): "1"}),
    "health port": ({"healthPort": 18000, "global": {"networkPolicy": {"enabled": True}}}, {
        (*CONTAINER, "readinessProbe", "httpGet"): {"path": "/readyz", "port": 18000},
        (*CONTAINER, "livenessProbe", "httpGet"): {"path": "/healthz", "port": 18000},
        config("HEALTH_PORT"): "18000",
        ("NetworkPolicy", "spec", "ingress", "0", "ports"): [
            {"protocol": "TCP", "port": 15014}, {"protocol": "TCP", "port": 18000}]}),
    "metrics port": ({"monitoringPort": 15099}, {
        (*CONTAINER, "ports", "metrics", "containerPort"): 15099, (*ANNOTATIONS, "prometheus.io/port"): "15099",
        config("MONITORING_PORT"): "15099"}),
    "no metrics": ({"monitoringPort": 0, "global": {"networkPolicy": {"enabled": True}}}, {
        (*CONTAINER, "ports"): ABSENT, (*ANNOTATIONS, "prometheus.io/scrape"): ABSENT, config("MONITORING_PORT"): "0",
        ("NetworkPolicy", "spec", "ingress", "0", "ports"): [{"protocol": "TCP", "port": 8000}]}),
    "slower probes": ({"readinessProbe": {"periodSeconds": 5}, "livenessProbe": {"failureThreshold": 9}}, {
        (*CONTAINER, "readinessProbe", "periodSeconds"): 5, (*CONTAINER, "readinessProbe", "failureThreshold"): 5,
        (*CONTAINER, "livenessProbe", "failureThreshold"): 9}),
    "network policy": ({"global": {"networkPolicy": {"enabled": True}}, "revision": "1-30"}, {
        ("NetworkPolicy", "metadata", "name"): "istio-cni-1-30",
        ("NetworkPolicy", "spec", "podSelector"): {"matchLabels": {"k8s-app": "istio-cni-node"}},
        ("NetworkPolicy", "spec", "policyTypes"): ["Ingress", "Egress"], ("NetworkPolicy", "spec", "egress"): [{}],
        ("NetworkPolicy", "spec", "ingress", "0", "from"): ABSENT}),
    "network policy without a revision": ({"global": {"networkPolicy": {"enabled": True}}}, {
        ("NetworkPolicy", "metadata", "name"): "istio-cni"}),
    "revision and owner": ({"revision": "1-30", "ownerName": "me"}, {
        ("DaemonSet", "metadata", "labels", "istio.io/rev"): "1-30",
        ("ConfigMap", "metadata", "labels", "install.operator.istio.io/owning-resource"): "me"}),
}
K3S = "/var/lib/rancher/k3s"
FILES: dict[str, tuple[Values, Facts]] = {
    "ambient": ({"profile": "ambient"}, {config("AMBIENT_ENABLED"): "true", IMAGE_AT: IMAGE}),
    "ambient, global": ({"global": {"profile": "ambient"}}, {config("AMBIENT_ENABLED"): "true"}),
    "demo": ({"profile": "demo"}, {(*CONTAINER, "resources", "requests"): {"cpu": "10m", "memory": "40Mi"}}),
    "1.25": ({"compatibilityVersion": "1.25", "profile": "ambient"}, {
        config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "false", (*POD, "hostNetwork"): True}),
    "1.28 as a number": ({"compatibilityVersion": 1.28, "profile": "ambient"}, {
        config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "false", (*POD, "hostNetwork"): ABSENT}),
    "1.26 as a profile": ({"profile": "compatibility-version-1.26"}, {
        config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "false"}),
    "1.27, global": ({"global": {"compatibilityVersion": "1.27"}}, {
        config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "false"}),
    "1.30": ({"compatibilityVersion": "1.30"}, {config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "true"}),
    "gke of an unknown version": ({"platform": "gke"}, {
        volume("cni-bin-dir"): "/opt/cni/bin", ("ResourceQuota", "spec", "hard", "pods"): "5000"}),
    "k3d": ({"platform": "k3d"}, {
        volume("cni-bin-dir"): "/bin", volume("cni-net-dir"): f"{K3S}/agent/etc/cni/net.d"}),
    "k3s": ({"global": {"platform": "k3s"}}, {
        volume("cni-bin-dir"): f"{K3S}/data/cni", volume("cni-net-dir"): f"{K3S}/agent/etc/cni/net.d"}),
    "microk8s": ({"platform": "microk8s"}, {
        volume("cni-bin-dir"): "/var/snap/microk8s/current/opt/cni/bin",
        volume("cni-net-dir"): "/var/snap/microk8s/current/args/cni-network"}),
    "minikube": ({"platform": "minikube", "profile": "ambient"}, {volume("cni-netns-dir"): "/var/run/docker/netns"}),
    "openshift": ({"global": {"platform": "openshift"}}, {
        volume("cni-bin-dir"): "/var/lib/cni/bin", volume("cni-net-dir"): "/etc/cni/multus/net.d",
        config("CHAINED_CNI_PLUGIN"): "false", config("CNI_CONF_NAME"): "istio-cni.conf",
        ("NetworkAttachmentDefinition", "metadata", "namespace"): "default",
        (*SECURITY, "seLinuxOptions"): {"type": "spc_t"},
        (*role("istio-cni"), "rules", "3"): {
            "apiGroups": ["security.openshift.io"], "resources": ["securitycontextconstraints"],
            "resourceNames": ["privileged"], "verbs": ["use"]}}),
    "preview, remote, stable": ({"profile": "stable"}, {config("AMBIENT_ENABLED"): "false"}),
}
# Later wins: defaults, profile, compatibility version, platform, values without prefix, values below `cni`.
ORDER: dict[str, tuple[Values, Facts]] = {
    "plain over profile": ({"profile": "ambient", "ambient": {"enabled": False}}, {config("AMBIENT_ENABLED"): "false"}),
    "prefixed over profile": ({"profile": "ambient", "cni": {"ambient": {"enabled": False}}}, {
        config("AMBIENT_ENABLED"): "false"}),
    "prefixed over plain": ({"ambient": {"enabled": False}, "cni": {"ambient": {"enabled": True}}}, {
        config("AMBIENT_ENABLED"): "true"}),
    "both, each for a part": ({"ambient": {"enabled": True}, "cni": {"ambient": {"ipv6": False}}}, {
        config("AMBIENT_ENABLED"): "true", config("AMBIENT_IPV6"): "false"}),
    "plain over platform": (
        {"platform": "openshift", "cniConfDir": "/mine", "chained": True, "provider": "default",
         "cniConfFileName": "", "seLinuxOptions": {"type": "mine_t"}},
        {volume("cni-net-dir"): "/mine", config("CHAINED_CNI_PLUGIN"): "true",
         ("NetworkAttachmentDefinition",): ABSENT, config("CNI_CONF_NAME"): ABSENT,
         (*SECURITY, "seLinuxOptions", "type"): "mine_t", volume("cni-bin-dir"): "/var/lib/cni/bin"}),
    "false and zero over platform": ({"platform": "gke", "resourceQuotas": {"enabled": False}}, {
        ("ResourceQuota",): ABSENT}),
    "plain over compatibility": (
        {"compatibilityVersion": "1.25", "profile": "ambient", "ambient": {
            "shareHostNetworkNamespace": False, "reconcileIptablesOnStartup": True}},
        {(*POD, "hostNetwork"): ABSENT, config("AMBIENT_RECONCILE_POD_RULES_ON_STARTUP"): "true"}),
    "profile over the defaults' own place": (
        {"profile": "ambient", "_internal_defaults_do_not_set": {"ambient": {"enabled": False}}},
        {config("AMBIENT_ENABLED"): "true"}),
    "plain over the defaults' own place": (
        {"_internal_defaults_do_not_set": {"cniConfDir": "/a", "cniBinDir": "/b"}, "cniConfDir": "/c"},
        {volume("cni-net-dir"): "/c", volume("cni-bin-dir"): "/b"}),
    "platform over profile": ({"profile": "platform-k3s", "platform": "microk8s"}, {
        volume("cni-bin-dir"): "/var/snap/microk8s/current/opt/cni/bin"}),
    "profile chosen below cni": ({"cni": {"profile": "ambient"}, "profile": "demo"}, {
        config("AMBIENT_ENABLED"): "true", (*CONTAINER, "resources", "requests", "cpu"): "100m"}),
    "platform chosen in the defaults' own place": ({"_internal_defaults_do_not_set": {"platform": "k3d"}}, {
        volume("cni-bin-dir"): "/bin"}),
    "own profile over the global one": ({"profile": "demo", "global": {"profile": "ambient"}}, {
        config("AMBIENT_ENABLED"): "false"}),
    "globals below cni": ({"cni": {"global": {"nativeNftables": True}}}, {config("NATIVE_NFTABLES"): "true"}),
    "lists are replaced": ({"ambient": {"enablementSelectors": SELECTORS}, "cni": {"excludeNamespaces": ["x"]}}, {
        config("EXCLUDE_NAMESPACES"): "x"}),
    "other charts' values": (
        {"pilot": {"a": 1}, "ztunnel": {}, "meshConfig": {"b": 2}, "global": {"proxy": {"c": 3}, "meshID": "m"},
         "cni": {"enabled": True, "logLevel": "x"}, "istio_cni": {"enabled": True}, "defaultRevision": "d"},
        {config("AMBIENT_ENABLED"): "false"}),
}
# fmt: on
TABLES = {
    "image": IMAGES,
    "installing": INSTALLING,
    "mode": MODES,
    "pod": PODS,
    "file": FILES,
    "order": ORDER,
}
CASES: dict[str, tuple[Values, Facts]] = {
    f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()
}
