"""The command line of `rules sidecar`: one table of flags, and the pure reading of it.

Names, shorthands, variables and defaults are those of the original's `istio-iptables`, so the two can be compared flag
by flag. Upstream: tools/istio-iptables/pkg/cmd/root.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshcni import istio
from meshcni.cli.given import Given, one_of
from meshcni.cli.ruleflags import ACTIONS, RuleCommand, parse_flags, read_actions
from meshcni.cli.ruleparameters import Lookups, read_interception, read_port
from meshcni.errors import UsageError
from meshcni.pflag import READERS, Flag, Kind, go_bool, go_duration
from meshcni.pods.interception import Interception
from meshcni.rules.model import Family


def _flag(
    name: str, short: str, default: str, help: str, kind: Kind = "string", stronger: tuple[str, ...] = ()
) -> Flag:
    """Make a row; the flag's name in upper snake case is its variable, `stronger` ones come before it."""
    return Flag(name, short, kind, default, (*stronger, name.upper().replace("-", "_")), help)


def _switch(name: str, help: str, *stronger: str, short: str = "") -> Flag:
    return _flag(name, short, "false", help, "bool", stronger)


PARAMETERS: Final = (
    Flag("envoy-port", "p", "string", "15001", (), "port of the proxy for outbound connections"),
    _flag("inbound-capture-port", "z", "15006", "port of the proxy for inbound connections"),
    _flag("inbound-tunnel-port", "e", "15008", "port of tunnelled inbound connections, never redirected"),
    _flag("proxy-uid", "u", "", "users of the proxy; empty: the user $ENVOY_USER, or 1337"),
    _flag("proxy-gid", "g", "", "groups of the proxy; empty: the same numbers as the users"),
    _flag("istio-inbound-interception-mode", "m", "", "TPROXY, or anything else for REDIRECT"),
    _flag("istio-inbound-ports", "b", "", "inbound ports to capture: *, a list, or none"),
    _flag("istio-local-exclude-ports", "d", "", "inbound ports to leave alone when all are captured"),
    _flag("istio-exclude-interfaces", "c", "", "interfaces to leave alone"),
    _flag("istio-service-cidr", "i", "", "outbound destinations to capture: *, prefixes, or none"),
    _flag("istio-service-exclude-cidr", "x", "", "outbound destinations to leave alone"),
    _flag("istio-outbound-ports", "q", "", "outbound ports to capture whatever the destination"),
    _flag("istio-local-outbound-ports-exclude", "o", "", "outbound ports to leave alone"),
    _flag("kube-virt-interfaces", "k", "", "interfaces of virtual machines whose traffic counts as outbound"),
    _flag("istio-inbound-tproxy-mark", "t", "1337", "packet mark of TPROXY"),
    _flag("istio-inbound-tproxy-route-table", "r", "133", "routing table of TPROXY"),
    _switch("redirect-dns", "capture DNS", istio.ENV_DNS_CAPTURE),
    _switch("capture-all-dns", "capture DNS to every server, not only the resolver's"),
    _switch("drop-invalid", "drop packets of no known connection", istio.ENV_DROP_INVALID),
    _switch("dual-stack", "any IPv6 address counts, see --family-policy", istio.ENV_DUAL_STACK),
)

WAYS: Final = (
    Flag("families", "", "string", "both", (), "what to print without --apply: ipv4, ipv6 or both"),
    _flag(
        "family-policy",
        "",
        "by-address",
        "when --apply makes IPv6 rules: by-address, if the netns has a global IPv6 address; original, if its first "
        "address is one, or any with --dual-stack",
    ),
    _switch("skip-rule-apply", "program nothing, whatever --apply says"),
    _switch(
        "run-validation", "at last try whether redirection works; run as the proxy's user; status 126: it does not"
    ),
    _flag("iptables-probe-port", "", "15002", "port that --run-validation dials", "int"),
    _flag("probe-timeout", "", "5s", "how long --run-validation tries", "duration"),
)

IGNORED: Final = (  # applying is repeatable here, over whatever an earlier run left
    _switch("reconcile", "accepted; earlier rules are always replaced"),
    _switch("force-apply", "accepted; rules are always applied"),
    _switch("cni-mode", "accepted; makes no difference"),
    Flag("log_output_level", help="accepted"),
    Flag("log_stacktrace_level", help="accepted"),
    Flag("log_caller", help="accepted"),
    Flag("log_as_json", kind="bool", default="false", help="accepted"),
    Flag("log_target", kind="strings", help="accepted"),
)

FLAGS: Final = (*PARAMETERS, *ACTIONS, *WAYS, *IGNORED)
FAMILIES: Final[Mapping[str, frozenset[Family]]] = {
    "both": frozenset(Family),
    "ipv4": frozenset({Family.V4}),
    "ipv6": frozenset({Family.V6}),
}
FAMILY_POLICIES: Final = ("by-address", "original", "")  # an empty variable is the first


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarCommand(RuleCommand):
    """A `rules sidecar` command line, understood. `interception` is None when the pod in `pod_file` decides."""

    interception: Interception | None
    families: frozenset[Family]
    family_policy: str
    validate: bool
    probe_port: int
    probe_timeout_seconds: float


def read_command(arguments: Sequence[str], environment: Mapping[str, str], lookups: Lookups) -> SidecarCommand | None:
    """Understand a command line, None when it asks for help. UsageError says what is wrong and where it stands."""
    parsed = parse_flags(FLAGS, arguments)
    if parsed.help:
        return None
    warnings: list[str] = []
    given = {flag.name: _resolve(flag, parsed.values.get(flag.name), environment, warnings) for flag in FLAGS}
    on = {flag.name: given[flag.name].read(go_bool) for flag in FLAGS if flag.kind == "bool"}
    for flag in IGNORED:
        given[flag.name].read(READERS[flag.kind])
    actions = read_actions(given)
    doubled = next((flag for flag in PARAMETERS if flag.name in parsed.values), None)
    if actions["pod_file"] and doubled:
        raise UsageError(f"--pod together with {doubled.spelling}", "either the pod or flags give the parameters")
    interception = None
    if not actions["pod_file"]:
        interception, more = read_interception(given, environment, lookups)
        warnings += more
    actions["apply"] &= not on["skip-rule-apply"]
    return SidecarCommand(
        **actions,
        interception=interception,
        families=FAMILIES[given["families"].read(one_of(tuple(FAMILIES)))],
        family_policy=given["family-policy"].read(one_of(FAMILY_POLICIES)) or FAMILY_POLICIES[0],
        validate=on["run-validation"],
        probe_port=given["iptables-probe-port"].read(read_port),
        probe_timeout_seconds=given["probe-timeout"].read(go_duration),
        warnings=tuple(warnings),
    )


def _resolve(flag: Flag, typed: str | list[str] | None, environment: Mapping[str, str], warnings: list[str]) -> Given:
    """Find a flag's text: the command line, else the strongest variable, else the default.

    As with the original, a variable that is no value of the flag's kind is passed over (said here), and a present but
    empty one sets a text to empty.
    """
    if typed is not None:
        return Given(typed if isinstance(typed, str) else ",".join(typed), f"flag {flag.spelling}")
    for name in flag.env:
        text = environment.get(name)
        if text is None or (not text and flag.kind != "string"):
            continue
        try:
            READERS[flag.kind](text)
        except ValueError as error:
            warnings.append(f"env {name} was passed over: {error}")
            continue
        return Given(text, f"env {name}")
    return Given(flag.default, f"default of --{flag.name}")
