"""Whether kernel, API and agent tell the same of every pod: the list of contradictions, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from lab.cluster.agent import DAEMON_SET
from lab.cluster.capture import Captured
from lab.cri import CriError
from lab.node import LabError
from meshcni import istio
from meshcni.errors import MeshCniError
from meshcni.pods.assess import Assessment, assess
from meshcni.pods.eligibility import Policy, Verdict
from meshcni.pods.model import namespace_from_object, pod_from_object
from meshcni.pods.selectors import parse_enablement_selectors

if TYPE_CHECKING:
    from lab.cluster.cluster import Cluster

CONFIG = f"/api/v1/namespaces/{istio.SYSTEM_NAMESPACE}/configmaps/istio-cni-config"
NO_AGENT = Policy(exclude_namespaces=frozenset({"kube-system"}), agent_namespace=istio.SYSTEM_NAMESPACE)
TRAFFIC_ANNOTATIONS = "traffic.sidecar.istio.io/"  # with them it depends which connection is redirected
ENROLLED = "enrolled"

Object = Mapping[str, Any]


def contradictions(cluster: Cluster) -> list[str]:
    """Return what contradicts itself about the running pods on nodes that run; empty when all agree."""
    policy = policy_of(cluster)
    namespaces = {each["metadata"]["name"]: each for each in cluster.api.list("/api/v1/namespaces")}
    pods = [pod for pod in cluster.pods() if is_judged(cluster, pod)]
    found: list[str] = []
    for pod in pods:
        assessment = assessed(pod, namespaces[pod["metadata"]["namespace"]], policy)
        found += [f"{name_of(pod)}: {text}" for text in of_pod(cluster, pod, assessment)]
    return found + of_statuses(cluster, pods)


def policy_of(cluster: Cluster) -> Policy:
    """Return the policy that the agent's ConfigMap sets; that of no agent's when there is none."""
    found = cluster.api.find(CONFIG)
    if found is None or cluster.api.find(DAEMON_SET.format(istio.SYSTEM_NAMESPACE)) is None:
        return NO_AGENT
    data = found.get("data") or {}
    selectors = yaml.safe_load(data.get("AMBIENT_ENABLEMENT_SELECTOR") or "[]")
    return Policy(
        exclude_namespaces=frozenset(filter(None, data.get("EXCLUDE_NAMESPACES", "").split(","))),
        agent_namespace=istio.SYSTEM_NAMESPACE,
        ambient_enabled=data.get("AMBIENT_ENABLED") == "true",
        enablement_selectors=parse_enablement_selectors(selectors),
    )


def assessed(pod: Object, namespace: Object, policy: Policy) -> Assessment:
    """Return what the agent has to do with a pod, by the function that the agent calls."""
    return assess(pod_from_object(pod), namespace_from_object(namespace), policy)


def is_judged(cluster: Cluster, pod: Object) -> bool:
    """Tell whether a pod has a netns of its own that can be looked into: it runs and stays."""
    node = cluster.nodes.get(pod["spec"].get("nodeName", ""))
    runs = pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
    return runs and node is not None and node.is_running and not pod["spec"].get("hostNetwork")


def of_pod(cluster: Cluster, pod: Object, assessment: Assessment) -> Iterable[str]:
    """Compare a pod's netns and its annotation with what has to be done with it."""
    try:
        got = cluster.capture(pod)
    except (LabError, CriError, OSError) as error:
        yield f"its netns cannot be looked into: {error}"
        return
    verdict, reason = assessment.decision.verdict, assessment.decision.reason.code
    marked = (pod["metadata"].get("annotations") or {}).get(istio.AMBIENT_REDIRECTION, "")
    if verdict is Verdict.SIDECAR:
        is_partial = any(key.startswith(TRAFFIC_ANNOTATIONS) for key in pod["metadata"].get("annotations") or {})
        if not (got.both or (is_partial and got.tables)):
            yield f"it is a sidecar pod and not captured: {got}"
    elif verdict is Verdict.AMBIENT:
        yield from of_ambient(got, marked)
    elif verdict is Verdict.SKIP and not got.is_untouched:
        yield f"it is not in the mesh ({reason}) and touched: {got}"
    if verdict is not Verdict.AMBIENT and marked == istio.REDIRECTION_ENABLED:
        yield f"it is not in ambient mode ({reason}) and annotated {marked}"


def of_ambient(got: Captured, marked: str) -> Iterable[str]:
    """Compare the netns and the annotation of a pod that has to be in ambient mode."""
    if not got.both:
        yield f"it is an ambient pod and not captured: {got}"
    if not got.tunnel:
        yield "it is an ambient pod and ztunnel does not listen in it"
    if (marked == istio.REDIRECTION_ENABLED) != got.both:
        yield f"its annotation says {marked or 'nothing'!r}, the kernel {got}"


def of_statuses(cluster: Cluster, pods: Iterable[Object]) -> list[str]:
    """Compare what the agents say of ambient pods with what the API says; agents that do not run say nothing."""
    found: list[str] = []
    for node in cluster.nodes.values():
        if not (node.is_running and node.agent_alive()):
            continue
        try:
            status = node.agent_status()
        except MeshCniError as error:
            found.append(f"{node.kube_name}: the agent gives no status: {error}")
            continue
        said = {each["pod"]: each for each in (status.get("ambient") or {}).get("pods") or ()}
        here = [pod for pod in pods if pod["spec"]["nodeName"] == node.kube_name]
        found += [f"{node.kube_name}: {text}" for text in of_status(said, here)]
    return found


def of_status(said: Mapping[str, Object], here: Iterable[Object]) -> Iterable[str]:
    """Compare what one agent says of its ambient pods with the pods of its node."""
    pods = {name_of(pod): pod for pod in here}
    for name, pod in pods.items():
        marked = (pod["metadata"].get("annotations") or {}).get(istio.AMBIENT_REDIRECTION, "")
        is_enrolled = said.get(name, {}).get("state") == ENROLLED
        if (marked == istio.REDIRECTION_ENABLED) != is_enrolled:
            yield f"pod {name} is annotated {marked or 'nothing'!r}, the agent says {said.get(name) or 'nothing of it'}"
        own = sorted(each["ip"] for each in pod["status"].get("podIPs") or ())
        if is_enrolled and sorted(said[name]["inSet"]) != own:
            yield f"pod {name} has {own}, the host's set {said[name]['inSet']}"


def name_of(pod: Object) -> str:
    """Return NAMESPACE/NAME."""
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
