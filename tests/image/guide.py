"""The DaemonSet that users of the hardened image write: the first edition names no mount, the newer one three."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import yaml
from lab.daemonset import DaemonSet

# Privileged, on the host's network, and without a user: the image's own, who is not root.
FIRST_EDITION = """
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: istio-cni-node, namespace: istio-system}
spec:
  selector: {matchLabels: {k8s-app: istio-cni-node}}
  template:
    metadata: {labels: {k8s-app: istio-cni-node}}
    spec:
      hostNetwork: true
      containers:
      - name: install-cni
        image: IMAGE
        securityContext: {privileged: true}
"""

NEWER_EDITION = """
spec:
  template:
    spec:
      containers:
      - name: install-cni
        command: [install-cni]
        env:
        - {name: CHAINED_CNI_PLUGIN, value: "true"}
        - {name: KUBECFG_FILE_NAME, value: ZZZ-istio-cni-kubeconfig}
        - {name: LOG_LEVEL, value: info}
        - {name: AMBIENT_ENABLED, value: "false"}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        volumeMounts:
        - {name: cni-bin-dir, mountPath: /host/opt/cni/bin}
        - {name: cni-net-dir, mountPath: /host/etc/cni/net.d}
        - {name: cni-run-dir, mountPath: /var/run/istio-cni}
      volumes:
      - {name: cni-bin-dir, hostPath: {path: /opt/cni/bin}}
      - {name: cni-net-dir, hostPath: {path: /etc/cni/net.d}}
      - {name: cni-run-dir, hostPath: {path: /var/run/istio-cni, type: DirectoryOrCreate}}
"""
KEYS = {
    "containers": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumes": "name",
}  # of lists, as kubectl has them


def daemonset(*patches: str | Mapping[str, Any]) -> DaemonSet:
    """The first edition with patches, merged as `kubectl patch` does."""
    merged = yaml.safe_load(FIRST_EDITION)
    for patch in patches:
        merged = merge(merged, yaml.safe_load(patch) if isinstance(patch, str) else patch)
    return DaemonSet(merged["spec"]["template"]["spec"], {})


def merge(value: Any, patch: Any, name: str = "") -> Any:
    """A strategic merge: mappings by key, lists of objects by their merge key, anything else is replaced."""
    if isinstance(value, dict) and isinstance(patch, dict):
        found = copy.deepcopy(value)
        for key, part in patch.items():
            found[key] = merge(value[key], part, key) if key in value else part
        return found
    if isinstance(value, list) and name in KEYS:
        known = {one[KEYS[name]]: one for one in value}
        for one in patch:
            known[one[KEYS[name]]] = merge(known.get(one[KEYS[name]], {}), one)
        return list(known.values())
    return patch
