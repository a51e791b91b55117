"""What the plugin decides alone, and what it must never decide alone."""

from __future__ import annotations

import pytest

from meshcni.cni.spec import Conf, Request
from meshcni.plugin.decide import decide

CONF = Conf(
    run_dir="/run/x",
    log_level="",
    pod_namespace="istio-system",
    exclude_namespaces=["kube-system", "istio-system"],
    agent_wait_seconds=1.0,
)
ENVIRON = {"CNI_CONTAINERID": "c", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0"}


def request(namespace: str, name: str, conf: Conf = CONF) -> Request:
    return Request(ENVIRON, "1.0.0", conf, {"K8S_POD_NAMESPACE": namespace, "K8S_POD_NAME": name}, None)


@pytest.mark.parametrize(
    ("namespace", "name", "reason"),
    [
        ("", "", "not-kubernetes"),
        ("shop", "", "not-kubernetes"),
        ("", "web", "not-kubernetes"),
        ("istio-system", "istio-cni-node-abcde", "agent-pod"),
        ("kube-system", "dns", "namespace-excluded"),
        ("istio-system", "istiod", "namespace-excluded"),
        ("shop", "web", "ask-agent"),
        ("shop", "istio-cni-node-abcde", "ask-agent"),
        ("istio-system-2", "istio-cni-node-abcde", "ask-agent"),
        ("kube", "web", "ask-agent"),
        ("Kube-System", "web", "ask-agent"),
    ],
)
def test_decisions(namespace: str, name: str, reason: str) -> None:
    decision = decide(request(namespace, name))
    assert decision.reason == reason
    assert decision.asks_agent is (reason == "ask-agent")
    assert decision.text


def test_the_agent_pod_is_recognised_in_a_namespace_that_is_not_excluded() -> None:
    conf = Conf("/run/x", "", "mesh", [], 1.0)
    assert decide(request("mesh", "istio-cni-node-x", conf)).reason == "agent-pod"
    assert decide(request("mesh", "other", conf)).reason == "ask-agent"


def test_no_namespace_of_the_agent_in_the_conf() -> None:
    assert decide(request("shop", "istio-cni-node-x", Conf("/run/x", "", "", [], 1.0))).asks_agent
