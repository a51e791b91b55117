"""A kernel that has IPv6 and no netfilter for it: pods without IPv6 addresses get rules, others fail and say why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv6Address

import pytest
from lab.withoutip6 import without_ip6tables
from tests.kernel.conftest import PodMaker
from tests.kernel.world import IPV6, Netns, apply, node_choice, policy, save, state

from meshcni.errors import ApplyError
from meshcni.host.ambient import apply_pod, verify_pod
from meshcni.host.hostrules import apply_host, verify_host
from meshcni.host.ipsetprobes import IpsetProbeSet
from meshcni.host.kernelsupport import lacks, lacks_for_ipv6_alone
from meshcni.host.mending import Mending, mend_sidecar
from meshcni.host.redirection import Applied
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules.model import Backend, Family

V4 = frozenset({Family.V4})
LEGACY = node_choice("legacy")
PARAMETERS = [
    Interception(),
    Interception(mode=InterceptionMode.TPROXY, redirect_dns=True, capture_all_dns=True),
]
AMBIENT = AmbientParameters()


@pytest.fixture
def v4_pod(new_pod: PodMaker) -> Netns:
    return new_pod(V4)


def failure(pod: Netns, parameters: Interception) -> ApplyError:
    with pytest.raises(ApplyError) as caught:
        without_ip6tables(lambda: apply(pod, parameters, "legacy"))
    return caught.value


def test_the_kernel_is_as_one_without_the_module() -> None:
    """What the other tests stand on: the commands' own words, one thing missing, for one thread."""
    found = without_ip6tables(lambda: lacks(Backend.IPTABLES, "legacy", ipv6=True))
    (lack,) = found
    assert (lack.modules, lack.family) == ("ip6_tables, ip6table_{nat,mangle,raw}", Family.V6)
    assert "initialize" in lack.reason
    assert without_ip6tables(lambda: lacks_for_ipv6_alone(Backend.IPTABLES, "legacy"))[0].modules == lack.modules
    assert without_ip6tables(lambda: lacks(Backend.IPTABLES, "legacy", ipv6=False)) == ()
    for variant in ("legacy", "nft"):
        assert lacks_for_ipv6_alone(Backend.IPTABLES, variant) == ()


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda one: one.mode.value)
def test_a_sidecar_pod_without_ipv6_gets_its_rules(parameters: Interception, v4_pod: Netns) -> None:
    applied = without_ip6tables(lambda: apply(v4_pod, parameters, "legacy"))
    assert (applied.variant, applied.families) == ("legacy", V4)
    assert "ISTIO_OUTPUT" in save(v4_pod, "legacy", Family.V4)
    assert not without_ip6tables(lambda: apply(v4_pod, parameters, "legacy")).changed


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda one: one.mode.value)
def test_a_dual_stack_sidecar_pod_fails_without_a_trace(parameters: Interception, pod: Netns) -> None:
    pod.shell("iptables-legacy-save")  # the tables that a failure leaves behind, empty
    before = state(pod)
    error = failure(pod, parameters)
    assert "ip6tables-legacy-restore" in error.message
    assert "IPv6 traffic would pass by the mesh: load ip6_tables" in error.hint
    assert "FAMILY_POLICY=original" in error.hint
    assert state(pod) == before


def test_repair_of_a_dual_stack_pod_says_the_same(pod: Netns) -> None:
    wanted = Mending(Interception(), pod_addresses(), Backend.IPTABLES)
    with pytest.raises(ApplyError, match="ip6tables") as caught:
        without_ip6tables(lambda: pod.call(lambda: mend_sidecar(wanted, LEGACY)))
    assert "load ip6_tables" in caught.value.hint


def pod_addresses() -> tuple[IPv6Address, ...]:
    return (IPv6Address(IPV6),)


def apply_ambient(pod: Netns) -> Applied:
    return pod.call(lambda: apply_pod(AMBIENT, V4, Backend.IPTABLES, choice=LEGACY))


def test_an_ambient_pod_gets_the_rules_of_the_node(v4_pod: Netns) -> None:
    assert without_ip6tables(lambda: apply_ambient(v4_pod)).changed
    drift = without_ip6tables(
        lambda: v4_pod.call(lambda: verify_pod(AMBIENT, V4, Backend.IPTABLES, choice=LEGACY)),
    )
    assert drift == ()
    assert "lookup 100" in policy(v4_pod)


@pytest.fixture
def host() -> Iterator[Netns]:
    with closing(Netns()) as netns:
        netns.ip("link set lo up")
        yield netns


def test_the_host_gets_rules_and_sets_for_ipv4(host: Netns) -> None:
    def work() -> tuple[str, ...]:
        IpsetProbeSet(V4).ensure()
        arguments = (AMBIENT.probe_v4, AMBIENT.probe_v6, V4, Backend.IPTABLES)
        apply_host(*arguments, kubelet_uid=None, choice=LEGACY)
        return verify_host(*arguments, kubelet_uid=None, choice=LEGACY)

    assert without_ip6tables(lambda: host.call(work)) == ()
    assert "ISTIO_POSTRT" in save(host, "legacy", Family.V4)
    assert "-v6" not in host.shell("ipset", "list")
