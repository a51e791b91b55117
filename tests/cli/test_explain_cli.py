"""`meshcni explain` as a process: verdict objects, text for people, exit statuses, wrong input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.apiserver import ServerThread, run_in_thread
from lab.apiserver.objects import BY_PLURAL
from tests.cli.conftest import Run

STATUS = "sidecar.istio.io/status"
SELECTOR = "[{namespaceSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}}]"


def manifest(**annotations: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "cart", "namespace": "shop", "annotations": annotations},
        "spec": {"containers": [{"name": "app"}, {"name": "istio-proxy", "args": ["proxy", "sidecar"]}]},
    }


SIDECAR = manifest(**{STATUS: "{}", "traffic.sidecar.istio.io/excludeInboundPorts": "3306"})
PLAIN = manifest()


@pytest.fixture
def pod_file(tmp_path: Path) -> Path:
    return tmp_path / "pod.yaml"


def explained(run: Run, pod_file: Path, pod: dict[str, Any], *arguments: str, status: int = 0) -> dict[str, Any]:
    pod_file.write_text(yaml.safe_dump(pod))
    result = run("explain", "pod", "--file", str(pod_file), "--format", "json", *arguments)
    assert (result.returncode, result.stderr) == (status, "")
    return dict(json.loads(result.stdout))


def test_a_sidecar(run: Run, pod_file: Path) -> None:
    shown = explained(run, pod_file, SIDECAR)
    assert (shown["verdict"], shown["reason"]) == ("sidecar", "sidecar-injected")
    assert shown["parameters"]["inboundExcludePorts"] == {
        "value": [3306, 15020, 15021, 15090],
        "origin": "annotation traffic.sidecar.istio.io/excludeInboundPorts",
    }
    assert any("Inbound port 3306 is excluded" in line for line in shown["rules"])
    assert shown["ruleset"]["tables"][0]["name"] == "nat"


def test_the_pods_addresses_decide_for_which_families_rules_are_shown(run: Run, pod_file: Path) -> None:
    for ips, heading in (
        ([], "For IPv4 and IPv6."),
        (["10.0.0.1"], "For IPv4."),
        (["10.0.0.1", "fd00::1"], "For IPv4 and IPv6."),
    ):
        pod = {**SIDECAR, "status": {"podIPs": [{"ip": ip} for ip in ips]}}
        assert explained(run, pod_file, pod)["rules"][0] == heading  # fmt: skip


def test_a_pod_outside_the_mesh(run: Run, pod_file: Path) -> None:
    shown = explained(run, pod_file, PLAIN)
    assert (shown["verdict"], shown["reason"], shown["parameters"], shown["rules"]) == (
        "skip",
        "not-injected",
        None,
        [],
    )
    assert shown["evidence"] == "annotation sidecar.istio.io/status is absent"


def test_an_excluded_namespace(run: Run, pod_file: Path) -> None:
    shown = explained(run, pod_file, SIDECAR, "--exclude-namespaces", "kube-system,shop")
    assert (shown["verdict"], shown["reason"]) == ("skip", "namespace-excluded")


def test_a_wrong_annotation_is_a_verdict_and_a_status(run: Run, pod_file: Path) -> None:
    pod = manifest(**{STATUS: "{}", "traffic.sidecar.istio.io/includeOutboundPorts": "http"})
    shown = explained(run, pod_file, pod, status=1)
    assert (shown["verdict"], shown["reason"], shown["parameters"]) == ("error", "bad-parameters", None)
    assert "traffic.sidecar.istio.io/includeOutboundPorts is 'http'" in shown["error"]["message"]


def test_a_field_of_a_wrong_type_is_a_verdict_and_a_status(run: Run, pod_file: Path) -> None:
    pod = manifest(**{STATUS: "{}", "a": 80})  # type: ignore[arg-type]
    shown = explained(run, pod_file, pod, status=1)
    assert (shown["verdict"], shown["reason"]) == ("error", "unreadable-pod")
    assert shown["error"] == {"message": "metadata.annotations[a] is 80, expected a string", "hint": "quote the value"}


def test_ambient_by_the_namespaces_labels(run: Run, pod_file: Path, tmp_path: Path) -> None:
    policy = ("--ambient-enabled", "--ambient-enablement-selector", SELECTOR)
    namespace_file = tmp_path / "namespace.yaml"
    namespace = {"kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}
    namespace_file.write_text(yaml.safe_dump(namespace))
    known = ("--namespace-file", str(namespace_file))
    assert explained(run, pod_file, PLAIN, *policy, *known)["verdict"] == "ambient"
    assert explained(run, pod_file, SIDECAR, *policy, *known)["verdict"] == "sidecar"
    assert explained(run, pod_file, PLAIN, *policy, status=1)["reason"] == "namespace-unknown"
    namespace_file.write_text(yaml.safe_dump({**namespace, "metadata": {"name": "other"}}))
    result = run("explain", "pod", "--file", str(pod_file), *policy, *known)
    assert (result.returncode, result.stdout) == (2, "")
    assert "pod shop/cart is not in the namespace given, 'other'" in result.stderr


# --- an ambient pod ---------------------------------------------------------------------------------------------------

REDIRECTION = "ambient.istio.io/redirection"
EVERY_POD = {"AMBIENT_ENABLED": "true", "AMBIENT_ENABLEMENT_SELECTOR": "[{podSelector: {}}]"}
NO_POD = {"AMBIENT_ENABLED": "true", "AMBIENT_ENABLEMENT_SELECTOR": "[]"}


def ambient_pod(
    *ips: str, phase: str = "Running", spec: dict[str, Any] | None = None, **annotations: str
) -> dict[str, Any]:
    status = {"phase": phase, "podIPs": [{"ip": ip} for ip in ips]}
    return {**manifest(**annotations), "spec": {"containers": [{"name": "app"}], **(spec or {})}, "status": status}


def told(run: Run, pod: dict[str, Any], env: dict[str, str], *arguments: str, status: int = 0) -> dict[str, Any]:
    result = run("explain", "pod", "--file=-", "--format=json", *arguments, env=env, stdin=json.dumps(pod))
    assert (result.returncode, result.stderr) == (status, "")
    return dict(json.loads(result.stdout))


def test_an_ambient_pods_parameters_with_their_origin_and_its_rules(run: Run) -> None:
    env = {**EVERY_POD, "AMBIENT_DNS_CAPTURE": "true", "AMBIENT_IPV6": "true", "HOST_PROBE_SNAT_IP": "192.0.2.7"}
    pod = ambient_pod("10.0.0.1", **{"ambient.istio.io/bypass-inbound-capture": "true"})
    shown = told(run, pod, env)
    assert (shown["verdict"], shown["reason"], shown["error"], shown["warnings"]) == (
        "ambient",
        "ambient-enabled",
        None,
        [],
    )
    assert shown["parameters"] == {
        "dnsCapture": {"value": True, "origin": "env AMBIENT_DNS_CAPTURE"},
        "ingress": {"value": True, "origin": "annotation ambient.istio.io/bypass-inbound-capture"},
        "virtualInterfaces": {"value": [], "origin": "default"},
        "probeV4": {"value": "192.0.2.7", "origin": "env HOST_PROBE_SNAT_IP"},
        "probeV6": {"value": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff", "origin": "default"},
    }
    assert shown["rules"][0] == "For IPv4 and IPv6."  # the node's choice, whatever addresses the pod has
    assert any("DNS queries of the application are answered by ztunnel" in line for line in shown["rules"])
    assert not any("redirect to port 15006" in line for line in shown["rules"])
    assert shown["ruleset"]["policyRules"][0]["priority"] == 32764
    assert told(run, pod, {**env, "AMBIENT_IPV6": ""})["rules"][0] == "For IPv4."
    assert told(run, pod, env, "--ipv6=false", "--dns=false")["parameters"]["dnsCapture"]["origin"] == "flag --dns"


LEAVES_PENDING = ["find-netns", "release", "ztunnel-del", "remove-rules", "remove-annotation", "remove-addresses"]
LEAVES_ENABLED = [*LEAVES_PENDING[:2], "annotate-pending", *LEAVES_PENDING[2:]]
NEXT: dict[str, tuple[dict[str, Any], dict[str, str], str, list[str]]] = {
    "to be made": (
        ambient_pod(phase="Pending"),
        EVERY_POD,
        "When its sandbox is made",
        ["rules", "ztunnel-add", "addresses", "annotate-enabled"],
    ),
    "pending and not selected any more": (
        ambient_pod("10.0.0.1", **{REDIRECTION: "pending"}),
        NO_POD,
        "Annotated pending and not selected any more: ",
        LEAVES_PENDING,
    ),
    "enrolled": (
        ambient_pod("10.0.0.1", **{REDIRECTION: "enabled"}),
        EVERY_POD,
        "Nothing, as long as all is in place",
        [],
    ),
    "ended": (
        ambient_pod("10.0.0.1", phase="Succeeded", **{REDIRECTION: "enabled"}),
        EVERY_POD,
        "It has ended, annotated enabled: ",
        ["remove-addresses", "ztunnel-del", "remove-annotation"],
    ),
    "on the host's network": (
        ambient_pod("10.0.0.1", spec={"hostNetwork": True}, **{REDIRECTION: "enabled"}),
        EVERY_POD,
        "Annotated enabled and not selected any more: ",
        LEAVES_ENABLED,
    ),
    "ambient mode is off": (
        ambient_pod("10.0.0.1", **{REDIRECTION: "enabled"}),
        {},
        "Nothing: ambient mode is off",
        [],
    ),
}


@pytest.mark.parametrize(("pod", "env", "begin", "steps"), NEXT.values(), ids=NEXT)
def test_what_would_happen_next(
    run: Run, pod: dict[str, Any], env: dict[str, str], begin: str, steps: list[str]
) -> None:
    shown = told(run, pod, env)
    assert shown["redirection"] == pod["metadata"]["annotations"].get(REDIRECTION, "")
    assert shown["next"]["text"].startswith(begin)
    assert [one["step"] for one in shown["next"]["steps"]] == steps
    text = run("explain", "pod", "--file=-", env=env, stdin=json.dumps(pod)).stdout
    assert f"  next     {shown['next']['text']}\n" in text  # one line, whatever its length
    agent = run("explain", "pod", "--file=-", "-o=json", env=env, stdin=json.dumps(pod), program="meshcni.agent")
    assert json.loads(agent.stdout) == shown


def test_a_sidecar_has_no_next_in_ambient_mode(run: Run, pod_file: Path) -> None:
    shown = explained(run, pod_file, SIDECAR)
    assert (shown["redirection"], shown["next"]) == ("", None)


def test_an_ambient_pod_in_words(run: Run) -> None:
    pod = ambient_pod("10.0.0.1", "fd00::1", **{"ambient.istio.io/dns-capture": "ja", REDIRECTION: "pending"})
    result = run("explain", "pod", "--file=-", env=EVERY_POD, stdin=json.dumps(pod))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "shop/cart: ambient, its traffic goes through ztunnel"
    assert "  state    annotation ambient.istio.io/redirection=pending" in lines
    assert any(line.startswith("  next     Annotated pending, so its enrolment did not complete: ") for line in lines)
    warnings = [line for line in lines if line.startswith("  warning  ")]
    assert "ambient.istio.io/dns-capture='ja' is no boolean" in warnings[0]
    assert "fd00::1 passes by the mesh: AMBIENT_IPV6 is false" in warnings[1]
    assert any(line.split()[:2] == ["dnsCapture", "no"] for line in lines)
    assert any("In routing table 100, 0.0.0.0/0 is delivered locally." in line for line in lines)


REFUSED_PODS = {
    "interface": (ambient_pod(**{"istio.io/reroute-virtual-interfaces": "a b"}), "'a b', which names no interface"),
    "runtime class": (ambient_pod(spec={"runtimeClassName": "kata-qemu"}), "runtime class kata-qemu"),
}


@pytest.mark.parametrize(("pod", "message"), REFUSED_PODS.values(), ids=REFUSED_PODS)
def test_a_pod_that_ambient_mode_refuses(run: Run, pod: dict[str, Any], message: str) -> None:
    shown = told(run, pod, EVERY_POD, status=1)
    assert (shown["verdict"], shown["reason"], shown["parameters"], shown["rules"]) == (
        "error",
        "bad-parameters",
        None,
        [],
    )
    assert message in shown["error"]["message"]
    assert shown["next"]["text"].startswith("Its ADD fails, and the runtime tries again, until this is corrected: ")
    text = run("explain", "pod", "--file=-", env=EVERY_POD, stdin=json.dumps(pod)).stdout
    assert f"  to do    {shown['error']['hint']}\n" in text


def test_runtime_classes_are_those_of_the_setting(run: Run) -> None:
    pod = ambient_pod(spec={"runtimeClassName": "kata-qemu"})
    assert told(run, pod, {**EVERY_POD, "AMBIENT_SANDBOXED_RUNTIMES": "none"})["verdict"] == "ambient"
    assert told(run, pod, EVERY_POD, "--sandboxed-runtimes=qemu*")["verdict"] == "ambient"


# --- variables and input ----------------------------------------------------------------------------------------------


def test_the_agents_variables_decide_as_in_the_agent(run: Run, pod_file: Path) -> None:
    pod_file.write_text(yaml.safe_dump(SIDECAR))
    env = {"EXCLUDE_NAMESPACES": "shop"}
    result = run("explain", "pod", "-f", str(pod_file), "-o", "json", env=env)
    assert json.loads(result.stdout)["reason"] == "namespace-excluded"


def test_standard_input_and_json(run: Run) -> None:
    result = run("explain", "pod", "--file=-", "--format=json", stdin=json.dumps(SIDECAR))
    assert json.loads(result.stdout)["verdict"] == "sidecar"


def test_a_manifest_without_namespace_is_in_default(run: Run) -> None:
    pod = {"kind": "Pod", "metadata": {"name": "cart"}}
    result = run("explain", "pod", "--file=-", "--format=json", stdin=json.dumps(pod))
    assert json.loads(result.stdout)["pod"] == {"namespace": "default", "name": "cart"}


def test_the_text_names_verdict_evidence_parameters_and_rules(run: Run, pod_file: Path) -> None:
    pod_file.write_text(yaml.safe_dump(SIDECAR))
    result = run("explain", "pod", "--file", str(pod_file))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "shop/cart: sidecar, its traffic goes through its sidecar"
    assert any(line.split()[:2] == ["proxyUids", "1337"] for line in lines)
    assert any("Inbound port 3306 is excluded" in line for line in lines)
    assert "\x1b" not in result.stdout  # nobody looks at a terminal


# --- with a live cluster ----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[ServerThread, dict[str, str]]]:
    """A running API server, and the environment of somebody whose kubeconfig names it."""
    with run_in_thread(tokens=["token-1"]) as server:
        path = tmp_path / "kubeconfig"
        server.do(lambda double: double.write_kubeconfig(path, "token-1"))
        yield server, {"KUBECONFIG": str(path)}


def test_a_pod_of_a_live_cluster(run: Run, cluster: tuple[ServerThread, dict[str, str]]) -> None:
    server, env = cluster
    server.do(lambda double: double.add_pod(SIDECAR))
    result = run("explain", "pod", "shop/cart", "--format=json", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert (shown["verdict"], shown["pod"]) == ("sidecar", {"namespace": "shop", "name": "cart"})
    assert 3306 in shown["parameters"]["inboundExcludePorts"]["value"]


def test_the_namespace_is_asked_for_where_ambient_needs_it(
    run: Run, cluster: tuple[ServerThread, dict[str, str]]
) -> None:
    server, env = cluster
    server.do(lambda double: double.add_namespace("shop", {"istio.io/dataplane-mode": "ambient"}))
    server.do(lambda double: double.add_pod(PLAIN))
    ambient = {**env, "AMBIENT_ENABLED": "true", "AMBIENT_ENABLEMENT_SELECTOR": SELECTOR}
    known = run("explain", "pod", "shop/cart", "--format=json", env=ambient)
    assert (known.returncode, json.loads(known.stdout)["verdict"]) == (0, "ambient")
    server.do(lambda double: double.cluster.delete(BY_PLURAL["namespaces"], "", "shop", grace_seconds=0))
    unknown = run("explain", "pod", "shop/cart", "--format=json", env=ambient)
    assert (unknown.returncode, json.loads(unknown.stdout)["reason"]) == (1, "namespace-unknown")
    assert "404" in unknown.stderr


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_said(run: Run, cluster: tuple[ServerThread, dict[str, str]], status: int) -> None:
    server, env = cluster
    server.do(lambda double: double.add_pod(SIDECAR))
    server.do(lambda double: double.fault("status", status=status, count=9))
    result = run("explain", "pod", "shop/cart", "--format=json", env=env)
    assert (result.returncode, result.stdout) == (1, "")
    assert str(status) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pod_that_is_not_there(run: Run, cluster: tuple[ServerThread, dict[str, str]]) -> None:
    result = run("explain", "pod", "shop/nobody", env=cluster[1])
    assert (result.returncode, result.stdout) == (1, "")
    assert "404" in result.stderr
    assert "Traceback" not in result.stderr


# --- wrong input ------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, int, str]] = {
    "not YAML": ("a: [", 1, "is not YAML"),
    "binary": ("\x00\x01", 1, "is not YAML"),
    "empty": ("", 1, "holds 0 objects"),
    "two objects": ("kind: Pod\n---\nkind: Pod\n", 1, "holds 2 objects"),
    "another kind": ("kind: Deployment", 1, "holds 'Deployment', not a Pod"),
    "no object": ("- a", 1, "holds 'list', not a Pod"),
}


@pytest.mark.parametrize(("text", "status", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_holds_no_pod(run: Run, pod_file: Path, text: str, status: int, message: str) -> None:
    pod_file.write_text(text)
    result = run("explain", "pod", "--file", str(pod_file), "--format", "json")
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


USAGE: dict[str, tuple[list[str], int, str]] = {
    "nothing": ([], 2, "explain what?"),
    "another thing": (["service"], 2, "cannot explain 'service'"),
    "no pod": (["pod"], 2, "which pod?"),
    "two pods": (["pod", "a/b", "c/d"], 2, "which pod?"),
    "file and name": (["pod", "a/b", "--file", "x"], 2, "which pod?"),
    "odd name": (["pod", "a/b/c"], 2, "'a/b/c' names no pod"),
    "unknown flag": (["pod", "--flie", "x"], 2, "unknown flag: --flie"),
    "unknown format": (["pod", "--file", "x", "--format", "xml"], 2, "flag --format is 'xml'"),
    "no such file": (["pod", "--file", "/nonexistent/pod.yaml"], 1, "cannot read /nonexistent/pod.yaml"),
    "no such kubeconfig": (["pod", "a/b", "--kubeconfig", "/nonexistent/config"], 1, "kubeconfig /nonexistent/config"),
    "wrong switch": (["pod", "--file", "x", "--ipv6=maybe"], 2, "flag --ipv6 is 'maybe'"),
    "wrong probe": (["pod", "--file", "x", "--host-probe-snat-ip=1"], 2, "flag --host-probe-snat-ip is '1'"),
    "wrong backend": (["pod", "--file", "x", "--native-nftables=2"], 2, "flag --native-nftables is '2'"),
    "wrong policy": (["pod", "--file", "x", "--ambient-enabled=maybe"], 2, "flag --ambient-enabled is 'maybe'"),
}


@pytest.mark.parametrize(("arguments", "status", "message"), USAGE.values(), ids=USAGE)
def test_wrong_command_lines(run: Run, arguments: list[str], status: int, message: str) -> None:
    result = run("explain", *arguments)
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_and_version(run: Run) -> None:
    assert "explain" in run("--help").stdout
    assert "--namespace-file" in run("explain", "--help").stdout
    assert run("version").stdout == run("--version").stdout
    assert run("nonsense").returncode == 2
