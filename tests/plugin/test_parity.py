"""Plugin and agent decide alike about every pod: the same sources, but one of them with stand-ins for the library."""

from __future__ import annotations

import copy
import json
import random
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.plugin.apidouble import ApiDouble, Authority, objects
from tests.plugin.harness import ROOT, conf, run, variables
from tests.pure.pods import test_eligibility as cases

from meshcni.errors import MeshCniError
from meshcni.pods.eligibility import Policy, Verdict, decide
from meshcni.pods.model import Container, Namespace, Pod, namespace_from_object, pod_from_object
from meshcni.pods.podidentity import uids_of
from meshcni.pods.selectors import parse_enablement_selectors, to_objects

RANDOM_CASES = 8_000
Case = tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]

KNOWN: dict[str, tuple[Pod, Namespace | None, Policy]] = {
    **{f"sidecar: {name}": (pod, None, Policy()) for name, (pod, _, _) in cases.SIDECAR_CASES.items()},
    **{f"order: {name}": (pod, None, policy) for name, (pod, policy, _) in cases.ORDER.items()},
    **{f"ambient: {name}": (pod, space, policy) for name, (pod, space, policy, _) in cases.AMBIENT_CASES.items()},
    **{f"warning: {name}": (pod, None, Policy()) for name, (pod, _) in cases.WARNINGS.items()},
}


def pod_object(pod: Pod) -> dict[str, Any]:
    """The pod as the API server would give it."""
    return {
        "kind": "Pod",
        "metadata": {
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid or "uid-1",
            "labels": dict(pod.labels),
            "annotations": dict(pod.annotations),
        },
        "spec": {
            "hostNetwork": pod.host_network,
            "initContainers": [container_object(one) for one in pod.containers if one.is_init],
            "containers": [container_object(one) for one in pod.containers if not one.is_init],
        },
    }


def container_object(container: Container) -> dict[str, Any]:
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in container.env.items()]
    env += [{"name": name, "valueFrom": {"fieldRef": {}}} for name in container.env_from_elsewhere]
    return {"name": container.name, "args": list(container.args), "env": env}


def namespace_object(namespace: Namespace | None) -> dict[str, Any] | None:
    if namespace is None:
        return None
    return {"kind": "Namespace", "metadata": {"name": namespace.name, "labels": dict(namespace.labels)}}


def policy_object(policy: Policy) -> dict[str, Any]:
    return {
        "exclude_namespaces": sorted(policy.exclude_namespaces),
        "agent_namespace": policy.agent_namespace,
        "ambient_enabled": policy.ambient_enabled,
        "enablement_selectors": to_objects(policy.enablement_selectors),
        "system_namespace": policy.system_namespace,
    }


def agents_decision(
    pod: Mapping[str, Any], namespace: Mapping[str, Any] | None, policy: Mapping[str, Any]
) -> list[str]:
    try:
        selectors = parse_enablement_selectors(policy["enablement_selectors"])
        excluded = frozenset(policy["exclude_namespaces"])
        settings = Policy(**{**policy, "exclude_namespaces": excluded, "enablement_selectors": selectors})
        read = pod_from_object(pod)
        labels = None if namespace is None else namespace_from_object(namespace)
        found = decide(read, labels, settings)
    except MeshCniError as error:
        return [type(error).__name__, error.message, error.hint]
    return [found.verdict.value, found.reason.code, found.reason.text, found.evidence, *found.warnings, *uids_of(read)]


def plugins_decisions(all_cases: list[Case]) -> list[list[str]]:
    lines = "".join(json.dumps(case) + "\n" for case in all_cases)
    command = [sys.executable, "-I", str(ROOT / "tests" / "plugin" / "frozen.py"), str(ROOT)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, timeout=240)
    return [json.loads(line) for line in done.stdout.splitlines()]


def case_of(known: tuple[Pod, Namespace | None, Policy]) -> Case:
    pod, namespace, policy = known
    return pod_object(pod), namespace_object(namespace), policy_object(policy)


def test_the_cases_of_the_agents_tests() -> None:
    all_cases = [case_of(known) for known in KNOWN.values()]
    expected = [agents_decision(*case) for case in all_cases]
    assert plugins_decisions(all_cases) == expected
    assert {decision[0] for decision in expected} == {verdict.value for verdict in Verdict}


JUNK: list[Any] = [
    None,
    True,
    0,
    1.5,
    "",
    "x",
    "true",
    [],
    {},
    ["x"],
    [{}],
    {"x": 1},
    10**20,
    "ambient",
    "none",
    "NONE",
]


def random_case(chance: random.Random) -> Case:
    """One of the known ones with a few values changed or removed, in the pod, the namespace or the policy."""
    pod, _, _ = case_of(chance.choice(list(KNOWN.values())))
    _, namespace, policy = case_of(chance.choice(list(KNOWN.values())))
    pod["metadata"]["annotations"] |= chance.choice([{}, {}, {"kubernetes.io/config.hash": "h"}])
    pod["status"] = {
        "containerStatuses": [{"containerID": chance.choice(["containerd://abc", "x://", "://y", "é://a", 7])}]
    }
    case: Case = (copy.deepcopy(pod), copy.deepcopy(namespace), copy.deepcopy(policy))
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        part = chance.choice([case[0], case[0], case[1] or {}, {"x": case[2]["enablement_selectors"]}])
        collect(part, places)
        if not places:
            continue
        container, key = chance.choice(places)
        if chance.random() < 0.3:
            del container[key]
        else:
            container[key] = copy.deepcopy(chance.choice(JUNK))
    return case


def collect(value: Any, found: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        collect(item, found)


def test_pods_that_nobody_would_write() -> None:
    chance = random.Random(6)
    all_cases = [random_case(chance) for _ in range(RANDOM_CASES)]
    expected = [agents_decision(*case) for case in all_cases]
    for case, ours, theirs in zip(all_cases, plugins_decisions(all_cases), expected, strict=True):
        assert ours == theirs, case
    errors = sum(decision[0] in ("PodSpecError", "SettingError") for decision in expected)
    assert RANDOM_CASES // 10 < errors < RANDOM_CASES // 2  # neither all readable nor all broken


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.server()


@pytest.mark.parametrize("name", KNOWN)
def test_the_executable_lets_pass_what_the_agent_would(
    run_dir: Path, shared_netns: str, authority: Authority, tls: ssl.SSLContext, name: str
) -> None:
    """All the way: what the agent would skip passes, and nothing else does."""
    pod, namespace, policy = case_of(KNOWN[name])
    expected = agents_decision(pod, namespace, policy)
    stdin = conf(
        run_dir,
        agent_wait_seconds=0,
        pod_namespace=policy["agent_namespace"],
        exclude_namespaces=policy["exclude_namespaces"] or None,
        system_namespace=policy["system_namespace"],
        ambient_enabled=policy["ambient_enabled"],
        enablement_selectors=policy["enablement_selectors"],
    )
    metadata = pod["metadata"]
    with ApiDouble(tls, objects(pod, *([namespace] if namespace else []))) as api:
        api.write_kubeconfig(run_dir, authority.pem)
        done = run(variables(netns=shared_netns, namespace=metadata["namespace"], name=metadata["name"]), stdin)
    if expected[0] == "skip":
        assert done.status == 0
    else:
        assert done.json["code"] == 11
        if expected[0] != "error":
            assert f"says that the pod is for the mesh: {expected[2]}" in done.json["msg"]
