"""The command lines of `rules ambient-pod` and `rules ambient-host`: two tables of flags, and the pure reading of them.

What the agent takes from its environment is taken from the same variables here, and read by the same readers. An empty
variable counts as unset, and a value that cannot be read is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from meshcni import istio
from meshcni.cli.given import Given, settle
from meshcni.cli.podfiles import POLICY_FLAGS, read_policy
from meshcni.cli.ruleflags import ACTIONS, RuleCommand, parse_flags, read_actions
from meshcni.cli.ruleparameters import read_number
from meshcni.errors import KubeletNotFoundError, PodSpecError, UsageError
from meshcni.pflag import Flag, ParsedFlags, go_bool
from meshcni.pods.ambient import AmbientParameters, read_interfaces
from meshcni.pods.ambientsettings import (
    SANDBOXED_RUNTIMES,
    AmbientNode,
    probe_addresses,
    read_probe_v4,
    read_probe_v6,
    read_runtime_patterns,
)
from meshcni.pods.eligibility import Policy
from meshcni.pods.values import HIGHEST_ID
from meshcni.rules.model import Backend, Family

NODE_FLAGS: Final = (  # the agent's settings for every pod of the node; `explain` has them too
    Flag(
        "dns",
        "",
        "bool",
        "false",
        ("AMBIENT_DNS_CAPTURE",),
        "capture DNS; without flag and variable it is not, as with the agent (Istio's chart sets the variable to true)",
    ),
    Flag(
        "ipv6",
        "",
        "bool",
        "false",
        ("AMBIENT_IPV6",),
        "rules for IPv6 too; without flag and variable there are none, as with the agent (the chart sets it to true)",
    ),
    Flag(
        "host-probe-snat-ip",
        default=istio.PROBE_SNAT_V4,
        env=("HOST_PROBE_SNAT_IP",),
        help="address that the kubelet's probes come from; hostIP for the node's own",
    ),
    Flag(
        "host-probe-snat-ipv6",
        default=istio.PROBE_SNAT_V6,
        env=("HOST_PROBE_SNAT_IPV6",),
        help="the same for IPv6",
    ),
)
RUNTIME_FLAG: Final = Flag(
    "sandboxed-runtimes",
    default=",".join(SANDBOXED_RUNTIMES),
    env=("AMBIENT_SANDBOXED_RUNTIMES",),
    help="RuntimeClasses whose pods are refused, with * and ?; none for no such class",
)
_OVERRIDES: Final = (  # what only a pod says
    Flag(
        "ingress", "", "bool", "false", (), f"capture only outbound traffic; of a pod: {istio.AMBIENT_BYPASS_INBOUND}"
    ),
    Flag(
        "virtual-interfaces",
        help=f"interfaces of virtual machines whose traffic is outbound; of a pod: {istio.REROUTE_VIRTUAL_INTERFACES}",
    ),
)
_KUBELET_FLAG: Final = Flag(
    "kubelet-uid",
    default="auto",
    env=("KUBELET_UID",),
    help="user of the kubelet, which nftables rules need; auto: that of its process below $HOST_PROC_DIR, "
    f"{istio.HOST_PROC} or /proc",
)
_VERIFY: Final = Flag(
    "verify", "", "bool", "false", (), "print how the network namespace differs from these rules; status 1: it does"
)
_COMMON: Final = tuple(flag for flag in ACTIONS if flag.name != "pod")
_ACCEPTED: Final = "accepted, so that both kinds of ambient rules take the same flags"

POD_FLAGS: Final = (
    *NODE_FLAGS,
    *_OVERRIDES,
    Flag("pod", help="a pod manifest, whose annotations override the flags; it must be ambient by the flags below"),
    Flag("namespace-file", help="manifest of the pod's namespace, for selectors that ask for its labels"),
    *POLICY_FLAGS,
    RUNTIME_FLAG,
    _VERIFY,
    *_COMMON,
    Flag("kubelet-uid", help=_ACCEPTED),
)
HOST_FLAGS: Final = (
    *NODE_FLAGS[1:],
    _KUBELET_FLAG,
    _VERIFY,
    *_COMMON,
    Flag("dns", "", "bool", "false", (), _ACCEPTED),
    Flag("ingress", "", "bool", "false", (), _ACCEPTED),
    Flag("virtual-interfaces", help=_ACCEPTED),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine knows; passed in, so that reading a command line has no effects of its own.

    `own_address` is the node's own address of an IP version, in the netns at the path given (empty: where the agent
    would look). `kubelet_uid` raises KubeletNotFoundError.
    """

    own_address: Callable[[int, str], IPv4Address | IPv6Address | None]
    kubelet_uid: Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AmbientCommand(RuleCommand):
    """A command line, understood; `origins` says by field of `parameters` where a value came from.

    `kubelet_uid` is None where no rule needs it.
    """

    parameters: AmbientParameters
    origins: Mapping[str, str]
    families: frozenset[Family]
    policy: Policy
    node: AmbientNode
    kubelet_uid: int | None = None
    namespace_file: str = ""


def read_pod_command(
    arguments: Sequence[str], environment: Mapping[str, str], machine: Machine
) -> AmbientCommand | None:
    """Understand a command line of `ambient-pod`, None when it asks for help. UsageError says what is wrong."""
    parsed = parse_flags(POD_FLAGS, arguments)
    if parsed.help:
        return None
    given = {flag.name: settle(flag, parsed, environment) for flag in POD_FLAGS}
    actions = read_actions(given)
    if given["namespace-file"].text and not actions["pod_file"]:
        raise UsageError("--namespace-file without --pod", "give the pod's manifest too")
    doubled = next((flag for flag in _OVERRIDES if flag.name in parsed.values), None)
    if actions["pod_file"] and doubled:
        raise UsageError(f"--pod together with {doubled.spelling}", "the pod's annotation says that")
    node, origins = read_node(parsed, environment, lambda version: machine.own_address(version, ""))
    parameters = AmbientParameters(
        dns_capture=node.defaults.dns_capture,
        ingress=given["ingress"].read(go_bool),
        virtual_interfaces=_interfaces(given["virtual-interfaces"]),
        probe_v4=node.defaults.probe_v4,
        probe_v6=node.defaults.probe_v6,
    )
    return AmbientCommand(
        **actions,
        parameters=parameters,
        origins={
            **origins,
            "ingress": given["ingress"].origin,
            "virtual_interfaces": given["virtual-interfaces"].origin,
        },
        families=families_of(node),
        namespace_file=given["namespace-file"].text,
        policy=read_policy(parsed, environment),
        node=node,
        verify=_verify(given, actions["cleanup_only"]),
    )


def read_host_command(
    arguments: Sequence[str], environment: Mapping[str, str], machine: Machine
) -> AmbientCommand | None:
    """Understand a command line of `ambient-host`, None when it asks for help. UsageError says what is wrong."""
    parsed = parse_flags(HOST_FLAGS, arguments)
    if parsed.help:
        return None
    given = {flag.name: settle(flag, parsed, environment) for flag in (*HOST_FLAGS, _NO_POD)}
    actions = read_actions(given)
    netns_path: str = actions["netns_path"]
    node, origins = read_node(parsed, environment, lambda version: machine.own_address(version, netns_path))
    verify = _verify(given, actions["cleanup_only"])
    uid: int | None = None
    warnings: tuple[str, ...] = ()
    if actions["backend"] is Backend.NFTABLES and not actions["cleanup_only"]:
        uid, warnings = _kubelet_uid(given["kubelet-uid"], machine, must_be_known=actions["apply"] or verify)
    return AmbientCommand(
        **actions,
        parameters=node.defaults,
        origins={**origins, "kubelet_uid": given["kubelet-uid"].origin},
        families=families_of(node),
        policy=Policy(),
        node=node,
        kubelet_uid=uid,
        verify=verify,
        warnings=warnings,
    )


def read_node(
    parsed: ParsedFlags, environment: Mapping[str, str], own_address: Callable[[int], IPv4Address | IPv6Address | None]
) -> tuple[AmbientNode, dict[str, str]]:
    """Read the node's settings; returns them with the origin of each parameter by its field. UsageError, SettingError.

    `own_address` is asked for the node's own address where a setting is `hostIP`.
    """
    given = {flag.name: settle(flag, parsed, environment) for flag in (*NODE_FLAGS, RUNTIME_FLAG, _ENABLED)}
    settings = given["host-probe-snat-ip"].read(read_probe_v4), given["host-probe-snat-ipv6"].read(read_probe_v6)
    probe_v4, probe_v6 = probe_addresses(*settings, own_address)
    node = AmbientNode(
        AmbientParameters(dns_capture=given["dns"].read(go_bool), probe_v4=probe_v4, probe_v6=probe_v6),
        enabled=given["ambient-enabled"].read(go_bool),
        ipv6=given["ipv6"].read(go_bool),
        sandboxed_runtimes=given["sandboxed-runtimes"].read(read_runtime_patterns),
    )
    origins = {
        "dns_capture": given["dns"].origin,
        "probe_v4": given["host-probe-snat-ip"].origin,
        "probe_v6": given["host-probe-snat-ipv6"].origin,
    }
    return node, origins


def families_of(node: AmbientNode) -> frozenset[Family]:
    """Return the families that get rules: the node's choice, whatever addresses a pod has."""
    return frozenset(Family) if node.ipv6 else frozenset({Family.V4})


_ENABLED: Final = next(flag for flag in POLICY_FLAGS if flag.name == "ambient-enabled")
_NO_POD: Final = Flag("pod")  # the host has none


def _interfaces(given: Given) -> tuple[str, ...]:
    try:
        return read_interfaces(given.text, given.origin)
    except PodSpecError as error:
        raise UsageError(error.message, error.hint) from None


def _verify(given: Mapping[str, Given], cleanup: bool) -> bool:
    verify = given["verify"].read(go_bool)
    if verify and cleanup:
        raise UsageError("--verify together with --cleanup", "what was taken out is not verified")
    return verify


def _kubelet_uid(given: Given, machine: Machine, *, must_be_known: bool) -> tuple[int, tuple[str, ...]]:
    """Return the user that the rules name, with warnings. Only to print, root's will do where no kubelet runs."""
    if given.text != "auto":
        return given.read(lambda text: read_number(text, HIGHEST_ID)), ()
    try:
        return machine.kubelet_uid(), ()
    except KubeletNotFoundError as error:
        if must_be_known:
            raise KubeletNotFoundError(
                error.message, "run it where the host's /proc is, or say --kubelet-uid N"
            ) from None
        return 0, (f"{error.message}; the rules are shown for user 0, --kubelet-uid N names another",)
