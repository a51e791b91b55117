"""Manifests of test pods: as the injector leaves them, for ambient mode, and those that know of no mesh.

Their containers run the static program of workload.c, which serves HTTP on APP_PORT and names its pod. `run_order`
gives `app` any other order of it. `deployment` and the like make of a pod what makes such pods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.ambient import AMBIENT_LABELS
from lab.images import static_archive
from meshcni import istio

IMAGE = "meshcni.test/workload:1"
PROGRAM = "/workload"
APP_PORT = 8080
READINESS_PORT = 15021
APP, NAME_LABEL = "app", "app.kubernetes.io/name"
TOLERATE_ALL = [{"operator": "Exists"}]

Object = dict[str, Any]


def archive() -> Path:
    """Return the OCI archive of the image that these pods run."""
    return static_archive(IMAGE, Path(__file__).parent / "workload.c")


# --- pods -------------------------------------------------------------------------------------------------------------


def plain_pod(
    namespace: str,
    name: str,
    *,
    node: str = "",
    ports: Sequence[int] = (APP_PORT,),
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    host_network: bool = False,
    readiness: bool = True,
    grace_seconds: int = 1,
    **spec: Any,  # noqa: ANN401
) -> Object:
    """Return a pod with one container `app` that serves `ports`, on `node` (by its label) or wherever.

    It carries NAME_LABEL with its name. `spec` are more fields of its spec.
    """
    app = container(APP, "serve", *map(str, ports))
    if readiness:
        app["readinessProbe"] = http_probe(ports[0])
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "labels": {NAME_LABEL: name, **(labels or {})},
            "annotations": dict(annotations or {}),
        },
        "spec": {
            "containers": [app],
            "terminationGracePeriodSeconds": grace_seconds,
            **({"nodeSelector": {"kubernetes.io/hostname": node}} if node else {}),
            **({"hostNetwork": True} if host_network else {}),
            **spec,
        },
    }


def sidecar_pod(
    namespace: str,
    name: str,
    *,
    validate: Sequence[int] = (4,),
    native: bool = False,
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    **options: Any,  # noqa: ANN401
) -> Object:
    """Return a pod as the injector leaves it with the CNI plugin in use; other options are those of `plain_pod`.

    `istio-validation` ends with 126 unless the IP versions in `validate` are redirected; without any it is left out.
    `native` has the proxy be an init container that stays.
    """
    status = json.dumps({"containers": [istio.PROXY_CONTAINER], "revision": "default"})
    pod = plain_pod(
        namespace,
        name,
        labels={"security.istio.io/tlsMode": "istio", **(labels or {})},
        annotations={istio.SIDECAR_STATUS: status, **(annotations or {})},
        **options,
    )
    proxy = proxy_container(namespace)
    validation = container(istio.VALIDATION_CONTAINER, "validate", *map(str, validate))
    validation["securityContext"] = proxy["securityContext"]
    init = [validation] if validate else []
    if native:
        pod["spec"]["initContainers"] = [*init, {**proxy, "restartPolicy": "Always"}]
    else:
        pod["spec"]["initContainers"] = init
        pod["spec"]["containers"].insert(0, proxy)
    return pod


def ambient_pod(namespace: str, name: str, **options: Any) -> Object:  # noqa: ANN401
    """Return a pod that asks for ambient mode by its label; in an `ambient` namespace a plain pod needs none."""
    labels = {**AMBIENT_LABELS, **(options.pop("labels", None) or {})}
    return plain_pod(namespace, name, labels=labels, **options)


def proxy_container(namespace: str) -> Object:
    """Return the stand-in of istio-proxy: it leads connections on and says so in its log."""
    made = container(istio.PROXY_CONTAINER, "sidecar")
    made["env"].append({"name": "ISTIO_META_WORKLOAD_NAMESPACE", "value": namespace})
    made["readinessProbe"] = http_probe(READINESS_PORT, "/healthz/ready")
    made["securityContext"] = {
        "runAsUser": istio.PROXY_UID,
        "runAsGroup": istio.PROXY_GID,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    return made


def container(name: str, *order: str) -> Object:
    """Return a container that runs an order of workload.c, and knows its pod's name."""
    return {
        "name": name,
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "args": list(order),
        "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
    }


def run_order(pod: Object, *order: str) -> Object:
    """Return the pod with `app` running another order, such as `sleep` or `exit 0`, without a probe."""
    spec = dict(pod["spec"])
    spec["containers"] = [
        {key: value for key, value in {**each, "args": list(order)}.items() if key != "readinessProbe"}
        if each["name"] == APP
        else each
        for each in spec["containers"]
    ]
    return {**pod, "spec": spec}


def http_probe(port: int, path: str = "/") -> Object:
    """Return a probe by HTTP, each second."""
    return {"httpGet": {"port": port, "path": path}, "periodSeconds": 1, "failureThreshold": 30}


# --- what is around pods ----------------------------------------------------------------------------------------------


def namespace(name: str, *, ambient: bool = False, labels: Mapping[str, str] | None = None) -> Object:
    """Return a namespace; with `ambient` its pods are in ambient mode unless they opt out."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {**(AMBIENT_LABELS if ambient else {}), **(labels or {})}},
    }


def service(namespace: str, name: str, selector: Mapping[str, str] | None = None, port: int = APP_PORT) -> Object:
    """Return a Service with addresses of both families; by default of the pods with NAME_LABEL=name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "selector": dict(selector or {NAME_LABEL: name}),
            "ports": [{"name": "http", "port": port, "protocol": "TCP", "targetPort": port}],
            "ipFamilyPolicy": "RequireDualStack",
            "ipFamilies": ["IPv4", "IPv6"],
        },
    }


def deployment(pod: Object, replicas: int = 1) -> Object:
    """Return a Deployment of pods like this one."""
    return controller("Deployment", pod, {"replicas": replicas})


def stateful_set(pod: Object, replicas: int = 1) -> Object:
    """Return a StatefulSet of pods like this one."""
    return controller("StatefulSet", pod, {"replicas": replicas, "serviceName": pod["metadata"]["name"]})


def daemon_set(pod: Object) -> Object:
    """Return a DaemonSet of pods like this one, on every node whatever its taints."""
    made = controller("DaemonSet", pod, {})
    made["spec"]["template"]["spec"].setdefault("tolerations", TOLERATE_ALL)
    return made


def job(pod: Object, **spec: Any) -> Object:  # noqa: ANN401
    """Return a Job that runs the pod to its end; `spec` are more fields of the Job's."""
    meta = pod["metadata"]
    template = template_of(pod)
    template["spec"].setdefault("restartPolicy", "Never")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"namespace": meta["namespace"], "name": meta["name"]},
        "spec": {"template": template, **spec},
    }


def controller(kind: str, pod: Object, spec: Mapping[str, Any]) -> Object:
    """Return an object of apps/v1 that makes pods."""
    meta = pod["metadata"]
    selector = {"matchLabels": {NAME_LABEL: meta["labels"][NAME_LABEL]}}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"namespace": meta["namespace"], "name": meta["name"]},
        "spec": {"selector": selector, "template": template_of(pod), **spec},
    }


def template_of(pod: Object) -> Object:
    """Return the template of a pod."""
    meta = pod["metadata"]
    return {"metadata": {"labels": meta["labels"], "annotations": meta["annotations"]}, "spec": dict(pod["spec"])}
