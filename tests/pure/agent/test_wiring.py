"""Settings as the parts see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # noqa: F401  (selectors import it when they are read; no file may be opened during a test)
from lab.ambient import ambient_environment
from lab.objects import ambient_namespace, ambient_pod, namespace_object, unmeshed_pod

from meshcni import istio
from meshcni.agent.resolution import resolve
from meshcni.agent.settings import ROWS
from meshcni.agent.wiring import api_access, backend_config, install_config, policy, warnings
from meshcni.host.redirection import FamilyPolicy
from meshcni.istio import DATAPLANE_MODE
from meshcni.pods.eligibility import Verdict, decide
from meshcni.pods.model import namespace_from_object, pod_from_object
from meshcni.rules.model import Backend


def test_conf_entry_has_only_the_originals_keys_by_default() -> None:
    entry = install_config(resolve([], {}), "info").entry
    assert dict(entry.extra) == {}
    assert (entry.plugin_log_level, entry.run_dir, entry.native_nftables) == ("info", istio.RUN_DIR, False)


@pytest.mark.parametrize(("text", "extra"), [("20", {}), ("5", {"agent_wait_seconds": 5})])
def test_our_own_key_is_there_when_it_differs(text: str, extra: dict[str, object]) -> None:
    assert dict(install_config(resolve([], {"AGENT_WAIT_SECONDS": text}), "info").entry.extra) == extra


def test_installer_gets_its_settings() -> None:
    config = install_config(
        resolve(
            ["--cni-conf-name=a.conf", "--chained-cni-plugin=false"],
            {"UNINSTALL_REMOVES_BINARY": "true", "CNI_BINARY_TARGET_DIR": "/b", "KUBERNETES_SERVICE_HOST": "fd00::1"},
        ),
        "debug",
    )
    assert (config.conf_name, config.chained, config.uninstall_removes_binary) == ("a.conf", False, True)
    assert (config.binary_target_dirs, config.api_host, config.api_protocol) == (("/b",), "fd00::1", "https")


def test_policy() -> None:
    chosen = policy(resolve([], {"EXCLUDE_NAMESPACES": "a,b", "POD_NAMESPACE": "istio-system"}))
    assert (chosen.exclude_namespaces, chosen.agent_namespace) == (frozenset({"a", "b"}), "istio-system")
    assert chosen.system_namespace == "istio-system"
    assert policy(resolve([], {"SYSTEM_NAMESPACE": "mesh"})).system_namespace == "mesh"


@pytest.mark.parametrize(
    ("variables", "backend", "netns"),
    [
        ({}, Backend.IPTABLES, istio.OWN_NETNS),
        ({"NATIVE_NFTABLES": "true", "ALLOW_SWITCH_TO_HOST_NS": "true"}, Backend.NFTABLES, istio.HOST_NETNS),
    ],
)
def test_backend(variables: dict[str, str], backend: Backend, netns: str) -> None:
    config = backend_config(resolve([], variables))
    assert (config.backend, config.host_netns, config.family_policy) == (backend, netns, FamilyPolicy.BY_ADDRESS)


def test_api_address() -> None:
    access = api_access(resolve([], {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}))
    assert access.server == "https://10.0.0.1:443"


AMBIENT = {"AMBIENT_ENABLED": "true", "AMBIENT_ENABLEMENT_SELECTOR": "[{}]", "NODE_NAME": "n1"}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"NATIVE_NFTABLES": "true", "FORCE_IPTABLES_BINARY": "nft"}, "nftables wins"),
        ({"DISABLE_SAFE_UPGRADE": "true"}, "outside the mesh"),
        ({"POD_NAMESPACE": ""}, "agent's own pod"),
        (AMBIENT | {"NODE_NAME": ""}, "NODE_NAME is not set: the pods of the node that is the host name are watched"),
        (AMBIENT | {"NODE_NAME": "", "KUBERNETES_NODE_NAME": "n2"}, "NODE_NAME is not set: the pods of the node 'n2'"),
        (AMBIENT | {"AMBIENT_ENABLEMENT_SELECTOR": ""}, "takes no pod"),
        (AMBIENT | {"AMBIENT_ZTUNNEL_WAIT_SECONDS": "20"}, "(20) is not below AGENT_WAIT_SECONDS (20)"),
        (AMBIENT | {"AMBIENT_VERIFY_SECONDS": "61"}, "AMBIENT_VERIFY_SECONDS is 61"),
    ],
)
def test_surprising_settings_are_said(variables: dict[str, str], part: str) -> None:
    (warning,) = warnings(resolve([], {"POD_NAMESPACE": "istio-system", **variables}))
    assert part in warning


@pytest.mark.parametrize("mode", [{}, AMBIENT])
def test_what_the_chart_sets_is_no_surprise(mode: dict[str, str]) -> None:
    assert warnings(resolve([], {"POD_NAMESPACE": "istio-system", **mode})) == ()


def test_ambient_settings_are_no_surprise_without_ambient() -> None:
    variables = {"POD_NAMESPACE": "istio-system", "AMBIENT_VERIFY_SECONDS": "3600", "AGENT_WAIT_SECONDS": "1"}
    assert warnings(resolve([], variables)) == ()


LAB_PODS = {
    "by its own label": (ambient_pod("shop", "a", runtime_class="x"), namespace_object("shop"), Verdict.AMBIENT),
    "by its namespace's": (unmeshed_pod("shop", "a"), ambient_namespace("shop"), Verdict.AMBIENT),
    "opted out": (unmeshed_pod("shop", "a", labels={DATAPLANE_MODE: "none"}), ambient_namespace("shop"), Verdict.SKIP),
    "of no mesh": (unmeshed_pod("shop", "a"), namespace_object("shop"), Verdict.SKIP),
}


@pytest.mark.parametrize(("pod", "namespace", "verdict"), LAB_PODS.values(), ids=LAB_PODS)
def test_the_labs_ambient_agent_takes_its_ambient_pods(
    pod: dict[str, Any], namespace: dict[str, Any], verdict: Verdict
) -> None:
    variables = ambient_environment(Path("/run/ztunnel.sock"))
    settings = resolve([], {"POD_NAMESPACE": "istio-system", "NODE_NAME": "n1", **variables})
    assert warnings(settings) == ()
    assert settings.origins.keys() >= {row.name for row in ROWS if set(row.variables) & variables.keys()}
    assert decide(pod_from_object(pod), namespace_from_object(namespace), policy(settings)).verdict is verdict


def test_a_pod_of_the_lab_with_addresses_runs() -> None:
    pod = pod_from_object(ambient_pod("shop", "a", ips=["10.0.0.1", "fd00::1"], annotations={"x": "y"}))
    assert (pod.phase, pod.ips, pod.service_account) == ("Running", ("10.0.0.1", "fd00::1"), "default")
    assert pod.annotations == {"x": "y"}
