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

    @property
    def short_name(self) -> str:
        """As a container's securityContext writes it."""
        return self.name.removeprefix("CAP_")


DAC_OVERRIDE = Capability("CAP_DAC_OVERRIDE", 1, "writing the plugin and its conf into directories of other users")
NET_ADMIN = Capability("CAP_NET_ADMIN", 12, "programming packet rules, addresses and routes in pods")
NET_RAW = Capability("CAP_NET_RAW", 13, "iptables, which asks the kernel through a raw socket")
SYS_PTRACE = Capability("CAP_SYS_PTRACE", 19, "finding the network namespaces of running pods under /proc")
SYS_ADMIN = Capability("CAP_SYS_ADMIN", 21, "entering the network namespaces of pods (setns)")
# The set that the chart grants: manifests/charts/istio-cni/templates/daemonset.yaml.
CAPABILITIES = (DAC_OVERRIDE, NET_ADMIN, NET_RAW, SYS_PTRACE, SYS_ADMIN)


def missing_capabilities(effective: int | None = None) -> tuple[Capability, ...]:
    """Return those of CAPABILITIES that are not effective; `effective` is a bit set, None means this process's own."""
    bits = effective_capabilities() if effective is None else effective
    return tuple(capability for capability in CAPABILITIES if not bits >> capability.number & 1)


def complaint(missing: tuple[Capability, ...]) -> str:
    """Put `missing` into one sentence for a log line or an error hint; empty when nothing is missing."""
    if not missing:
        return ""
    names = ", ".join(capability.short_name for capability in missing)
    return f"missing {purposes(missing)}: add {names} to securityContext.capabilities of the agent's container"


def purposes(missing: tuple[Capability, ...]) -> str:
    """Each with what it is needed for."""
    return "; ".join(f"{capability.name} (needed for {capability.needed_for})" for capability in missing)
