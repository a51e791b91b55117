"""What `meshcni rules` does once a command line is understood, whichever kind of rules it is about."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from meshcni.cli.ruleflags import RuleCommand
from meshcni.rules.narrate import family_name

if TYPE_CHECKING:
    from meshcni.host.redirection import Applied

T = TypeVar("T")
FAILED = 1  # a wrong command line too: the original has no other status but that of a failed validation


@dataclass(frozen=True, slots=True)
class Job:
    """What can be done with one set of rules; what changes or reads a netns does so in that of the calling thread.

    `show` gives what to print for a format, `removal` how to take the rules out by hand. `beside` names what is
    programmed beside rules and routes. `check` comes last and gives the exit status.
    """

    show: Callable[[str], str]
    removal: Callable[[], str]
    apply: Callable[[], Applied]
    remove: Callable[[], None]
    verify: Callable[[], tuple[str, ...]] | None = None
    check: Callable[[], int] | None = None
    beside: Mapping[str, tuple[str, ...]] | None = None


def perform(command: RuleCommand, job: Job) -> int:
    """Do what the command line asks for and print what was done; returns the exit status."""
    inside = partial(in_netns, command.netns_path)
    if command.apply:
        print(inside(partial(_change, command, job)))
    elif command.cleanup_only:
        print(job.removal(), end="")
    elif not command.verify:
        print(job.show(command.format), end="")
    if command.verify and job.verify is not None:
        return _report(command.format, inside(job.verify))
    return inside(job.check) if job.check is not None else 0


def _change(command: RuleCommand, job: Job) -> str:
    if command.cleanup_only:
        job.remove()
        return json.dumps({"removed": True}) if command.format == "json" else "Our rules are taken out."
    applied = job.apply()
    families = [family_name(family) for family in sorted(applied.families, key=lambda family: family.value)]
    beside = dict(job.beside or {})
    if command.format != "json":
        state = "in place now" if applied.changed else "in place already"
        more = "".join(f" {what.capitalize()}: {', '.join(names)}." for what, names in beside.items())
        return f"Rules for {' and '.join(families)} are {state}: {applied.variant}, because {applied.reason}.{more}"
    shown: dict[str, Any] = {
        "applied": True,
        "changed": applied.changed,
        "backend": applied.backend.value,
        "variant": applied.variant,
        "reason": applied.reason,
        "families": families,
        "digest": applied.digest,
        **beside,
    }
    return json.dumps(shown, indent=2)


def _report(form: str, drift: tuple[str, ...]) -> int:
    """Print how a netns differs from what it should be; the status is 1 when it does."""
    if form == "json":
        print(json.dumps({"asDesired": not drift, "drift": list(drift)}, indent=2))
    elif drift:
        print(*drift, sep="\n")
    else:
        print("All is as it should be.")
    return FAILED if drift else 0


def in_netns(path: str, work: Callable[[], T]) -> T:
    """Run `work` in the network namespace at `path`, or where we are when it is empty."""
    if not path:
        return work()
    from meshcni.host.netns import call_in_netns, open_netns

    descriptor = open_netns(path)
    try:
        return call_in_netns(descriptor, work)
    finally:
        os.close(descriptor)


def warn(warnings: tuple[str, ...]) -> None:
    """Print warnings to standard error."""
    for warning in warnings:
        print(f"meshcni rules: warning: {warning}", file=sys.stderr)
