"""`meshcni rules`: print the rules of a sidecar, of an ambient pod or of the host, program them, take them out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from meshcni.cli import ambientflags, ambientrules, sidecarflags, sidecarrules
from meshcni.cli.rulejobs import FAILED
from meshcni.errors import MeshCniError, UsageError
from meshcni.pflag import Flag, help_text


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of rules: what it is, its usage and flags, and what runs it (None: the arguments ask for help)."""

    meaning: str
    usage: str
    flags: tuple[Flag, ...]
    run: Callable[[Sequence[str]], int | None]


KINDS: Final = {
    "sidecar": Kind(
        "a pod's rules that lead its traffic through its sidecar",
        "[--pod POD.yaml | parameters] [--apply] [--cleanup] [--format script|json|words]",
        sidecarflags.FLAGS,
        sidecarrules.run,
    ),
    "ambient-pod": Kind(
        "an ambient pod's rules, with policy rule and route, that lead its traffic through ztunnel",
        "[--pod POD.yaml [--namespace-file NS.yaml]] [--dns] [--ipv6] [--ingress] [--virtual-interfaces LIST]\n"
        "       [--apply] [--verify] [--cleanup] [--format script|json|words]",
        ambientflags.POD_FLAGS,
        ambientrules.run_pod,
    ),
    "ambient-host": Kind(
        "the host's rules and address sets that exempt the kubelet's probes of ambient pods",
        "[--ipv6] [--kubelet-uid N|auto] [--apply] [--verify] [--cleanup]\n       [--format script|json|words]",
        ambientflags.HOST_FLAGS,
        ambientrules.run_host,
    ),
}
USAGE: Final = "\n".join(
    [
        f"Usage: meshcni rules {'|'.join(KINDS)} [flags]",
        "",
        "Kinds of rules:",
        *(f"  {name:<13} {kind.meaning}" for name, kind in KINDS.items()),
        "",
        "Without --apply nothing is changed: the rules are printed. meshcni rules KIND --help lists the flags.",
    ]
)


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
    name = argv[0] if argv else ""
    if name in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(
            f"no such rules: {name!r}" if argv else "which rules?", f"write: meshcni rules {'|'.join(KINDS)}"
        )
    status = kind.run(argv[1:])
    if status is None:
        print(help_text(f"Usage: meshcni rules {name} {kind.usage}", kind.flags))
        return 0
    return status
