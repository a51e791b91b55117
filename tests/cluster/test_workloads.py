"""What users run, under a real kubelet: probes, Jobs, StatefulSets, crowds of pods, and pods that leave in a hurry.

One installation in ambient mode serves the whole file. Every test ends with kernel, API and agents telling the same.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from lab.cluster import Cluster, workloads
from lab.cluster.capture import capture
from lab.cluster.client import ready
from lab.cluster.workloads import APP_PORT, NAME_LABEL
from lab.node import LabError
from tests.cluster.hostpolicy import denied_by_default, host_connections
from tests.cluster.podtraces import (
    addresses,
    check_captured,
    connect,
    connections,
    host_set,
    uid,
    wait_forgotten,
    ztunnel,
)
from tests.cluster.releases import Release, is_enrolled, namespace_of, ready_since, release_on, restarts

from meshcni import istio
from meshcni.errors import MeshCniError

pytestmark = pytest.mark.timeout(600)

IS_LONG = os.environ.get("MESHCNI_LONG") == "1"
AT_ONCE = 100 if IS_LONG else 40
RUNNING = 50 if IS_LONG else 20
BUSY_SECONDS = 240.0  # many pods, on a machine that does other things too
HTTP_PORT, TCP_PORT = 7001, 7002
PROBES = 5  # that have to succeed in each situation
SECOND_PORT = 8081
FAR = "n2"
CUT = "Connection reset by peer"


@pytest.fixture(scope="module")
def installed(iptables_cluster: Cluster) -> Iterator[Release]:
    """The agent in ambient mode and ztunnel's stand-in, for all tests of this file."""
    iptables_cluster.restore()
    for release in release_on(iptables_cluster):
        release.install("profile=ambient", wait=False)
        release.wait_rollout(BUSY_SECONDS)
        iptables_cluster.install_ztunnel()
        yield release


@pytest.fixture
def release(cluster: Cluster, installed: Release) -> Iterator[Release]:
    """Whatever a test has made goes at its end."""
    yield installed
    for name in installed.namespaces:
        cluster.delete_namespace(name)
    installed.namespaces.clear()


# --- probes of ambient pods -------------------------------------------------------------------------------------------


def test_probes_of_ambient_pods(cluster: Cluster, release: Release) -> None:
    check_probes(cluster, release, nftables=False)


def test_probes_of_ambient_pods_with_nftables(nftables_cluster: Cluster) -> None:
    """Kube-proxy, policies and the agent, all by nftables; the kubelet is found by the name of its process."""
    nftables_cluster.restore()
    for release in release_on(nftables_cluster):
        release.install("profile=ambient", "global.nativeNftables=true", wait=False)
        release.wait_rollout(BUSY_SECONDS)
        nftables_cluster.install_ztunnel()
        check_probes(nftables_cluster, release, nftables=True)


def check_probes(cluster: Cluster, release: Release, *, nftables: bool) -> None:
    """Probes pass ztunnel by, also where the host denies by default and while the agent is away; others do not."""
    quiet, outside = release.add_namespace("quiet", ambient=True), release.add_namespace("outside")
    node, ports = cluster.nodes["n1"], (HTTP_PORT, TCP_PORT)
    cluster.apply([workloads.plain_pod(outside, name, node=FAR) for name in ("client", "stranger")])
    client, stranger = cluster.wait_ready(outside, count=2)
    with denied_by_default(node, addresses(client), ports, nftables=nftables):
        cluster.apply([probed_pod(quiet, "web", HTTP_PORT, TCP_PORT), probed_pod(quiet, "db", TCP_PORT, HTTP_PORT)])
        cluster.wait_ready(quiet, count=2)
        before = [cluster.wait_pod(quiet, name, lambda pod: ready(pod) and is_enrolled(pod)) for name in ("web", "db")]
        wait_probed(cluster, nftables=nftables)
        for pod in before:
            check_captured(cluster, pod, ambient=True)
            for address in addresses(pod):
                assert f"pod={pod['metadata']['name']}" in connect(cluster, client, address, HTTP_PORT)
                with pytest.raises(LabError, match="timed out"):
                    connect(cluster, stranger, address, HTTP_PORT)
        unhealthy = [failed_probes(cluster, pod) for pod in before]
        node.kill_agent()

        def is_back() -> bool:
            is_there = is_serving(release)
            known = host_set(cluster, "n1")
            assert [pod["metadata"]["name"] for pod in before if known.count(uid(pod)) != len(addresses(pod))] == []
            return is_there

        cluster.wait("the agent is back", is_back)
        wait_probed(cluster, nftables=nftables)
        cluster.wait_agreed()
        for pod, failed in zip(before, unhealthy, strict=True):
            after = cluster.pod(quiet, pod["metadata"]["name"])
            assert ready(after)
            assert ready_since(after) == ready_since(pod)
            assert restarts(after) == 0
            assert failed_probes(cluster, pod) == failed
            seen = connections(cluster, pod, "inbound")  # so ztunnel does see what is not a probe
            assert {each["client"].split()[0] for each in seen} == set(addresses(client))
            assert len(seen) == len(addresses(pod))


def probed_pod(namespace: str, name: str, readiness: int, liveness: int) -> dict[str, Any]:
    """A pod that one failed probe would make unready or restart; HTTP_PORT is probed by HTTP, TCP_PORT by TCP."""
    pod = workloads.plain_pod(namespace, name, node="n1", ports=(HTTP_PORT, TCP_PORT))
    probes = {"readinessProbe": (readiness, 1), "livenessProbe": (liveness, 1), "startupProbe": (readiness, 60)}
    for kind, (port, failures) in probes.items():
        how = {"httpGet": {"port": port}} if port == HTTP_PORT else {"tcpSocket": {"port": port}}
        pod["spec"]["containers"][0][kind] = {
            **how,
            "periodSeconds": 1,
            "timeoutSeconds": 20,
            "failureThreshold": failures,
        }
    return pod


def wait_probed(cluster: Cluster, *, nftables: bool) -> None:
    """Return when the host has begun PROBES more connections to each port."""
    ports, node = (HTTP_PORT, TCP_PORT), cluster.nodes["n1"]
    begin = host_connections(node, ports, nftables=nftables)

    def is_done() -> bool:
        now = host_connections(node, ports, nftables=nftables)
        return all(now[port] >= begin[port] + PROBES for port in ports)

    cluster.wait("the kubelet has probed", is_done)


def is_serving(release: Release) -> bool:
    try:
        return bool(release.cluster.nodes["n1"].agent_status()["ready"])
    except (MeshCniError, LabError):
        return False


def failed_probes(cluster: Cluster, pod: Mapping[str, Any]) -> int:
    events = cluster.events(namespace_of(pod), pod["metadata"]["name"])
    return sum(event.get("count") or 1 for event in events if event["reason"] == "Unhealthy")


# --- Jobs -------------------------------------------------------------------------------------------------------------


def test_jobs_with_init_containers(cluster: Cluster, release: Release) -> None:
    """Init containers have the traffic that place, user and annotations allow them; the Job ends, nothing stays."""
    shop, quiet = release.add_namespace("shop"), release.add_namespace("quiet", ambient=True)
    outside = release.add_namespace("outside")
    cluster.apply(workloads.plain_pod(outside, "server", node=FAR, ports=(APP_PORT, SECOND_PORT)))
    there = addresses(cluster.wait_pod(outside, "server"))
    cluster.apply([workloads.job(pod, backoffLimit=0) for pod in job_pods(shop, quiet, there)])

    assert job_end(cluster, shop, "early") == "Failed"  # nobody takes what is led to a proxy that has not begun
    assert "Connection refused" in cluster.log(shop, pods_of(cluster, shop, "early")[0]["metadata"]["name"], "early-0")

    for namespace, name in ((shop, "sidecar"), (quiet, "ambient")):
        pod = running_pod_of(cluster, namespace, name)
        check_captured(cluster, pod, ambient=namespace == quiet)
        cluster.wait_agreed()
        cluster.node_of(pod).runtime.container(namespace, pod["metadata"]["name"], workloads.APP).signal(signal.SIGTERM)
        assert job_end(cluster, namespace, name) == "Complete"
        wait_forgotten(cluster, pod)
        if namespace == quiet:
            led = {each["destination"] for each in connections(cluster, pod, "outbound")}
            assert led >= {f"{address} {APP_PORT}" for address in there}
        else:
            told = cluster.log(namespace, pod["metadata"]["name"], istio.PROXY_CONTAINER)
            assert [f"to {address} port {APP_PORT}" in told for address in there] == [True] * len(there)
            assert f"port {SECOND_PORT}" not in told
        cluster.api.delete(f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}")
        cluster.wait(f"the pod of {name} is gone", lambda ns=namespace, n=name: not pods_of(cluster, ns, n))
    cluster.wait_agreed()


def job_pods(shop: str, quiet: str, there: list[str]) -> list[dict[str, Any]]:
    def clients(name: str, port: int, **fields: Any) -> list[dict[str, Any]]:
        return [
            {**workloads.container(f"{name}-{number}", "connect", address, str(port)), **fields}
            for number, address in enumerate(there)
        ]

    ambient = workloads.run_order(workloads.plain_pod(quiet, "ambient", node="n1"), "sleep")
    ambient["spec"]["initContainers"] = clients("first", APP_PORT)

    exclude = {"traffic.sidecar.istio.io/excludeOutboundPorts": str(SECOND_PORT)}
    sidecar = workloads.sidecar_pod(shop, "sidecar", node="n1", native=True, validate=(4, 6), annotations=exclude)
    sidecar = workloads.run_order(sidecar, "sleep")
    validation, proxy = sidecar["spec"]["initContainers"]
    proxy["startupProbe"] = proxy["readinessProbe"]
    as_proxy = {"securityContext": {"runAsUser": istio.PROXY_UID, "runAsGroup": istio.PROXY_GID}}
    sidecar["spec"]["initContainers"] = [
        validation,
        *clients("excluded", SECOND_PORT),
        *clients("as-proxy", APP_PORT, **as_proxy),
        proxy,
        *clients("late", APP_PORT),
    ]
    early = workloads.run_order(workloads.sidecar_pod(shop, "early", node="n1", native=True), "exit", "0")
    early["spec"]["initContainers"].insert(1, clients("early", APP_PORT)[0])
    return [ambient, sidecar, early]


def pods_of(cluster: Cluster, namespace: str, name: str) -> list[dict[str, Any]]:
    return cluster.pods(namespace, f"{NAME_LABEL}={name}")


def running_pod_of(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def check() -> bool:
        found[:] = pods_of(cluster, namespace, name)
        return any(pod["status"].get("phase") == "Running" and ready(pod) for pod in found)

    cluster.wait(f"the Job {name} runs", check)
    return found[0]


def job_end(cluster: Cluster, namespace: str, name: str) -> str:
    """Wait until a Job has ended; returns how."""
    ended: list[str] = []

    def check() -> bool:
        job = cluster.api.get(f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}")
        conditions = job["status"].get("conditions") or ()
        ended[:] = [c["type"] for c in conditions if c["status"] == "True" and c["type"] in ("Complete", "Failed")]
        return bool(ended)

    cluster.wait(f"the Job {name} ends", check)
    return ended[0]


# --- StatefulSets -----------------------------------------------------------------------------------------------------


def test_pod_of_stateful_set_returns_under_its_name(cluster: Cluster, release: Release) -> None:
    """Another pod by its uid: captured anew, and nothing is left of the one before it."""
    shop, quiet = release.add_namespace("shop"), release.add_namespace("quiet", ambient=True)
    pods = [workloads.sidecar_pod(shop, "db", validate=(4, 6)), workloads.plain_pod(quiet, "db")]
    cluster.apply([workloads.stateful_set(pod) for pod in pods])
    first = {namespace: cluster.wait_ready(namespace)[0] for namespace in (shop, quiet)}
    for namespace, pod in first.items():
        assert pod["metadata"]["name"] == "db-0"
        check_captured(cluster, pod, ambient=namespace == quiet)
        cluster.api.delete(f"/api/v1/namespaces/{namespace}/pods/db-0")

    def is_another(pod: Mapping[str, Any]) -> bool:
        return ready(pod) and uid(pod) != uid(first[namespace_of(pod)])

    for namespace, old in first.items():
        pod = cluster.wait_pod(namespace, "db-0", is_another)
        check_captured(cluster, pod, ambient=namespace == quiet)
        wait_forgotten(cluster, old)
    cluster.wait_agreed()


# --- many pods --------------------------------------------------------------------------------------------------------


def test_namespace_is_labelled_and_unlabelled(cluster: Cluster, release: Release) -> None:
    """With pods running: all get in, then all out, none restarts, and who calls one of them notices nothing.

    But for the one connection that is with ztunnel in the moment in which the pod leaves it: ztunnel cuts that.
    """
    crowd, outside = release.add_namespace("crowd"), release.add_namespace("outside")
    cluster.apply([workloads.plain_pod(crowd, f"pod-{n}", readiness=False) for n in range(RUNNING)])
    before = cluster.wait_ready(crowd, count=RUNNING, timeout_seconds=BUSY_SECONDS)
    callers = {}
    for number, address in enumerate(addresses(cluster.pod(crowd, "pod-0"))):
        caller = workloads.plain_pod(outside, f"caller-{number}", node=FAR, readiness=False)
        callers[f"caller-{number}"] = workloads.run_order(caller, "knock", address, str(APP_PORT), "50")
    cluster.apply(callers.values())
    cluster.wait_ready(outside, count=len(callers))
    assert [pod["metadata"]["name"] for pod in before if not cluster.capture(pod).is_untouched] == []

    for mode, is_done in (("ambient", is_enrolled), (None, is_out)):
        cluster.api.patch(f"/api/v1/namespaces/{crowd}", {"metadata": {"labels": {istio.DATAPLANE_MODE: mode}}})
        wait_all(cluster, crowd, is_done)
        cluster.wait_agreed()
        found = {pod["metadata"]["name"]: cluster.capture(pod) for pod in before}
        if mode:
            assert [name for name, each in found.items() if not (each.both and each.tunnel)] == []
        else:
            assert [name for name, each in found.items() if not each.is_untouched] == []
        for name in callers:
            wait_calls(cluster, outside, name)
    after = cluster.pods(crowd)
    assert {uid(pod) for pod in after} == {uid(pod) for pod in before}
    assert [restarts(pod) for pod in after] == [0] * RUNNING
    wait_forgotten(cluster, *before)
    for name in callers:
        answers = cluster.log(outside, name).split("\n")[:-1]
        assert "ok" in answers
        assert [answer for answer in answers if answer != "ok"] in ([], [CUT])


def is_out(pod: Mapping[str, Any]) -> bool:
    return istio.AMBIENT_REDIRECTION not in (pod["metadata"].get("annotations") or {})


def wait_all(cluster: Cluster, namespace: str, check: Callable[[Mapping[str, Any]], bool]) -> None:
    cluster.wait(f"all of {namespace}", lambda: all(check(pod) for pod in cluster.pods(namespace)), BUSY_SECONDS)


def wait_calls(cluster: Cluster, namespace: str, name: str) -> None:
    """Return when a caller has called some more times."""
    begin = cluster.log(namespace, name).count("\n")
    cluster.wait(f"{name} calls", lambda: cluster.log(namespace, name).count("\n") > begin + PROBES)


def test_many_pods_at_once(cluster: Cluster, release: Release) -> None:
    """Of all three kinds over both nodes."""
    shop, quiet = release.add_namespace("shop"), release.add_namespace("quiet", ambient=True)
    makers = (
        lambda n, node: workloads.sidecar_pod(shop, f"sidecar-{n}", node=node),
        lambda n, node: workloads.plain_pod(shop, f"plain-{n}", node=node, readiness=False),
        lambda n, node: workloads.plain_pod(quiet, f"ambient-{n}", node=node, readiness=False),
    )
    nodes = list(cluster.nodes)
    cluster.apply([makers[n % 3](n, nodes[n // 3 % 2]) for n in range(AT_ONCE)])
    ambient = len(range(2, AT_ONCE, 3))
    pods = cluster.wait_ready(shop, count=AT_ONCE - ambient, timeout_seconds=BUSY_SECONDS)
    pods += cluster.wait_ready(quiet, count=ambient, timeout_seconds=BUSY_SECONDS)
    cluster.wait_agreed()
    for pod in pods:
        name = pod["metadata"]["name"]
        if name.startswith("plain"):
            assert cluster.capture(pod).is_untouched, name
        else:
            check_captured(cluster, pod, ambient=name.startswith("ambient"))
        assert restarts(pod) == 0, name


# --- pods that leave --------------------------------------------------------------------------------------------------


def test_eviction_and_drain(cluster: Cluster, release: Release) -> None:
    """Pods that the Eviction API takes are made again elsewhere, captured; kubectl can drain the node."""
    shop, quiet = release.add_namespace("shop"), release.add_namespace("quiet", ambient=True)
    drained = {"lab.meshcni/drain": "yes"}
    pods = [workloads.sidecar_pod(shop, "cart", labels=drained), workloads.plain_pod(quiet, "web", labels=drained)]
    cluster.apply([workloads.deployment(pod, replicas=2) for pod in pods])
    first = {namespace: cluster.wait_ready(namespace, count=2) for namespace in (shop, quiet)}
    gone = [first[shop][0], first[quiet][0]]
    for pod in gone:
        evict(cluster, pod)
    for namespace, before in first.items():
        wait_replaced(cluster, namespace, {uid(pod) for pod in before} & {uid(pod) for pod in gone})
    try:
        selector = ",".join("=".join(each) for each in drained.items())
        going = [pod for namespace in first for pod in cluster.pods(namespace) if pod["spec"]["nodeName"] == "n1"]
        cluster.kubectl("drain", "n1", "--ignore-daemonsets", f"--pod-selector={selector}", "--timeout=110s")
        for namespace in first:
            wait_replaced(cluster, namespace, {uid(pod) for pod in going})
            for pod in cluster.pods(namespace):
                assert pod["spec"]["nodeName"] == FAR
                check_captured(cluster, pod, ambient=namespace == quiet)
    finally:
        cluster.kubectl("uncordon", "n1")
    wait_forgotten(cluster, *gone, *going)
    cluster.wait_agreed()


def evict(cluster: Cluster, pod: Mapping[str, Any]) -> None:
    meta = {key: pod["metadata"][key] for key in ("namespace", "name")}
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/eviction"
    cluster.api.request("POST", path, {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta})


def wait_replaced(cluster: Cluster, namespace: str, gone: set[str]) -> None:
    """Return when two pods are ready and none of those that had to go is left."""
    cluster.wait(f"they left {namespace}", lambda: not gone & {uid(pod) for pod in cluster.pods(namespace)})
    cluster.wait_ready(namespace, count=2)


def test_pods_deleted_while_they_start(cluster: Cluster, release: Release) -> None:
    """At whatever point: they end, and neither netns, nor entry, nor record of them stays."""
    shop, quiet = release.add_namespace("shop"), release.add_namespace("quiet", ambient=True)
    node = cluster.nodes["n1"]
    before = set(node.run(["ls", "/run/netns"]).split())
    stages: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "made": lambda _: True,
        "begun": lambda pod: pod["status"].get("startTime"),
        "wired": lambda pod: pod["status"].get("podIP") or set(node.run(["ls", "/run/netns"]).split()) - before,
        "running": lambda pod: pod["status"].get("phase") == "Running",
    }
    deleted = []
    for stage, is_there in stages.items():
        for grace in (0, 1):
            made = [
                workloads.sidecar_pod(shop, f"cart-{stage}-{grace}", node="n1"),
                workloads.plain_pod(quiet, f"web-{stage}-{grace}", node="n1"),
            ]
            cluster.apply(made)
            for each in made:
                namespace, name = each["metadata"]["namespace"], each["metadata"]["name"]
                deleted.append(cluster.wait_pod(namespace, name, is_there))
                cluster.api.delete(f"/api/v1/namespaces/{namespace}/pods/{name}", grace_seconds=grace)
    for namespace in (shop, quiet):
        cluster.wait(f"the pods of {namespace} are gone", lambda ns=namespace: not cluster.pods(ns))
    cluster.wait("no netns is left", lambda: set(node.run(["ls", "/run/netns"]).split()) == before)
    for pod in deleted:
        pod["spec"].setdefault("nodeName", "n1")
    wait_forgotten(cluster, *deleted)
    cluster.wait_agreed()


# --- pods that are none of ours ---------------------------------------------------------------------------------------


def test_host_network_pod_in_ambient_namespace(cluster: Cluster, release: Release) -> None:
    """It runs on the node's own network, which stays as it was."""
    quiet, node = release.add_namespace("quiet", ambient=True), cluster.nodes["n1"]
    port = 18080
    cluster.apply(workloads.plain_pod(quiet, "host", node="n1", host_network=True, ports=(port,)))
    cluster.apply(workloads.plain_pod(quiet, "web", node="n1"))
    host, web = (cluster.wait_pod(quiet, name) for name in ("host", "web"))
    check_captured(cluster, web, ambient=True)
    found = capture(node.netns)
    assert (found.v4, found.v6, found.tunnel) == (False, False, False)
    assert is_out(host)
    assert uid(host) not in host_set(cluster, "n1") + json.dumps(ztunnel(cluster, "n1"))
    assert not set(addresses(host)) & set(host_set(cluster, "n1").split())
    cluster.wait_agreed()


def test_pod_of_sandboxed_runtime_is_refused(cluster: Cluster, release: Release) -> None:
    """Rules would not hold it, so it does not start, and its Event says why and what to do; opted out, it starts."""
    quiet = release.add_namespace("quiet", ambient=True)
    runtime = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "gvisor"},
        "handler": "runc",  # the agent knows such pods by their class
    }
    cluster.apply(runtime)
    try:
        out = {istio.DATAPLANE_MODE: "none"}
        cluster.apply(workloads.plain_pod(quiet, "sandboxed", node="n1", runtimeClassName="gvisor"))
        cluster.apply(workloads.plain_pod(quiet, "opted-out", node="n1", runtimeClassName="gvisor", labels=out))
        cluster.wait("an Event tells of it", lambda: "runtime class gvisor" in refusals(cluster, quiet, "sandboxed"))
        assert "istio.io/dataplane-mode=none" in refusals(cluster, quiet, "sandboxed")
        assert cluster.capture(cluster.wait_pod(quiet, "opted-out")).is_untouched
        refused = cluster.pod(quiet, "sandboxed")
        assert refused["status"]["phase"] == "Pending"
        cluster.api.delete(f"/api/v1/namespaces/{quiet}/pods/sandboxed")
        cluster.wait("it is gone", lambda: len(cluster.pods(quiet)) == 1)
        wait_forgotten(cluster, refused)
        cluster.wait_agreed()
    finally:
        cluster.api.delete("/apis/node.k8s.io/v1/runtimeclasses/gvisor")


def refusals(cluster: Cluster, namespace: str, name: str) -> str:
    events = cluster.events(namespace, name)
    return "\n".join(event["message"] for event in events if event["reason"] == "FailedCreatePodSandBox")
