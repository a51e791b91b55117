"""Who is in the mesh: one decision per pod, with the reason and the value that decided.

Upstream: cni/pkg/plugin/plugin.go, cni/pkg/util/podutil.go. Where we differ, the reason is beside the check.
The plugin decides with this too, so no more of the standard library may be used than native/plugin/stubs has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from meshcni import istio
from meshcni.pflag import go_bool
from meshcni.pods.ambientsettings import SANDBOXED_RUNTIMES
from meshcni.pods.interception import NO_INTERCEPTION
from meshcni.pods.model import Namespace, Pod
from meshcni.pods.selectors import EnablementSelector


class Verdict(Enum):
    """What happens to a pod: redirected by rules of its own, enrolled in ambient, left alone, or refused."""

    SIDECAR = "sidecar"
    AMBIENT = "ambient"
    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a verdict: a stable `code` for machines, a sentence for people."""

    code: str
    text: str
    verdict: Verdict


OWN_AGENT_POD = Reason("own-agent-pod", "It is a pod of the node agent itself.", Verdict.SKIP)
NAMESPACE_EXCLUDED = Reason("namespace-excluded", "Its namespace is excluded from the mesh.", Verdict.SKIP)
ZTUNNEL_POD = Reason(
    "ztunnel-pod", "It is ztunnel itself, which every pod of ambient mode needs to start.", Verdict.SKIP
)
HOST_NETWORK = Reason("host-network", "It shares the host's network, which is never redirected.", Verdict.SKIP)
NAMESPACE_UNKNOWN = Reason(
    "namespace-unknown",
    "Whether it belongs to ambient mode depends on its namespace's labels, and those are not known.",
    Verdict.ERROR,
)
AMBIENT_ENABLED = Reason("ambient-enabled", "An enablement selector takes it into ambient mode.", Verdict.AMBIENT)
INIT_CONTAINER = Reason("istio-init-present", "Its own istio-init container programs the rules.", Verdict.SKIP)
ENVOY_DISABLED = Reason("envoy-disabled", "Its proxy runs without Envoy.", Verdict.SKIP)
NO_PROXY = Reason("no-proxy-container", "It has no istio-proxy container to send traffic to.", Verdict.SKIP)
NOT_A_SIDECAR = Reason("proxy-not-sidecar", "Its proxy is no sidecar, but a gateway or the like.", Verdict.SKIP)
INJECTION_OFF = Reason("injection-disabled", "Injection is switched off for it.", Verdict.SKIP)
NOT_INJECTED = Reason("not-injected", "The injector has not put a sidecar into it.", Verdict.SKIP)
INTERCEPTION_NONE = Reason("interception-none", "It asks for no interception.", Verdict.SKIP)
SIDECAR_INJECTED = Reason("sidecar-injected", "It has an injected sidecar.", Verdict.SIDECAR)
BAD_PARAMETERS = Reason(
    "bad-parameters", "It belongs to the mesh, but a parameter of its rules is invalid.", Verdict.ERROR
)
UNREADABLE = Reason("unreadable-pod", "A field of it has a wrong type.", Verdict.ERROR)

REASONS: Final = (
    OWN_AGENT_POD,
    NAMESPACE_EXCLUDED,
    ZTUNNEL_POD,
    HOST_NETWORK,
    NAMESPACE_UNKNOWN,
    AMBIENT_ENABLED,
    INIT_CONTAINER,
    ENVOY_DISABLED,
    NO_PROXY,
    NOT_A_SIDECAR,
    INJECTION_OFF,
    NOT_INJECTED,
    INTERCEPTION_NONE,
    SIDECAR_INJECTED,
    BAD_PARAMETERS,
    UNREADABLE,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide about pods; `agent_namespace` is the agent's own, empty when not known.

    `system_namespace` is that of the control plane, in which a pod with ztunnel's label is ztunnel; pods of a
    RuntimeClass that matches one of `sandboxed_runtimes` cannot be redirected.
    """

    exclude_namespaces: frozenset[str] = frozenset()
    agent_namespace: str = ""
    ambient_enabled: bool = False
    enablement_selectors: tuple[EnablementSelector, ...] = ()
    system_namespace: str = istio.SYSTEM_NAMESPACE
    sandboxed_runtimes: tuple[str, ...] = SANDBOXED_RUNTIMES


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on a pod, its reason, and `evidence`: the concrete value that decided."""

    verdict: Verdict
    reason: Reason
    evidence: str
    warnings: tuple[str, ...] = ()


Found = tuple[Reason, str] | None  # what a check says: a reason with its evidence, or nothing
Check = Callable[[Pod, Namespace | None, Policy], Found]


def _own_agent_pod(pod: Pod, _namespace: Namespace | None, policy: Policy) -> Found:
    in_its_namespace = policy.agent_namespace != "" and pod.namespace == policy.agent_namespace
    if in_its_namespace and pod.name.startswith(istio.AGENT_POD_PREFIX):
        return OWN_AGENT_POD, f"pod name {pod.name} in the agent's namespace {policy.agent_namespace}"
    return None


def _namespace_excluded(pod: Pod, _namespace: Namespace | None, policy: Policy) -> Found:
    if pod.namespace in policy.exclude_namespaces:
        return NAMESPACE_EXCLUDED, f"namespace {pod.namespace}"
    return None


def _host_network(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    return (HOST_NETWORK, "spec.hostNetwork=true") if pod.host_network else None


def _ztunnel_pod(pod: Pod, _namespace: Namespace | None, policy: Policy) -> Found:
    """Recognise ztunnel, whose start no ztunnel can wait for; upstream relies on its chart's label to opt out."""
    if not policy.ambient_enabled or istio.SIDECAR_STATUS in pod.annotations:
        return None
    label, value = istio.ZTUNNEL_LABEL
    if pod.namespace == policy.system_namespace and pod.labels.get(label) == value:
        return ZTUNNEL_POD, f"label {label}={value} in the control plane's namespace {pod.namespace}"
    return None


def _ambient(pod: Pod, namespace: Namespace | None, policy: Policy) -> Found:
    """Take the pod when a selector matches it and its namespace.

    A namespace that is not known is an error as soon as its labels matter. Upstream goes on to the sidecar checks
    then, find none, and starts the pod outside the mesh.
    """
    if not policy.ambient_enabled or istio.SIDECAR_STATUS in pod.annotations:
        return None
    undecided: Found = None
    for index, selector in enumerate(policy.enablement_selectors):
        if not selector.pod.matches(pod.labels):
            continue
        if selector.namespace.is_empty or (namespace is not None and selector.namespace.matches(namespace.labels)):
            return AMBIENT_ENABLED, f"enablement selector {index} matches its labels and its namespace's"
        if namespace is None:
            undecided = NAMESPACE_UNKNOWN, f"namespace {pod.namespace}, asked for by enablement selector {index}"
    return undecided


def _init_container(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    if any(container.name == istio.INIT_CONTAINER for container in pod.containers):
        return INIT_CONTAINER, f"container {istio.INIT_CONTAINER}"
    return None


def _envoy_disabled(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    value = pod.proxy.env.get(istio.ENV_DISABLE_ENVOY, "") if pod.proxy else ""
    if _reads_as(value, True):
        return ENVOY_DISABLED, f"env {istio.ENV_DISABLE_ENVOY}={value} of container {istio.PROXY_CONTAINER}"
    return None


def _no_proxy(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    if pod.proxy is None:
        return NO_PROXY, f"containers {', '.join(one.name for one in pod.containers) or 'none'}"
    return None


def _not_a_sidecar(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    args = pod.proxy.args if pod.proxy else ()
    if len(args) >= 2 and args[0] == "proxy" and args[1] != "sidecar":
        return NOT_A_SIDECAR, f"arguments '{args[0]} {args[1]}' of container {istio.PROXY_CONTAINER}"
    return None


def _injection_off(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    kind, value = _inject_value(pod)
    return (INJECTION_OFF, f"{kind} {istio.INJECT_KEY}={value}") if _reads_as(value, False) else None


def _not_injected(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    if istio.SIDECAR_STATUS not in pod.annotations:
        return NOT_INJECTED, f"annotation {istio.SIDECAR_STATUS} is absent"
    return None


def _interception_none(pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    """Respect the mode NONE that the injector may write; upstream fails the ADD on it."""
    if pod.annotations.get(istio.INTERCEPTION_MODE) == NO_INTERCEPTION:
        return INTERCEPTION_NONE, f"annotation {istio.INTERCEPTION_MODE}={NO_INTERCEPTION}"
    return None


def _sidecar(_pod: Pod, _namespace: Namespace | None, _policy: Policy) -> Found:
    return SIDECAR_INJECTED, f"annotation {istio.SIDECAR_STATUS} and container {istio.PROXY_CONTAINER} are present"


CHECKS: Final[tuple[Check, ...]] = (  # the first one that says something decides
    _own_agent_pod,
    _namespace_excluded,
    _ztunnel_pod,
    _host_network,
    _ambient,
    _init_container,
    _envoy_disabled,
    _no_proxy,
    _not_a_sidecar,
    _injection_off,
    _not_injected,
    _interception_none,
    _sidecar,
)


def decide(pod: Pod, namespace: Namespace | None, policy: Policy) -> Decision:
    """Decide what happens to `pod`; `namespace` is None when it could not be looked up."""
    found = next(found for check in CHECKS if (found := check(pod, namespace, policy)) is not None)
    reason, evidence = found
    return Decision(reason.verdict, reason, evidence, _warnings(pod))


def _inject_value(pod: Pod) -> tuple[str, str]:
    """Return where the inject switch stands and its value; an empty label hides no annotation, unlike upstream."""
    if label := pod.labels.get(istio.INJECT_KEY, ""):
        return "label", label
    return "annotation", pod.annotations.get(istio.INJECT_KEY, "")


def _reads_as(text: str, wanted: bool) -> bool:
    """Whether `text` is the boolean `wanted`; text that is no boolean is neither."""
    try:
        return go_bool(text) is wanted
    except ValueError:
        return False


def _warnings(pod: Pod) -> tuple[str, ...]:
    """Say which switches were passed over because their value cannot be read."""
    kind, inject = _inject_value(pod)
    switches = [(f"{kind} {istio.INJECT_KEY}", inject)]
    if pod.proxy is not None:
        where = f"env {istio.ENV_DISABLE_ENVOY} of container {istio.PROXY_CONTAINER}"
        switches.append((where, pod.proxy.env.get(istio.ENV_DISABLE_ENVOY, "")))
    said = [
        f"{where}={value!r} is no boolean and was passed over"
        for where, value in switches
        if value and not _reads_as(value, True) and not _reads_as(value, False)
    ]
    if pod.proxy is not None and istio.ENV_DISABLE_ENVOY in pod.proxy.env_from_elsewhere:
        said.append(
            f"env {istio.ENV_DISABLE_ENVOY} of container {istio.PROXY_CONTAINER} comes from elsewhere (valueFrom) "
            "and was passed over: only literal values are seen here"
        )
    return tuple(said)
