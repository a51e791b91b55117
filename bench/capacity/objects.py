"""Objects of a cluster in use: pods about as large as an injected application's, whose size is what watches cost."""

from __future__ import annotations

import json
from typing import Any

from meshcni import istio

AMBIENT_LABEL = "istio.io/dataplane-mode"
VARIABLES = 24  # of the proxy; the injector writes about as many
CONTAINER_PROBE = {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 10, "failureThreshold": 3}


def node_name(number: int) -> str:
    """Return the name of a simulated node."""
    return f"node-{number:05d}"


def namespace(number: int, *, ambient: bool = False) -> dict[str, Any]:
    """Return a namespace with the labels and annotations that tools leave behind."""
    labels = {"team": f"team-{number % 50}", "env": "production", **({AMBIENT_LABEL: "ambient"} if ambient else {})}
    notes = {f"example.com/note-{index}": "x" * 80 for index in range(4)}
    metadata = {"name": f"capacity-{number:04d}", "labels": labels, "annotations": notes}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def pod(namespace_name: str, name: str, node: str, *, ambient: bool) -> dict[str, Any]:
    """Return a pod bound to a node: with a sidecar, or of ambient mode."""
    labels = {"app": name, "version": "v1", **({AMBIENT_LABEL: "ambient"} if ambient else {})}
    injected = {
        istio.SIDECAR_STATUS: json.dumps({"containers": [istio.PROXY_CONTAINER], "revision": "default"}),
        "kubectl.kubernetes.io/default-container": "app",
        "prometheus.io/path": "/stats/prometheus",
    }
    containers = [_container("app", 6), *([] if ambient else [_container(istio.PROXY_CONTAINER, VARIABLES)])]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace_name,
            "name": name,
            "labels": labels,
            "annotations": {} if ambient else injected,
        },
        "spec": {
            "nodeName": node,
            "containers": containers,
            "initContainers": [] if ambient else [_container(istio.VALIDATION_CONTAINER, 4)],
            "volumes": [{"name": f"config-{index}", "configMap": {"name": f"config-{index}"}} for index in range(6)],
            "tolerations": [
                {
                    "key": "node.kubernetes.io/not-ready",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 300,
                }
            ],
        },
    }


def status(step: int, address: str) -> dict[str, Any]:
    """Return what a kubelet reports at one step of a pod's life: 0 containers are made, 1 running, 2 ready, 3 ended."""
    conditions = [
        {"type": kind, "status": "True" if step >= 1 + (kind == "Ready") else "False", "message": "containers"}
        for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled", "PodReadyToStartContainers")
    ]
    states = [{"name": "app", "image": "app:1", "imageID": "", "ready": step == 2, "restartCount": 0}]
    network = {} if step == 0 else {"podIP": address, "podIPs": [{"ip": address}]}
    phase = ("Pending", "Running", "Running", "Succeeded")[step]
    return {"status": {"phase": phase, "conditions": conditions, "containerStatuses": states, **network}}


def _container(name: str, variables: int) -> dict[str, Any]:
    probe = {} if name == istio.VALIDATION_CONTAINER else {"readinessProbe": CONTAINER_PROBE}  # none in init containers
    return {
        "name": name,
        **probe,
        "image": f"registry.example/{name}@sha256:{'0' * 64}",
        "args": ["proxy", "sidecar", "--domain", "$(POD_NAMESPACE).svc.cluster.local"],
        "env": [{"name": f"VARIABLE_{index:02d}", "value": "value-" + "v" * 24} for index in range(variables)],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": [{"name": f"config-{index}", "mountPath": f"/etc/config/{index}"} for index in range(6)],
    }
