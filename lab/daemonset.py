"""A DaemonSet's manifest, read as strictly as the lab can act on it, and the container that a kubelet would make of it.

What the lab does not do (probes, resources, scheduling) is ignored; any other field that it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lab.container import ContainerSpec, Mount, Security
from lab.node import LabError

IGNORED = {"name", "image", "imagePullPolicy", "ports", "readinessProbe", "livenessProbe", "startupProbe", "resources"}
KNOWN = IGNORED | {"command", "args", "env", "envFrom", "securityContext", "volumeMounts"}
SECURITY = {
    "runAsUser",
    "runAsGroup",
    "runAsNonRoot",
    "privileged",
    "readOnlyRootFilesystem",
    "allowPrivilegeEscalation",
    "capabilities",
}


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of the pod: `path` is the node's, empty for an emptyDir; `type` is that of the hostPath."""

    path: str
    type: str


@dataclass(frozen=True, slots=True)
class DaemonSet:
    """The pod template of a manifest and the ConfigMaps beside it."""

    pod: Mapping[str, Any]
    config_maps: Mapping[str, Mapping[str, str]]

    @property
    def is_privileged(self) -> bool:
        """Whether its container is privileged."""
        return bool(self._container.get("securityContext", {}).get("privileged"))

    @property
    def is_on_host_network(self) -> bool:
        """Whether its pods have the node's network instead of one of their own."""
        return bool(self.pod.get("hostNetwork"))

    @property
    def volumes(self) -> dict[str, Volume]:
        """Its volumes by name."""
        found = {}
        for volume in self.pod.get("volumes", ()):
            if "hostPath" in volume:
                found[volume["name"]] = Volume(volume["hostPath"]["path"], volume["hostPath"].get("type", ""))
            elif "emptyDir" in volume:
                found[volume["name"]] = Volume("", "")
            else:
                raise LabError(f"volume {volume['name']}: neither hostPath nor emptyDir")
        return found

    def container(
        self, image: str, fields: Mapping[str, str], place: Callable[[str, Volume], str], **security: object
    ) -> ContainerSpec:
        """Return the container: `fields` are values of the downward API by path, `place` says where a volume is.

        `security` replaces the manifest's securityContext when it is given.
        """
        container, volumes = self._container, self.volumes
        unknown = container.keys() - KNOWN
        if unknown:
            raise LabError(f"the lab cannot run a container with {', '.join(sorted(unknown))}")
        mounts = tuple(
            Mount(
                place(mount["name"], volumes[mount["name"]]),
                mount["mountPath"],
                bool(mount.get("readOnly")),
                mount.get("mountPropagation", "None") == "HostToContainer",
            )
            for mount in container.get("volumeMounts", ())
        )
        return ContainerSpec(
            image,
            container["name"],
            tuple(container.get("command", ())),
            tuple(container.get("args", ())),
            self._environment(fields),
            mounts,
            read_security({**container.get("securityContext", {}), **security}),
        )

    @property
    def _container(self) -> Mapping[str, Any]:
        (container,) = self.pod["containers"]
        found: Mapping[str, Any] = container
        return found

    def _environment(self, fields: Mapping[str, str]) -> dict[str, str]:
        values: dict[str, str] = {}
        for source in self._container.get("envFrom", ()):
            values.update(self.config_maps[source["configMapRef"]["name"]])
        for entry in self._container.get("env", ()):
            origin = entry.get("valueFrom", {})
            if "fieldRef" in origin:
                values[entry["name"]] = fields[origin["fieldRef"]["fieldPath"]]
            elif not origin:
                values[entry["name"]] = str(entry.get("value", ""))
        return values


def read(path: Path) -> DaemonSet:
    """Read a file with one DaemonSet, and what it refers to."""
    return parse(path.read_text())


def parse(text: str) -> DaemonSet:
    """Read YAML with one DaemonSet, and what it refers to."""
    objects = [one for one in yaml.safe_load_all(text) if one]
    (daemonset,) = (one for one in objects if one["kind"] == "DaemonSet")
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    return DaemonSet(daemonset["spec"]["template"]["spec"], maps)


def read_security(context: Mapping[str, Any]) -> Security:
    """Return a securityContext; LabError when it has a field that the lab does not know."""
    if unknown := context.keys() - SECURITY:
        raise LabError(f"the lab cannot run a container whose securityContext has {', '.join(sorted(unknown))}")
    capabilities = context.get("capabilities", {})
    return Security(
        user=context.get("runAsUser"),
        group=context.get("runAsGroup"),
        privileged=bool(context.get("privileged")),
        add=tuple(capabilities.get("add", ())),
        drop=tuple(capabilities.get("drop", ())),
        read_only_root=bool(context.get("readOnlyRootFilesystem")),
        no_new_privileges=context.get("allowPrivilegeEscalation") is False,
    )
