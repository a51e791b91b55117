"""The one path from a pod to what is done with it."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from meshcni import istio
from meshcni.errors import CNI_INVALID_CONFIG, PodSpecError
from meshcni.pods.annotations import ANNOTATIONS, derive_interception
from meshcni.pods.assess import assess, unreadable
from meshcni.pods.eligibility import Policy, Verdict
from meshcni.pods.interception import Interception
from meshcni.pods.model import Container, Pod

PROXY = Container("istio-proxy")
SIDECAR = Pod("shop", "cart", annotations={istio.SIDECAR_STATUS: "{}"}, containers=(PROXY,))


def annotated(**more: str) -> Pod:
    return replace(SIDECAR, annotations={**SIDECAR.annotations, istio.EXCLUDE_INBOUND_PORTS: more["exclude"]})


def test_a_sidecar_pod_has_parameters() -> None:
    assessment = assess(SIDECAR, None, Policy())
    assert assessment.decision.verdict is Verdict.SIDECAR
    assert assessment.derived == derive_interception(SIDECAR)
    assert assessment.error is None


def test_a_skipped_pod_has_none_and_its_annotations_are_not_looked_at() -> None:
    pod = replace(annotated(exclude="nonsense"), labels={istio.INJECT_KEY: "false"})
    assessment = assess(pod, None, Policy())
    assert (assessment.decision.verdict, assessment.derived, assessment.error) == (Verdict.SKIP, None, None)


def test_a_wrong_annotation_is_a_verdict() -> None:
    assessment = assess(annotated(exclude="http"), None, Policy())
    assert assessment.decision.verdict is Verdict.ERROR
    assert assessment.decision.reason.code == "bad-parameters"
    assert assessment.error is not None
    assert assessment.error.cni_code == CNI_INVALID_CONFIG
    assert assessment.decision.evidence == assessment.error.message
    assert istio.EXCLUDE_INBOUND_PORTS in assessment.decision.evidence


def test_the_agents_environment_fills_in() -> None:
    assessment = assess(SIDECAR, None, Policy(), {istio.ENV_LOOPBACK_CIDR: "127.0.0.0/8"})
    assert assessment.derived is not None
    assert assessment.derived.interception.loopback_cidr.prefixlen == 8


def test_warnings_of_both_steps() -> None:
    proxy = replace(PROXY, env={istio.ENV_DISABLE_ENVOY: "no", istio.ENV_DNS_CAPTURE: "no"})
    warnings = assess(replace(SIDECAR, containers=(proxy,)), None, Policy()).warnings
    assert [istio.ENV_DISABLE_ENVOY in warnings[0], istio.ENV_DNS_CAPTURE in warnings[1], len(warnings)] == [
        True,
        True,
        2,
    ]


def test_an_unreadable_pod_is_refused() -> None:
    assessment = unreadable(PodSpecError("spec.containers is 1, expected a list"))
    assert assessment.decision.verdict is Verdict.ERROR
    assert assessment.decision.evidence == "spec.containers is 1, expected a list"


TEXT = st.text(max_size=12) | st.text(alphabet="*,-/.:0123456789 abcdef", max_size=20)
TEXT.validate()  # hypothesis reads its table of characters now: a pure test may not
LIKELY = st.sampled_from(["", "*", "80", "80,443,", "10.0.0.0/8", "fd00::1/64", "eth1", "TPROXY", "NONE", "true"])
NAMES = [name for source in ANNOTATIONS for name in source.annotations]
VARIABLES = [
    istio.ENV_DNS_CAPTURE, istio.ENV_DUAL_STACK, istio.ENV_DROP_INVALID, istio.ENV_DISABLE_ENVOY,
    istio.ENV_LOOPBACK_CIDR, istio.ENV_OWNER_GROUPS, istio.ENV_OWNER_GROUPS_EXCLUDE,
]  # fmt: skip
ANY_ANNOTATIONS = st.dictionaries(st.sampled_from(NAMES) | TEXT, LIKELY | TEXT, max_size=6)
ANY_ENV = st.dictionaries(st.sampled_from(VARIABLES), LIKELY | TEXT, max_size=4)


@given(ANY_ANNOTATIONS, ANY_ENV, ANY_ENV)
def test_any_annotations_make_an_assessment(
    annotations: dict[str, str], env: dict[str, str], environment: dict[str, str]
) -> None:
    proxy = replace(PROXY, env=env)
    pod = replace(SIDECAR, annotations={**annotations, istio.SIDECAR_STATUS: ""}, containers=(proxy,))
    assessment = assess(pod, None, Policy(), environment)
    verdict = assessment.decision.verdict
    assert (assessment.derived is not None) == (verdict is Verdict.SIDECAR)
    assert (assessment.error is not None) == (verdict is Verdict.ERROR)
    if assessment.derived is not None:
        assert set(assessment.derived.origins) == {one.name for one in fields(Interception)}
        assert_normalised(assessment.derived.interception)


def assert_normalised(parameters: Interception) -> None:
    """Lists hold no repetitions, prefixes no host bits, ports are ports."""
    for one in fields(parameters):
        value = getattr(parameters, one.name)
        if isinstance(value, tuple):
            assert len(set(value)) == len(value)
    assert parameters.inbound_exclude_ports[-1].last <= 65535
    assert {15020, 15021, 15090} <= {port.first for port in parameters.inbound_exclude_ports}
