"""The chart's own files: lint, package, notes, schema and README."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart import original
from tests.chart.releases import CHART, IMAGE, NAMESPACE, ROOT, helm, release

import meshcni

DEFAULTS = "_internal_defaults_do_not_set"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Known to the schema, told of nowhere: of earlier versions of Istio's chart, or of a chart that has this one as a part.
UNTOLD = {"enabled", "logLevel", "privileged", "psp_cluster_role", "rollingMaxUnavailable"}
WITHIN = {"resources", "global.defaultResources", "updateStrategy", "readinessProbe", "livenessProbe"}


@pytest.mark.parametrize(
    "values",
    [f"image={IMAGE}", f"image={IMAGE},profile=ambient,global.platform=openshift,global.networkPolicy.enabled=true"],
)
def test_lint(values: str) -> None:
    done = helm("lint", "--strict", CHART, "--set", values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def test_package_can_be_installed_from(tmp_path: Path) -> None:
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("cni-*.tgz")
    with tarfile.open(package) as archive:
        names = set(archive.getnames())
    files = {f"cni/{path.relative_to(CHART)}" for path in CHART.rglob("*") if path.is_file()}
    assert names == files - {"cni/.helmignore"} or names == files
    options = ("istio-cni", "--namespace", NAMESPACE, "--set", f"image={IMAGE}")
    packed, unpacked = (helm("template", *options[:1], where, *options[1:]) for where in (package, CHART))
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout == unpacked.stdout


@pytest.mark.parametrize("mode", ["sidecar", "ambient"])
def test_notes(mode: str) -> None:
    options = ("--namespace", NAMESPACE, "--set", f"image={IMAGE},ambient.enabled={str(mode == 'ambient').lower()}")
    done = helm("install", "istio-cni", CHART, *options, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("\nNOTES:\n")[2]
    assert f"kubectl -n {NAMESPACE} rollout status daemonset/istio-cni-node" in notes
    assert ("istio.io/dataplane-mode=ambient" in notes) == (mode == "ambient")


def test_versions_are_those_of_the_programs() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (about["name"], about["apiVersion"], about["appVersion"]) == ("cni", "v2", meshcni.__version__)


def test_the_schema_knows_the_same_values_at_each_place() -> None:
    settings = SCHEMA["definitions"]["settings"]["properties"]
    others = {name for name, value in SCHEMA["properties"].items() if value == {"$ref": "#/definitions/otherChart"}}
    extra = others | {"cni", DEFAULTS, "defaults", "defaultRevision"}
    assert SCHEMA["properties"].keys() - settings.keys() == extra
    assert {name: SCHEMA["properties"][name] for name in settings} == settings
    for place in ("cni", DEFAULTS):
        assert SCHEMA["properties"][place] == {"$ref": "#/definitions/settings"}


def test_every_value_has_a_default_and_every_default_a_type() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert defaults.keys() == {DEFAULTS}
    typed = set(paths(SCHEMA["definitions"]["settings"]["properties"]))
    given = set(leaves(defaults[DEFAULTS]))
    assert typed - given == UNTOLD
    assert given - typed == set()


def test_releases_of_istios_chart_can_reuse_their_values() -> None:
    """Helm then takes the other chart's defaults for ours, and they lack what only we have."""
    own = yaml.safe_load((CHART / "files" / "own-values.yaml").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())[DEFAULTS]
    assert set(leaves(own)) == set(leaves(defaults)) - original.VALUES
    assert original.VALUES - set(leaves(defaults)) == set()
    for path in leaves(own):
        assert value_at(own, path) == value_at(defaults, path), path
    without = {
        **dict.fromkeys(own),
        "ambient": dict.fromkeys(own["ambient"]),
        "global": dict.fromkeys(own["global"]),
    }
    assert release({DEFAULTS: without}).objects == release({}).objects


def test_every_value_is_described() -> None:
    described = (CHART / "README.md").read_text()
    for path in leaves(yaml.safe_load((CHART / "values.yaml").read_text())[DEFAULTS]):
        assert f"\n| `{path}` | " in described, f"{path} has no comment in values.yaml"


def test_readme_is_fresh(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    done = subprocess.run([ROOT / "scripts" / "chart-readme", page], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert page.read_text() == (CHART / "README.md").read_text(), "run scripts/chart-readme"


def value_at(values: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def leaves(defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every value; a map that is one value as a whole, or empty, is not gone into."""
    for name, value in defaults.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value and path not in WITHIN:
            yield from leaves(value, f"{path}.")
        else:
            yield path


def paths(properties: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The same from the schema."""
    for name, value in properties.items():
        path, rule = f"{prefix}{name}", value
        while "$ref" in rule:
            rule = SCHEMA["definitions"][rule["$ref"].rpartition("/")[2]]
        whole = path in WITHIN or path in ("affinity", "seccompProfile", "seLinuxOptions")
        if rule.get("properties") and not whole:
            yield from paths(rule["properties"], f"{path}.")
        else:
            yield path
