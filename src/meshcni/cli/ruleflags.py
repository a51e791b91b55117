"""What the command lines of every kind of rules have in common: the flags that say what to do, and their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshcni.cli.given import Given, one_of
from meshcni.errors import UsageError
from meshcni.pflag import Flag, ParsedFlags, go_bool, parse
from meshcni.rules.model import Backend

ACTIONS: Final = (
    Flag("apply", "", "bool", "false", (), "program the current network namespace, as the agent would"),
    Flag("pod", "", "string", "", (), "take the parameters from this pod manifest instead of from flags"),
    Flag("backend", "", "string", "", (), "iptables or nftables; empty: as --native-nftables says"),
    Flag("format", "", "string", "script", (), "what to print: script, json or words"),
    Flag("native-nftables", "", "bool", "false", ("NATIVE_NFTABLES",), "nftables instead of iptables"),
    Flag(
        "force-iptables-binary",
        env=("FORCE_IPTABLES_BINARY",),
        help="legacy or nft; empty: found by looking",
    ),
    Flag(
        "cleanup",
        "",
        "bool",
        "false",
        (),
        "take our rules out and put none in; without --apply only say how",
    ),
    Flag("cleanup-only", "", "bool", "false", ("CLEANUP_ONLY",), "the same"),
    Flag("dry-run", "n", "bool", "false", ("DRY_RUN",), "program nothing, whatever --apply says"),
    Flag(
        "network-namespace",
        env=("NETWORK_NAMESPACE",),
        help="with --apply, the network namespace to program instead of the current one",
    ),
)

FORMATS: Final = ("script", "json", "words")
BACKENDS: Final = tuple(backend.value for backend in Backend)
FORCED_BINARIES: Final = ("", "legacy", "nft")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCommand:
    """A command line about rules, understood: what to do and where. Each kind of rules adds its own parameters."""

    backend: Backend
    format: str
    apply: bool
    cleanup_only: bool
    force_iptables: str
    netns_path: str
    pod_file: str
    verify: bool = False
    warnings: tuple[str, ...] = ()


def read_actions(given: Mapping[str, Given]) -> dict[str, Any]:
    """Read what every kind has, as the fields of RuleCommand; `given` is by flag name. UsageError names the flag."""
    on = {flag.name: given[flag.name].read(go_bool) for flag in ACTIONS if flag.kind == "bool"}
    backend = Backend.NFTABLES if on["native-nftables"] else Backend.IPTABLES
    if given["backend"].text:
        backend = Backend(given["backend"].read(one_of(BACKENDS)))
    return {
        "backend": backend,
        "format": given["format"].read(one_of(FORMATS)),
        "apply": on["apply"] and not on["dry-run"],
        "cleanup_only": on["cleanup"] or on["cleanup-only"],
        "force_iptables": given["force-iptables-binary"].read(one_of(FORCED_BINARIES)),
        "netns_path": given["network-namespace"].text,
        "pod_file": given["pod"].text,
    }


def parse_flags(flags: Sequence[Flag], arguments: Sequence[str]) -> ParsedFlags:
    """Read a command line that has nothing but flags; UsageError for what is none."""
    parsed = parse(flags, arguments)
    if parsed.rest and not parsed.help:
        hint = "parameters are flags; --help lists them"
        if parsed.rest[0] in ("true", "false"):
            hint = f"a switch takes its value with an equals sign: --flag={parsed.rest[0]}"
        raise UsageError(f"unexpected argument {parsed.rest[0]!r}", hint)
    return parsed
