"""`meshcni explain pod`: what the agent would decide about a pod, why, and which rules that means."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from meshcni.cli.ambientflags import NODE_FLAGS, RUNTIME_FLAG, families_of, read_node
from meshcni.cli.ambientrules import this_machine
from meshcni.cli.given import settle
from meshcni.cli.podfiles import DEFAULT_NAMESPACE, POLICY_FLAGS, assess_manifest, load_namespace, read_policy
from meshcni.cli.show import Explained, explained_object
from meshcni.errors import KubeError, MeshCniError, PodSpecError, SettingError, UsageError
from meshcni.pflag import Flag, ParsedFlags, go_bool, help_text, parse
from meshcni.pods.ambientsettings import AmbientNode
from meshcni.pods.assess import Assessment, assess, unreadable
from meshcni.pods.eligibility import Policy, Verdict
from meshcni.pods.model import Namespace, Pod, namespace_from_object
from meshcni.pods.outlook import prospect_of
from meshcni.rules.ambient import pod_ruleset
from meshcni.rules.model import Backend, Family, Ruleset
from meshcni.rules.narrate import as_objects, words
from meshcni.rules.sidecar import sidecar_ruleset

if TYPE_CHECKING:
    from meshcni.kube.credentials import Access

USAGE: Final = (
    "Usage: meshcni explain pod --file POD.yaml [--namespace-file NS.yaml] [--format text|json]\n"
    "       meshcni explain pod NAMESPACE/NAME [--kubeconfig FILE] [--format text|json]"
)
_BACKEND_FLAG: Final = Flag(
    "native-nftables", "", "bool", "false", ("NATIVE_NFTABLES",), "show the rules as nftables gets them"
)
FLAGS: Final = (
    Flag("file", "f", help="manifest of the pod; - for standard input"),
    Flag("namespace-file", help="manifest of its namespace, for ambient mode"),
    Flag("format", "o", default="text", help="text or json"),
    Flag("kubeconfig", env=("KUBECONFIG",), help="how to reach the cluster; within a pod its service account"),
    Flag("context", help="context of the kubeconfig; empty: its current one"),
    _BACKEND_FLAG,
    *POLICY_FLAGS,
    *NODE_FLAGS,
    RUNTIME_FLAG,
)


def main(argv: Sequence[str]) -> int:
    """Run `explain` with its arguments (`["pod", ...]`).

    The status is 0 for a verdict (skip too), 1 when the verdict is error or there is nothing to judge, 2 for a command
    line that cannot be understood.
    """
    try:
        return _run(argv)
    except MeshCniError as error:
        lines = [f"meshcni explain: {error.message}", *([f"  {error.hint}"] if error.hint else [])]
        print(*lines, sep="\n", file=sys.stderr)
        return error.exit_code


def _run(argv: Sequence[str]) -> int:
    parsed = parse(FLAGS, argv)
    if parsed.help or parsed.rest[:1] == ["help"]:
        print(help_text(USAGE, FLAGS))
        return 0
    if parsed.rest[:1] != ["pod"]:
        raise UsageError(f"cannot explain {parsed.rest[0]!r}" if parsed.rest else "explain what?", "write: explain pod")
    output = parsed.text("format") or "text"
    if output not in ("text", "json"):
        raise UsageError(f"flag --format is {output!r}", "write text or json")
    own_address = this_machine(os.environ).own_address
    node, origins = read_node(parsed, os.environ, lambda version: own_address(version, ""))
    policy = replace(read_policy(parsed, os.environ), sandboxed_runtimes=node.sandboxed_runtimes)
    backend = settle(_BACKEND_FLAG, parsed, os.environ).read(_read_backend)
    pod, assessment = _assess(parsed, policy)
    prospect = prospect_of(pod, assessment.decision, node)
    explained = Explained(pod, assessment, prospect, origins)
    ruleset = _ruleset(explained, node, backend)
    lines = words(ruleset) if ruleset else []
    if output == "json":
        shown = {**explained_object(explained), "rules": lines, "ruleset": as_objects(ruleset) if ruleset else None}
        print(json.dumps(shown, indent=2))
    else:
        from meshcni.cli.explaintext import print_explained

        print_explained(explained, lines)
    return 1 if prospect.decision.verdict is Verdict.ERROR else 0


def _assess(parsed: ParsedFlags, policy: Policy) -> tuple[Pod, Assessment]:
    file, namespace_file, names = parsed.text("file"), parsed.text("namespace-file"), parsed.rest[1:]
    if file and not names:
        namespace = load_namespace(namespace_file) if namespace_file else None
        return assess_manifest(file, namespace, policy, os.environ)
    if file or namespace_file or len(names) != 1:
        raise UsageError("which pod?", "give either --file POD.yaml or one NAMESPACE/NAME")
    namespace_name, _, name = names[0].rpartition("/")
    if not name or "/" in namespace_name:
        raise UsageError(f"{names[0]!r} names no pod", "write NAMESPACE/NAME")
    return _assess_live(parsed, policy, namespace_name or DEFAULT_NAMESPACE, name)


def _assess_live(parsed: ParsedFlags, policy: Policy, namespace_name: str, name: str) -> tuple[Pod, Assessment]:
    """Ask the cluster; of the namespace only where ambient mode makes it matter."""
    import asyncio

    from meshcni.kube.client import NAMESPACES, KubeApi

    async def ask() -> tuple[Pod, Namespace | None]:
        async with KubeApi(_access(parsed, os.environ)) as api:
            pod = await api.get_pod(namespace_name, name)
            if not policy.ambient_enabled:
                return pod, None
            try:
                return pod, namespace_from_object(await api.get_object(*NAMESPACES, None, namespace_name))
            except KubeError as error:
                print(f"meshcni explain: warning: {error}", file=sys.stderr)
                return pod, None

    try:
        pod, namespace = asyncio.run(ask())
    except PodSpecError as error:
        return Pod(namespace_name, name), unreadable(error)
    return pod, assess(pod, namespace, policy, os.environ)


def _access(parsed: ParsedFlags, environment: Mapping[str, str]) -> Access:
    """Choose how to reach the cluster: by the file named, as the pod we are in, by the file in the home folder."""
    from meshcni.kube.credentials import InCluster, KubeconfigFile

    chosen = parsed.text("kubeconfig")
    path = chosen or environment.get("KUBECONFIG")
    if not path and environment.get("KUBERNETES_SERVICE_HOST"):
        return InCluster(environment)
    if find_spec("lightkube") is None:  # the image leaves it out
        raise _without_kubeconfig(chosen, path)
    return KubeconfigFile(path or os.path.expanduser("~/.kube/config"), parsed.text("context") or "")


def _without_kubeconfig(chosen: str | None, path: str | None) -> MeshCniError:
    elsewhere = "with a kubeconfig use the meshcni command line outside of the image"
    if not path:
        message = "no cluster to ask: KUBERNETES_SERVICE_HOST is not set, so this is no pod, and a kubeconfig needs"
        return UsageError(
            f"{message} lightkube, which is not installed here",
            f"run it in the agent's pod (kubectl exec), or give --file POD.yaml; {elsewhere}",
        )
    origin, kind = ("flag --kubeconfig", UsageError) if chosen else ("environment variable KUBECONFIG", SettingError)
    return kind(
        f"kubeconfig {path!r} ({origin}) cannot be used: that needs lightkube, which is not installed here",
        f"leave it out in the agent's pod, whose service account does; {elsewhere}",
    )


def _read_backend(text: str) -> Backend:
    return Backend.NFTABLES if go_bool(text) else Backend.IPTABLES


def _ruleset(explained: Explained, node: AmbientNode, backend: Backend) -> Ruleset | None:
    """Return the rules: a sidecar's by the families of the pod's addresses (both when it has none yet), ambient ones
    by the node's choice.
    """
    pod, sidecar, ambient = explained.pod, explained.assessment.derived, explained.prospect.derived
    if ambient is not None:
        return pod_ruleset(ambient.parameters, families_of(node), backend)
    if sidecar is None:
        return None
    families = frozenset(Family) if not pod.ips else frozenset({Family.V4, *map(_family, pod.ips)})
    return sidecar_ruleset(sidecar.interception, families, backend)


def _family(ip: str) -> Family:
    try:
        return Family(ip_address(ip).version)
    except ValueError:
        return Family.V4
