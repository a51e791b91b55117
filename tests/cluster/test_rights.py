"""Each rule of the installed roles is taken away in turn: the agent stays, and says what it cannot do without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from lab.cluster import Cluster, workloads
from tests.cluster.releases import NAMESPACE, ROLES, Release, release_on

from meshcni.agent import prerequisites, rights
from meshcni.agent.needs import Weight
from meshcni.errors import MeshCniError
from meshcni.pods.repair import Mode

NODE = "n1"
VALUES = (
    "profile=ambient",
    "repair.repairPods=false",
    "repair.deletePods=true",
    "nodeSelector.kubernetes\\.io/hostname=n1",
)
GROUP = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
WANTED = rights.wanted(ambient=True, repair=Mode.DELETE)
Rule = dict[str, Any]


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    yield from release_on(cluster)


def test_each_rule_taken_away(cluster: Cluster, release: Release) -> None:
    """Pods outside the mesh start, but where nobody may know who is in it: then those of excluded namespaces do."""
    shop, closed = release.add_namespace("shop"), release.add_namespace("closed")
    release.install(*VALUES, f"excludeNamespaces={{kube-system,{closed}}}", wait=False)
    release.wait_serving(NODE)
    installed = {role: cluster.api.get(f"{GROUP}/{role}") for role in ROLES}
    rules = distinct([rule for role in installed.values() for rule in role["rules"]])
    covered: set[str] = set()
    for number, rule in enumerate(rules):
        lost = [right for right in WANTED if grants(rule, right)]
        covered |= {str(right) for right in lost}
        for role_name, role in installed.items():
            left = copy.deepcopy(role)
            left["rules"] = [
                each for each in (without(each, rule) for each in distinct(role["rules"])) if each["verbs"]
            ]
            cluster.api.replace(f"{GROUP}/{role_name}", unversioned(left))
        restart(cluster, release)
        check(cluster, release, lost)
        name = f"plain-{number}"
        cluster.apply([workloads.plain_pod(where, name, node=NODE) for where in (shop, closed)])
        cluster.wait_pod(closed, name)
        if not any(right.weight is Weight.STOPS for right in lost):
            cluster.wait_pod(shop, name)
        for role_name, role in installed.items():
            cluster.api.replace(f"{GROUP}/{role_name}", unversioned(role))
        release.wait_serving(NODE)
    for pod in cluster.wait_ready(shop, count=len(rules)):  # those that had to wait as well
        assert cluster.capture(pod).is_untouched
    assert covered == {str(right) for right in WANTED}  # the roles grant what the agent asks for, and all was tried


def distinct(rules: list[Rule]) -> list[Rule]:
    """The rules, each of one kind of object; what several roles grant is there once."""
    found: list[Rule] = []
    for rule in rules:
        for resource in rule["resources"]:
            one = {**rule, "resources": [resource]}
            found += [one] if one not in found else []
    return found


def without(rule: Rule, taken: Rule) -> Rule:
    """What is left of a rule of one kind of object; nothing when it has no verb any more."""
    if (rule["apiGroups"], rule["resources"]) != (taken["apiGroups"], taken["resources"]):
        return rule
    return {**rule, "verbs": [verb for verb in rule["verbs"] if verb not in taken["verbs"]]}


def grants(rule: Rule, right: rights.Right) -> bool:
    return right.target in rule["resources"] and right.verb in rule["verbs"]


def unversioned(role: dict[str, Any]) -> dict[str, Any]:
    meta = {key: role["metadata"][key] for key in ("name", "labels", "annotations") if key in role["metadata"]}
    return {**role, "metadata": meta}


def restart(cluster: Cluster, release: Release) -> None:
    before = release.agents()[NODE]["metadata"]
    cluster.api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/{before['name']}", grace_seconds=1)

    def is_new() -> bool:
        now = release.agents().get(NODE)
        return now is not None and now["metadata"]["uid"] != before["uid"]

    cluster.wait("a new agent", is_new)


def check(cluster: Cluster, release: Release, lost: list[rights.Right]) -> None:
    """Log, status and Event say which rights are missing and what for."""

    def missing() -> list[str]:
        try:
            document = release.status(NODE)["missing"] or {"rights": []}
        except MeshCniError:
            return []
        return [right["right"] for right in document["rights"]]

    cluster.wait(f"the agent misses {lost[0]}", lambda: set(missing()) == {str(right) for right in lost})
    if not any(right.weight is Weight.STOPS for right in lost):
        release.wait_serving(NODE)
    status, log = release.status(NODE), release.log(NODE)
    for right in lost:
        assert right.target in log
        if right.weight is Weight.STOPS:
            assert not status["ready"]
            assert right.target in " ".join(status["missing"]["stops"])
        if right.weight is Weight.DEGRADES:
            assert right.target in " ".join(status["missing"]["degrades"])
    assert status["notLive"] == []
    agent = release.agents()[NODE]
    told_of = [right for right in lost if right.weight is not Weight.HELPS and right.target != "events"]
    if told_of:
        cluster.wait("an Event", lambda: told_of[0].target in events(cluster, agent["metadata"]["name"]))
    assert agent["status"]["containerStatuses"][0]["restartCount"] == 0


def events(cluster: Cluster, about: str) -> str:
    found = cluster.events(NAMESPACE, about)
    return " ".join(event["message"] for event in found if event["reason"] == prerequisites.EVENT_REASON)
