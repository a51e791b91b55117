"""`meshcni rules ambient-pod` and `ambient-host` as processes: what they print, and what they leave in the kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Run
from tests.cli.netns import ADDRESS, Netns
from tests.kernel import ambient_oracle

BACKENDS = {
    "nftables": ["--backend", "nftables"],
    "nft": ["--backend", "iptables", "--force-iptables-binary", "nft"],
    "legacy": ["--backend=iptables", "--force-iptables-binary=legacy"],
}
POD_FLAGS = {
    "plain": [],
    "everything": ["--dns", "--ipv6", "--virtual-interfaces=vnet0,k6t+", "--host-probe-snat-ip=192.0.2.7"],
    "ingress": ["--ingress", "--ipv6"],
}
POLICY_FOUR = "fwmark 0x111/0xfff lookup 100"


def by_hand(netns: Netns, script: str, variant: str) -> None:
    """Do what a printed script says, part by part in its order."""
    for part in re.split(r"(?m)^(?=# (?:IPv[46]: |nft ))|(?<=\n)\n", script):
        first, _, body = part.partition("\n")
        if first.startswith("# nft "):
            netns(*first[2:].split(), stdin=body)
        elif found := re.match(r"# IPv[46]: (ip6?tables)-restore (.*)", first):
            netns(f"{found[1]}-{variant}-restore", *found[2].split(), stdin=body)
        else:
            for command in part.splitlines():
                assert command.startswith("# ip")
                netns(*command[2:].split())


def save_variant(variant: str) -> str:
    return "legacy" if variant == "legacy" else "nft"


def ours(netns: Netns, variant: str) -> list[str]:
    """Every line of what is ours; the sets are empty, so each has one."""
    marks = ("ISTIO", "istio", "0x111", "table 100")
    lines = netns.listing(save_variant(variant)).splitlines()
    return [line for line in lines if any(mark in line for mark in marks)]


# --- a script, --apply and what takes them back -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", POD_FLAGS.values(), ids=POD_FLAGS)
@pytest.mark.parametrize("variant", BACKENDS)
def test_a_pods_script_by_hand_is_what_apply_programs(
    run: Run, netns: Netns, other_netns: Netns, variant: str, flags: list[str]
) -> None:
    command = ("rules", "ambient-pod", *BACKENDS[variant], *flags)
    script = run(*command)
    assert (script.returncode, script.stderr) == (0, "")
    by_hand(other_netns, script.stdout, save_variant(variant))

    applied = run(*command, "--apply", prefix=netns.prefix)
    assert (applied.returncode, applied.stderr) == (0, "")
    families = "IPv4 and IPv6" if "--ipv6" in flags else "IPv4"
    assert applied.stdout.startswith(f"Rules for {families} are in place now: {variant}, because")
    state = netns.listing(save_variant(variant))
    assert state == other_netns.listing(save_variant(variant))
    assert state.count(POLICY_FOUR) == state.count("local default dev lo table 100") == (2 if "--ipv6" in flags else 1)

    again = run(*command, "--apply", "--format=json", prefix=netns.prefix)
    assert json.loads(again.stdout)["changed"] is False
    assert netns.listing(save_variant(variant)) == state


@pytest.mark.parametrize("kind", ["ambient-pod", "ambient-host"])
@pytest.mark.parametrize("variant", BACKENDS)
def test_what_was_put_in_can_be_taken_out(run: Run, netns: Netns, other_netns: Netns, variant: str, kind: str) -> None:
    command = ("rules", kind, *BACKENDS[variant], "--ipv6", "--dns", "--kubelet-uid=1000")
    for one in (netns, other_netns):
        assert ours(one, variant) == []
        assert run(*command, "--apply", prefix=one.prefix).returncode == 0
        assert len(ours(one, variant)) > 4

    cleaned = run("rules", kind, "--cleanup", "--apply", prefix=netns.prefix)
    assert (cleaned.returncode, cleaned.stdout, cleaned.stderr) == (0, "Our rules are taken out.\n", "")
    assert ours(netns, variant) == []
    again = run("rules", kind, "--cleanup", "--apply", "--format=json", prefix=netns.prefix)
    assert (again.returncode, json.loads(again.stdout)) == (0, {"removed": True})

    by_hand(other_netns, run(*command, "--cleanup").stdout, save_variant(variant))
    assert ours(other_netns, variant) == []


@pytest.mark.parametrize("families", [[], ["--ipv6"]], ids=["v4", "dual"])
@pytest.mark.parametrize("variant", BACKENDS)
def test_the_hosts_script_by_hand_is_what_apply_programs(
    run: Run, netns: Netns, other_netns: Netns, variant: str, families: list[str]
) -> None:
    command = ("rules", "ambient-host", *BACKENDS[variant], *families, "--kubelet-uid=1000")
    script = run(*command)
    assert (script.returncode, script.stderr) == (0, "")
    by_hand(other_netns, script.stdout, save_variant(variant))
    applied = run(*command, "--apply", "--format=json", prefix=netns.prefix)
    assert applied.returncode == 0, applied.stderr
    names = ["istio-inpod-probes-v4", "istio-inpod-probes-v6"][: 1 + len(families)]
    shown = json.loads(applied.stdout)
    assert (shown["applied"], shown["changed"], shown["sets"]) == (True, True, names)
    state = netns.listing(save_variant(variant))
    assert state == other_netns.listing(save_variant(variant))
    assert ("skuid 1000" in state) is (variant == "nftables")


@pytest.mark.parametrize("variant", BACKENDS)
def test_making_the_hosts_rules_anew_keeps_the_sets_entries(run: Run, netns: Netns, variant: str) -> None:
    command = ("rules", "ambient-host", *BACKENDS[variant], "--kubelet-uid=0", "--apply")
    assert run(*command, prefix=netns.prefix).returncode == 0
    if variant == "nftables":
        element = '{ 10.0.0.7 comment "u" }'
        netns("nft", "add", "element", "inet", "istio-ambient-nat", "istio-inpod-probes-v4", element)
    else:
        netns("ipset", "add", "istio-inpod-probes-v4", "10.0.0.7", "comment", "u")
    assert run(*command, "--host-probe-snat-ip=192.0.2.7", prefix=netns.prefix).returncode == 0
    state = netns.listing(save_variant(variant))
    assert "10.0.0.7" in state
    assert "192.0.2.7" in state


def test_changing_backends_leaves_rules_in_one_only(run: Run, netns: Netns) -> None:
    for kind, chain in (("ambient-pod", "ISTIO_PRERT"), ("ambient-host", "ISTIO_POSTRT")):
        for variant in ("nft", "nftables", "nft"):
            command = ("rules", kind, *BACKENDS[variant], "--kubelet-uid=0", "--apply")
            result = run(*command, prefix=netns.prefix)
            assert result.returncode == 0, result.stderr
            has = (chain in netns("iptables-nft-save"), "hook" in netns("nft", "list", "ruleset", "inet"))
            assert has == ((False, True) if variant == "nftables" else (True, False))
        assert run("rules", kind, "--cleanup", "--apply", prefix=netns.prefix).returncode == 0


def test_apply_in_a_namespace_given_by_its_path(run: Run, netns: Netns) -> None:
    result = run("rules", "ambient-pod", "--native-nftables", "--apply", "--network-namespace", netns.path)
    assert result.returncode == 0, result.stderr
    assert len(ours(netns, "nftables")) > 4
    assert (
        run("rules", "ambient-pod", "--native-nftables", "--verify", "--network-namespace", netns.path).returncode == 0
    )


# --- against the original ---------------------------------------------------------------------------------------------


def load(netns: Netns, texts: ambient_oracle.Texts, variant: str) -> None:
    """Do by hand what the original does with its texts."""
    if variant == "nftables":
        netns("nft", "-f", "-", stdin=texts.nft)
    else:
        netns(f"iptables-{variant}-restore", "--noflush", stdin=texts.iptables)
        netns(f"ip6tables-{variant}-restore", "--noflush", stdin=texts.ip6tables)
    netns("sh", "-e", stdin=texts.ip)


@pytest.mark.parametrize("variant", BACKENDS)
def test_a_pod_has_what_the_original_gives_it(run: Run, netns: Netns, other_netns: Netns, variant: str) -> None:
    load(other_netns, ambient_oracle.pod(ipv6=True, dns=True, interfaces=("vnet0",)), variant)
    flags = ("--ipv6", "--dns", "--virtual-interfaces", "vnet0", "--apply")
    assert run("rules", "ambient-pod", *BACKENDS[variant], *flags, prefix=netns.prefix).returncode == 0
    assert netns.listing(save_variant(variant)) == other_netns.listing(save_variant(variant))


@pytest.mark.parametrize("variant", BACKENDS)
def test_the_host_has_what_the_original_gives_it(run: Run, netns: Netns, other_netns: Netns, variant: str) -> None:
    if variant == "nftables":
        for name, kind in (("istio-inpod-probes-v4", "ipv4_addr"), ("istio-inpod-probes-v6", "ipv6_addr")):
            text = f"add table inet istio-ambient-nat\nadd set inet istio-ambient-nat {name} {{ type {kind} ; }}\n"
            other_netns("nft", "-f", "-", stdin=text)
    else:
        other_netns("ipset", "create", "istio-inpod-probes-v4", "hash:ip", "family", "inet", "comment")
        other_netns("ipset", "create", "istio-inpod-probes-v6", "hash:ip", "family", "inet6", "comment")
    load(other_netns, ambient_oracle.host(ipv6=True, uid=1000), variant)
    flags = ("--ipv6", "--kubelet-uid=1000", "--apply")
    assert run("rules", "ambient-host", *BACKENDS[variant], *flags, prefix=netns.prefix).returncode == 0
    assert netns.listing(save_variant(variant)) == other_netns.listing(save_variant(variant))


# --- comparing --------------------------------------------------------------------------------------------------------

DAMAGES = {
    "nftables": ("nft flush chain inet istio-ambient-nat istio-output", "istio-output lacks the rule"),
    "nft": ("iptables-nft -t nat -F ISTIO_OUTPUT", "chain nat ISTIO_OUTPUT (IPv4) lacks the rule"),
    "legacy": ("iptables-legacy -t nat -F ISTIO_OUTPUT", "chain nat ISTIO_OUTPUT (IPv4) lacks the rule"),
}


@pytest.mark.parametrize("variant", BACKENDS)
def test_verify_tells_what_a_pod_lacks(run: Run, netns: Netns, variant: str) -> None:
    command = ("rules", "ambient-pod", *BACKENDS[variant], "--ipv6")
    nothing = run(*command, "--verify", prefix=netns.prefix)
    assert (nothing.returncode, nothing.stderr) == (1, "")
    assert "local route 0.0.0.0/0 in table 100" in nothing.stdout
    applied = run(*command, "--apply", "--verify", prefix=netns.prefix)
    assert applied.returncode == 0
    assert applied.stdout.endswith("All is as it should be.\n")

    damage, said = DAMAGES[variant]
    state = netns.listing(save_variant(variant))
    netns(*damage.split())
    netns("ip", "-6", "rule", "del", "pref", "32764")
    broken = run(*command, "--verify", "--format=json", prefix=netns.prefix)
    assert broken.returncode == 1
    drift = json.loads(broken.stdout)
    assert drift["asDesired"] is False
    assert any(said in line for line in drift["drift"])
    assert "IPv6 rule fwmark 0x111/0xfff lookup 100" in drift["drift"]
    assert netns.listing(save_variant(variant)) != state  # looking mends nothing

    assert run(*command, "--apply", prefix=netns.prefix).returncode == 0
    healed = run(*command, "--verify", "--format=json", prefix=netns.prefix)
    assert (healed.returncode, json.loads(healed.stdout)) == (0, {"asDesired": True, "drift": []})
    assert netns.listing(save_variant(variant)) == state
    assert run(*command, "--dns", "--verify", prefix=netns.prefix).returncode == 1  # other parameters, other rules


@pytest.mark.parametrize("variant", ["nftables", "nft"])
def test_verify_tells_what_the_host_lacks(run: Run, netns: Netns, variant: str) -> None:
    command = ("rules", "ambient-host", *BACKENDS[variant], "--kubelet-uid=1000")
    assert run(*command, "--verify", prefix=netns.prefix).returncode == 1
    assert run(*command, "--apply", "--verify", prefix=netns.prefix).returncode == 0
    if variant == "nft":
        netns("iptables-nft", "-t", "nat", "-I", "POSTROUTING", "-j", "ACCEPT")
        result = run(*command, "--verify", prefix=netns.prefix)
        assert (result.returncode, result.stdout.count("does not begin with the rule")) == (1, 1)
    else:
        result = run("rules", "ambient-host", *BACKENDS[variant], "--kubelet-uid=0", "--verify", prefix=netns.prefix)
        assert (result.returncode, "skuid 1000" in result.stdout) == (1, True)


# --- the agent's variables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ambient-pod", "ambient-host"])
def test_the_agents_variables_do_what_the_flags_do(run: Run, netns: Netns, other_netns: Netns, kind: str) -> None:
    variables = {
        "NATIVE_NFTABLES": "true",
        "AMBIENT_IPV6": "true",
        "AMBIENT_DNS_CAPTURE": "1",
        "HOST_PROBE_SNAT_IP": "192.0.2.7",
        "HOST_PROBE_SNAT_IPV6": "2001:db8::7",
        "KUBELET_UID": "1234",
    }
    flags = ("--native-nftables", "--ipv6", "--dns", "--host-probe-snat-ip=192.0.2.7", "--kubelet-uid=1234")
    flags += ("--host-probe-snat-ipv6=2001:db8::7",)
    assert run("rules", kind, "--apply", prefix=netns.prefix, env=variables).returncode == 0
    assert run("rules", kind, "--apply", *flags, prefix=other_netns.prefix).returncode == 0
    state = netns.listing()
    assert state == other_netns.listing()
    assert "2001:db8::7" in state
    assert ("dport 53" in state, "skuid 1234" in state) == (kind == "ambient-pod", kind == "ambient-host")


def test_the_nodes_own_address_marks_probes(run: Run, netns: Netns) -> None:
    netns("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
    netns("ip", "address", "add", "198.51.100.7/24", "dev", "eth0")
    netns("ip", "link", "set", "eth0", "up")
    command = ("rules", "ambient-host", "--native-nftables", "--kubelet-uid=0", "--apply")
    result = run(*command, "--network-namespace", netns.path, env={"HOST_PROBE_SNAT_IP": "hostIP"})
    assert result.returncode == 0, result.stderr
    assert "snat ip to 198.51.100.7" in netns("nft", "list", "ruleset")


def test_the_kubelet_is_found_under_the_procfs_that_the_agent_uses(run: Run, tmp_path: Path) -> None:
    process = tmp_path / "77"
    process.mkdir()
    (process / "comm").write_text("kubelet\n")
    (process / "cmdline").write_bytes(b"/usr/bin/kubelet\0")
    (process / "status").write_text("Name:\tkubelet\nUid:\t4321\t0\t0\t0\n")
    (process / "stat").write_text("77 (kubelet) S 1 " + "0 " * 48)
    (process / "cgroup").write_text("0::/system.slice/kubelet.service\n")
    command = ("rules", "ambient-host", "--native-nftables", "--kubelet-uid=auto")
    result = run(*command, env={"HOST_PROC_DIR": str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, "")
    assert "skuid 4321" in result.stdout


def test_without_a_kubelet_the_rules_are_printed_and_not_programmed(run: Run, netns: Netns, tmp_path: Path) -> None:
    environment = {"HOST_PROC_DIR": str(tmp_path)}
    command = ("rules", "ambient-host", "--native-nftables")
    printed = run(*command, env=environment)
    assert (printed.returncode, "skuid 0" in printed.stdout) == (0, True)
    assert "is a kubelet" in printed.stderr
    assert "--kubelet-uid N names another" in printed.stderr
    refused = run(*command, "--apply", env=environment, prefix=netns.prefix)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--kubelet-uid N" in refused.stderr
    assert ours(netns, "nftables") == []


# --- printing ---------------------------------------------------------------------------------------------------------


def test_a_pod_as_json_and_in_words(run: Run) -> None:
    result = run("rules", "ambient-pod", "--dns", "--format", "json", env={"AMBIENT_IPV6": "true"})
    shown = json.loads(result.stdout)
    assert (shown["backend"], shown["families"]) == ("iptables", ["IPv4", "IPv6"])
    assert shown["parameters"] == {
        "dnsCapture": True,
        "ingress": False,
        "virtualInterfaces": [],
        "probeV4": "169.254.7.127",
        "probeV6": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
    }
    assert shown["origins"]["dnsCapture"] == "flag --dns"
    assert {"family": "IPv6", "mark": 0x111, "mask": 0xFFF, "table": 100, "priority": 32764} in shown["policyRules"]
    assert all(rule["why"] for table in shown["tables"] for chain in table["chains"] for rule in chain["rules"])
    words = run("rules", "ambient-pod", "--dns", "--format=words").stdout
    assert "DNS queries of the application are answered by ztunnel." in words
    assert "In routing table 100, 0.0.0.0/0 is delivered locally." in words


def test_the_host_as_json_and_in_words(run: Run) -> None:
    shown = json.loads(run("rules", "ambient-host", "--ipv6", "--format=json").stdout)
    assert shown["parameters"]["kubeletUid"] is None
    assert [one["name"] for one in shown["sets"]] == ["istio-inpod-probes-v4", "istio-inpod-probes-v6"]
    words = run("rules", "ambient-host", "--format=words").stdout
    assert "to an address of set istio-inpod-probes-v4 → send from 169.254.7.127" in words
    assert "Set istio-inpod-probes-v4 (ipset hash:ip, family inet, with comments)" in words


def test_help(run: Run) -> None:
    result = run("rules", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(kind in result.stdout for kind in ("sidecar", "ambient-pod", "ambient-host"))
    for kind, flag in (("ambient-pod", "--virtual-interfaces"), ("ambient-host", "--kubelet-uid")):
        result = run("rules", kind, "--help")
        assert (result.returncode, result.stderr, flag in result.stdout) == (0, "", True)
    for words in ([], ["ambient"]):
        result = run("rules", *words)
        assert (result.returncode, result.stdout) == (1, "")
        assert "sidecar|ambient-pod|ambient-host" in result.stderr


# --- from a pod -------------------------------------------------------------------------------------------------------

AMBIENT = {
    "AMBIENT_ENABLED": "true",
    "AMBIENT_ENABLEMENT_SELECTOR": "[{namespaceSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}}]",
}


def files(folder: Path, spec: dict[str, Any] | None = None, **annotations: str) -> list[str]:
    """Write a pod and its namespace; return the flags that name them."""
    metadata = {"name": "cart", "namespace": "shop", "annotations": annotations}
    (folder / "pod.yaml").write_text(yaml.safe_dump({"kind": "Pod", "metadata": metadata, "spec": spec or {}}))
    labels = {"istio.io/dataplane-mode": "ambient"}
    (folder / "ns.yaml").write_text(
        yaml.safe_dump({"kind": "Namespace", "metadata": {"name": "shop", "labels": labels}})
    )
    return [f"--pod={folder}/pod.yaml", f"--namespace-file={folder}/ns.yaml"]


@pytest.mark.parametrize("variant", ["nftables", "nft"])
def test_a_pods_parameters_are_those_of_the_same_flags(
    run: Run, netns: Netns, other_netns: Netns, tmp_path: Path, variant: str
) -> None:
    annotations = {
        "ambient.istio.io/dns-capture": "true",
        "ambient.istio.io/bypass-inbound-capture": "true",
        "istio.io/reroute-virtual-interfaces": "vnet0",
    }
    command = ("rules", "ambient-pod", *BACKENDS[variant], "--apply")
    of_pod = run(*command, *files(tmp_path, **annotations), env=AMBIENT, prefix=netns.prefix)
    assert (of_pod.returncode, of_pod.stderr) == (0, "")
    flags = ("--dns", "--ingress", "--virtual-interfaces=vnet0")
    assert run(*command, *flags, prefix=other_netns.prefix).returncode == 0
    state = netns.listing()
    assert state == other_netns.listing()
    assert "vnet0" in state


def test_annotations_override_the_nodes_settings(run: Run, tmp_path: Path) -> None:
    named = files(tmp_path, **{"ambient.istio.io/dns-capture": "false"})
    environment = {**AMBIENT, "AMBIENT_DNS_CAPTURE": "true", "HOST_PROBE_SNAT_IP": "192.0.2.7"}
    shown = json.loads(run("rules", "ambient-pod", *named, "--format=json", env=environment).stdout)
    assert (shown["parameters"]["dnsCapture"], shown["parameters"]["probeV4"]) == (False, "192.0.2.7")
    assert shown["origins"]["dnsCapture"] == "annotation ambient.istio.io/dns-capture"
    assert shown["origins"]["probeV4"] == "env HOST_PROBE_SNAT_IP"


@pytest.mark.parametrize(
    ("spec", "annotations", "environment", "status", "said"),
    [
        ({}, {}, {}, 0, "shop/cart: skip. "),
        ({"hostNetwork": True}, {}, AMBIENT, 0, "shop/cart: skip. "),
        (
            {"containers": [{"name": "istio-proxy"}]},
            {"sidecar.istio.io/status": "{}"},
            AMBIENT,
            0,
            "shop/cart: sidecar.",
        ),
        ({}, {"istio.io/reroute-virtual-interfaces": "a/b"}, AMBIENT, 1, "'a/b', which names no interface"),
        ({"runtimeClassName": "kata-clh"}, {}, AMBIENT, 1, "runtime class kata-clh"),
    ],
    ids=["ambient is off", "host network", "a sidecar", "a bad annotation", "a sandboxed runtime"],
)
def test_a_pod_that_is_not_ambient_programs_nothing(
    run: Run,
    netns: Netns,
    tmp_path: Path,
    spec: dict[str, Any],
    annotations: dict[str, str],
    environment: dict[str, str],
    status: int,
    said: str,
) -> None:
    state = netns.listing()
    named = files(tmp_path, spec, **annotations)
    result = run("rules", "ambient-pod", *named, "--apply", env=environment, prefix=netns.prefix)
    assert result.returncode == status, result.stderr
    assert said in (result.stdout if status == 0 else result.stderr)
    assert netns.listing() == state


def test_a_pod_whose_namespace_is_not_given(run: Run, tmp_path: Path) -> None:
    pod, _namespace = files(tmp_path)
    result = run("rules", "ambient-pod", pod, "--format=json", env=AMBIENT)
    assert (result.returncode, json.loads(result.stdout)["reason"]) == (1, "namespace-unknown")


# --- nothing is programmed --------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[list[str], dict[str, str], int]] = {
    "no --apply": ([], {}, 0),
    "dry run": (["--apply", "--dry-run"], {}, 0),
    "dry run by variable": (["--apply"], {"DRY_RUN": "1"}, 0),
    "cleanup without --apply": (["--cleanup"], {}, 0),
    "unknown flag": (["--apply", "--nonsense"], {}, 1),
    "switch": (["--apply", "--ipv6=2"], {}, 1),
    "wrong probe": (["--apply"], {"HOST_PROBE_SNAT_IP": "nonsense"}, 1),
    "wrong IPv6 probe": (["--apply"], {"HOST_PROBE_SNAT_IPV6": "10.0.0.1"}, 1),
    "wrong switch of a variable": (["--apply"], {"AMBIENT_IPV6": "nonsense"}, 1),
    "no such netns": (["--apply", "--network-namespace", "/run/netns/mc-cli-nowhere"], {}, 1),
}


@pytest.mark.parametrize("kind", ["ambient-pod", "ambient-host"])
@pytest.mark.parametrize(("flags", "env", "status"), NOTHING.values(), ids=NOTHING)
def test_nothing_is_programmed(
    run: Run, netns: Netns, kind: str, flags: list[str], env: dict[str, str], status: int
) -> None:
    state = netns.listing()
    result = run("rules", kind, *flags, prefix=netns.prefix, env=env)
    assert result.returncode == status, result.stderr
    assert bool(result.stderr) == (status != 0)
    assert bool(result.stdout) == (status == 0)
    assert "Traceback" not in result.stderr
    assert netns.listing() == state


def test_without_the_privilege_it_is_said(run: Run, netns: Netns) -> None:
    prefix = [*netns.prefix, "setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    for backend in ("nftables", "iptables"):
        result = run("rules", "ambient-pod", "--apply", "--backend", backend, prefix=prefix)
        assert (result.returncode, result.stdout) == (1, "")
        assert "CAP_NET_ADMIN" in result.stderr
        assert "Traceback" not in result.stderr
    assert ADDRESS.partition("/")[0] in netns.listing()
    assert ours(netns, "nftables") == []
