"""Pods that run programs of the host and of the checkout, shown to them by hostPath: ztunnel's stand-in, and Envoy.

So no large image has to be made: the root is the workload image's, /usr is the host's.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import envoy
from lab.cluster import workloads
from lab.cluster.binaries import ROOT
from lab.cluster.kubenode import CHECKOUT_INSIDE
from lab.envoy import Mode
from lab.node import LabError
from meshcni import istio

Object = dict[str, Any]

CHECKOUT = "/checkout"  # in the container
ZTUNNEL = "ztunnel"
ZTUNNEL_FOLDER = "/run/lab/ztunnel"  # of the node: control.sock takes orders, see lab.ztunnel.client.order
ZTUNNEL_CAPABILITIES = ["NET_ADMIN", "NET_RAW", "SYS_ADMIN"]
LINKED = ("lib", "lib64")  # in /, to folders of /usr
ENVOY_CONFIG = "envoy-bootstrap"


def ztunnel_daemon_set(*, ipv6: bool = True, arguments: Sequence[str] = ()) -> Object:
    """Return the DaemonSet of ztunnel's stand-in, which takes pods from the agent and serves them.

    It is ready when the agent's snapshot has come and all pods are served. `arguments` are more of lab.ztunnel's.
    """
    command = ["/usr/bin/python3", "-m", "lab.ztunnel", "--socket", istio.ZTUNNEL_SOCKET, "--listen"]
    command += ["--control", f"{ZTUNNEL_FOLDER}/control.sock", "--record", f"{ZTUNNEL_FOLDER}/record.jsonl"]
    command += ["--record-connections", *([] if ipv6 else ["--ipv4-only"]), *arguments]
    probe = {"exec": {"command": ["/usr/bin/test", "-S", f"{ZTUNNEL_FOLDER}/control.sock"]}, "periodSeconds": 1}
    container = {
        **python_container(ZTUNNEL, command),
        "readinessProbe": probe,
        "securityContext": {
            "runAsUser": 0,
            "runAsNonRoot": False,
            "capabilities": {"drop": ["ALL"], "add": ZTUNNEL_CAPABILITIES},
        },
    }
    pod = {
        "metadata": {
            "namespace": istio.SYSTEM_NAMESPACE,
            "name": ZTUNNEL,
            "labels": {
                workloads.NAME_LABEL: ZTUNNEL,
                istio.ZTUNNEL_LABEL[0]: istio.ZTUNNEL_LABEL[1],
                istio.DATAPLANE_MODE: "none",
                "sidecar.istio.io/inject": "false",
            },
            "annotations": {"sidecar.istio.io/inject": "false"},
        },
        "spec": {
            "containers": [container],
            "volumes": host_volumes(),
            "priorityClassName": "system-node-critical",
            "terminationGracePeriodSeconds": 5,
        },
    }
    folders = {"run": str(Path(istio.ZTUNNEL_SOCKET).parent), "lab": ZTUNNEL_FOLDER}
    for name, path in folders.items():
        add_volume(pod, name, path, path, "DirectoryOrCreate", read_only=False)
    return workloads.daemon_set(pod)


def envoy_pod(namespace: str, name: str, **options: Any) -> Object:  # noqa: ANN401
    """Return a sidecar pod whose proxy is a real Envoy; its namespace needs `envoy_config`.

    Options are those of workloads.sidecar_pod.
    """
    pod = workloads.sidecar_pod(namespace, name, **options)
    proxy = next(each for each in pod["spec"]["containers"] if each["name"] == istio.PROXY_CONTAINER)
    del proxy["readinessProbe"]
    proxy["command"] = ["/envoy", "--config-path", "/etc/envoy/bootstrap.json", "--concurrency", "1"]
    proxy["args"] = ["--disable-hot-restart", "--log-level", "warning"]
    pod["spec"]["volumes"] = host_volumes(checkout=False)
    add_mounts(proxy, pod["spec"]["volumes"])
    add_volume(pod, "envoy", inside_node(envoy.envoy_binary()), "/envoy", "File")
    pod["spec"]["volumes"].append({"name": "bootstrap", "configMap": {"name": ENVOY_CONFIG}})
    proxy["volumeMounts"].append({"name": "bootstrap", "mountPath": "/etc/envoy", "readOnly": True})
    return pod


def envoy_config(namespace: str) -> Object:
    """Return the ConfigMap with the configuration that `envoy_pod` starts Envoy with."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": namespace, "name": ENVOY_CONFIG},
        "data": {"bootstrap.json": json.dumps(envoy.bootstrap(Mode.REDIRECT))},
    }


def python_container(name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Object:
    """Return a container that runs the host's Python with the checkout's modules."""
    variables = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1", "PATH": "/usr/bin", **(environment or {})}
    made = {
        "name": name,
        "image": workloads.IMAGE,
        "imagePullPolicy": "Never",
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in variables.items()],
    }
    add_mounts(made, host_volumes())
    return made


def python_path() -> str:
    """Return where the checkout's modules and those that it needs are in a container."""
    packages = Path(sysconfig.get_path("purelib"))
    return ":".join([f"{CHECKOUT}/src", CHECKOUT, inside_checkout(packages, CHECKOUT)])


def inside_node(path: Path) -> str:
    """Return where the node sees a file of the checkout; LabError when it is none."""
    return inside_checkout(path, CHECKOUT_INSIDE)


def inside_checkout(path: Path, checkout: str) -> str:
    """Return the place of a file of the checkout below another folder; LabError when it is not in the checkout."""
    try:
        return os.path.join(checkout, path.absolute().relative_to(ROOT))
    except ValueError:
        raise LabError(f"{path} is not in {ROOT}; run this with .venv/bin/python (scripts/setup makes it)") from None


def host_volumes(*, checkout: bool = True) -> list[Object]:
    """Return volumes of the host's programs and libraries, and of the checkout; each is named by its mount path."""
    folders = {"usr": "/usr", **{name: f"/{name}" for name in LINKED if Path(f"/{name}").exists()}}
    if checkout:
        folders[CHECKOUT.lstrip("/")] = CHECKOUT_INSIDE
    return [{"name": name, "hostPath": {"path": path}} for name, path in folders.items()]


def add_mounts(container: Object, volumes: Sequence[Object]) -> None:
    """Mount each of `host_volumes` at its name."""
    mounts = container.setdefault("volumeMounts", [])
    mounts += [{"name": each["name"], "mountPath": f"/{each['name']}", "readOnly": True} for each in volumes]


def add_volume(pod: Object, name: str, outside: str, inside: str, kind: str, *, read_only: bool = True) -> None:
    """Give a pod's first container a path of the node."""
    pod["spec"]["volumes"].append({"name": name, "hostPath": {"path": outside, "type": kind}})
    mount = {"name": name, "mountPath": inside, "readOnly": read_only}
    pod["spec"]["containers"][0].setdefault("volumeMounts", []).append(mount)
