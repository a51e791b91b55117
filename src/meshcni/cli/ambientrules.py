"""`meshcni rules ambient-pod` and `ambient-host`: ambient rules printed, programmed, compared, taken out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final

from meshcni import istio
from meshcni.cli.ambientflags import AmbientCommand, Machine, read_host_command, read_pod_command
from meshcni.cli.given import Given
from meshcni.cli.podfiles import assess_manifest, load_namespace
from meshcni.cli.rulejobs import Job, in_netns, perform, warn
from meshcni.cli.show import (
    Explained,
    camel_case,
    explained_object,
    parameter_values,
    print_decision,
    removal_of,
    script,
)
from meshcni.errors import MeshCniError
from meshcni.pflag import go_bool
from meshcni.pods.outlook import prospect_of
from meshcni.rules.ambient import host_ruleset, pod_ruleset
from meshcni.rules.model import Backend, Family, Ruleset
from meshcni.rules.narrate import as_objects, family_name, words

if TYPE_CHECKING:
    from meshcni.host.probeset import ProbeSet
    from meshcni.host.redirection import Applied

NFT_TABLE: Final = istio.AMBIENT_NFT_TABLE_PREFIX + "nat"  # of the host's rules and sets
SETS: Final[Mapping[Family, str]] = {Family.V4: istio.PROBE_SET_V4, Family.V6: istio.PROBE_SET_V6}
_IPSET_FAMILY: Final = {Family.V4: "inet", Family.V6: "inet6"}


# --- a pod ------------------------------------------------------------------------------------------------------------


def run_pod(arguments: Sequence[str]) -> int | None:
    """Do what the arguments ask for and return the exit status, None when they ask for help."""
    command = read_pod_command(arguments, os.environ, this_machine(os.environ))
    if command is None:
        return None
    if command.pod_file:
        return _for_pod(command)
    return perform(command, _pod_job(command))


def _for_pod(command: AmbientCommand) -> int:
    """Let the pod's annotations override the node's parameters, if the verdict is that it is ambient."""
    namespace = load_namespace(command.namespace_file) if command.namespace_file else None
    pod, assessment = assess_manifest(command.pod_file, namespace, command.policy, os.environ)
    prospect = prospect_of(pod, assessment.decision, command.node)
    explained = Explained(pod, assessment, prospect, command.origins)
    warn(explained.warnings)
    if explained.error is not None:
        raise explained.error
    if prospect.derived is None:
        return print_decision(command.format, pod, prospect.decision, explained_object(explained))
    origins = {**command.origins, **prospect.derived.origins}
    return perform(command, _pod_job(replace(command, parameters=prospect.derived.parameters, origins=origins)))


def _pod_job(command: AmbientCommand) -> Job:
    ruleset = pod_ruleset(command.parameters, command.families, command.backend)
    described = _described(parameter_values(command.parameters), command.origins)
    return Job(
        show=lambda form: _shown(command, ruleset, described, form),
        removal=lambda: removal_of(ruleset, command.backend),
        apply=lambda: _apply_pod(command),
        remove=_remove_pod,
        verify=lambda: _verify_pod(command),
    )


def _apply_pod(command: AmbientCommand) -> Applied:
    from meshcni.host.ambient import apply_pod

    return apply_pod(command.parameters, command.families, command.backend, force_iptables=command.force_iptables)


def _remove_pod() -> None:
    from meshcni.host.ambient import remove_pod

    remove_pod()


def _verify_pod(command: AmbientCommand) -> tuple[str, ...]:
    from meshcni.host.ambient import verify_pod

    return verify_pod(command.parameters, command.families, command.backend, force_iptables=command.force_iptables)


# --- the host ---------------------------------------------------------------------------------------------------------


def run_host(arguments: Sequence[str]) -> int | None:
    """Do what the arguments ask for and return the exit status, None when they ask for help."""
    command = read_host_command(arguments, os.environ, this_machine(os.environ))
    if command is None:
        return None
    warn(command.warnings)
    return perform(command, _host_job(command))


def _host_job(command: AmbientCommand) -> Job:
    probes = command.parameters
    uid = command.kubelet_uid
    if command.backend is Backend.NFTABLES and uid is None:
        uid = 0  # a removal, in which no user is named
    ruleset = host_ruleset(probes.probe_v4, probes.probe_v6, command.families, command.backend, uid)
    values = {
        "probeV4": str(probes.probe_v4),
        "probeV6": str(probes.probe_v6),
        "kubeletUid": command.kubelet_uid,
    }
    sets = [
        {"name": SETS[family], "family": family_name(family), "type": _set_type(command.backend, family)}
        for family in _ordered(command.families)
    ]
    described = {**_described(values, command.origins), "sets": sets}
    return Job(
        show=lambda form: _host_shown(command, ruleset, described, form),
        removal=lambda: _host_removal(command, ruleset),
        apply=lambda: _apply_host(command),
        remove=_remove_host,
        verify=lambda: _verify_host(command),
        beside={"sets": tuple(SETS[family] for family in _ordered(command.families))},
    )


def _host_shown(command: AmbientCommand, ruleset: Ruleset, described: Mapping[str, Any], form: str) -> str:
    if form == "script":
        return _set_commands(command) + "\n" + _shown(command, ruleset, described, form)
    shown = _shown(command, ruleset, described, form)
    if form == "words":
        shown += "\nBeside the packet rules\n" + "".join(
            f"  Set {SETS[family]} ({_set_type(command.backend, family)}) holds the {family_name(family)} addresses of "
            "enrolled pods; it is made before the rules, and its entries stay when they are made anew.\n"
            for family in _ordered(command.families)
        )
    return shown


def _set_type(backend: Backend, family: Family) -> str:
    if backend is Backend.NFTABLES:
        return f"nft set of type ipv{family.value}_addr"
    return f"ipset hash:ip, family {_IPSET_FAMILY[family]}, with comments"


def _set_commands(command: AmbientCommand) -> str:
    """Return what makes the sets, which have to be there before the rules; what is there already stays as it is."""
    families = _ordered(command.families)
    if command.backend is Backend.NFTABLES:
        lines = [f"add set inet {NFT_TABLE} {SETS[family]} {{ type ipv{family.value}_addr ; }}" for family in families]
        return "\n".join(["# nft -f -", f"add table inet {NFT_TABLE}", *lines, ""])
    return "".join(
        f"# ipset create -exist {SETS[family]} hash:ip family {_IPSET_FAMILY[family]} comment\n" for family in families
    )


def _host_removal(command: AmbientCommand, ruleset: Ruleset) -> str:
    """Return what takes rules and sets out; with nft both are all that their table holds."""
    if command.backend is Backend.NFTABLES:
        return f"# nft -f -\nadd table inet {NFT_TABLE}\ndelete table inet {NFT_TABLE}\n"
    sets = "".join(f"# ipset destroy {SETS[family]}\n" for family in _ordered(command.families))
    return removal_of(ruleset, command.backend) + "\n" + sets


def _apply_host(command: AmbientCommand) -> Applied:
    """Make the sets, then the rules that look into them."""
    from meshcni.host.hostrules import apply_host
    from meshcni.host.probeset import IpsetProbeSet, NftProbeSet

    kind: type[IpsetProbeSet] | type[NftProbeSet]
    kind = NftProbeSet if command.backend is Backend.NFTABLES else IpsetProbeSet
    probes: ProbeSet = kind(command.families)
    probes.ensure()
    warn((probes.warning,) if probes.warning else ())
    return apply_host(
        command.parameters.probe_v4,
        command.parameters.probe_v6,
        command.families,
        command.backend,
        kubelet_uid=command.kubelet_uid,
        force_iptables=command.force_iptables,
    )


def _remove_host() -> None:
    """Take rules and sets of every backend out; what fails does not keep the rest from going. Raises MeshCniError."""
    from meshcni.host.hostrules import remove_host
    from meshcni.host.probeset import IpsetProbeSet, NftProbeSet

    both = frozenset(Family)
    problems: list[MeshCniError] = []
    for part in (remove_host, IpsetProbeSet(both).destroy, NftProbeSet(both).destroy):
        try:
            part()
        except MeshCniError as error:
            problems.append(error)
    if problems:
        raise MeshCniError("; ".join(problem.message for problem in problems), problems[0].hint)


def _verify_host(command: AmbientCommand) -> tuple[str, ...]:
    from meshcni.host.hostrules import verify_host

    return verify_host(
        command.parameters.probe_v4,
        command.parameters.probe_v6,
        command.families,
        command.backend,
        kubelet_uid=command.kubelet_uid,
        force_iptables=command.force_iptables,
    )


# --- both -------------------------------------------------------------------------------------------------------------


def _shown(command: AmbientCommand, ruleset: Ruleset, described: Mapping[str, Any], form: str) -> str:
    if form == "script":
        return script(ruleset, command.backend)
    if form == "words":
        return "\n".join(words(ruleset)) + "\n"
    return json.dumps({"backend": command.backend.value, **described, **as_objects(ruleset)}, indent=2) + "\n"


def _described(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """Return parameters for JSON with their origins; `origins` is by field."""
    known = {camel_case(name): origin for name, origin in origins.items()}
    return {"parameters": dict(values), "origins": {name: known[name] for name in values}}


def _ordered(families: frozenset[Family]) -> list[Family]:
    return [family for family in Family if family in families]


def this_machine(environment: Mapping[str, str]) -> Machine:
    """What this machine knows, looked for where the agent with the same environment would look."""

    def proc_root() -> str:
        from meshcni.host.hostpaths import find_proc_root

        return environment.get("HOST_PROC_DIR") or find_proc_root().path

    def own_address(version: int, netns_path: str) -> IPv4Address | IPv6Address | None:
        from meshcni.host.hostpaths import host_netns_path
        from meshcni.host.nodeaddress import node_address

        path = netns_path or host_netns_path(proc_root(), _allows_switch(environment))
        return in_netns(path, lambda: node_address(Family(version)))

    def kubelet() -> int:
        from meshcni.host.kubelet import kubelet_uid

        return kubelet_uid(proc_root())

    return Machine(own_address, kubelet)


def _allows_switch(environment: Mapping[str, str]) -> bool:
    return Given(environment.get("ALLOW_SWITCH_TO_HOST_NS") or "false", "env ALLOW_SWITCH_TO_HOST_NS").read(go_bool)
