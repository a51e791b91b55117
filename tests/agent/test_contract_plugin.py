"""The built plugin with the conf entries that it meets: ours, the original's, and those of other versions."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from lab.objects import sidecar_pod, unmeshed_pod
from tests.agent.contract import BRIDGE, Node
from tests.plugin.harness import ROOT, Outcome, run, variables

ADDRESS = "10.1.0.5/24"
PREV_RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "sandbox": "/netns"}],
    "ips": [{"interface": 0, "address": ADDRESS}],
}
# As the original writes it, and with what earlier and later versions of it know besides.
ORIGINAL: dict[str, Any] = {
    "ambient_enabled": False,
    "dns": {},
    "enable_ambient_detection_retry": False,
    "enablement_selectors": [],
    "exclude_namespaces": ["kube-system"],
    "ipam": {},
    "name": "istio-cni",
    "native_nftables": False,
    "plugin_log_level": "info",
    "pod_namespace": "istio-system",
    "type": "istio-cni",
}
OTHER_VERSIONS: dict[str, Any] = {
    "log_level": "debug",
    "log_uds_address": "/var/run/istio-cni/log.sock",
    "cni_event_address": "/var/run/istio-cni/pluginevent.sock",
    "ztunnel_ready": True,
    "hostNSEnterExec": False,
    "capabilities": {"portMappings": True},
    "kubernetes": {"kubeconfig": "/x", "node_name": "n", "exclude_namespaces": ["a"], "cni_bin_dir": "/opt/cni/bin"},
    "runtimeConfig": {"portMappings": []},
    "unknown": [1, {"a": None}],
}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """build/istio-cni, up to date."""
    subprocess.run([ROOT / "scripts" / "build-plugin"], check=True)


@pytest.fixture
def netns(node: Node) -> str:
    """A node with an agent that knows shop/cart (in the mesh) and shop/plain, and a pod's netns."""
    node.write("10-a.conflist", BRIDGE.replace("0.4.0", "1.0.0"))
    node.scene.add_pod(sidecar_pod("shop", "cart"))
    node.scene.add_pod(unmeshed_pod("shop", "plain"))
    node.start(NATIVE_NFTABLES="true").wait_watching()
    return node.scene.pod_netns(ADDRESS)


def add(entry: dict[str, Any], netns: str, pod: str = "cart", namespace: str = "shop") -> Outcome:
    """What libcni makes of an entry of a list: version and name from the list, the result of the plugin before."""
    stdin = {**entry, "cniVersion": "1.0.0", "name": "dbnet", "prevResult": PREV_RESULT}
    environ = variables(netns=netns, namespace=namespace, name=pod)
    environ["CNI_ARGS"] = environ["CNI_ARGS"].replace(";K8S_POD_UID=uid-1", "")
    return run(environ, json.dumps(stdin).encode())


def redirected(netns: str) -> bool:
    """Whether there are rules of ours inside."""
    listed = subprocess.run(
        ["ip", "netns", "exec", netns.rpartition("/")[2], "nft", "list", "ruleset"], capture_output=True, check=False
    )
    return b"15001" in listed.stdout


def passes(done: Outcome) -> bool:
    return done.status == 0 and done.json["ips"] == PREV_RESULT["ips"] and done.json["cniVersion"] == "1.0.0"


def test_entry_of_our_agent(node: Node, netns: str) -> None:
    entry = json.loads((node.conf / "10-a.conflist").read_text())["plugins"][-1]
    assert passes(add(entry, netns, "plain"))
    assert not redirected(netns)
    done = add(entry, netns)
    assert passes(done), done
    assert redirected(netns)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        OTHER_VERSIONS,
        {"exclude_namespaces": None, "enablement_selectors": None},
        {"ambient_enabled": True, "enablement_selectors": [{"podSelector": {}, "namespaceSelector": {}}]},
        {"plugin_log_level": "nonsense"},
    ],
)
def test_entry_of_the_original(node: Node, netns: str, changes: dict[str, Any]) -> None:
    done = add(ORIGINAL | {"cni_agent_run_dir": str(node.run)} | changes, netns)
    assert passes(done), done
    assert redirected(netns)


def test_keys_in_any_case(node: Node, netns: str) -> None:
    """Go's decoder does not look at the case of keys."""
    entry = {key.upper(): value for key, value in ORIGINAL.items() if key != "type"}
    done = add(entry | {"type": "istio-cni", "CNI_Agent_Run_Dir": str(node.run)}, netns)
    assert passes(done), done
    assert redirected(netns)


def test_what_the_entry_alone_decides(node: Node, netns: str) -> None:
    """Excluded namespaces and the agent's own pods need no agent, no API server and no kubeconfig."""
    entry = ORIGINAL | {"cni_agent_run_dir": str(node.run / "nowhere")}
    assert passes(add(entry, netns, namespace="kube-system"))
    assert passes(add(entry, netns, "istio-cni-node-xyz", "istio-system"))
    assert not redirected(netns)


def test_entry_of_a_standalone_file(node: Node, netns: str) -> None:
    """A meta plugin hands the file over as it is, with or without a result."""
    entry = ORIGINAL | {"cni_agent_run_dir": str(node.run), "cniVersion": "0.3.1"}
    done = run(variables(netns=netns) | {"CNI_ARGS": args("plain")}, json.dumps(entry).encode())
    assert (done.status, done.json) == (0, {"cniVersion": "0.3.1", "dns": {}})


def args(pod: str) -> str:
    return f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod}"
