"""Migration from Istio's own image: its manifests and others' with our image in them, and the guide's commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from lab.cluster import Cluster, workloads
from lab.cluster.hostpods import ztunnel_daemon_set
from tests.cluster import guideblocks, original
from tests.cluster.releases import CHART, NAMESPACE, Release, entry, is_enrolled, release_on
from tests.image import guide

IMAGE_USER = 65532


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


def with_image(manifest: str, reference: str) -> str:
    """The manifest with nothing changed but the image's reference."""
    changed = manifest.replace(original.REFERENCE, reference)
    before, after = manifest.splitlines(), changed.splitlines()
    assert [line for line in after if line not in before] == [line for line in after if reference in line]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    return changed


# --- Istio's own manifests --------------------------------------------------------------------------------------------


def test_sidecar_manifest_of_the_original(cluster: Cluster, release: Release) -> None:
    shop = release.add_namespace("shop")
    cluster.apply([workloads.sidecar_pod(shop, "running", node="n1", validate=()), workloads.plain_pod(shop, "plain")])
    cluster.wait_ready(shop, count=2)
    apply_original(release, with_image(original.manifest(ambient=False), release.by_digest), ambient=False)
    release.wait_rollout()
    cluster.apply([workloads.sidecar_pod(shop, f"new-{node}", node=node) for node in cluster.nodes])
    cluster.apply([workloads.sidecar_pod("kube-system", "excluded", validate=())])
    try:
        for pod in cluster.wait_ready(shop, count=2 + len(cluster.nodes)):
            if pod["metadata"]["name"].startswith("new"):
                assert cluster.capture(pod).both
        cluster.wait_pod("kube-system", "excluded")
        assert cluster.capture(cluster.pod("kube-system", "excluded")).is_untouched
    finally:
        cluster.delete_pod("kube-system", "excluded")
    cluster.wait("the pod that ran is captured", lambda: cluster.capture(cluster.pod(shop, "running")).both)
    assert cluster.capture(cluster.pod(shop, "plain")).is_untouched
    for node in cluster.nodes:
        assert release.status(node)["ready"]


def test_ambient_manifest_of_the_original(cluster: Cluster, release: Release) -> None:
    shop = release.add_namespace("shop", ambient=True)
    cluster.apply([workloads.plain_pod(shop, f"running-{node}", node=node) for node in cluster.nodes])
    cluster.wait_ready(shop, count=len(cluster.nodes))
    apply_original(release, with_image(original.manifest(ambient=True), release.tagged), ambient=True)
    cluster.apply(ztunnel_daemon_set())
    release.wait_rollout()
    for node in cluster.nodes:
        cluster.wait_pod(shop, f"running-{node}", is_enrolled)
    cluster.apply([workloads.plain_pod(shop, f"new-{node}", node=node) for node in cluster.nodes])
    for pod in cluster.wait_ready(shop, count=2 * len(cluster.nodes)):
        found = cluster.capture(pod)
        assert found.both
        assert found.tunnel
    for node in cluster.nodes:
        assert release.status(node)["ready"]


def apply_original(release: Release, manifest: str, *, ambient: bool) -> None:
    release.cluster.apply(workloads.namespace(NAMESPACE))
    release.cluster.apply(original.rights(ambient=ambient))
    release.cluster.apply(manifest)


# --- the hardened image's guide ---------------------------------------------------------------------------------------


def test_daemonset_of_the_hardened_guide(cluster: Cluster, release: Release) -> None:
    """Privileged, no user named: a kubelet gives that no effective capability, and the launcher has to cope."""
    shop = release.add_namespace("shop")
    text = guide.FIRST_EDITION
    for patch in (guide.NEWER_EDITION, {"spec": {"template": {"spec": {"serviceAccountName": original.ACCOUNT}}}}):
        merged = guide.merge(yaml.safe_load(text), yaml.safe_load(patch) if isinstance(patch, str) else patch)
        text = yaml.safe_dump(merged)
    apply_original(release, text.replace("IMAGE", release.by_digest), ambient=False)
    release.wait_rollout()
    for node in cluster.nodes.values():
        release.wait_serving(node.kube_name)
        container = node.agent_container()
        assert container is not None
        assert credentials(node.path(f"/proc/{container.pid}/status").read_text())["Uid"] == str(IMAGE_USER)
    cluster.apply([workloads.sidecar_pod(shop, f"new-{node}", node=node) for node in cluster.nodes])
    for pod in cluster.wait_ready(shop, count=len(cluster.nodes)):
        assert cluster.capture(pod).both


def credentials(status: str) -> dict[str, str]:
    """Real user and effective capabilities, of /proc/PID/status."""
    lines = dict(line.split(":\t", 1) for line in status.splitlines())
    return {"Uid": lines["Uid"].split()[0], "CapEff": lines["CapEff"]}


# --- the guide's commands ---------------------------------------------------------------------------------------------


def test_helm_commands_of_the_guide(cluster: Cluster, release: Release) -> None:
    """There with `helm upgrade`, the look, and back with `helm rollback`, from one reference to another."""
    there, back = guideblocks.helm_blocks()
    _, look, _ = guideblocks.kubectl_blocks()
    release.install("excludeNamespaces={kube-system,closed}")
    variables = {"CHART": str(CHART), "IMAGE": release.by_digest}
    guideblocks.run(cluster, there, variables)
    assert "ready      yes" in guideblocks.run(cluster, look, variables)
    assert images(release) == {release.by_digest}
    for node in cluster.nodes.values():
        assert (entry(node) or {})["exclude_namespaces"] == ["kube-system", "closed"]
    guideblocks.run(cluster, back, variables)
    assert images(release) == {release.tagged}


def images(release: Release) -> set[str]:
    return {pod["spec"]["containers"][0]["image"] for pod in release.agents().values()}
