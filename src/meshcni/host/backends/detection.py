"""Which iptables variant to use, found out without changing anything, and why.

The original runs legacy commands to find out whether legacy is in use; they create the tables whose existence the next
detection takes for an answer. Here files and listings are read, and rules are tried only in a namespace made for the
trial, which nobody else sees and which is gone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshcni.errors import ApplyError, MeshCniError, NetnsError, SettingError
from meshcni.host import procfs
from meshcni.host.backends import xtables
from meshcni.host.backends.iptables import VARIANTS, IptablesBackend, find_tools
from meshcni.host.netns import call_in_new_netns
from meshcni.pods.interception import Interception
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

FORCE_SETTING = "FORCE_IPTABLES_BINARY"


@dataclass(frozen=True, slots=True)
class VariantChoice:
    """The variant to use (`nft` or `legacy`), why, and the boot for which the answer holds (empty when unknown)."""

    variant: str
    reason: str
    boot_id: str = ""

    def to_object(self) -> dict[str, str]:
        """Return it as JSON-able data, for the agent's run directory."""
        return {"variant": self.variant, "reason": self.reason, "boot_id": self.boot_id}

    @classmethod
    def from_object(cls, data: object, boot_id: str) -> VariantChoice | None:
        """Read what `to_object` gave; None when it is something else or from another boot than `boot_id`."""
        if not isinstance(data, Mapping) or data.get("variant") not in VARIANTS or not boot_id:
            return None
        if data.get("boot_id") != boot_id:
            return None
        return cls(str(data["variant"]), str(data.get("reason", "")), boot_id)


def choose_variant(
    forced: str = "",
    host_uses_legacy: bool | None = None,
    unusable: Callable[[str], str] | None = None,
) -> VariantChoice:
    """Decide for this node: forced, else legacy when the host's own rules are in legacy tables, else nft, else legacy.

    `host_uses_legacy` is `legacy_rules_here()` called in the host's network namespace, None when that is out of reach.
    `unusable` tells why a variant cannot be used here, empty when it can; None tries it with real commands.
    Raises SettingError for a `forced` that is no variant, ApplyError when no variant works.
    """
    boot_id = procfs.boot_id()
    if forced:
        if forced not in VARIANTS:
            raise SettingError(f"iptables binary {forced!r} from {FORCE_SETTING} is unsupported", "use legacy or nft")
        return VariantChoice(forced, f"forced by {FORCE_SETTING}", boot_id)
    problem_of = unusable or why_unusable
    order = [("nft", "the kernel and the nft commands work"), ("legacy", "nft does not work here")]
    if host_uses_legacy:
        order = [("legacy", "the host's own rules are in legacy tables"), order[0]]
    problems: dict[str, str] = {}
    for variant, reason in order:
        problem = problem_of(variant)
        if not problem:
            because = f" ({problems['nft']})" if variant == "legacy" and "nft" in problems else ""
            return VariantChoice(variant, reason + because, boot_id)
        problems[variant] = problem
    raise ApplyError(
        "no iptables variant works: " + "; ".join(f"{variant}: {problem}" for variant, problem in problems.items()),
        "install iptables and load its kernel modules, or use nftables",
    )


def legacy_rules_here() -> bool:
    """Tell whether legacy tables of this thread's network namespace hold rules; makes none appear."""
    try:
        return any(xtables.has_rules(family) for family in Family)
    except ApplyError:
        return False  # not allowed to look: no hint


def why_unusable(variant: str) -> str:
    """Try the default rules of `variant` in a namespace made for it; return why they cannot be used, empty if they can.

    Only IPv4 is tried: a node without IPv6 modules is fine until a pod with an IPv6 address comes. Without the right to
    make a namespace (in an init container, say) there is no trial, and the rules themselves show whether they work.
    """
    tools = find_tools(variant)
    if tools is None:
        return f"no iptables-{variant}-restore and iptables-{variant}-save in the search path"
    ruleset = sidecar_ruleset(Interception(), frozenset({Family.V4}), Backend.IPTABLES)
    backend = IptablesBackend(tools)
    try:
        call_in_new_netns(lambda: backend.apply(ruleset))
    except NetnsError:
        return ""
    except MeshCniError as error:
        return error.message
    return ""
