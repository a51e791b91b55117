"""What helm makes of the chart: objects of one release, or of many in one run.

Many: a chart of the test has ours as a dependency under many aliases, each with values of its own. Helm treats each as
a chart by itself, schema and all, and starts once.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "istio-cni"
IMAGE = "registry.example/meshcni/install-cni:0.1.0"
NAMESPACE = "istio-system"
Values = Mapping[str, Any]


class Absent:
    """Stands for what is not in a manifest."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent()


@dataclass(frozen=True)
class Release:
    """The objects of one release."""

    objects: tuple[Mapping[str, Any], ...]

    def find(self, kind: str, name: str = "") -> Any:
        """The object of that kind, and name where there are several; ABSENT when there is none."""
        found = [one for one in self.objects if one["kind"] == kind and name in ("", one["metadata"]["name"])]
        assert len(found) < 2, f"{len(found)} objects of kind {kind}: name one of them"
        return found[0] if found else ABSENT

    def at(self, path: Sequence[str]) -> Any:
        """What is at `kind[/name]`, then keys; an element of a list is found by its `name`, or by its number."""
        here: Any = self.find(*path[0].split("/", 1))
        for key in path[1:]:
            here = _step(here, key)
        return here

    @property
    def names(self) -> set[str]:
        """`Kind/name` of every object."""
        return {f"{one['kind']}/{one['metadata']['name']}" for one in self.objects}

    @property
    def container(self) -> Any:
        """The agent's container."""
        return self.at(["DaemonSet", "spec", "template", "spec", "containers", "install-cni"])

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the agent's process, as a kubelet would set them; those of the pod's fields made up."""
        found = dict(self.find("ConfigMap")["data"])
        for one in self.container["env"]:
            found[one["name"]] = one["value"] if "value" in one else _MADE_UP[_source(one)]
        return found


_MADE_UP = {
    "spec.nodeName": "n1",
    "metadata.name": "istio-cni-node-x7x7x",
    "metadata.namespace": NAMESPACE,
    "limits.memory": "134217728",
}


def _source(variable: Mapping[str, Any]) -> str:
    reference = variable["valueFrom"]
    found = reference["fieldRef"]["fieldPath"] if "fieldRef" in reference else reference["resourceFieldRef"]["resource"]
    assert isinstance(found, str)
    return found


def _step(here: Any, key: str) -> Any:
    if isinstance(here, list):
        if key.isdigit():
            return here[int(key)] if int(key) < len(here) else ABSENT
        return next((one for one in here if one.get("name") == key), ABSENT)
    return here.get(key, ABSENT) if isinstance(here, dict) else ABSENT


@functools.cache
def program() -> Path:
    """Helm, built from its module; MESHCNI_HELM names another."""
    if given := os.environ.get("MESHCNI_HELM"):
        return Path(given)
    built = subprocess.run([ROOT / "scripts" / "build-kubernetes", "helm"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"scripts/build-kubernetes helm failed:\n{built.stdout}{built.stderr}"
    return ROOT / "build" / "kubernetes" / "helm"


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm with nothing of this machine's own: no cluster, no repositories, no plugins."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ["PATH"], "HOME": home, "KUBECONFIG": os.devnull}
        command = [str(program()), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)


def template(values: Values, *options: str, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
    """`helm template` of the chart with exactly those values."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(values), file)
        file.flush()
        return helm("template", "istio-cni", chart, "--namespace", NAMESPACE, "--values", file.name, *options)


def release(values: Values, *options: str) -> Release:
    """One release of the chart, with an image unless `values` names one."""
    done = template({"image": IMAGE, **values}, *options)
    assert done.returncode == 0, done.stderr
    return Release(tuple(_objects(done.stdout)))


def refusal(values: Values, *options: str) -> str:
    """What helm says about values that it must not take."""
    done = template(values, *options)
    assert done.returncode != 0, f"{values} was accepted"
    return done.stderr


def releases(cases: Mapping[str, Values], *options: str) -> dict[str, Release]:
    """A release for each case, by its name, with an image unless its values name one."""
    text = render_together(cases, *options)
    parts: dict[str, list[str]] = {alias: [] for alias in _aliases(cases)}
    for document in text.split("\n---\n"):
        if source := re.search(r"^# Source: many/charts/(c\d+)/", document, re.MULTILINE):
            parts[source[1]].append(document)
    return {
        name: Release(tuple(one for part in parts[alias] for one in _objects(part)))
        for alias, name in _aliases(cases).items()
    }


def render_together(cases: Mapping[str, Values], *options: str) -> str:
    """The text of `releases`."""
    with tempfile.TemporaryDirectory() as folder:
        chart = Path(folder, "many")
        shutil.copytree(CHART, chart / "charts" / "cni")
        version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
        uses = [{"name": "cni", "version": version, "alias": alias} for alias in _aliases(cases)]
        about = {"apiVersion": "v2", "name": "many", "version": "0.0.0", "dependencies": uses}
        (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
        values = {alias: {"image": IMAGE, **cases[name]} for alias, name in _aliases(cases).items()}
        done = template(values, *options, chart=chart)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _aliases(cases: Mapping[str, Values]) -> dict[str, str]:
    return {f"c{number}": name for number, name in enumerate(cases)}


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    yield from (one for one in yaml.load_all(text, loader) if one is not None)
