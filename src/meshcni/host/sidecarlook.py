"""Whether the netns of a running sidecar pod is captured, by whoever and with whatever parameters. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import IPv6Address

from meshcni import istio
from meshcni.host import routes
from meshcni.host.backends import PacketBackend
from meshcni.host.mending import Mending, check_every_address
from meshcni.host.netns import NetnsFacts, facts
from meshcni.host.redirection import FamilyPolicy, all_backends, choose_families
from meshcni.host.rtnetlink import Rtnetlink
from meshcni.host.rulesmark import RulesMark, take_mark
from meshcni.rules import capture, plan
from meshcni.rules.model import Backend, Family, Purpose, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

_SELF_V6 = IPv6Address(istio.SELF_V6.partition("/")[0]).packed


class Found(Enum):
    """How a netns is."""

    AS_WANTED = "as-wanted"  # exactly what an ADD would leave now, in whichever backend
    OTHERWISE = "otherwise"  # captured, in another way than an ADD would do it now
    NOTHING = "nothing"  # no redirection at all
    PARTLY = "partly"  # what is there does not capture all that it should


@dataclass(frozen=True, slots=True)
class Look:
    """What was found; `words`: how it differs. `variant` is the backend that holds it, empty when none does.

    `mark` is that of the rules before they were listed; None where the kernel has none.
    """

    found: Found
    words: tuple[str, ...] = ()
    variant: str = ""
    mark: RulesMark | None = None

    @property
    def is_captured(self) -> bool:
        """Whether the pod's connections go to its proxy."""
        return self.found in (Found.AS_WANTED, Found.OTHERWISE)


def look_at_capture(wanted: Mending, known: Look | None = None) -> Look:
    """Look at the calling thread's netns; `known` is the last look at it, which is returned if nothing has changed.

    Starts no process unless iptables rules have changed since (one for each family). Raises WrongAddressError when the
    netns does not hold every address of the pod, NetnsError, RulesError, ApplyError.
    """
    here = facts()
    check_every_address(here, wanted.addresses)
    mark = take_mark()
    if known is not None and known.is_captured and known.mark == mark is not None and not _routing(wanted, here, known):
        return known
    looks = [_one(backend, wanted, here) for backend in all_backends(Purpose.SIDECAR) if backend.holds_ours()]
    if not looks:
        return Look(Found.NOTHING, ("it has no rules at all",), mark=mark)
    order = list(Found)
    best = min(looks, key=lambda look: order.index(look.found))
    others = [look.variant for look in looks if look is not best]
    if best.is_captured and others:
        doubles = f"rules of a sidecar are in {' and '.join(others)} too"
        best = replace(best, found=Found.OTHERWISE, words=(*best.words, doubles))
    return replace(best, mark=mark)


def _one(backend: PacketBackend, wanted: Mending, here: NetnsFacts) -> Look:
    kind = Backend.NFTABLES if backend.variant == Backend.NFTABLES.value else Backend.IPTABLES
    ruleset, *rest = (sidecar_ruleset(wanted.parameters, one, kind) for one in _families(wanted, here))
    observed = backend.observed(ruleset)
    drift = tuple(map(str, plan.drift(ruleset, observed)))
    absent = routes.missing(ruleset)
    if not drift:
        words = tuple(f"{one} is missing" for one in absent)
        return Look(Found.PARTLY if absent else Found.AS_WANTED, words, backend.variant)
    found: list[str] = []
    for candidate in (ruleset, *rest):
        if candidate is not ruleset and capture.holds_own_chains(observed, Family.V6) and kind is Backend.IPTABLES:
            continue  # there was something for IPv6 once
        found = [*capture.gaps(candidate, observed), *_missing_ways(candidate, observed)]
        if not found:
            return Look(Found.OTHERWISE, (*drift, *absent), backend.variant)
    return Look(Found.PARTLY, tuple(capture.gaps(ruleset, observed)) or tuple(found), backend.variant)


def _families(wanted: Mending, here: NetnsFacts) -> Iterator[frozenset[Family]]:
    """Yield the families to program, then those that the original programs, if it is it who was at work.

    It leaves IPv6 out where IPv4 comes first. Then it gives `lo` no address either, as everybody does for IPv6 rules.
    """
    families = choose_families(here, wanted.parameters.dual_stack, wanted.family_policy)
    yield families
    original = choose_families(here, wanted.parameters.dual_stack, FamilyPolicy.ORIGINAL)
    if original != families and not _has_self_v6():
        yield original


def _has_self_v6() -> bool:
    with Rtnetlink() as netlink:
        return any(entry.packed == _SELF_V6 for entry in netlink.addresses())


def _missing_ways(ruleset: Ruleset, observed: plan.Observation) -> tuple[str, ...]:
    """What packets on their way to a transparent proxy need beside rules, when there are such rules."""
    if not capture.is_transparent(observed):
        return ()
    needed = replace(ruleset, addresses=())
    return tuple(f"packets do not get to the proxy: {absent} is missing" for absent in routes.missing(needed))


def _routing(wanted: Mending, here: NetnsFacts, known: Look) -> tuple[str, ...]:
    """What of addresses, policy rules and routes is missing; they have no mark."""
    if known.found is not Found.AS_WANTED:
        return ()
    families = choose_families(here, wanted.parameters.dual_stack, wanted.family_policy)
    return routes.missing(sidecar_ruleset(wanted.parameters, families, wanted.backend))
