"""Pods and namespaces from manifests, and the settings that decide about them, for the people's commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from meshcni import istio
from meshcni.cli.given import Given, settle
from meshcni.errors import MeshCniError, PodSpecError, SettingError, UsageError
from meshcni.pflag import Flag, ParsedFlags, go_bool
from meshcni.pods.assess import Assessment, assess, unreadable
from meshcni.pods.eligibility import Policy
from meshcni.pods.model import Namespace, Pod, namespace_from_object, pod_from_object
from meshcni.pods.selectors import EnablementSelector, parse_enablement_selectors

DEFAULT_NAMESPACE: Final = "default"  # where kubectl would put a manifest that names none

POLICY_FLAGS: Final = (  # the agent's own variables, so that `explain` within its pod decides as the agent does
    Flag("exclude-namespaces", env=("EXCLUDE_NAMESPACES",), help="namespaces whose pods are never touched"),
    Flag("agent-namespace", env=("POD_NAMESPACE",), help="namespace of the node agent's own pods"),
    Flag("ambient-enabled", "", "bool", "false", ("AMBIENT_ENABLED",), "whether ambient mode is on"),
    Flag(
        "ambient-enablement-selector",
        env=("AMBIENT_ENABLEMENT_SELECTOR",),
        help="YAML list of {podSelector, namespaceSelector}",
    ),
    Flag(
        "system-namespace",
        default=istio.SYSTEM_NAMESPACE,
        env=("SYSTEM_NAMESPACE",),
        help="namespace of the control plane and of ztunnel",
    ),
)


def read_policy(parsed: ParsedFlags, environment: Mapping[str, str]) -> Policy:
    """Take the policy from flags, else from the agent's variables; an empty variable counts as unset."""
    given = {flag.name: settle(flag, parsed, environment) for flag in POLICY_FLAGS}
    return Policy(
        exclude_namespaces=frozenset(
            name.strip() for name in given["exclude-namespaces"].text.split(",") if name.strip()
        ),
        agent_namespace=given["agent-namespace"].text,
        ambient_enabled=given["ambient-enabled"].read(go_bool),
        enablement_selectors=_selectors(given["ambient-enablement-selector"]),
        system_namespace=given["system-namespace"].text,
    )


def _selectors(given: Given) -> tuple[EnablementSelector, ...]:
    import yaml

    try:
        return parse_enablement_selectors(yaml.safe_load(given.text), given.origin)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{given.origin} is not YAML: {' '.join(str(error).split())}") from error
    except SettingError as error:
        raise UsageError(error.message, error.hint) from error


def load_manifest(path: str, kind: str) -> Mapping[str, Any]:
    """Return the one object of `kind` in a YAML or JSON file (`-`: standard input). MeshCniError says what is wrong."""
    import yaml

    shown = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise MeshCniError(f"cannot read {shown}: {error}", f"name a file with a {kind} manifest") from error
    try:
        documents = [document for document in yaml.safe_load_all(data) if document is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise MeshCniError(f"{shown} is not YAML: {problem}", "kubectl get -o yaml writes such a file") from error
    if len(documents) != 1:
        raise MeshCniError(f"{shown} holds {len(documents)} objects", f"it must hold one {kind}")
    document = documents[0]
    found = document.get("kind") if isinstance(document, Mapping) else type(document).__name__
    if found != kind:
        raise MeshCniError(f"{shown} holds {found!r}, not a {kind}", f"it must hold one object with kind: {kind}")
    return dict(document)


def load_namespace(path: str) -> Namespace:
    """Read a Namespace manifest."""
    return namespace_from_object(load_manifest(path, "Namespace"))


def assess_manifest(
    path: str, namespace: Namespace | None, policy: Policy, environment: Mapping[str, str]
) -> tuple[Pod, Assessment]:
    """Read a Pod manifest and assess the pod in it; a field of a wrong type is a verdict, not an exception."""
    manifest = dict(load_manifest(path, "Pod"))
    metadata = manifest.get("metadata")
    named = metadata if isinstance(metadata, Mapping) else {}
    if not named.get("namespace"):
        manifest["metadata"] = {**named, "namespace": DEFAULT_NAMESPACE} if named or metadata is None else metadata
    try:
        pod = pod_from_object(manifest)
    except PodSpecError as error:
        return Pod(str(named.get("namespace") or DEFAULT_NAMESPACE), str(named.get("name") or "")), unreadable(error)
    if namespace is not None and namespace.name != pod.namespace:
        raise UsageError(
            f"pod {pod.full_name} is not in the namespace given, {namespace.name!r}", "give the pod's own namespace"
        )
    return pod, assess(pod, namespace, policy, environment)
