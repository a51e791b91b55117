"""Whether this process may do what the settings ask of it; looked at before anything is opened, written or started."""

from __future__ import annotations

from collections.abc import Iterator

from meshcni.agent.settings import Settings
from meshcni.errors import MeshCniError
from meshcni.host.capabilities import (
    CAPABILITIES,
    DAC_OVERRIDE,
    NET_ADMIN,
    NET_RAW,
    SYS_ADMIN,
    SYS_PTRACE,
    Capability,
    missing_capabilities,
    purposes,
)
from meshcni.host.procfs import Privileges

EXIT_STATUS = 77  # EX_NOPERM of sysexits.h


class PrivilegesError(MeshCniError):
    """A capability is missing without which the agent cannot do its work; it has touched nothing."""

    exit_code = EXIT_STATUS


def check(settings: Settings, found: Privileges) -> str:
    """Return what is missing and merely degrades, as a sentence, empty when nothing is. Raises PrivilegesError."""
    missing = missing_capabilities(found.effective)
    needed = indispensable(settings, found.uid)
    fatal = tuple(capability for capability in missing if capability in needed)
    if fatal:
        raise PrivilegesError(f"missing {purposes(fatal)}", f"{_reason(fatal, found)}\n{_yaml(fatal, found)}")
    useful = tuple(one for one in missing if one not in _useless(settings))
    return f"missing {purposes(useful)}; what needs them is left out" if useful else ""


def indispensable(settings: Settings, uid: int) -> tuple[Capability, ...]:
    """The capabilities without which the configured mode cannot work."""
    found = [NET_ADMIN, SYS_ADMIN]
    if not settings.native_nftables and settings.force_iptables_binary != "nft":
        found.append(NET_RAW)  # of the iptables commands, only the legacy ones open a raw socket
    if settings.ambient_enabled:
        found.append(SYS_PTRACE)
    if uid != 0:
        found.append(DAC_OVERRIDE)  # the host's directories belong to root
    return tuple(capability for capability in CAPABILITIES if capability in found)


def _useless(settings: Settings) -> tuple[Capability, ...]:
    """What the configured mode has no use for."""
    return (NET_RAW,) if settings.native_nftables or settings.force_iptables_binary == "nft" else ()


def _reason(fatal: tuple[Capability, ...], found: Privileges) -> str:
    if not _all_allowed(fatal, found):
        return "the container is not allowed them; in its securityContext:"
    if found.uid == 0:
        return "the process has given them up; start it without that, with the securityContext:"
    if found.no_new_privileges:
        return (
            f"user {found.uid} gets them from the file capabilities of the image's install-cni, which "
            "allowPrivilegeEscalation: false keeps from acting; in the container's securityContext:"
        )
    return (
        f"user {found.uid} gets them from the file capabilities of the image's /usr/local/bin/install-cni, which was "
        "not started, or has lost them on the way here; start that, or as root, in the container's securityContext:"
    )


def _all_allowed(fatal: tuple[Capability, ...], found: Privileges) -> bool:
    return all(found.bounding >> capability.number & 1 for capability in fatal)


def _yaml(fatal: tuple[Capability, ...], found: Privileges) -> str:
    return "\n".join(_lines(fatal, found))


def _lines(fatal: tuple[Capability, ...], found: Privileges) -> Iterator[str]:
    yield "securityContext:"
    if found.uid != 0 and found.no_new_privileges:
        yield "  allowPrivilegeEscalation: true"
    elif found.uid != 0 and _all_allowed(fatal, found):
        yield "  runAsUser: 0"
    yield "  capabilities:"
    yield "    drop: [ALL]"
    yield f"    add: [{', '.join(capability.short_name for capability in CAPABILITIES)}]"
