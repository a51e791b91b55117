"""What each value does, in one run of helm: the table of facts.py."""

from __future__ import annotations

import pytest
from tests.chart.facts import ANNOTATIONS, APPARMOR, CASES, DIGEST, HUB, IMAGE_AT, POD, SECURITY, config, volume
from tests.chart.releases import ABSENT, IMAGE, Release, release, releases


@pytest.fixture(scope="module")
def made() -> dict[str, Release]:
    return releases({name: values for name, (values, _) in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_value(made: dict[str, Release], name: str) -> None:
    facts = CASES[name][1]
    assert {path: made[name].at(path) for path in facts} == facts


def test_the_table_is_made_as_single_releases_are(made: dict[str, Release]) -> None:
    """But for the name of the chart that has ours as a part, which no object carries."""
    name = "order: plain over platform"
    assert release(CASES[name][0]).objects == made[name].objects


def test_the_agent_is_replaced_when_its_configuration_changes(made: dict[str, Release]) -> None:
    path = ["DaemonSet", "spec", "template", "metadata", "annotations", "checksum/config"]
    same, other = "pod: limits", "installing: conf name"
    untouched = made["mode: safe endings are the default"].at(path)
    assert made[same].at(path) == untouched
    assert made[other].at(path) != untouched


def test_gke_is_known_by_the_version_of_the_api_server() -> None:
    found = releases(
        {"gke": {"platform": "gke"}, "given": {"platform": "gke", "cniBinDir": "/x"}, "elsewhere": {}},
        "--kube-version=v1.31.4-gke.1000",
    )
    where = {name: one.at(volume("cni-bin-dir")) for name, one in found.items()}
    assert where == {"gke": "/home/kubernetes/bin", "given": "/x", "elsewhere": "/opt/cni/bin"}


def test_apparmor_is_turned_off_in_the_way_that_the_api_server_knows() -> None:
    cases = {"annotation": {}, "field": {"useAppArmorAnnotation": False}}
    path = (*SECURITY, "appArmorProfile", "type")
    old, new = releases(cases, "--kube-version=1.29.0"), releases(cases, "--kube-version=1.30.0")
    annotation = (*ANNOTATIONS, APPARMOR)
    for name in cases:
        assert [old[name].at(path), old[name].at(annotation)] == [ABSENT, "unconfined"]
        assert new[name].at(path) == "Unconfined"
    assert [new["annotation"].at(annotation), new["field"].at(annotation)] == ["unconfined", ABSENT]


def test_values_of_the_command_line() -> None:
    """`--set` makes numbers of its own kind, and text of what only looks like one."""
    options = ("--set", f"image=null,hub={HUB},tag=1.30,terminationGracePeriodSeconds=45,digest={DIGEST}")
    made = release({}, *options, "--set", "env.AGENT_WAIT_SECONDS=5")
    assert made.at(IMAGE_AT) == f"{HUB}/install-cni:1.30@{DIGEST}"
    assert made.at((*POD, "terminationGracePeriodSeconds")) == 45
    assert made.at(config("AGENT_WAIT_SECONDS")) == "5"


def test_a_release_of_another_name_in_another_namespace() -> None:
    made = release({"image": IMAGE}, "--namespace", "mesh", "--set", "profile=ambient")
    spaces = {one["metadata"].get("namespace") for one in made.objects}
    assert spaces == {"mesh", None}
    for name in ("istio-cni", "istio-cni-repair-rolebinding", "istio-cni-ambient"):
        assert made.find("ClusterRoleBinding", name)["subjects"][0]["namespace"] == "mesh"
