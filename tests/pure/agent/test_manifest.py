"""What the agent needs of its manifest: the tables, the YAML, the capabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshcni.agent import hostmounts, manifest, privileges, rights
from meshcni.agent.needs import Weight
from meshcni.agent.settings import Settings
from meshcni.host.capabilities import CAPABILITIES
from meshcni.host.procfs import Privileges
from meshcni.kube.credentials import subject

SIDECAR = Settings(
    node_name="node", pod_name="pod", pod_namespace="mesh", kubernetes_service_host="10.0.0.1", service_account_dir="/"
)
AMBIENT = replace(SIDECAR, ambient_enabled=True)
CHART = sum(1 << capability.number for capability in CAPABILITIES)
NUMBER = {capability.short_name: capability.number for capability in CAPABILITIES}


# --- the tables -----------------------------------------------------------------------------------------------------


def test_ambient_mode_stops_without_procfs_and_ztunnels_directory() -> None:
    weights = {one.volume: one.weight for one in hostmounts.wanted(AMBIENT)}
    assert weights == {
        "cni-bin-dir": Weight.STOPS,
        "cni-host-procfs": Weight.STOPS,
        "cni-net-dir": Weight.STOPS,
        "cni-socket-dir": Weight.STOPS,
        "cni-netns-dir": Weight.DEGRADES,
        "cni-ztunnel-sock-dir": Weight.STOPS,
    }
    sidecar = {one.volume: one.weight for one in hostmounts.wanted(SIDECAR)}
    assert sidecar.pop("cni-host-procfs") is Weight.DEGRADES
    assert sidecar == dict.fromkeys(("cni-bin-dir", "cni-net-dir", "cni-socket-dir"), Weight.STOPS)


@pytest.mark.parametrize(
    ("changes", "code", "inside"),
    [
        ({}, "/srv/meshcni/__init__.py", True),
        ({"cni_binary_target_dir": "/opt/cni/bin", "mounted_cni_net_dir": "/a"}, "/srv/meshcni/__init__.py", False),
        ({"cni_binary_target_dir": "/opt/cni/bin"}, "/srv/meshcni/__init__.py", True),
        ({"cni_binary_target_dir": "/b", "mounted_cni_net_dir": "/a"}, "/usr/lib/meshcni/meshcni/__init__.py", True),
    ],
)
def test_who_is_in_a_container(changes: dict[str, str], code: str, inside: bool) -> None:
    assert hostmounts.in_container(replace(SIDECAR, **changes), code) is inside  # type: ignore[arg-type]


def test_paths_are_those_of_the_settings() -> None:
    settings = replace(
        AMBIENT,
        cni_binary_target_dir="/host/var/lib/cni/bin",
        mounted_cni_net_dir="/elsewhere",
        cni_agent_run_dir="/var/run/other",
        ztunnel_uds_address="/var/run/zt/z.sock",
    )
    paths = {one.volume: (one.path, one.host_path) for one in hostmounts.wanted(settings)}
    assert paths["cni-bin-dir"] == ("/host/var/lib/cni/bin", "/var/lib/cni/bin")
    assert paths["cni-net-dir"] == ("/elsewhere", "/etc/cni/net.d")
    assert paths["cni-socket-dir"] == ("/var/run/other", "/var/run/other")
    assert paths["cni-ztunnel-sock-dir"] == ("/var/run/zt", "/var/run/zt")


# --- the YAML -------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1))
def test_scalars_are_read_back(text: str) -> None:
    printable = "".join(character for character in text if character.isprintable() and ord(character) < 0x10000)
    for wrapped in (f"a: {manifest.scalar(printable)}", f"{{a: {manifest.scalar(printable)}, b: c}}"):
        assert yaml.safe_load(wrapped)["a"] == printable


@pytest.mark.parametrize("word", ["true", "No", "null", "12", "1e3", "0x1f", "a: b", "a#b", "~", "y"])
def test_words_that_yaml_takes_for_others(word: str) -> None:
    assert yaml.safe_load(f"a: {manifest.scalar(word)}") == {"a": word}


def test_role_has_every_right_and_marks_the_missing_ones() -> None:
    wanted = rights.wanted(ambient=True)
    text = manifest.role(wanted, [wanted[1], wanted[2]], namespace="mesh", account="mine")
    _, role, binding = yaml.safe_load_all(text)
    assert {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]} in role["rules"]
    assert {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]} in role["rules"]
    daemonsets = {"apiGroups": ["apps"], "resources": ["daemonsets"], "resourceNames": ["istio-cni-node"]}
    assert daemonsets | {"verbs": ["get"]} in role["rules"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "mine", "namespace": "mesh"}]
    assert [line for line in text.splitlines() if "missing" in line] == [
        "  verbs: [get, list, watch]  # missing: list, watch"
    ]


def test_subject_of_a_token() -> None:
    assert subject("a-token") == subject("") == subject("a.%%%.c") == subject("a.W10.c") == ""
    assert subject("e30.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6YTpiIn0.x") == "system:serviceaccount:a:b"


# --- capabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "uid", "indispensable"),
    [
        ({}, 0, {"NET_ADMIN", "NET_RAW", "SYS_ADMIN"}),
        ({}, 65532, {"NET_ADMIN", "NET_RAW", "SYS_ADMIN", "DAC_OVERRIDE"}),
        ({"native_nftables": True}, 0, {"NET_ADMIN", "SYS_ADMIN"}),
        ({"force_iptables_binary": "nft"}, 0, {"NET_ADMIN", "SYS_ADMIN"}),
        ({"force_iptables_binary": "legacy"}, 0, {"NET_ADMIN", "NET_RAW", "SYS_ADMIN"}),
        ({"ambient_enabled": True}, 65532, set(NUMBER)),
    ],
)
def test_indispensable_capabilities(changes: dict[str, Any], uid: int, indispensable: set[str]) -> None:
    settings = replace(SIDECAR, **changes)
    for name, number in NUMBER.items():
        found = Privileges(CHART & ~(1 << number), CHART, no_new_privileges=False, uid=uid)
        if name in indispensable:
            with pytest.raises(privileges.PrivilegesError, match=name) as raised:
                privileges.check(settings, found)
            assert raised.value.exit_code == 77
        else:
            useless = name == "NET_RAW"
            assert (name in privileges.check(settings, found)) is not useless
    assert privileges.check(settings, Privileges(CHART, CHART, no_new_privileges=True, uid=uid)) == ""


@pytest.mark.parametrize(
    ("found", "context"),
    [
        (Privileges(0, 0, no_new_privileges=False, uid=65532), {}),
        (Privileges(0, CHART, no_new_privileges=True, uid=65532), {"allowPrivilegeEscalation": True}),
        (Privileges(0, 0, no_new_privileges=True, uid=65532), {"allowPrivilegeEscalation": True}),
        (Privileges(0, CHART, no_new_privileges=False, uid=65532), {"runAsUser": 0}),
        (Privileges(0, 0, no_new_privileges=False, uid=0), {}),
    ],
)
def test_security_context(found: Privileges, context: dict[str, Any]) -> None:
    with pytest.raises(privileges.PrivilegesError) as raised:
        privileges.check(SIDECAR, found)
    text = raised.value.hint
    shown = yaml.safe_load(text[text.index("securityContext:\n  ") :])["securityContext"]
    capabilities = shown.pop("capabilities")
    assert shown == context
    assert capabilities == {"drop": ["ALL"], "add": [one.short_name for one in CAPABILITIES]}
