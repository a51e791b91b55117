"""A sidecar's redirection in the netns of a pod that runs: look, mend what is wrong, look again. Blocking.

An ADD comes before anything runs, so it may take everything out when it fails; here a proxy may be at work, and what
was right stays whatever happens. And an ADD is told its netns by the runtime, where this one was found by looking: it
must hold every address of the pod, not just one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshcni.errors import ApplyError, NetnsError
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.netns import NetnsFacts, facts
from meshcni.host.redirection import Address, FamilyPolicy, apply_ruleset, choose_families, verify_ruleset
from meshcni.pods.interception import Interception
from meshcni.rules.model import Backend, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

MAX_NAMED = 3  # differences in an error's text


class WrongAddressError(NetnsError):
    """The netns does not hold every address of the pod, so it may be another one's."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What was wrong, in words, empty when nothing was; `variant` is what mended it, empty when nothing was changed."""

    drift: tuple[str, ...] = ()
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Mending:
    """What belongs into the netns and how it gets there; `addresses` are all that the pod has."""

    parameters: Interception
    addresses: tuple[Address, ...]
    backend: Backend
    forced_variant: str = ""
    family_policy: FamilyPolicy = FamilyPolicy.BY_ADDRESS


def look_at_sidecar(wanted: Mending, choice: VariantChoice | None) -> Mended:
    """Tell what is wrong in the calling thread's netns; changes nothing. Raises NetnsError, RulesError, ApplyError."""
    return Mended(_drift(wanted, _ruleset(wanted), choice))


def mend_sidecar(wanted: Mending, choice: VariantChoice | None) -> Mended:
    """Make the calling thread's netns as an ADD would leave it; what is right already is not touched.

    Raises WrongAddressError (nothing is changed then), NetnsError, RulesError, and ApplyError, after which everything
    that was there before still is, except what had been replaced already.
    """
    ruleset = _ruleset(wanted)
    drift = _drift(wanted, ruleset, choice)
    if not drift:
        return Mended()
    applied = apply_ruleset(
        ruleset, wanted.backend, force_iptables=wanted.forced_variant, choice=choice, keep_on_failure=True
    )
    still = _drift(wanted, ruleset, choice)
    if still:
        raise ApplyError(
            f"after programming, {len(still)} things are still wrong: {'; '.join(still[:MAX_NAMED])}",
            "does something else program this pod?",
        )
    return Mended(drift, applied.variant)


def check_every_address(found: NetnsFacts, wanted: Iterable[Address]) -> None:
    """Raise WrongAddressError unless the netns has every one of the pod's addresses, at least one."""
    addresses = tuple(wanted)
    absent = [address for address in addresses if address not in found.addresses]
    if absent or not addresses:
        here = ", ".join(map(str, found.addresses)) or "no address"
        raise WrongAddressError(
            f"the network namespace holds {here}, and not {', '.join(map(str, absent)) or 'any address of the pod'}",
            "it is another pod's, or the API server does not know this sandbox's addresses yet",
        )


def _ruleset(wanted: Mending) -> Ruleset:
    found = facts()
    check_every_address(found, wanted.addresses)
    families = choose_families(found, wanted.parameters.dual_stack, wanted.family_policy)
    return sidecar_ruleset(wanted.parameters, families, wanted.backend)


def _drift(wanted: Mending, ruleset: Ruleset, choice: VariantChoice | None) -> tuple[str, ...]:
    return verify_ruleset(ruleset, wanted.backend, force_iptables=wanted.forced_variant, choice=choice)
