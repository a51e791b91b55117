"""What is missing in the agent's manifest, as YAML to paste: a patch of the DaemonSet, an account with its role.

Written by hand, for PyYAML would have to be loaded, and knows neither comments nor which lists read better on one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from meshcni import istio
from meshcni.agent.hostmounts import Mount
from meshcni.agent.rights import Right

CONTAINER = istio.AGENT_NAME
ACCOUNT = "istio-cni"  # the chart's
DEFAULT_ACCOUNT = "default"
ROLE = "istio-cni-node"  # not the chart's own, which an `apply` would replace
# Variables that the downward API gives: upstream's chart sets them, the agent misses them.
VARIABLES = {"NODE_NAME": "spec.nodeName", "POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace"}

_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z/][A-Za-z0-9/._-]*", re.IGNORECASE)


def daemonset_patch(
    mounts: Sequence[Mount], *, namespace: str, account: str = "", variables: Iterable[str] = ()
) -> str:
    """What the DaemonSet lacks, as `kubectl patch --patch-file` takes it; `account` empty leaves that as it is."""
    return "\n".join(_daemonset_patch(mounts, namespace, account, tuple(variables))) + "\n"


def _daemonset_patch(mounts: Sequence[Mount], namespace: str, account: str, variables: Sequence[str]) -> Iterator[str]:
    yield "# Into the DaemonSet, by hand or as FILE of:"
    yield f"# kubectl -n {scalar(namespace)} patch daemonset {istio.DAEMONSET_NAME} --patch-file FILE"
    yield "spec:"
    yield "  template:"
    yield "    spec:"
    if account:
        yield f"      serviceAccountName: {scalar(account)}"
        yield "      automountServiceAccountToken: true"
    if mounts or variables:
        yield "      containers:"
        yield f"      - name: {CONTAINER}"
    if variables:
        yield "        env:"
    for name in variables:
        yield f"        - name: {name}"
        yield f"          valueFrom: {{fieldRef: {{fieldPath: {VARIABLES[name]}}}}}"
    if not mounts:
        return
    yield "        volumeMounts:"
    for mount in mounts:
        yield f"        - name: {mount.volume}"
        yield f"          mountPath: {scalar(mount.path)}"
        if mount.read_only:
            yield "          readOnly: true"
        if mount.propagation:
            yield f"          mountPropagation: {mount.propagation}"
    yield "      volumes:"
    for mount in mounts:
        yield f"      - name: {mount.volume}"
        yield f"        hostPath: {{path: {scalar(mount.host_path)}, type: {mount.kind}}}"


def role(rights: Sequence[Right], missing: Sequence[Right], *, namespace: str, account: str) -> str:
    """An account and a role with all of `rights`, as `kubectl apply -f` takes them; the missing ones are marked.

    All of them, because what is applied replaces what was applied before under that name.
    """
    return "\n".join(_role(rights, missing, namespace, account)) + "\n"


def _role(rights: Sequence[Right], missing: Sequence[Right], namespace: str, account: str) -> Iterator[str]:
    yield "# As FILE of: kubectl apply -f FILE"
    yield "apiVersion: v1"
    yield "kind: ServiceAccount"
    yield f"metadata: {{name: {scalar(account)}, namespace: {scalar(namespace)}}}"
    yield "---"
    yield "apiVersion: rbac.authorization.k8s.io/v1"
    yield "kind: ClusterRole"
    yield f"metadata: {{name: {ROLE}}}"
    yield "rules:"
    for (group, target, name), verbs in _rules(rights).items():
        lacking = [right.verb for right in missing if _key(right) == (group, target, name)]
        yield f"- apiGroups: [{json.dumps(group)}]"
        yield f"  resources: [{target}]"
        if name:
            yield f"  resourceNames: [{name}]"
        yield f"  verbs: [{', '.join(verbs)}]{'  # missing: ' + ', '.join(lacking) if lacking else ''}"
    yield "---"
    yield "apiVersion: rbac.authorization.k8s.io/v1"
    yield "kind: ClusterRoleBinding"
    yield f"metadata: {{name: {ROLE}}}"
    yield f"roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {ROLE}}}"
    yield f"subjects: [{{kind: ServiceAccount, name: {scalar(account)}, namespace: {scalar(namespace)}}}]"


def _rules(rights: Sequence[Right]) -> Mapping[tuple[str, str, str], list[str]]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for right in rights:
        found.setdefault(_key(right), []).append(right.verb)
    return found


def _key(right: Right) -> tuple[str, str, str]:
    return right.resource.group, right.target, right.name


def scalar(text: str) -> str:
    """A string as YAML: as it is where that is safe, else in double quotes, which JSON writes as YAML does."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
