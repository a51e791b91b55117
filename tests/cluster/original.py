"""Istio's own node agent as its documentation describes it: manifests, rights, and an image that plays its part."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lab.ambient import ENABLEMENT_SELECTORS
from lab.cluster import Cluster, KubeNode
from lab.images import BUILD, oci_archive
from lab.namespaces import call_in_netns
from tests.cluster.releases import NAMESPACE, RUN_DIR
from tests.kernel import ambient_oracle
from tests.kernel.contract_oracle import contract, pod_flags

from meshcni import istio

HERE = Path(__file__).parent
MANIFEST = HERE.parent / "image" / "original.yaml"
REFERENCE = "registry.example/istio/install-cni:1.30.3"  # in the manifest
IMAGE = "meshcni.test/original:1"
ACCOUNT = "istio-cni"

Object = dict[str, Any]


# --- manifests --------------------------------------------------------------------------------------------------------


def rights(*, ambient: bool, account: str = ACCOUNT) -> list[Object]:
    """The roles of Istio's own chart, its bindings and its account."""
    everything = ["get", "list", "watch"]
    rules = {
        "istio-cni": [rule("", ["pods", "nodes", "namespaces"], everything)],
        "istio-cni-repair-role": [rule("", ["events"], ["create", "patch"]), rule("", ["pods"], everything)],
    }
    if ambient:
        daemonset = {**rule("apps", ["daemonsets"], ["get"]), "resourceNames": ["istio-cni-node"]}
        rules["istio-cni-ambient"] = [rule("", ["pods/status"], ["patch", "update"]), daemonset]
    subject = {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}
    found: list[Object] = [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named(account, NAMESPACE)}]
    for name, granted in rules.items():
        group = "rbac.authorization.k8s.io"
        role = {"apiGroup": group, "kind": "ClusterRole", "name": name}
        found += [
            {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": named(name), "rules": granted},
            {
                "apiVersion": f"{group}/v1",
                "kind": "ClusterRoleBinding",
                "metadata": named(name),
                "roleRef": role,
                "subjects": [subject],
            },
        ]
    return found


def rule(group: str, resources: list[str], verbs: list[str]) -> Object:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


def named(name: str, namespace: str = "") -> Object:
    return {"name": name, **({"namespace": namespace} if namespace else {})}


def manifest(*, ambient: bool, native_nftables: bool = False) -> str:
    """ConfigMap and DaemonSet as Istio's chart makes them; sidecar mode is tests/image/original.yaml to the letter."""
    text = MANIFEST.read_text()
    if not ambient:
        return text
    config, daemonset = yaml.safe_load_all(text)
    config["data"] |= {
        "AMBIENT_ENABLED": "true",
        "AMBIENT_ENABLEMENT_SELECTOR": yaml.safe_dump(json.loads(ENABLEMENT_SELECTORS)),
        "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP": "true",
        "NATIVE_NFTABLES": json.dumps(native_nftables),
    }
    pod = daemonset["spec"]["template"]["spec"]
    pod["containers"][0]["volumeMounts"] += [
        {"name": "cni-netns-dir", "mountPath": "/host/var/run/netns", "mountPropagation": "HostToContainer"},
        {"name": "cni-ztunnel-sock-dir", "mountPath": "/var/run/ztunnel"},
    ]
    ztunnel = {"path": "/var/run/ztunnel", "type": "DirectoryOrCreate"}
    pod["volumes"].append({"name": "cni-ztunnel-sock-dir", "hostPath": ztunnel})
    return yaml.safe_dump_all([config, daemonset])


# --- the image that plays the original --------------------------------------------------------------------------------


def with_the_hosts_python(text: str) -> str:
    """The manifest with the host's programs mounted, which the image that plays the original needs and ours ignores."""
    *others, daemonset = yaml.safe_load_all(text)
    pod = daemonset["spec"]["template"]["spec"]
    mount = {"name": "host-usr", "mountPath": "/host/usr", "readOnly": True}
    pod["containers"][0]["volumeMounts"].append(mount)
    pod["volumes"].append({"name": "host-usr", "hostPath": {"path": "/usr"}})
    return yaml.safe_dump_all([*others, daemonset])


def import_image(cluster: Cluster) -> None:
    """Have the image in every node."""
    archive = BUILD / "original.tar"
    sources = [HERE / f"original{part}" for part in ("launcher.c", "agent.py", "plugin.py")]
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "originallauncher"
    subprocess.run(["gcc", "-Os", "-static", "-s", "-Wall", "-o", program, sources[0]], check=True)
    files = {
        "usr/local/bin/install-cni": program.read_bytes(),
        "original.py": sources[1].read_bytes(),
        "opt/cni/bin/istio-cni": sources[2].read_bytes(),
    }
    archive.write_bytes(oci_archive(IMAGE, files, ["/usr/local/bin/install-cni"]))
    for node in cluster.nodes.values():
        node.import_archive(archive)


def tell_of_pods(node: KubeNode, pods: list[Mapping[str, Any]]) -> None:
    """Have the image that plays the original enrol pods at the node's ztunnel when that connects."""
    listed = [
        {
            "uid": pod["metadata"]["uid"],
            "name": pod["metadata"]["name"],
            "namespace": pod["metadata"]["namespace"],
            "netns": Path(node.runtime.sandbox_by_uid(pod["metadata"]["uid"]).netns).name,
        }
        for pod in pods
    ]
    node.path(f"{RUN_DIR}/original-pods.json").write_text(json.dumps(listed))


def found_at_start(node: KubeNode) -> Object:
    """What the image that plays the original found on a node when it was last started there."""
    found: Object = json.loads(node.path(f"{RUN_DIR}/original-found.json").read_text())
    return found


# --- rules, as the original leaves them -------------------------------------------------------------------------------


def program_sidecar(netns: str, pod: Object, *, native_nftables: bool) -> None:
    """Program a sidecar pod as the original's plugin does."""
    addresses = ["127.0.0.1", *(each["ip"] for each in pod["status"]["podIPs"])]
    texts = contract(pod_flags(pod), {}, addresses)
    program(netns, texts, native_nftables=native_nftables)


def program_ambient(netns: str, *, native_nftables: bool) -> None:
    """Program an ambient pod as the original's agent does."""
    program(netns, ambient_oracle.pod(ipv6=True, dns=True), native_nftables=native_nftables)


def program_host(node: KubeNode, pods: list[Object], *, native_nftables: bool) -> None:
    """Make the host's address sets with the pods in them, and its probe rules."""
    version = {f"istio-inpod-probes-v{each}": each for each in (4, 6)}
    elements = [
        (name, address["ip"], pod["metadata"]["uid"])
        for pod in pods
        for name, number in version.items()
        for address in pod["status"]["podIPs"]
        if (":" in address["ip"]) == (number == 6)
    ]
    if native_nftables:
        table = "inet istio-ambient-nat"
        lines = [f"add table {table}"]
        for name, number in version.items():
            lines.append(f'add set {table} {name} {{ type ipv{number}_addr ; comment "probes" ; }}')
        lines += [f'add element {table} {name} {{ {ip} comment "{uid}" }}' for name, ip, uid in elements]
        node.run(["nft", "-f", "-"], text="\n".join(lines) + "\n")
    else:
        families = {4: "inet", 6: "inet6"}
        lines = [f"create {name} hash:ip family {families[number]} comment" for name, number in version.items()]
        lines += [f'add {name} {ip} comment "{uid}"' for name, ip, uid in elements]
        node.run(["ipset", "restore"], text="\n".join(lines) + "\n")
    program(node.netns, ambient_oracle.host(ipv6=True, uid=0), native_nftables=native_nftables)


def program(netns: str, texts: Any, *, native_nftables: bool) -> None:
    """Feed the texts to the tools that the original feeds, in a netns."""
    if native_nftables:
        fed = [("nft -f -", texts.nft)]
    else:
        fed = [
            ("iptables-nft-restore --noflush", texts.iptables),
            ("ip6tables-nft-restore --noflush", texts.ip6tables),
        ]
    fed.append(("sh -e", texts.ip))

    def work() -> None:
        for command, text in fed:
            if text:
                subprocess.run(command.split(), input=text, text=True, check=True, capture_output=True)

    call_in_netns(netns, work)


def annotate(cluster: Cluster, pod: Object) -> None:
    """Tell the mesh that a pod is captured, as the original does last of all."""
    path = f"{cluster.api.path_of(pod)}/status"
    cluster.api.patch(path, {"metadata": {"annotations": {istio.AMBIENT_REDIRECTION: "enabled"}}})
