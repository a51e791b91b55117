"""Values that are told apart by what they switch, combined so that each pair of them occurs at least once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

from tests.chart.original import Mode
from tests.chart.releases import Values

Choice = tuple[str, ...]

PROFILES = ("", "ambient", "demo", "preview", "remote", "stable")
VERSIONS = ("", "1.25", "1.26", "1.27", "1.28", "1.29", "1.30")
PLATFORMS = ("", "gke", "k3d", "k3s", "microk8s", "minikube", "openshift")
REPAIR: Mapping[str, Values] = {
    "repairPods": {},
    "deletePods": {"repairPods": False, "deletePods": True},
    "labelPods": {"repairPods": False, "labelPods": True},
    "": {"repairPods": False},
    "off": {"enabled": False, "deletePods": True},
}
SWITCHES: Mapping[str, Values] = {
    "nftables": {"global": {"nativeNftables": True}},
    "policy": {"global": {"networkPolicy": {"enabled": True}}, "revision": "r"},
    "quota": {"resourceQuotas": {"enabled": True}},
    "multus": {"provider": "multus"},
    "user": {"runAsNonRoot": True, "readOnlyRootFilesystem": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "field": {"useAppArmorAnnotation": False, "seLinuxOptions": {"level": "s0"}},
    "network": {"ambient": {"shareHostNetworkNamespace": True, "hostXtablesLock": True}, "healthPort": 18000},
    "owned": {"istioOwnedCNIConfig": True, "istioOwnedCNIConfigFileName": "00-i.conflist"},
    "ends": {"disableSafeUpgrade": True, "uninstallRemovesBinary": True, "terminationGracePeriodSeconds": 10},
    "running": {"sidecarReconcile": "off", "ambient": {"unenrollOnUninstall": True}},
    "secrets": {"imagePullSecrets": ["a"], "pullPolicy": "Always", "global": {"logAsJson": True}},
    "env": {"env": {"AGENT_WAIT_SECONDS": 5, "NODE_NAME": "x"}},
}
AXES: Mapping[str, Sequence[str]] = {
    "profile": PROFILES,
    "platform": PLATFORMS,
    "version": VERSIONS,
    "ambient": ("", "true", "false"),
    "repair": tuple(REPAIR),
    "scope": ("all", "cluster", "namespace"),
    "style": ("plain", "cni", "_internal_defaults_do_not_set"),
    **dict.fromkeys(SWITCHES, ("", "on")),
}
NAMES = tuple(AXES)


def covering() -> list[Choice]:
    """Rows with a value for each axis: every profile with every platform, and every pair of any two axes."""
    missing = {
        (one, other, *pair)
        for one, other in combinations(range(len(NAMES)), 2)
        for pair in product(AXES[NAMES[one]], AXES[NAMES[other]])
    }
    begins: list[Mapping[int, str]] = [dict(enumerate(pair)) for pair in product(PROFILES, PLATFORMS)]
    rows = []
    while begins or missing:
        row = _filled(begins.pop() if begins else _pair(min(missing)), missing)
        missing -= _pairs(row)
        rows.append(tuple(row))
    return rows


def _pair(missing: tuple[Any, ...]) -> Mapping[int, str]:
    one, other, value, with_value = missing
    return {one: value, other: with_value}


def _filled(given: Mapping[int, str], missing: set[tuple[Any, ...]]) -> list[str]:
    """The rest of a row, each value chosen for the most pairs that no row had yet."""
    row = dict(given)
    for axis in range(len(NAMES)):
        if axis not in row:
            row[axis] = max(AXES[NAMES[axis]], key=lambda value: len(_new(row, axis, value) & missing))
    return [row[axis] for axis in range(len(NAMES))]


def _new(row: Mapping[int, str], axis: int, value: str) -> set[tuple[Any, ...]]:
    return {
        (min(axis, other), max(axis, other), *((value, known) if axis < other else (known, value)))
        for other, known in row.items()
    }


def _pairs(row: Sequence[str]) -> set[tuple[Any, ...]]:
    return {(one, other, row[one], row[other]) for one, other in combinations(range(len(row)), 2)}


def values(row: Choice) -> Values:
    """The values of a row, under the prefix that it names."""
    chosen = dict(zip(NAMES, row, strict=True))
    found: dict[str, Any] = {"profile": chosen["profile"], "platform": chosen["platform"]}
    found |= {"compatibilityVersion": chosen["version"], "global": {"resourceScope": chosen["scope"]}}
    found |= {"repair": dict(REPAIR[chosen["repair"]]), "ambient": {}}
    if chosen["ambient"]:
        found["ambient"] = {"enabled": chosen["ambient"] == "true"}
    for name, switched in SWITCHES.items():
        if chosen[name]:
            found = {**found, **{key: _joined(found.get(key), value) for key, value in switched.items()}}
    return found if chosen["style"] == "plain" else {chosen["style"]: found}


def _joined(old: object, new: object) -> object:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def mode(row: Choice) -> Mode:
    """What the row means for the roles. A profile wins over the place of the defaults, but not over the others."""
    chosen = dict(zip(NAMES, row, strict=True))
    says = chosen["ambient"]
    by_profile = chosen["profile"] == "ambient" and (not says or chosen["style"] == "_internal_defaults_do_not_set")
    return Mode(says == "true" or by_profile, chosen["platform"] == "openshift", chosen["repair"])
