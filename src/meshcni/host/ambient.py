"""Ambient redirection of a pod in the network namespace of the calling thread: apply, verify, remove. Blocking."""

from __future__ import annotations

from collections.abc import Iterable

from meshcni.errors import ApplyError
from meshcni.host import routes
from meshcni.host.backends import PacketBackend
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.netns import facts
from meshcni.host.redirection import (
    Address,
    Applied,
    all_backends,
    apply_ruleset,
    check_addresses,
    verify_ruleset,
)
from meshcni.pods.ambient import AmbientParameters
from meshcni.rules.ambient import INBOUND, pod_ruleset, route_ruleset
from meshcni.rules.model import Backend, Family, Purpose, Ruleset
from meshcni.rules.nft_layout import LAYOUTS

_NOTHING = Ruleset(frozenset(), (), purpose=Purpose.AMBIENT_POD)
# What ambient rules of every kind have and a sidecar's have not.
_TRACES = frozenset({INBOUND, *LAYOUTS[Purpose.AMBIENT_POD].table_names})


def prepare_routes(families: frozenset[Family]) -> bool:
    """Make policy rules and routes for packets that return to ztunnel, which change nothing without packet rules.

    Tells whether any was missing. `families` are the node's. Raises ApplyError.
    """
    return routes.establish(route_ruleset(families))


def apply_pod(
    parameters: AmbientParameters,
    families: frozenset[Family],
    backend: Backend,
    *,
    force_iptables: str = "",
    choice: VariantChoice | None = None,
    expected_addresses: Iterable[Address] = (),
    keep_on_failure: bool = False,
) -> Applied:
    """Make `parameters` all that this pod has of ours: rules in one backend, policy rules, routes.

    `families` are the node's (AMBIENT_IPV6), whatever addresses the pod has. What other backends or a sidecar left goes
    after the new rules are in. `choice` is the node's iptables variant as `choose_variant` gave it; `force_iptables` is
    `legacy` or `nft` and beats everything. `keep_on_failure` is for an enrolled pod: if it cannot be healed, what it
    has stays, so that nothing bypasses ztunnel; otherwise nothing of ours stays.
    Raises NetnsError (none of `expected_addresses` is here), RulesError, ApplyError.
    """
    if expected := tuple(expected_addresses):
        check_addresses(facts(), expected)
    ruleset = pod_ruleset(parameters, families, backend)
    return apply_ruleset(
        ruleset, backend, force_iptables=force_iptables, choice=choice, keep_on_failure=keep_on_failure
    )


def verify_pod(
    parameters: AmbientParameters,
    families: frozenset[Family],
    backend: Backend,
    *,
    force_iptables: str = "",
    choice: VariantChoice | None = None,
) -> tuple[str, ...]:
    """Return in words how this pod differs from what `apply_pod` makes; empty when it is right.

    Starts no process with nftables, one for each family with iptables. Raises RulesError, ApplyError.
    """
    ruleset = pod_ruleset(parameters, families, backend)
    return verify_ruleset(ruleset, backend, force_iptables=force_iptables, choice=choice)


def release_pod(backends: Iterable[PacketBackend] | None = None) -> None:
    """Let new connections pass by ztunnel; what those under way need (translation, marks, routes) stays.

    Taking everything at once leaves them hanging: with the last nat chain the kernel stops translating their packets.
    Raises ApplyError.
    """
    for backend in all_backends(Purpose.AMBIENT_POD) if backends is None else backends:
        if not _TRACES.isdisjoint(backend.own_names()):
            backend.release()


def remove_pod(backends: Iterable[PacketBackend] | None = None) -> None:
    """Take the ambient rules of every backend out, then the policy rules, then the routes; nothing there is fine.

    A sidecar's rules beside which there are no ambient ones stay, whatever says that this pod was ambient. A part that
    fails does not keep the others from going. `backends` None stands for all that this image has.
    Raises ApplyError, with all that failed.
    """
    problems: list[ApplyError] = []
    try:
        _remove_packet_rules(all_backends(Purpose.AMBIENT_POD) if backends is None else backends, problems)
    except ApplyError as error:  # a kernel that does not even show its rules
        problems.append(error)
    try:
        routes.remove(_NOTHING)
    except ApplyError as error:
        problems.append(error)
    if problems:
        raise ApplyError("; ".join(problem.message for problem in problems), problems[0].hint)


def _remove_packet_rules(backends: Iterable[PacketBackend], problems: list[ApplyError]) -> None:
    holding = [(backend, names) for backend in backends if (names := backend.own_names())]
    if _TRACES.isdisjoint(name for _backend, names in holding for name in names):
        return
    for backend, _names in holding:
        try:
            backend.remove()
        except ApplyError as error:
            problems.append(error)
