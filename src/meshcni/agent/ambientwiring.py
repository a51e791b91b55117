"""From `Settings` to ambient mode, whose modules an agent for sidecars alone never loads."""

from __future__ import annotations

import logging
import os
from ipaddress import IPv4Address, IPv6Address

from meshcni.agent.ambient import Ambient
from meshcni.agent.ambientconfig import AmbientConfig, Namespaces, Pods
from meshcni.agent.hostside import HostConfig, HostSide
from meshcni.agent.metrics import Metrics
from meshcni.agent.netnssearch import NetnsSearch
from meshcni.agent.programming import BackendConfig, Programmer, settle_choice
from meshcni.agent.settings import Settings
from meshcni.agent.steps import PatchesRedirection, Warn
from meshcni.agent.wiring import policy
from meshcni.errors import MeshCniError
from meshcni.host.hostpaths import ProcRoot, find_proc_root, host_netns_path
from meshcni.host.kernelsupport import has_ipv6, lacks_for_ipv6_alone
from meshcni.host.netns import call_in_netns, open_netns
from meshcni.host.nodeaddress import node_address
from meshcni.host.podnetns import NetnsFinder
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.ambientsettings import probe_addresses
from meshcni.rules.model import Backend, Family

log = logging.getLogger(__name__)


def make_ambient(
    settings: Settings,
    pods: Pods,
    namespaces: Namespaces,
    programmer: Programmer,
    api: PatchesRedirection,
    warn: Warn,
    metrics: Metrics,
) -> Ambient:
    """Ambient mode of this node. Raises SettingError when the node's own address is asked for and there is none."""
    without_ipv6 = _without_ipv6(programmer.config) if settings.ambient_ipv6 else ""
    ipv6 = settings.ambient_ipv6 and has_ipv6() and not without_ipv6
    families = frozenset(Family) if ipv6 else frozenset({Family.V4})
    proc = ProcRoot(settings.host_proc_dir) if settings.host_proc_dir else find_proc_root()
    if proc.warning:
        log.warning("%s", proc.warning)
    netns_path = host_netns_path(proc.path, settings.allow_switch_to_host_ns)
    probe_v4, probe_v6 = probe_addresses(
        settings.host_probe_snat_ip,
        settings.host_probe_snat_ipv6,
        lambda version: _node_address(Family(version), netns_path),
    )
    defaults = AmbientParameters(dns_capture=settings.ambient_dns_capture, probe_v4=probe_v4, probe_v6=probe_v6)
    host = HostConfig(
        backend=programmer.config.backend,
        families=families,
        probe_v4=defaults.probe_v4,
        probe_v6=defaults.probe_v6,
        netns_path=netns_path,
        proc_root=proc.path,
        forced_variant=settings.force_iptables_binary,
        kubelet_uid=settings.kubelet_uid,
        branch_eni=settings.ambient_enable_aws_branch_eni_probe,
    )
    config = AmbientConfig(
        policy=policy(settings),
        defaults=defaults,
        families=families,
        verify_seconds=settings.ambient_verify_seconds,
        ztunnel_wait_seconds=settings.ambient_ztunnel_wait_seconds,
        sandboxed_runtimes=settings.ambient_sandboxed_runtimes,
        without_ipv6=without_ipv6,
    )
    return Ambient(
        config,
        pods=pods,
        namespaces=namespaces,
        programmer=programmer,
        search=NetnsSearch(NetnsFinder(proc.path).find),
        host=HostSide(host, programmer.variant),
        api=api,
        warn=warn,
        metrics=metrics,
    )


def _without_ipv6(config: BackendConfig) -> str:
    """What this kernel lacks for IPv6 rules, in words, where it has IPv6; preflight tells of it. Once, and blocking.

    It decides for the life of the agent: rules of running pods must not change because a module has come.
    """
    if config.backend is Backend.NFTABLES or not has_ipv6():
        return ""
    try:
        found = lacks_for_ipv6_alone(config.backend, settle_choice(config).variant)
    except (MeshCniError, OSError):
        return ""  # no rules of any family then, of which the choice of the variant tells
    return "; ".join(lack.what for lack in found)


def _node_address(family: Family, netns_path: str) -> IPv4Address | IPv6Address | None:
    netns = open_netns(netns_path)
    try:
        return call_in_netns(netns, lambda: node_address(family))
    finally:
        os.close(netns)
