"""Redirection in the network namespace of the calling thread: apply, verify, remove; and a sidecar's in particular.

All or nothing: rules, addresses and routes are in place and looked at before an apply returns; if any part fails,
nothing of ours stays and the caller gets the error. Where packets must not get past a proxy that they went through
before, a failure leaves what was there (`keep_on_failure`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from meshcni.errors import ApplyError, MeshCniError, NetnsError
from meshcni.host import routes
from meshcni.host.backends import PacketBackend
from meshcni.host.backends.detection import VariantChoice, choose_variant
from meshcni.host.backends.iptables import VARIANTS, IptablesBackend, find_tools
from meshcni.host.backends.libnftables import Nft
from meshcni.host.backends.nftables import NftablesBackend
from meshcni.host.netns import NetnsFacts, facts
from meshcni.pods.interception import Interception
from meshcni.rules import plan
from meshcni.rules.model import Backend, Family, PolicyRule, Purpose, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

Address = IPv4Address | IPv6Address


class FamilyPolicy(Enum):
    """Which address families get rules; IPv4 always does."""

    # IPv6 when the namespace has a usable IPv6 address.
    BY_ADDRESS = "by-address"
    # IPv6 when the first address is one, or with dual stack when any is. The kernel lists IPv4 first, so a pod that has
    # both but no ISTIO_DUAL_STACK goes without IPv6 rules.
    ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Applied:
    """What was programmed: by whom, for which families, and how many processes that took.

    `changed` is False when everything was in place already; `reason` tells why this iptables variant was chosen.
    """

    backend: Backend
    variant: str
    families: frozenset[Family]
    digest: str
    processes: int
    changed: bool
    reason: str
    ruleset: Ruleset


@dataclass(frozen=True, slots=True)
class Observation:
    """What a namespace holds: the variants with rules of ours (more than one is a fault), policy rules of any owner."""

    variants: tuple[str, ...]
    policy_rules: tuple[PolicyRule, ...]


def choose_families(found: NetnsFacts, dual_stack: bool, policy: FamilyPolicy) -> frozenset[Family]:
    """Return the families to program. Raises NetnsError when the namespace has no usable address."""
    if not found.addresses:
        raise NetnsError(
            "no valid local IP address found in the pod's network namespace",
            "istio-cni must come after the plugin that gives the pod its address",
        )
    first_only = policy is FamilyPolicy.ORIGINAL and not dual_stack
    decisive = found.addresses[:1] if first_only else found.addresses
    wants_ipv6 = any(address.version == 6 for address in decisive)
    return frozenset({Family.V4, Family.V6}) if wants_ipv6 else frozenset({Family.V4})


def check_addresses(found: NetnsFacts, expected: Iterable[Address]) -> None:
    """Raise NetnsError when addresses are expected and the namespace has none of them: it is not this pod's."""
    wanted = set(expected)
    if wanted and wanted.isdisjoint(found.addresses):
        raise NetnsError(
            f"the network namespace has none of the pod's addresses {_words(wanted)}, but {_words(found.addresses)}",
            "it belongs to another pod, or the plugins before istio-cni did not set the address they reported",
        )


def apply_sidecar(
    parameters: Interception,
    backend: Backend,
    *,
    force_iptables: str = "",
    choice: VariantChoice | None = None,
    family_policy: FamilyPolicy = FamilyPolicy.BY_ADDRESS,
    expected_addresses: Iterable[Address] = (),
) -> Applied:
    """Program `parameters` in the calling thread's network namespace and check that they are there. Blocking.

    `choice` is the node's iptables variant as `choose_variant` gave it; without one it is found out now, which costs a
    process. `force_iptables` is `legacy` or `nft` and beats everything. `expected_addresses` are the pod's.
    Raises NetnsError, RulesError, ApplyError; then nothing of ours is left.
    """
    found = facts()
    check_addresses(found, expected_addresses)
    families = choose_families(found, parameters.dual_stack, family_policy)
    ruleset = sidecar_ruleset(parameters, families, backend)
    return apply_ruleset(ruleset, backend, force_iptables=force_iptables, choice=choice)


def apply_ruleset(
    ruleset: Ruleset,
    backend: Backend,
    *,
    force_iptables: str = "",
    choice: VariantChoice | None = None,
    keep_on_failure: bool = False,
) -> Applied:
    """Make `ruleset` (built for `backend`) all that this namespace holds of ours, in one backend only. Blocking.

    Raises ApplyError; then nothing of ours is left, or with `keep_on_failure` everything that was not replaced.
    """
    chosen, others, reason = _backends(ruleset.purpose, backend, force_iptables, choice)
    return program(ruleset, backend, chosen, others, reason, keep_on_failure=keep_on_failure)


def remove_sidecar(parameters: Interception | None = None) -> None:
    """Take everything of ours out, from whichever backend has it, with policy rules, routes and `::6`.

    `parameters` are needed only for a mark or routing table other than the default, and for entries of excluded
    interfaces. Raises ApplyError.
    """
    known = None if parameters is None else sidecar_ruleset(parameters, frozenset(Family), Backend.IPTABLES)
    for backend in all_backends(Purpose.SIDECAR):
        if backend.holds_ours():
            backend.remove(known)
    routes.remove(known or routes.NOTHING)


def observe_sidecar() -> Observation:
    """Tell what the calling thread's network namespace holds of ours; starts no process and changes nothing."""
    holding = tuple(backend.variant for backend in all_backends(Purpose.SIDECAR) if backend.holds_ours())
    return Observation(holding, routes.observe())


def verify_sidecar(
    parameters: Interception,
    backend: Backend,
    *,
    choice: VariantChoice | None = None,
    family_policy: FamilyPolicy = FamilyPolicy.BY_ADDRESS,
) -> tuple[str, ...]:
    """Return in words how the namespace differs from `parameters`; empty when it is as an ADD would leave it.

    Reads everything back, rule by rule (with iptables one process for each family), and changes nothing.
    """
    families = choose_families(facts(), parameters.dual_stack, family_policy)
    return verify_ruleset(sidecar_ruleset(parameters, families, backend), backend, choice=choice)


def verify_ruleset(
    ruleset: Ruleset, backend: Backend, *, force_iptables: str = "", choice: VariantChoice | None = None
) -> tuple[str, ...]:
    """Return in words how the namespace differs from `ruleset`; changes nothing. Raises ApplyError."""
    chosen, others, _reason = _backends(ruleset.purpose, backend, force_iptables, choice)
    doubles = tuple(f"rules of ours are in {other.variant} too" for other in others if other.holds_ours())
    return (*(str(drift) for drift in chosen.drift(ruleset)), *routes.missing(ruleset), *doubles)


def program(
    ruleset: Ruleset,
    kind: Backend,
    chosen: PacketBackend,
    others: tuple[PacketBackend, ...] = (),
    reason: str = "",
    *,
    keep_on_failure: bool = False,
) -> Applied:
    """Program `ruleset` with the backend `chosen`, take what is ours out of `others`, and look at the result.

    Everything that is new is in before anything that was there goes, so that no packet finds nothing.
    """
    try:
        changed = routes.establish(ruleset)
        changed |= chosen.apply(ruleset, keep_on_failure=keep_on_failure)
        for other in others:
            if other.holds_ours():
                other.remove(ruleset)
                changed = True
        changed |= routes.clean(ruleset)
        absent = (*chosen.missing(ruleset), *routes.missing(ruleset))
        if absent:
            raise ApplyError(
                f"after programming, the kernel lacks: {', '.join(absent)}", "does something else program this pod?"
            )
    except Exception as error:  # whatever it was: half of a rule set is worse than none
        if not keep_on_failure:
            _undo(ruleset, (chosen, *others), error)
        raise
    processes = sum(backend.processes for backend in (chosen, *others))
    return Applied(kind, chosen.variant, ruleset.families, plan.digest(ruleset), processes, changed, reason, ruleset)


def _undo(ruleset: Ruleset, backends: tuple[PacketBackend, ...], cause: Exception) -> None:
    """Leave nothing of ours; what cannot be taken out is noted on `cause`."""
    for backend in backends:
        try:
            if backend.holds_ours():
                backend.remove(ruleset)
        except Exception as error:  # the other backends and the routes still have to go
            cause.add_note(f"rules of ours may stay in {backend.variant}: {error}")
    try:
        routes.remove(ruleset)
    except (MeshCniError, OSError) as error:
        cause.add_note(f"policy rules or routes of ours stay: {error}")


def _backends(
    purpose: Purpose, backend: Backend, forced: str, choice: VariantChoice | None
) -> tuple[PacketBackend, tuple[PacketBackend, ...], str]:
    """Return the backend to use here, all others, and the reason for the iptables variant."""
    candidates = {candidate.variant: candidate for candidate in all_backends(purpose)}
    variant, reason = NftablesBackend.variant, "nftables is asked for"
    if backend is Backend.IPTABLES:
        variant, reason = _variant_here(candidates, forced, choice)
    if variant not in candidates:
        raise ApplyError(f"there are no commands for iptables variant {variant!r}", "install iptables")
    others = tuple(candidate for name, candidate in candidates.items() if name != variant)
    return candidates[variant], others, reason


def _variant_here(candidates: dict[str, PacketBackend], forced: str, choice: VariantChoice | None) -> tuple[str, str]:
    """Forced, else the one variant that holds rules of ours already, else the node's choice."""
    if not forced:
        holding = [name for name in VARIANTS if name in candidates and candidates[name].holds_ours()]
        if len(holding) == 1:
            return holding[0], "the pod has rules of ours there already"
    decided = choose_variant(forced) if forced or choice is None else choice
    return decided.variant, decided.reason


def all_backends(purpose: Purpose) -> tuple[PacketBackend, ...]:
    """Return every backend that this image has, for what is ours for `purpose` in this thread's namespace."""
    tools = [found for found in map(find_tools, VARIANTS) if found is not None]
    nft_here = Nft()
    return (NftablesBackend(nft_here, purpose), *(IptablesBackend(found, nft_here, purpose) for found in tools))


def _words(addresses: Iterable[Address]) -> str:
    return ", ".join(sorted(map(str, addresses))) or "none"
