"""`meshcni rules sidecar`: print the rules that parameters or a pod lead to, or program them."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from meshcni import istio
from meshcni.cli.podfiles import assess_manifest, read_policy
from meshcni.cli.ruleflags import FLAGS, SidecarCommand, read_command
from meshcni.cli.ruleparameters import Lookups
from meshcni.cli.show import assessment_object, camel_case, plain, removal_script, script
from meshcni.errors import MeshCniError, UsageError
from meshcni.pflag import ParsedFlags, help_text
from meshcni.pods.eligibility import Verdict
from meshcni.pods.interception import Interception
from meshcni.rules.narrate import as_objects, words
from meshcni.rules.sidecar import sidecar_ruleset

T = TypeVar("T")
USAGE: Final = "Usage: meshcni rules sidecar [--pod POD.yaml | parameters] [--apply] [--format script|json|words]"
FAILED: Final = 1  # a wrong command line too: the original has no other status but that of a failed validation
RESOLVER_FILE: Final = "/etc/resolv.conf"


def main(argv: Sequence[str]) -> int:
    """Run `rules` with its arguments (`["sidecar", ...]`); return the exit status."""
    try:
        return _run(argv)
    except MeshCniError as error:
        print(
            f"meshcni rules: {error.message}", *([f"  {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr
        )
        return FAILED


def _run(argv: Sequence[str]) -> int:
    command = None
    if argv[:1] == ["sidecar"]:
        command = read_command(argv[1:], os.environ, machine_lookups())
    elif argv[:1] not in (["--help"], ["-h"], ["help"]):
        raise UsageError(f"no such rules: {argv[0]!r}" if argv else "which rules?", "write: meshcni rules sidecar")
    if command is None:
        print(help_text(USAGE, FLAGS))
        return 0
    for warning in command.warnings:
        print(f"meshcni rules: warning: {warning}", file=sys.stderr)
    if command.interception is None:
        return _for_pod(command)
    return _print_or_apply(command, command.interception)


def _for_pod(command: SidecarCommand) -> int:
    """Take the parameters from a pod, if the verdict is that it has any."""
    policy = read_policy(ParsedFlags({}), os.environ)
    pod, assessment = assess_manifest(command.pod_file, None, policy, os.environ)
    for warning in assessment.warnings:
        print(f"meshcni rules: warning: {warning}", file=sys.stderr)
    if assessment.error is not None:
        raise assessment.error
    decision = assessment.decision
    if assessment.derived is not None:
        return _print_or_apply(command, assessment.derived.interception)
    if command.format == "json":
        print(json.dumps(assessment_object(pod, assessment), indent=2))
    else:
        print(f"{pod.full_name}: {decision.verdict.value}. {decision.reason.text} ({decision.evidence})")
    return 1 if decision.verdict is Verdict.ERROR else 0


def _print_or_apply(command: SidecarCommand, parameters: Interception) -> int:
    if command.apply:
        print(_in_netns(command.netns_path, lambda: _apply(command, parameters)))
    elif command.cleanup_only:
        print(removal_script(command.backend), end="")
    else:
        print(_shown(command, parameters), end="")
    if not command.validate:
        return 0
    return _in_netns(command.netns_path, lambda: _validate(command, parameters))


def _shown(command: SidecarCommand, parameters: Interception) -> str:
    ruleset = sidecar_ruleset(parameters, command.families, command.backend)
    if command.format == "script":
        return script(ruleset, command.backend)
    if command.format == "words":
        return "\n".join(words(ruleset)) + "\n"
    names = {camel_case(name): plain(getattr(parameters, name)) for name in Interception.__dataclass_fields__}
    shown: dict[str, Any] = {"backend": command.backend.value, "parameters": names, **as_objects(ruleset)}
    return json.dumps(shown, indent=2) + "\n"


def _apply(command: SidecarCommand, parameters: Interception) -> str:
    """Program the netns of the calling thread; return what was done, as the format asks."""
    from meshcni.host.redirection import FamilyPolicy, apply_sidecar, remove_sidecar

    if command.cleanup_only:
        remove_sidecar(parameters)
        return json.dumps({"removed": True}) if command.format == "json" else "Our rules are taken out."
    applied = apply_sidecar(
        parameters,
        command.backend,
        force_iptables=command.force_iptables,
        family_policy=FamilyPolicy(command.family_policy),
    )
    families = [f"IPv{family.value}" for family in sorted(applied.families, key=lambda family: family.value)]
    if command.format != "json":
        state = "in place now" if applied.changed else "in place already"
        return f"Rules for {' and '.join(families)} are {state}: {applied.variant}, because {applied.reason}."
    return json.dumps(
        {
            "applied": True,
            "changed": applied.changed,
            "backend": applied.backend.value,
            "variant": applied.variant,
            "reason": applied.reason,
            "families": families,
            "digest": applied.digest,
        },
        indent=2,
    )


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


def _in_netns(path: str, work: Callable[[], T]) -> T:
    """Run `work` in the network namespace at `path`, or where we are when it is empty."""
    if not path:
        return work()
    from meshcni.host.netns import call_in_netns, open_netns

    descriptor = open_netns(path)
    try:
        return call_in_netns(descriptor, work)
    finally:
        os.close(descriptor)


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
