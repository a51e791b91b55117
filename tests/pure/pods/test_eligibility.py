"""Who is in the mesh: every case of the decision, its order, reason and evidence."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.pods.eligibility import REASONS, Policy, Verdict, decide
from meshcni.pods.model import Container, Namespace, Pod
from meshcni.pods.selectors import parse_enablement_selectors

STATUS = "sidecar.istio.io/status"
INJECT = "sidecar.istio.io/inject"
MODE = "sidecar.istio.io/interceptionMode"
AMBIENT = "istio.io/dataplane-mode"

PROXY = Container("istio-proxy", args=("proxy", "sidecar"))
SIDECAR = Pod("shop", "cart", annotations={STATUS: "{}"}, containers=(Container("app"), PROXY))
PLAIN = Pod("shop", "cart", containers=(Container("app"),))


def with_env(**env: str) -> Pod:
    return replace(SIDECAR, containers=(Container("app"), replace(PROXY, env=env)))


def with_args(*args: str) -> Pod:
    return replace(SIDECAR, containers=(replace(PROXY, args=args),))


def annotated(**annotations: str) -> Pod:
    names = {"inject": INJECT, "mode": MODE}
    return replace(SIDECAR, annotations={STATUS: "", **{names[key]: text for key, text in annotations.items()}})


SIDECAR_CASES: dict[str, tuple[Pod, str, str]] = {
    "injected": (SIDECAR, "sidecar-injected", "annotation sidecar.istio.io/status and container istio-proxy"),
    "status may be empty": (annotated(), "sidecar-injected", ""),
    "proxy as an init container": (
        replace(SIDECAR, containers=(replace(PROXY, is_init=True), Container("app"))),
        "sidecar-injected",
        "",
    ),
    "12a istio-init": (
        replace(SIDECAR, containers=(Container("istio-init", is_init=True), PROXY)),
        "istio-init-present",
        "container istio-init",
    ),
    "12a istio-init as a regular container": (
        replace(SIDECAR, containers=(PROXY, Container("istio-init"))),
        "istio-init-present",
        "container istio-init",
    ),
    "istio-validation is no istio-init": (
        replace(SIDECAR, containers=(Container("istio-validation", is_init=True), PROXY)),
        "sidecar-injected",
        "",
    ),
    "12b DISABLE_ENVOY": (
        with_env(DISABLE_ENVOY="true"),
        "envoy-disabled",
        "env DISABLE_ENVOY=true of container istio-proxy",
    ),
    "12b DISABLE_ENVOY=1": (with_env(DISABLE_ENVOY="1"), "envoy-disabled", "DISABLE_ENVOY=1"),
    "12b DISABLE_ENVOY=false": (with_env(DISABLE_ENVOY="false"), "sidecar-injected", ""),
    "12b DISABLE_ENVOY=yes is passed over": (with_env(DISABLE_ENVOY="yes"), "sidecar-injected", ""),
    "12c no proxy": (replace(SIDECAR, containers=(Container("app"),)), "no-proxy-container", "containers app"),
    "12c no containers at all": (replace(SIDECAR, containers=()), "no-proxy-container", "containers none"),
    "12d router": (
        with_args("proxy", "router"),
        "proxy-not-sidecar",
        "arguments 'proxy router' of container istio-proxy",
    ),
    "12d ambient waypoint": (with_args("proxy", "waypoint", "--domain", "x"), "proxy-not-sidecar", "proxy waypoint"),
    "12d sidecar": (with_args("proxy", "sidecar", "--domain", "x"), "sidecar-injected", ""),
    "12d one argument": (with_args("proxy"), "sidecar-injected", ""),
    "12d other command": (with_args("istio-iptables", "router"), "sidecar-injected", ""),
    "12d no arguments": (with_args(), "sidecar-injected", ""),
    "12e label false": (
        replace(SIDECAR, labels={INJECT: "false"}),
        "injection-disabled",
        "label sidecar.istio.io/inject=false",
    ),
    "12e label f": (replace(SIDECAR, labels={INJECT: "f"}), "injection-disabled", "label sidecar.istio.io/inject=f"),
    "12e annotation false": (
        annotated(inject="false"),
        "injection-disabled",
        "annotation sidecar.istio.io/inject=false",
    ),
    "12e the label beats the annotation": (
        replace(annotated(inject="false"), labels={INJECT: "true"}),
        "sidecar-injected",
        "",
    ),
    "12e an empty label hides no annotation": (
        replace(annotated(inject="false"), labels={INJECT: ""}),
        "injection-disabled",
        "annotation sidecar.istio.io/inject=false",
    ),
    "12e unreadable": (replace(SIDECAR, labels={INJECT: "no"}), "sidecar-injected", ""),
    "12e empty annotation": (annotated(inject=""), "sidecar-injected", ""),
    "12f no status": (
        replace(SIDECAR, annotations={}),
        "not-injected",
        "annotation sidecar.istio.io/status is absent",
    ),
    "mode NONE": (annotated(mode="NONE"), "interception-none", "annotation sidecar.istio.io/interceptionMode=NONE"),
    "mode none is no NONE": (annotated(mode="none"), "sidecar-injected", ""),
    "mode NONE without a sidecar": (replace(PLAIN, annotations={MODE: "NONE"}), "no-proxy-container", ""),
    "host network": (replace(SIDECAR, host_network=True), "host-network", "spec.hostNetwork=true"),
    "a plain pod": (PLAIN, "no-proxy-container", "containers app"),
}


@pytest.mark.parametrize(("pod", "code", "evidence"), SIDECAR_CASES.values(), ids=SIDECAR_CASES)
@pytest.mark.parametrize("namespace", [None, Namespace("shop")], ids=["namespace unknown", "namespace known"])
def test_sidecar_cases(pod: Pod, code: str, evidence: str, namespace: Namespace | None) -> None:
    decision = decide(pod, namespace, Policy())
    assert decision.reason.code == code
    assert decision.verdict is decision.reason.verdict
    assert evidence in decision.evidence


ORDER = {  # a pod to which two reasons apply: the earlier check decides
    "own pod before excluded": (
        replace(PLAIN, namespace="istio-system", name="istio-cni-node-x"),
        Policy(frozenset({"istio-system"}), "istio-system"),
        "own-agent-pod",
    ),
    "excluded before host network": (
        replace(SIDECAR, host_network=True),
        Policy(frozenset({"shop"})),
        "namespace-excluded",
    ),
    "excluded before a sidecar": (SIDECAR, Policy(frozenset({"kube-system", "shop"})), "namespace-excluded"),
    "istio-init before DISABLE_ENVOY": (
        replace(SIDECAR, containers=(Container("istio-init"), replace(PROXY, env={"DISABLE_ENVOY": "true"}))),
        Policy(),
        "istio-init-present",
    ),
    "DISABLE_ENVOY before the proxy's type": (
        replace(SIDECAR, containers=(replace(PROXY, args=("proxy", "router"), env={"DISABLE_ENVOY": "true"}),)),
        Policy(),
        "envoy-disabled",
    ),
    "the proxy's type before injection": (
        replace(with_args("proxy", "router"), labels={INJECT: "false"}),
        Policy(),
        "proxy-not-sidecar",
    ),
    "injection before the status": (
        replace(SIDECAR, annotations={}, labels={INJECT: "false"}),
        Policy(),
        "injection-disabled",
    ),
    "the status before the mode": (replace(SIDECAR, annotations={MODE: "NONE"}), Policy(), "not-injected"),
}


@pytest.mark.parametrize(("pod", "policy", "code"), ORDER.values(), ids=ORDER)
def test_order(pod: Pod, policy: Policy, code: str) -> None:
    assert decide(pod, None, policy).reason.code == code


@pytest.mark.parametrize(
    ("namespace", "name", "agent_namespace", "is_own"),
    [
        ("istio-system", "istio-cni-node-abcde", "istio-system", True),
        ("istio-system", "istio-cni-node", "istio-system", False),
        ("shop", "istio-cni-node-abcde", "istio-system", False),
        ("istio-system", "istio-cni-node-abcde", "", False),
    ],
)
def test_the_agents_own_pod(namespace: str, name: str, agent_namespace: str, is_own: bool) -> None:
    decision = decide(Pod(namespace, name), None, Policy(agent_namespace=agent_namespace))
    assert (decision.reason.code == "own-agent-pod") is is_own


SELECTORS = parse_enablement_selectors(
    [
        {"podSelector": {"matchLabels": {AMBIENT: "ambient"}}},
        {
            "podSelector": {"matchExpressions": [{"key": AMBIENT, "operator": "NotIn", "values": ["none"]}]},
            "namespaceSelector": {"matchLabels": {AMBIENT: "ambient"}},
        },
    ]
)
ON = Policy(ambient_enabled=True, enablement_selectors=SELECTORS)
IN_MESH, OUTSIDE = Namespace("shop", {AMBIENT: "ambient"}), Namespace("shop")

ZTUNNEL = Pod("istio-system", "ztunnel-x", labels={"app": "ztunnel"}, containers=(Container("istio-proxy"),))
EVERYTHING = Policy(ambient_enabled=True, enablement_selectors=parse_enablement_selectors([{}]))

AMBIENT_CASES: dict[str, tuple[Pod, Namespace | None, Policy, str]] = {
    "by the pod's label": (replace(PLAIN, labels={AMBIENT: "ambient"}), OUTSIDE, ON, "ambient-enabled"),
    "by the pod's label, whatever the namespace": (
        replace(PLAIN, labels={AMBIENT: "ambient"}),
        None,
        ON,
        "ambient-enabled",
    ),
    "by the namespace's label": (PLAIN, IN_MESH, ON, "ambient-enabled"),
    "opted out": (replace(PLAIN, labels={AMBIENT: "none"}), IN_MESH, ON, "no-proxy-container"),
    "opted out, namespace unknown": (replace(PLAIN, labels={AMBIENT: "none"}), None, ON, "no-proxy-container"),
    "neither": (PLAIN, OUTSIDE, ON, "no-proxy-container"),
    "namespace unknown": (PLAIN, None, ON, "namespace-unknown"),
    "namespace unknown, no selector": (PLAIN, None, Policy(ambient_enabled=True), "no-proxy-container"),
    "ambient is off": (PLAIN, IN_MESH, replace(ON, ambient_enabled=False), "no-proxy-container"),
    "ambient is off, namespace unknown": (PLAIN, None, replace(ON, ambient_enabled=False), "no-proxy-container"),
    "a sidecar is no ambient pod": (SIDECAR, IN_MESH, ON, "sidecar-injected"),
    "a sidecar needs no namespace": (SIDECAR, None, ON, "sidecar-injected"),
    "host network": (replace(PLAIN, host_network=True), IN_MESH, ON, "host-network"),
    "excluded": (PLAIN, IN_MESH, replace(ON, exclude_namespaces=frozenset({"shop"})), "namespace-excluded"),
    "excluded, namespace unknown": (
        PLAIN,
        None,
        replace(ON, exclude_namespaces=frozenset({"shop"})),
        "namespace-excluded",
    ),
    "a selector for everything": (
        PLAIN,
        None,
        Policy(ambient_enabled=True, enablement_selectors=parse_enablement_selectors([{}])),
        "ambient-enabled",
    ),
    "ztunnel, selected by everything": (ZTUNNEL, None, EVERYTHING, "ztunnel-pod"),
    "ztunnel in the control plane's namespace": (
        replace(ZTUNNEL, namespace="mesh"),
        None,
        replace(EVERYTHING, system_namespace="mesh"),
        "ztunnel-pod",
    ),
    "ztunnel that shares the host's network": (replace(ZTUNNEL, host_network=True), None, EVERYTHING, "ztunnel-pod"),
    "a pod called ztunnel elsewhere": (replace(ZTUNNEL, namespace="shop"), None, EVERYTHING, "ambient-enabled"),
    "another pod of the control plane": (
        replace(ZTUNNEL, labels={"app": "istiod"}),
        None,
        EVERYTHING,
        "ambient-enabled",
    ),
    "a sidecar that calls itself ztunnel": (
        replace(SIDECAR, namespace="istio-system", labels={"app": "ztunnel"}),
        None,
        EVERYTHING,
        "sidecar-injected",
    ),
    "ztunnel, ambient is off": (ZTUNNEL, None, Policy(), "not-injected"),
    "ztunnel of an excluded namespace": (
        ZTUNNEL,
        None,
        replace(EVERYTHING, exclude_namespaces=frozenset({"istio-system"})),
        "namespace-excluded",
    ),
    "ambient before istio-init": (
        replace(PLAIN, containers=(Container("istio-init"),)),
        IN_MESH,
        ON,
        "ambient-enabled",
    ),
}


@pytest.mark.parametrize(("pod", "namespace", "policy", "code"), AMBIENT_CASES.values(), ids=AMBIENT_CASES)
def test_ambient_cases(pod: Pod, namespace: Namespace | None, policy: Policy, code: str) -> None:
    assert decide(pod, namespace, policy).reason.code == code


def test_ztunnel_needs_no_labels_of_its_namespace() -> None:
    decision = decide(ZTUNNEL, None, replace(ON, enablement_selectors=SELECTORS))
    assert decision.verdict is Verdict.SKIP
    assert decision.evidence == "label app=ztunnel in the control plane's namespace istio-system"


def test_an_unknown_namespace_is_an_error_that_names_it() -> None:
    decision = decide(PLAIN, None, ON)
    assert decision.verdict is Verdict.ERROR
    assert decision.evidence == "namespace shop, asked for by enablement selector 1"


def test_every_reason_is_reached_by_a_case() -> None:
    reached = {code for _, code, _ in SIDECAR_CASES.values()}
    reached |= {code for *_, code in ORDER.values()} | {code for *_, code in AMBIENT_CASES.values()}
    assert reached | {"bad-parameters", "unreadable-pod"} == {reason.code for reason in REASONS}


def test_reasons_are_distinct_sentences() -> None:
    assert len({reason.code for reason in REASONS}) == len(REASONS)
    assert all(reason.text.endswith(".") and reason.text[0].isupper() for reason in REASONS)


WARNINGS = {
    "unreadable DISABLE_ENVOY": (
        with_env(DISABLE_ENVOY="yes"),
        "env DISABLE_ENVOY of container istio-proxy='yes' is no boolean and was passed over",
    ),
    "unreadable label": (
        replace(SIDECAR, labels={INJECT: "no"}),
        "label sidecar.istio.io/inject='no' is no boolean and was passed over",
    ),
    "DISABLE_ENVOY from elsewhere": (
        replace(SIDECAR, containers=(replace(PROXY, env_from_elsewhere=frozenset({"DISABLE_ENVOY"})),)),
        "env DISABLE_ENVOY of container istio-proxy comes from elsewhere (valueFrom)",
    ),
}


@pytest.mark.parametrize(("pod", "warning"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(pod: Pod, warning: str) -> None:
    (said,) = decide(pod, None, Policy()).warnings
    assert said.startswith(warning)


def test_no_warning_without_cause() -> None:
    assert decide(with_env(DISABLE_ENVOY=""), None, Policy()).warnings == ()


TEXTS = st.sampled_from(["", "true", "false", "NONE", "TPROXY", "ambient", "none", "x"])
PODS = st.builds(
    Pod,
    namespace=st.sampled_from(["shop", "kube-system", "istio-system", ""]),
    name=st.sampled_from(["cart", "istio-cni-node-x"]),
    labels=st.dictionaries(st.sampled_from([INJECT, AMBIENT, "app"]), TEXTS | st.just("ztunnel")),
    annotations=st.dictionaries(st.sampled_from([STATUS, INJECT, MODE]), TEXTS),
    host_network=st.booleans(),
    containers=st.lists(
        st.builds(
            Container,
            name=st.sampled_from(["istio-proxy", "istio-init", "app"]),
            args=st.sampled_from([(), ("proxy",), ("proxy", "sidecar"), ("proxy", "router")]),
            env=st.dictionaries(st.just("DISABLE_ENVOY"), TEXTS).map(MappingProxyType),
        ),
        max_size=3,
    ).map(tuple),
)


@given(PODS, st.sampled_from([None, IN_MESH, OUTSIDE]), st.sampled_from([Policy(), ON]))
def test_no_mesh_pod_is_let_through(pod: Pod, namespace: Namespace | None, policy: Policy) -> None:
    """A pod with the marks of an injected sidecar is skipped only for a reason that it names itself."""
    decision = decide(pod, namespace, policy)
    assert decision.evidence
    if decision.verdict is Verdict.SKIP and STATUS in pod.annotations and pod.proxy is not None:
        assert decision.reason.code in {
            "host-network", "istio-init-present", "envoy-disabled", "proxy-not-sidecar", "injection-disabled",
            "interception-none",
        }  # fmt: skip
