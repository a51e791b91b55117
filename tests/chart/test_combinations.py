"""What must hold whatever the values are: valid objects, fitting parts, no right too many, settings the agent reads."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from tests.chart import combinations, original
from tests.chart.apischemas import complaints
from tests.chart.combinations import Choice, covering
from tests.chart.facts import volume
from tests.chart.releases import ABSENT, Release, Values, release, releases, render_together

from meshcni.agent import rights
from meshcni.agent.platforms import PLATFORMS, Platform
from meshcni.agent.resolution import FLAGS, settle
from meshcni.agent.settings import ROWS, Settings
from meshcni.pflag import parse
from meshcni.pods.repair import Mode

ROWS_OF_VALUES: Mapping[str, Choice] = {"/".join(row): row for row in covering()}
VALUES: Mapping[str, Values] = {name: combinations.values(row) for name, row in ROWS_OF_VALUES.items()}
OF_CLUSTER = {"ClusterRole", "ClusterRoleBinding"}
REPAIR_MODES = {"repairPods": Mode.REPAIR, "deletePods": Mode.DELETE, "labelPods": Mode.LABEL, "": Mode.NONE}
KNOWN = {variable for row in ROWS for variable in row.variables}


@pytest.fixture(scope="module")
def made() -> dict[str, Release]:
    return releases(VALUES)


def scope(name: str) -> str:
    return dict(zip(combinations.NAMES, ROWS_OF_VALUES[name], strict=True))["scope"]


def with_agent(made: Mapping[str, Release]) -> dict[str, Release]:
    found = {name: one for name, one in made.items() if one.find("DaemonSet") is not ABSENT}
    assert found
    return found


def settings(one: Release) -> Settings:
    """What the agent reads from its environment and its command line. Raises SettingError."""
    return settle(parse(FLAGS, one.container.get("args", [])), one.environment)


def test_every_object_is_valid(made: dict[str, Release]) -> None:
    assert complaints(one for release in made.values() for one in release.objects) == []


def test_every_object_is_valid_for_an_old_kubernetes() -> None:
    old = releases(VALUES, "--kube-version=1.25.0")
    assert complaints((one for release in old.values() for one in release.objects), "1.25") == []


def test_the_check_of_objects_finds_mistakes() -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "x"}, "imagePullSecret": []}
    assert len(complaints([account])) == 1


def test_scopes_part_the_objects(made: dict[str, Release]) -> None:
    for name, one in made.items():
        of_cluster = {each["kind"] in OF_CLUSTER for each in one.objects}
        assert of_cluster == {"all": {True, False}, "cluster": {True}, "namespace": {False}}[scope(name)], name
        for each in one.objects:
            assert ("namespace" in each["metadata"]) == (each["kind"] not in OF_CLUSTER), (name, each["kind"])


def test_two_scopes_make_what_one_release_makes() -> None:
    whole = {"profile": "ambient", "platform": "openshift", "resourceQuotas": {"enabled": True}}
    switched = {"networkPolicy": {"enabled": True}}
    parts = releases({
        each: {**whole, "global": {**switched, "resourceScope": each}} for each in ("all", "cluster", "namespace")
    })  # fmt: skip
    assert parts["cluster"].names | parts["namespace"].names == parts["all"].names
    assert parts["cluster"].names & parts["namespace"].names == set()
    assert len(parts["all"].names) == 12


def test_what_is_mounted_is_declared_and_the_other_way_round(made: dict[str, Release]) -> None:
    for name, one in with_agent(made).items():
        pod = one.at(["DaemonSet", "spec", "template", "spec"])
        mounted = [each["name"] for each in one.container["volumeMounts"]]
        assert sorted(mounted) == sorted(each["name"] for each in pod["volumes"]), name
        assert len({each["mountPath"] for each in one.container["volumeMounts"]}) == len(mounted), name


def test_names_that_others_rely_on(made: dict[str, Release]) -> None:
    for name, one in with_agent(made).items():
        daemonset = one.find("DaemonSet")
        assert daemonset["metadata"]["name"] == "istio-cni-node", name
        labels = daemonset["spec"]["template"]["metadata"]["labels"]
        assert daemonset["spec"]["selector"]["matchLabels"].items() <= labels.items(), name
        assert one.at(["DaemonSet", "spec", "template", "spec", "serviceAccountName"]) == "istio-cni", name
        assert one.container["envFrom"][0]["configMapRef"]["name"] == one.find("ConfigMap")["metadata"]["name"], name
        assert one.container["securityContext"]["allowPrivilegeEscalation"] is True, name
        variables = [each["name"] for each in one.container["env"]]
        assert len(variables) == len(set(variables)), name


# --- rights -----------------------------------------------------------------------------------------------------------


def test_rights_are_no_more_than_those_of_istios_chart(made: dict[str, Release]) -> None:
    for name, one in made.items():
        if scope(name) == "namespace":
            continue
        roles = [each for each in one.objects if each["kind"] == "ClusterRole"]
        allowed = original.rights(combinations.mode(ROWS_OF_VALUES[name]))
        assert granted(one) - allowed <= {original.OWN_DAEMONSET}, name
        assert {each["metadata"]["name"] for each in roles} == bound(one), name


def bound(one: Release) -> set[str]:
    """The roles that the agent's account has."""
    found = set()
    for each in one.objects:
        if each["kind"] == "ClusterRoleBinding":
            account = {"kind": "ServiceAccount", "name": "istio-cni", "namespace": "istio-system"}
            assert each["subjects"] == [account]
            found.add(each["roleRef"]["name"])
    return found


def test_rights_are_those_that_the_agent_asks_for(made: dict[str, Release]) -> None:
    """All of them, but Events, which repair brings."""
    for name, one in made.items():
        mode = combinations.mode(ROWS_OF_VALUES[name])
        if scope(name) == "namespace":
            continue
        for right in rights.wanted(ambient=mode.ambient, repair=REPAIR_MODES.get(mode.repair)):
            is_there = as_granted(right) in granted(one)
            assert is_there or (right.target == "events" and mode.repair == "off"), (name, str(right))


def test_values_that_the_agent_names_for_a_right_grant_it() -> None:
    asked = {str(right): right for mode in REPAIR_MODES.values() for right in rights.wanted(ambient=True, repair=mode)}
    made = releases({name: named_values(right.chart) for name, right in asked.items()})
    for name, right in asked.items():
        assert as_granted(right) in granted(made[name]), right.chart


def named_values(text: str) -> Values:
    """The values of a text like `repair.enabled=true with repair.deletePods=true; ...`."""
    found: dict[str, dict[str, bool]] = {}
    for group, key, value in re.findall(r"(\w+)\.(\w+)=(true|false)", text.partition(";")[0]):
        found.setdefault(group, {})[key] = value == "true"
    return found


def as_granted(right: rights.Right) -> original.Right:
    return (right.resource.group, right.target, right.name or "*", right.verb)


def granted(one: Release) -> set[original.Right]:
    return original.flattened([each for each in one.objects if each["kind"] == "ClusterRole"])


@pytest.fixture(scope="module")
def modes() -> dict[str, Release]:
    return releases({
        f"{repair} {ambient}": {"repair": combinations.REPAIR[repair], "ambient": {"enabled": ambient}}
        for repair in combinations.REPAIR
        for ambient in (False, True)
    })  # fmt: skip


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("repair", combinations.REPAIR)
def test_rights_of_a_mode(modes: dict[str, Release], repair: str, ambient: bool) -> None:
    wanted = {
        *(("", "pods", "*", verb) for verb in ("get", "list", "watch")),
        ("", "nodes", "*", "get"),
        original.OWN_DAEMONSET,
    }
    if ambient:
        wanted |= {("", "namespaces", "*", verb) for verb in ("get", "list", "watch")}
        wanted.add(("", "pods/status", "*", "patch"))
    if repair != "off":
        wanted.add(("", "events", "*", "create"))
    if repair == "deletePods":
        wanted.add(("", "pods", "*", "delete"))
    if repair == "labelPods":
        wanted.add(("", "pods/status", "*", "patch"))
    assert granted(modes[f"{repair} {ambient}"]) == wanted


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_variable_is_a_setting_of_the_agent(made: dict[str, Release]) -> None:
    for name, one in with_agent(made).items():
        assert set(one.environment) - KNOWN == set(), name


def test_the_agent_reads_what_it_is_given(made: dict[str, Release]) -> None:
    for name, one in with_agent(made).items():
        mode, read = combinations.mode(ROWS_OF_VALUES[name]), settings(one)
        assert read.ambient_enabled == mode.ambient, name
        assert len(read.ambient_enablement_selector) == 2, name
        assert read.repair_enabled == (mode.repair != "off"), name
        ending = one.at(["DaemonSet", "spec", "template", "spec", "terminationGracePeriodSeconds"])
        assert read.shutdown_grace_seconds < ending, name
        for probe in ("readinessProbe", "livenessProbe"):
            assert one.container[probe]["httpGet"]["port"] == read.health_port, name


def test_own_values_reach_the_agent() -> None:
    values = {
        "sidecarReconcile": "report",
        "disableSafeUpgrade": True,
        "uninstallRemovesBinary": True,
        "ambient": {"unenrollOnUninstall": True},
        "terminationGracePeriodSeconds": 12,
        "monitoringPort": 0,
        "logging": {"level": "default:warn,cni-plugin:debug"},
    }
    read = settings(release(values))
    assert read.sidecar_drift == "report"
    assert read.cleans_up_always
    assert read.uninstall_removes_binary
    assert read.ambient_unenroll_on_uninstall
    assert (read.shutdown_grace_seconds, read.monitoring_port) == (10, 0)
    assert read.log_output_level == (("default", "warn"), ("cni-plugin", "debug"))


def test_platforms_are_those_that_the_agent_advises() -> None:
    names = [one.name for one in PLATFORMS]
    made = releases({name: {"platform": name} for name in names}, "--kube-version=v1.31.4-gke.1000")
    for one in PLATFORMS:
        where = {name: made[one.name].at(volume(name)) for name in ("cni-bin-dir", "cni-net-dir")}
        if one.name == "gke" or one.bin_dir != Platform("").bin_dir:
            assert where["cni-bin-dir"] == one.bin_dir, one.name
        assert where["cni-net-dir"] == one.conf_dir, one.name


def test_keys_of_the_configmap_are_those_of_istios_chart() -> None:
    made = releases({
        "default": {},
        "names": {"cniConfFileName": "x.conf", "istioOwnedCNIConfigFileName": "00-i.conflist"},
    })  # fmt: skip
    names = {"CNI_CONF_NAME", original.OWNED_NAME_KEY, "ISTIO_OWNED_CNI_CONFIG_FILENAME"}
    assert set(made["default"].find("ConfigMap")["data"]) == original.KEYS
    assert set(made["names"].find("ConfigMap")["data"]) == original.KEYS | names
    assert settings(made["names"]).owned_conf_name == "00-i.conflist"


def test_the_same_values_make_the_same_text() -> None:
    some = dict(list(VALUES.items())[:12])
    assert render_together(some) == render_together(some)
