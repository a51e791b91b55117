"""Kubernetes objects of the lab: pods as the injector leaves them, ambient ones, and those that know of no mesh."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lab.ambient import AMBIENT_LABELS
from meshcni import istio

NODE_NAME = "lab-node"
_numbers = itertools.count(1)


def unmeshed_pod(
    namespace: str, name: str, *, labels: Mapping[str, str] | None = None, annotations: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a pod with one container, on the lab's node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": f"00000000-0000-4000-8000-{next(_numbers):012d}",
            "labels": dict(labels or {}),
            "annotations": dict(annotations or {}),
        },
        "spec": {
            "nodeName": NODE_NAME,
            "containers": [{"name": "app", "image": "meshcni.test/app:1"}],
        },
        "status": {"phase": "Pending"},
    }


def sidecar_pod(
    namespace: str,
    name: str,
    *,
    mode: str = "REDIRECT",
    annotations: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a pod as the injector leaves it with the CNI plugin in use; `environment` is that of the proxy."""
    pod = unmeshed_pod(namespace, name, labels={"security.istio.io/tlsMode": "istio"})
    pod["metadata"]["annotations"] = {
        istio.SIDECAR_STATUS: json.dumps({"containers": [istio.PROXY_CONTAINER], "revision": "default"}),
        **({} if mode == "REDIRECT" else {istio.INTERCEPTION_MODE: mode}),
        **(annotations or {}),
    }
    transparent = mode == "TPROXY"  # a transparent socket needs CAP_NET_ADMIN, which the injector gives to root
    proxy = {
        "name": istio.PROXY_CONTAINER,
        "image": "meshcni.test/proxy:1",
        "args": ["proxy", "sidecar", "--domain", f"{namespace}.svc.cluster.local"],
        "env": [{"name": key, "value": value} for key, value in (environment or {}).items()],
        "securityContext": {"runAsUser": 0 if transparent else istio.PROXY_UID, "runAsGroup": istio.PROXY_GID},
    }
    pod["spec"]["initContainers"] = [{"name": istio.VALIDATION_CONTAINER, "image": "meshcni.test/proxy:1"}]
    pod["spec"]["containers"].append(proxy)
    return pod


def ambient_pod(
    namespace: str,
    name: str,
    *,
    ips: Sequence[str] = (),
    runtime_class: str = "",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a pod that asks for ambient mode by its label; one with `ips` runs already."""
    pod = unmeshed_pod(namespace, name, labels={**AMBIENT_LABELS, **(labels or {})}, annotations=annotations)
    pod["spec"]["serviceAccountName"] = "default"
    if runtime_class:
        pod["spec"]["runtimeClassName"] = runtime_class
    if ips:
        pod["status"] = {"phase": "Running", "podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]}
    return pod


def ambient_namespace(name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a namespace whose pods are in ambient mode unless they opt out."""
    return namespace_object(name, {**AMBIENT_LABELS, **(labels or {})})


def namespace_object(name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}}


def daemonset_object(namespace: str) -> dict[str, Any]:
    """Return the DaemonSet that our agent is a pod of."""
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"namespace": namespace, "name": istio.DAEMONSET_NAME},
        "spec": {"template": {"metadata": {}, "spec": {}}},
    }
