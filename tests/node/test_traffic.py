"""Real packets through a real Envoy: what is captured, what is not, as Envoy counts and as the servers see it."""

from __future__ import annotations

import pytest
from lab.envoy import Captured, Envoy
from lab.mesh import APP_PORT, Mesh, RunningPod
from lab.objects import sidecar_pod
from lab.traffic import address_seen
from tests.node.conftest import BACKENDS, FAR_V4, FAR_V6, OTHER_OUTSIDE_PORT, OUTSIDE_PORT, far, gateway

from meshcni import istio

EXCLUDED_PORT = 8081
NEITHER, IN, OUT = Captured(0, 0), Captured(1, 0), Captured(0, 1)
VERSIONS = (4, 6)
SELF = {4: "127.0.0.6", 6: "::6"}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, mesh: Mesh) -> str:
    mesh.agent.ensure(BACKENDS[request.param])
    return str(request.param)


def start(mesh: Mesh, name: str, mode: str, annotations: dict[str, str] | None = None) -> tuple[RunningPod, Envoy]:
    pod = mesh.start_pod(sidecar_pod("shop", name, mode=mode, annotations=annotations))
    mesh.servers.serve(pod.netns, EXCLUDED_PORT)
    return pod, mesh.start_proxy(pod)


class Counted:
    """Counts what Envoy takes during one connection."""

    def __init__(self, mesh: Mesh, pod: RunningPod, envoy: Envoy) -> None:
        self.mesh, self.pod, self.envoy = mesh, pod, envoy

    def into_pod(self, version: int, port: int = APP_PORT) -> tuple[Captured, str]:
        begin = self.envoy.captured()
        seen = address_seen(self.mesh.node.netns, self.pod.address(version), port)
        return self.envoy.captured() - begin, seen

    def out_of_pod(self, address: str, port: int = OUTSIDE_PORT) -> tuple[Captured, str]:
        begin = self.envoy.captured()
        seen = address_seen(self.pod.netns, address, port)
        return self.envoy.captured() - begin, seen


@pytest.mark.parametrize("mode", ["REDIRECT", "TPROXY"])
def test_traffic_of_a_sidecar_pod_passes_envoy(mesh: Mesh, backend: str, mode: str) -> None:
    pod, envoy = start(mesh, f"through-{mode}-{backend}".lower(), mode)
    counted = Counted(mesh, pod, envoy)
    for version in VERSIONS:
        client = gateway(version)
        seen_inside = SELF[version] if mode == "REDIRECT" else client
        assert counted.into_pod(version) == (IN, seen_inside)
        assert counted.out_of_pod(gateway(version)) == (OUT, pod.address(version))
        # a pod's own addresses and its loopback are no traffic of the mesh
        assert counted.out_of_pod(pod.address(version), APP_PORT) == (NEITHER, pod.address(version))
        loopback = "127.0.0.1" if version == 4 else "::1"
        assert counted.out_of_pod(loopback, APP_PORT) == (NEITHER, loopback)

    held = mesh.rules(pod.netns)
    assert held.count == 1, held.listing
    assert {
        "nftables": held.nftables,
        "iptables-nft": held.iptables_nft,
        "iptables-legacy": held.iptables_legacy,
    }[backend]


@pytest.mark.parametrize("mode", ["REDIRECT", "TPROXY"])
def test_excluded_ports_and_ranges_pass_by_envoy(mesh: Mesh, backend: str, mode: str) -> None:
    annotations = {
        istio.EXCLUDE_INBOUND_PORTS: str(EXCLUDED_PORT),
        istio.EXCLUDE_OUTBOUND_PORTS: str(OTHER_OUTSIDE_PORT),
        istio.EXCLUDE_OUTBOUND_CIDRS: f"{FAR_V4}/32,{FAR_V6}/128",
    }
    pod, envoy = start(mesh, f"excluded-{mode}-{backend}".lower(), mode, annotations)
    counted = Counted(mesh, pod, envoy)
    for version in VERSIONS:
        client, own = gateway(version), pod.address(version)
        assert counted.into_pod(version, EXCLUDED_PORT) == (NEITHER, client)
        assert counted.out_of_pod(gateway(version), OTHER_OUTSIDE_PORT) == (NEITHER, own)
        assert counted.out_of_pod(far(version)) == (NEITHER, own)
        # the others still do
        assert counted.into_pod(version)[0] == IN
        assert counted.out_of_pod(gateway(version))[0] == OUT


def test_only_included_ports_and_ranges_pass_envoy(mesh: Mesh, backend: str) -> None:
    annotations = {
        istio.INCLUDE_INBOUND_PORTS: str(APP_PORT),
        istio.INCLUDE_OUTBOUND_CIDRS: f"{FAR_V4}/32,{FAR_V6}/128",
        istio.INCLUDE_OUTBOUND_PORTS: str(OTHER_OUTSIDE_PORT),
    }
    pod, envoy = start(mesh, f"included-{backend}", "REDIRECT", annotations)
    counted = Counted(mesh, pod, envoy)
    for version in VERSIONS:
        assert counted.into_pod(version)[0] == IN
        assert counted.into_pod(version, EXCLUDED_PORT)[0] == NEITHER
        assert counted.out_of_pod(far(version))[0] == OUT
        assert counted.out_of_pod(gateway(version), OTHER_OUTSIDE_PORT)[0] == OUT
        assert counted.out_of_pod(gateway(version))[0] == NEITHER


def test_mode_none_is_left_alone(mesh: Mesh, backend: str) -> None:
    pod, envoy = start(mesh, f"none-{backend}", "REDIRECT")
    mesh.remove_pod(pod)
    quiet = mesh.start_pod(sidecar_pod("shop", f"quiet-{backend}", mode="NONE"))
    assert mesh.rules(quiet.netns).count == 0
    assert address_seen(mesh.node.netns, quiet.address(4), APP_PORT) == gateway(4)
    assert envoy.process is None


def test_switching_backends_leaves_running_pods_alone(mesh: Mesh) -> None:
    mesh.agent.ensure(BACKENDS["iptables-nft"])
    old, old_envoy = start(mesh, "old", "REDIRECT")
    before = mesh.rules(old.netns).listing
    mesh.agent.ensure(BACKENDS["nftables"])
    new, new_envoy = start(mesh, "new", "REDIRECT")
    assert mesh.rules(old.netns).listing == before
    for pod, envoy in ((old, old_envoy), (new, new_envoy)):
        assert Counted(mesh, pod, envoy).into_pod(4) == (IN, SELF[4])
