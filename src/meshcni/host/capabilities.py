"""Which of the capabilities that the agent's work needs are effective, and what each missing one is needed for."""

from __future__ import annotations

from dataclasses import dataclass

from meshcni.host.procfs import effective_capabilities


@dataclass(frozen=True, slots=True)
class Capability:
    """A Linux capability: number as in linux/capability.h, and what the agent cannot do without it."""

    name: str
    number: int
    needed_for: str


# The set that the chart grants: manifests/charts/istio-cni/templates/daemonset.yaml.
CAPABILITIES = (
    Capability("CAP_DAC_OVERRIDE", 1, "writing the plugin and its conf into directories of other users"),
    Capability("CAP_NET_ADMIN", 12, "programming packet rules, addresses and routes in pods"),
    Capability("CAP_NET_RAW", 13, "iptables, which asks the kernel through a raw socket"),
    Capability("CAP_SYS_PTRACE", 19, "finding the network namespaces of running pods under /proc"),
    Capability("CAP_SYS_ADMIN", 21, "entering the network namespaces of pods (setns)"),
)


def missing_capabilities(effective: int | None = None) -> tuple[Capability, ...]:
    """Return those of CAPABILITIES that are not effective; `effective` is a bit set, None means this process's own."""
    bits = effective_capabilities() if effective is None else effective
    return tuple(capability for capability in CAPABILITIES if not bits >> capability.number & 1)


def complaint(missing: tuple[Capability, ...]) -> str:
    """Put `missing` into one sentence for a log line or an error hint; empty when nothing is missing."""
    if not missing:
        return ""
    parts = [f"{capability.name} (needed for {capability.needed_for})" for capability in missing]
    names = ", ".join(capability.name.removeprefix("CAP_") for capability in missing)
    return f"missing {'; '.join(parts)}: add {names} to securityContext.capabilities of the agent's container"
