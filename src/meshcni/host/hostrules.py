"""The host's rules for probes, in the network namespace of the calling thread: apply, verify, remove. Blocking.

The address sets that the rules look into have to be there first. They are not touched here, not even by a removal.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from meshcni.errors import ApplyError
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.redirection import Applied, all_backends, apply_ruleset, verify_ruleset
from meshcni.rules.ambient import host_ruleset
from meshcni.rules.model import Backend, Family, Purpose


def apply_host(
    probe_v4: IPv4Address,
    probe_v6: IPv6Address,
    families: frozenset[Family],
    backend: Backend,
    *,
    kubelet_uid: int | None,
    force_iptables: str = "",
    choice: VariantChoice | None = None,
) -> Applied:
    """Make the rules for probes all that the host has of ours, in one backend; right ones are left as they are.

    With iptables the jump to them comes first in nat POSTROUTING again, whatever other tools have put there.
    `kubelet_uid` is needed for nftables. A failure leaves what was there. Raises RulesError, ApplyError.
    """
    ruleset = host_ruleset(probe_v4, probe_v6, families, backend, kubelet_uid)
    return apply_ruleset(ruleset, backend, force_iptables=force_iptables, choice=choice, keep_on_failure=True)


def verify_host(
    probe_v4: IPv4Address,
    probe_v6: IPv6Address,
    families: frozenset[Family],
    backend: Backend,
    *,
    kubelet_uid: int | None,
    force_iptables: str = "",
    choice: VariantChoice | None = None,
) -> tuple[str, ...]:
    """Return in words how the host differs from what `apply_host` makes; empty when it is right.

    Starts no process with nftables, two for each family with iptables. Raises RulesError, ApplyError.
    """
    ruleset = host_ruleset(probe_v4, probe_v6, families, backend, kubelet_uid)
    return verify_ruleset(ruleset, backend, force_iptables=force_iptables, choice=choice)


def remove_host() -> None:
    """Take the rules for probes out of every backend; nothing there is fine.

    A backend that fails does not keep the others from being cleaned. Raises ApplyError, with all that failed.
    """
    problems: list[ApplyError] = []
    for backend in all_backends(Purpose.AMBIENT_HOST):
        try:
            if backend.holds_ours():
                backend.remove()
        except ApplyError as error:
            problems.append(error)
    if problems:
        raise ApplyError("; ".join(problem.message for problem in problems), problems[0].hint)
