"""What the tests of ambient mode look at: a pod's netns, the stand-in's table, the host's set, the annotation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lab.agent import EXCLUDED_NAMESPACE, AgentOptions
from lab.containerd import GATEWAY_V4
from lab.mesh import COUNTERS, Mesh, RunningPod, legacy_tables_loaded
from lab.node import wait_until
from lab.objects import ambient_pod
from lab.standin import StandIn

from meshcni import istio

PROBE = {4: "169.254.7.127", 6: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"}  # whom an application sees probing
ENROL_SECONDS = 30.0
VERIFY_SECONDS = "1"
SETTINGS = {"AMBIENT_VERIFY_SECONDS": VERIFY_SECONDS}
BACKENDS = {
    "nftables": AgentOptions(ambient=True, environment=SETTINGS),
    "iptables-nft": AgentOptions(ambient=True, nftables=False, force_iptables="nft", environment=SETTINGS),
    "iptables-legacy": AgentOptions(ambient=True, nftables=False, force_iptables="legacy", environment=SETTINGS),
}
MODE = istio.DATAPLANE_MODE
TABLE = re.compile(r"^table .*?^}$", re.MULTILINE | re.DOTALL)
LEGACY_TABLE = re.compile(r"^\*.*?^COMMIT$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"istio|ISTIO|0x111")


def start_pods(mesh: Mesh, objects: Iterable[Mapping[str, Any]], retry_seconds: float = 30.0) -> list[RunningPod]:
    """Start pods, several at once, as a kubelet does."""
    with ThreadPoolExecutor(8, "kubelet") as pool:
        return list(pool.map(lambda pod: mesh.start_pod(pod, retry_seconds=retry_seconds), objects))


def remove_pods(mesh: Mesh, pods: Sequence[RunningPod]) -> None:
    """Delete pods, several at once."""
    with ThreadPoolExecutor(8, "kubelet") as pool:
        list(pool.map(mesh.remove_pod, pods))


def start_ambient(mesh: Mesh, *names: str, namespace: str = "shop") -> list[RunningPod]:
    """Start pods that ask for ambient mode by their label, and wait until they are enrolled."""
    pods = start_pods(mesh, [ambient_pod(namespace, name) for name in names])
    wait_enrolled(mesh, pods)
    return pods


def inode(pod: RunningPod) -> int:
    """The inode of the pod's netns."""
    return os.stat(pod.netns).st_ino


def newest(mesh: Mesh) -> StandIn:
    """The stand-in that was started last and still runs."""
    return [one for one in mesh.ztunnels.values() if one.is_running][-1]


def wait_enrolled(mesh: Mesh, pods: Iterable[RunningPod]) -> None:
    """Return when pods are annotated and the newest stand-in has them; what is in their netns is not looked at."""
    for pod in pods:
        wait_until(f"{pod.name} is annotated", lambda pod=pod: mesh.redirection(pod) == "enabled", ENROL_SECONDS)


def wait_left(mesh: Mesh, pods: Iterable[RunningPod]) -> None:
    """Return when nothing of ours is left of pods."""
    for pod in pods:
        wait_until(f"{pod.name} has left the mesh", lambda pod=pod: not traces(mesh, pod), ENROL_SECONDS)


def traces(mesh: Mesh, pod: RunningPod) -> list[str]:
    """What of ambient mode there is of a pod, anywhere."""
    found = []
    if mesh.redirection(pod):
        found.append(f"{pod.name} is annotated {mesh.redirection(pod)}")
    if any(pod.uid in one.workloads() for one in mesh.ztunnels.values() if one.is_running):
        found.append(f"the stand-in has {pod.name}")
    if pod.uid in host_set(mesh).values():
        found.append(f"the host's set has {pod.name}")
    if pod in mesh.pods and pod.sandbox.netns:
        found += [f"in {pod.name}: {line}" for line in kernel(mesh, pod.netns) if OURS.search(line)]
    return found


def kernel(mesh: Mesh, netns: str) -> list[str]:
    """Tables that hold something of ours, policy rules, routes of our table, in an order that does not depend on time.

    What the iptables commands leave of tables in which nothing is left is no difference.
    """
    script = (
        "nft list ruleset; "
        "ip rule; ip -6 rule; ip route show table 100 2>/dev/null; ip -6 route show table 100 2>/dev/null; "
    )
    if legacy_tables_loaded(mesh.node, netns):
        script += "iptables-legacy-save; ip6tables-legacy-save; "
    text = COUNTERS.sub("", mesh.node.run(["sh", "-c", f"{script} true"], netns=netns))
    tables = sorted(table for table in TABLE.findall(text) if OURS.search(table))
    rest = LEGACY_TABLE.sub(lambda found: found[0] if OURS.search(found[0]) else "", TABLE.sub("", text))
    lines = [line for table in tables for line in chains_sorted(table)]
    return lines + [line for line in rest.splitlines() if line and not line.startswith("#")]


def chains_sorted(table: str) -> list[str]:
    """A table's lines with its chains by name: their order is that of their making and says nothing."""
    head, *chains = re.split(r"\n(?=\t(?:chain|set|map) )", table.removesuffix("\n}"))
    return [head, *(line for chain in sorted(chains) for line in chain.splitlines() if line), "}"]


def host_set(mesh: Mesh) -> dict[str, str]:
    """The host's probed addresses with the UID of their pod, of whichever backend has a set; both when both have."""
    found: dict[str, str] = {}
    for name in (istio.PROBE_SET_V4, istio.PROBE_SET_V6):
        listing = mesh.node.run(["sh", "-c", f"nft -j list set inet istio-ambient-nat {name} 2>/dev/null || true"])
        for item in json.loads(listing)["nftables"] if listing else ():
            for element in item.get("set", {}).get("elem", ()):
                found[element["elem"]["val"]] = element["elem"].get("comment", "")
        listing = mesh.node.run(["sh", "-c", f"ipset save {name} 2>/dev/null || true"])
        found |= dict(re.findall(r'^add \S+ (\S+)(?: comment "(.*)")?$', listing, re.MULTILINE))
    return found


def is_wanted(mesh: Mesh, pod: RunningPod) -> bool:
    """Whether a running pod belongs into ambient mode, by its own labels and those of its namespace."""
    known = mesh.api_object(pod)
    metadata = known.get("metadata", {})
    out = known.get("spec", {}).get("hostNetwork") or istio.SIDECAR_STATUS in metadata.get("annotations", {})
    if not known or out or pod.sandbox.namespace == EXCLUDED_NAMESPACE:
        return False
    own = metadata.get("labels", {}).get(MODE)
    namespaces = mesh.api.do(lambda server: server.cluster.objects("namespaces"))
    labels = next(one["metadata"]["labels"] for one in namespaces if one["metadata"]["name"] == pod.sandbox.namespace)
    return bool(own == "ambient" or (own != "none" and labels.get(MODE) == "ambient"))


def disagreements(mesh: Mesh, reference: Sequence[str]) -> list[str]:
    """Everything in which kernel, stand-in, host's set, annotations and API server do not agree; empty when all do.

    `reference` is what `kernel` gives for a pod that was enrolled in peace.
    """
    wanted = [pod for pod in mesh.pods if is_wanted(mesh, pod)]
    found = []
    for pod in mesh.pods:
        if pod not in wanted:
            found += traces(mesh, pod)
            continue
        if mesh.redirection(pod) != "enabled":
            found.append(f"{pod.name} is annotated {mesh.redirection(pod) or 'not at all'}")
        if kernel(mesh, pod.netns) != list(reference):
            found.append(f"the rules of {pod.name} are others")
    table = {uid: (one["state"], one["inode"]) for uid, one in newest(mesh).workloads().items()}
    right = {pod.uid: ("Up", inode(pod)) for pod in wanted}
    found += [f"stand-in: {uid} is {table.get(uid)}, not {right.get(uid)}" for uid in differing(table, right)]
    entries = {address: pod.uid for pod in wanted for address in pod.sandbox.addresses}
    there = host_set(mesh)
    found += [f"set: {a} is {there.get(a)}'s, not {entries.get(a)}'s" for a in differing(there, entries)]
    return found


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """The keys under which two mappings differ."""
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def wait_agreement(mesh: Mesh, reference: Sequence[str], seconds: float = 60.0) -> None:
    """Return when everything agrees; the last disagreements are the failure."""
    last: list[str] = []

    def agree() -> bool:
        last[:] = disagreements(mesh, reference)
        return not last

    try:
        wait_until("everything agrees", agree, seconds, pause_seconds=0.2)
    except Exception as error:
        raise AssertionError("\n".join([str(error), *last])) from None


def host_network_pod(namespace: str, name: str) -> dict[str, Any]:
    """An ambient pod on the host's network, whose address is the node's."""
    pod = ambient_pod(namespace, name)
    pod["spec"]["hostNetwork"] = True
    pod["status"] = {"phase": "Running", "podIP": GATEWAY_V4, "podIPs": [{"ip": GATEWAY_V4}]}
    return pod
