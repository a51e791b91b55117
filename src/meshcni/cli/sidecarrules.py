"""`meshcni rules sidecar`: the rules that parameters or a pod lead to."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from meshcni import istio
from meshcni.cli.podfiles import assess_manifest, read_policy
from meshcni.cli.rulejobs import Job, perform, warn
from meshcni.cli.ruleparameters import Lookups
from meshcni.cli.show import assessment_object, parameter_values, print_decision, removal_script, script
from meshcni.cli.sidecarflags import SidecarCommand, read_command
from meshcni.errors import MeshCniError
from meshcni.pflag import ParsedFlags
from meshcni.pods.interception import Interception
from meshcni.rules.narrate import as_objects, words
from meshcni.rules.sidecar import sidecar_ruleset

if TYPE_CHECKING:
    from meshcni.host.redirection import Applied

RESOLVER_FILE: Final = "/etc/resolv.conf"


def run(arguments: Sequence[str]) -> int | None:
    """Do what the arguments ask for and return the exit status, None when they ask for help."""
    command = read_command(arguments, os.environ, machine_lookups())
    if command is None:
        return None
    warn(command.warnings)
    if command.interception is None:
        return _for_pod(command)
    return perform(command, _job(command, command.interception))


def _for_pod(command: SidecarCommand) -> int:
    """Take the parameters from a pod, if the verdict is that it has any."""
    policy = read_policy(ParsedFlags({}), os.environ)
    pod, assessment = assess_manifest(command.pod_file, None, policy, os.environ)
    warn(assessment.warnings)
    if assessment.error is not None:
        raise assessment.error
    if assessment.derived is not None:
        return perform(command, _job(command, assessment.derived.interception))
    return print_decision(command.format, pod, assessment.decision, assessment_object(pod, assessment))


def _job(command: SidecarCommand, parameters: Interception) -> Job:
    return Job(
        show=lambda form: _shown(command, parameters, form),
        removal=lambda: removal_script(command.backend),
        apply=lambda: _apply(command, parameters),
        remove=lambda: _remove(parameters),
        check=(lambda: _validate(command, parameters)) if command.validate else None,
    )


def _shown(command: SidecarCommand, parameters: Interception, form: str) -> str:
    ruleset = sidecar_ruleset(parameters, command.families, command.backend)
    if form == "script":
        return script(ruleset, command.backend)
    if form == "words":
        return "\n".join(words(ruleset)) + "\n"
    shown: dict[str, Any] = {
        "backend": command.backend.value,
        "parameters": parameter_values(parameters),
        **as_objects(ruleset),
    }
    return json.dumps(shown, indent=2) + "\n"


def _apply(command: SidecarCommand, parameters: Interception) -> Applied:
    from meshcni.host.redirection import FamilyPolicy, apply_sidecar

    return apply_sidecar(
        parameters,
        command.backend,
        force_iptables=command.force_iptables,
        family_policy=FamilyPolicy(command.family_policy),
    )


def _remove(parameters: Interception) -> None:
    from meshcni.host.redirection import remove_sidecar

    remove_sidecar(parameters)


def _validate(command: SidecarCommand, parameters: Interception) -> int:
    """Try whether redirection works in the netns of the calling thread; return the exit status."""
    from meshcni.cli.validation import V4, V6, redirection_works
    from meshcni.host.netns import facts

    loopback = V6 if any(address.version == 6 for address in facts().addresses[:1]) else V4
    ports = (parameters.proxy_port, parameters.inbound_capture_port)
    try:
        works = redirection_works(loopback, ports, command.probe_port, command.probe_timeout_seconds)
    except OSError as error:
        raise MeshCniError(
            f"cannot listen on {loopback.own}, ports {ports[0]} and {ports[1]}: {error.strerror}",
            "validate before the proxy is started",
        ) from error
    if works:
        print("meshcni rules: redirection works", file=sys.stderr)
        return 0
    print(
        f"meshcni rules: a connection to {loopback.dialled} port {command.probe_port} was not redirected within "
        f"{command.probe_timeout_seconds:g} s\n  are the rules in place, and is this the proxy's user?",
        file=sys.stderr,
    )
    return istio.VALIDATION_EXIT_CODE


# --- what this machine knows ------------------------------------------------------------------------------------------


def machine_lookups() -> Lookups:
    """Look names up in this machine's databases, as iptables would do."""
    return Lookups(
        service=_known(lambda name: socket.getservbyname(name)),
        user=_known(lambda name: pwd.getpwnam(name).pw_uid),
        group=_known(lambda name: grp.getgrnam(name).gr_gid),
        resolver_text=_resolver_text,
    )


def _known(look_up: Callable[[str], int]) -> Callable[[str], int | None]:
    def known(name: str) -> int | None:
        try:
            return look_up(name)
        except (KeyError, OSError, ValueError):  # ValueError: a NUL or a lone surrogate in the name
            return None

    return known


def _resolver_text() -> str:
    try:
        return Path(RESOLVER_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MeshCniError(
            f"cannot read the name servers from {RESOLVER_FILE}: {error.strerror}", "--capture-all-dns needs none"
        ) from error
