"""Letting a pod go: new connections pass by at once, those under way keep what they need until the rest is taken."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.kernel.world import KIND, VARIANTS, Netns, make_pod

from meshcni.host.ambient import apply_pod, release_pod, remove_pod, verify_pod
from meshcni.host.backends.detection import VariantChoice
from meshcni.pods.ambient import AmbientParameters
from meshcni.rules.model import Backend, Family

BOTH = frozenset(Family)
PARAMETERS = AmbientParameters(dns_capture=True)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pod() -> Iterator[Netns]:
    made = make_pod()
    yield made
    made.close()


def choice_of(variant: str) -> VariantChoice | None:
    return None if KIND[variant] is Backend.NFTABLES else VariantChoice(variant, "the test says so")


def enrol(pod: Netns, variant: str) -> None:
    pod.call(lambda: apply_pod(PARAMETERS, BOTH, KIND[variant], choice=choice_of(variant)))


def listing(pod: Netns) -> str:
    texts = [pod.shell("nft", "list", "ruleset")]
    texts += [pod.shell(f"{tool}-legacy-save") for tool in ("iptables", "ip6tables")]
    return re.sub(r"packets \d+ bytes \d+|\[\d+:\d+\]|^#.*$", "", "\n".join(texts).lower(), flags=re.MULTILINE)


def kept_lines(text: str) -> list[str]:
    """Return the hooks, the jumps and what marks connections: what those under way live on."""
    return re.findall(r"^.*(?:hook | jump |-j istio_|ct mark|connmark|ct zone|-j ct).*$", text, re.MULTILINE)


def test_a_released_pod_redirects_nothing_and_keeps_hooks_marks_and_routes(pod: Netns, variant: str) -> None:
    enrol(pod, variant)
    before = listing(pod)
    assert "redirect" in before
    pod.call(release_pod)
    after = listing(pod)
    assert "redirect" not in after
    assert kept_lines(after) == kept_lines(before)
    assert "fwmark 0x111/0xfff lookup 100" in pod.shell("ip", "rule")
    assert "local default dev lo" in pod.shell("ip", "route", "show", "table", "100")


def test_a_released_pod_can_be_enrolled_again_and_taken_out(pod: Netns, variant: str) -> None:
    enrol(pod, variant)
    pod.call(release_pod)
    assert pod.call(lambda: verify_pod(PARAMETERS, BOTH, KIND[variant], choice=choice_of(variant)))
    enrol(pod, variant)
    assert not pod.call(lambda: verify_pod(PARAMETERS, BOTH, KIND[variant], choice=choice_of(variant)))
    pod.call(release_pod)
    pod.call(remove_pod)
    assert "istio" not in listing(pod)
    assert "lookup 100" not in pod.shell("ip", "rule")


def test_others_rules_and_an_empty_pod_are_left_alone(pod: Netns, variant: str) -> None:
    pod.shell("nft", "add table inet other; add chain inet other c; add rule inet other c counter accept")
    before = listing(pod)
    pod.call(release_pod)
    assert listing(pod) == before
    enrol(pod, variant)
    pod.call(release_pod)
    assert "table inet other" in listing(pod)
