"""ADDs on agent.sock of a real agent: real netns, real nftables, an API server double."""

from __future__ import annotations

import subprocess

from lab.namespaces import call_in_netns
from lab.objects import sidecar_pod, unmeshed_pod
from tests.agent.scene import Scene


def rules_in(netns: str) -> str:
    return call_in_netns(
        netns, lambda: subprocess.run(("nft", "list", "ruleset"), capture_output=True, text=True).stdout
    )


def test_sidecar_pod_gets_rules(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_watching()
    pod = scene.add_pod(sidecar_pod("shop", "cart"))
    netns = scene.pod_netns("10.1.0.5/24")
    reply = agent.add(pod, netns, ips=("10.1.0.5/24",))
    assert (reply.ok, reply.verdict, reply.reason) == (True, "sidecar", "sidecar-injected"), agent.log
    assert "redirect to :15001" in rules_in(netns)


def test_pod_outside_the_mesh_gets_none(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_watching()
    pod = scene.add_pod(unmeshed_pod("shop", "job"))
    netns = scene.pod_netns("10.1.0.5/24")
    reply = agent.add(pod, netns)
    assert (reply.ok, reply.verdict) == (True, "skip")
    assert rules_in(netns) == ""
