"""`meshcni rules sidecar` as a process: what it prints, and what `--apply` leaves in a network namespace of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run
from tests.cli.netns import ADDRESS, Netns

ADDRESS_V6 = "fd00:240::1/128"
POD = """
apiVersion: v1
kind: Pod
metadata:
  name: cart
  namespace: shop
  annotations:
    sidecar.istio.io/status: '{}'
    traffic.sidecar.istio.io/includeInboundPorts: '8080'
    traffic.sidecar.istio.io/excludeOutboundIPRanges: 10.1.2.3/8
spec:
  containers:
  - name: istio-proxy
"""
BACKENDS = ("iptables", "nftables")


@pytest.fixture
def pod_file(tmp_path: Path) -> Path:
    path = tmp_path / "pod.yaml"
    path.write_text(POD)
    return path


# --- printing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["-b", "*", "-i", "*"], ["-b", "80,90", "-m", "TPROXY", "--drop-invalid"]])
def test_a_printed_iptables_script_is_what_apply_programs(run: Run, netns: Netns, flags: list[str]) -> None:
    script = run("rules", "sidecar", *flags, "--families", "ipv4").stdout
    netns("iptables-nft-restore", "--noflush", stdin=script)
    by_hand = netns("iptables-nft-save", "-t", "nat")
    applied = run("rules", "sidecar", *flags, "--apply", "--force-iptables-binary", "nft", prefix=netns.prefix)
    assert applied.returncode == 0, applied.stderr
    assert rules_of(netns("iptables-nft-save", "-t", "nat")) == rules_of(by_hand)
    assert "ISTIO_OUTPUT" in by_hand


def test_a_printed_nftables_script_is_what_apply_programs(run: Run, netns: Netns) -> None:
    flags = ["-b*", "-i*", "--redirect-dns", "--capture-all-dns", "--native-nftables"]
    netns("nft", "-f", "-", stdin=run("rules", "sidecar", *flags, "--families=ipv4").stdout)
    by_hand = netns("nft", "list", "ruleset")
    assert run("rules", "sidecar", *flags, "--apply", prefix=netns.prefix).returncode == 0
    assert netns("nft", "list", "ruleset") == by_hand
    assert "istio-output-dns" in by_hand


def rules_of(save: str) -> list[str]:
    return [line for line in save.splitlines() if line.startswith("-A")]


def test_json_and_words(run: Run) -> None:
    shown = json.loads(run("rules", "sidecar", "-b", "80", "--format", "json", "--families", "ipv4").stdout)
    assert (shown["backend"], shown["families"], shown["parameters"]["inboundPorts"]) == ("iptables", ["IPv4"], [80])
    assert all(rule["why"] for table in shown["tables"] for chain in table["chains"] for rule in chain["rules"])
    assert "Inbound port 80 is captured" in run("rules", "sidecar", "-b", "80", "--format", "words").stdout


def test_help(run: Run) -> None:
    result = run("rules", "sidecar", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "-b, --istio-inbound-ports" in result.stdout


# --- applying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_is_repeatable_and_cleanup_leaves_nothing(run: Run, netns: Netns, backend: str) -> None:
    flags = ["-b*", "-i*", "-m", "TPROXY", "--redirect-dns", "--capture-all-dns", "--apply", "--backend", backend]
    netns("ip", "-6", "address", "add", ADDRESS_V6, "dev", "lo", "nodad")
    before_ours = ours(netns)
    first = run("rules", "sidecar", *flags, prefix=netns.prefix)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("Rules for IPv4 and IPv6 are in place now")
    state = netns.listing()
    assert state.count("fwmark 0x539 lookup 133") == 2
    again = run("rules", "sidecar", *flags, prefix=netns.prefix)
    assert again.returncode == 0
    assert netns.listing() == state
    cleaned = run("rules", "sidecar", "--cleanup-only", "--apply", prefix=netns.prefix)
    assert cleaned.returncode == 0, cleaned.stderr
    assert ours(netns) == before_ours == []


def ours(netns: Netns) -> list[str]:
    marks = ("ISTIO", "istio", "0x539", "table 133", "::6/128")
    return [line for line in netns.listing().splitlines() if any(mark in line for mark in marks)]


def test_changing_backends_leaves_rules_in_one_only(run: Run, netns: Netns) -> None:
    for backend in (*BACKENDS, *BACKENDS):
        result = run("rules", "sidecar", "-b*", "-i*", "--apply", "--backend", backend, prefix=netns.prefix)
        assert result.returncode == 0, result.stderr
        has = ("ISTIO_" in netns("iptables-nft-save"), "istio-proxy-nat" in netns("nft", "list", "tables"))
        assert has == ((True, False) if backend == "iptables" else (False, True))


def test_apply_in_a_namespace_given_by_its_path(run: Run, netns: Netns) -> None:
    path = f"/run/netns/{netns.name}"
    arguments = ("rules", "sidecar", "-b*", "--apply", "--native-nftables", "--network-namespace", path)
    result = run(*arguments, "--format=json")
    assert result.returncode == 0, result.stderr
    applied = json.loads(result.stdout)
    assert (applied["applied"], applied["backend"], applied["families"]) == (True, "nftables", ["IPv4"])
    assert "istio-proxy-nat" in netns("nft", "list", "tables")


@pytest.mark.parametrize(
    ("flags", "has_ipv6"),
    [([], True), (["--family-policy=original"], False), (["--family-policy=original", "--dual-stack"], True)],
)
def test_family_policy(run: Run, netns: Netns, flags: list[str], has_ipv6: bool) -> None:
    netns("ip", "-6", "address", "add", ADDRESS_V6, "dev", "lo", "nodad")
    assert run("rules", "sidecar", "-b*", "--apply", *flags, prefix=netns.prefix).returncode == 0
    assert "ISTIO_INBOUND" in netns("iptables-nft-save")
    assert ("ISTIO_INBOUND" in netns("ip6tables-nft-save")) is has_ipv6


def test_a_namespace_without_an_address_is_refused(run: Run, netns: Netns) -> None:
    netns("ip", "address", "flush", "dev", "lo")
    state = netns.listing()
    result = run("rules", "sidecar", "-b*", "--apply", prefix=netns.prefix)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no valid local IP address" in result.stderr
    assert netns.listing() == state


# --- nothing is programmed -------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[list[str], dict[str, str], int]] = {
    "no --apply": (["-b*", "-i*"], {}, 0),
    "no --apply, nftables": (["-b*", "-i*", "--native-nftables"], {}, 0),
    "dry run": (["-b*", "--apply", "--dry-run"], {}, 0),
    "dry run by variable": (["-b*", "--apply"], {"DRY_RUN": "1"}, 0),
    "skip": (["-b*", "--apply", "--skip-rule-apply"], {}, 0),
    "cleanup without --apply": (["--cleanup-only"], {}, 0),
    "unknown flag": (["-b*", "--apply", "--nonsense"], {}, 1),
    "wrong port": (["-b", "x", "--apply"], {}, 1),
    "wrong port, nftables": (["-b", "x", "--apply", "--native-nftables"], {}, 1),
    "wrong prefix": (["-i", "10.0.0.1", "--apply"], {}, 1),
    "wrong variable": (["--apply"], {"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "10.0.0.0/8"}, 1),
    "no such netns": (["--apply", "--network-namespace", "/run/netns/mc-cli-nowhere"], {}, 1),
    "no netns": (["--apply", "--network-namespace", "/etc/passwd"], {}, 1),
    "no such pod file": (["--apply", "--pod", "/nonexistent/pod.yaml"], {}, 1),
}


@pytest.mark.parametrize(("flags", "env", "status"), NOTHING.values(), ids=NOTHING)
def test_nothing_is_programmed(run: Run, netns: Netns, flags: list[str], env: dict[str, str], status: int) -> None:
    state = netns.listing()
    result = run("rules", "sidecar", *flags, prefix=netns.prefix, env=env)
    assert result.returncode == status, result.stderr
    assert bool(result.stderr) == (status != 0)
    assert bool(result.stdout) == (status == 0)
    assert "Traceback" not in result.stderr
    assert netns.listing() == state


# --- validation -------------------------------------------------------------------------------------------------------

VALIDATE = ("rules", "sidecar", "--run-validation", "--skip-rule-apply", "--format=words")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("address", [ADDRESS, ADDRESS_V6])
def test_validation_tells_whether_redirection_works(run: Run, netns: Netns, backend: str, address: str) -> None:
    netns("ip", "address", "flush", "dev", "lo", "scope", "global")
    netns("ip", "address", "replace", "127.0.0.1/8", "dev", "lo")
    netns("ip", "address", "replace", "::1/128", "dev", "lo")
    netns("ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
    before = run(*VALIDATE, "--probe-timeout=1s", prefix=netns.prefix)
    assert before.returncode == 126, before.stderr
    assert "was not redirected within 1 s" in before.stderr
    # The test is root, so root is made the proxy's user.
    flags = ("-u0", "-g0", "-b*", "-i*", "--apply", "--run-validation", "--backend", backend)
    after = run("rules", "sidecar", *flags, prefix=netns.prefix)
    assert (after.returncode, after.stderr) == (0, "meshcni rules: redirection works\n")
    assert run(*VALIDATE, prefix=netns.prefix).returncode == 0


# --- from a pod ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pods_parameters_are_those_of_the_same_flags(run: Run, netns: Netns, pod_file: Path, backend: str) -> None:
    common = ("--apply", "--backend", backend)
    assert run("rules", "sidecar", "--pod", str(pod_file), *common, prefix=netns.prefix).returncode == 0
    from_pod = netns.listing()
    assert "10.0.0.0/8" in from_pod
    assert run("rules", "sidecar", "--cleanup-only", "--apply", prefix=netns.prefix).returncode == 0
    flags = ("-u1337", "-i*", "-b8080", "-d15020,15021,15090", "-o15020", "-x10.1.2.3/8")
    assert run("rules", "sidecar", *flags, *common, prefix=netns.prefix).returncode == 0
    assert netns.listing() == from_pod


def test_a_pod_outside_the_mesh_programs_nothing(run: Run, netns: Netns, pod_file: Path) -> None:
    pod_file.write_text(POD.replace("sidecar.istio.io/status", "somebody.else/status"))
    state = netns.listing()
    result = run("rules", "sidecar", "--pod", str(pod_file), "--apply", prefix=netns.prefix)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("shop/cart: skip. ")
    assert netns.listing() == state
    shown = json.loads(run("rules", "sidecar", "--pod", str(pod_file), "--format", "json").stdout)
    assert shown["verdict"] == "skip"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_annotation_programs_nothing(run: Run, netns: Netns, pod_file: Path, backend: str) -> None:
    pod_file.write_text(POD.replace("'8080'", "'http'"))
    state = netns.listing()
    result = run("rules", "sidecar", "--pod", str(pod_file), "--apply", "--backend", backend, prefix=netns.prefix)
    assert (result.returncode, result.stdout) == (1, "")
    assert "traffic.sidecar.istio.io/includeInboundPorts is 'http'" in result.stderr
    assert netns.listing() == state
