"""Pods with a user namespace of their own (`hostUsers: false`): owner matches have to be made from inside it."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.kernel.world import IPV4, IPV6, KIND, Netns, apply, node_choice

from meshcni.errors import ApplyError
from meshcni.host.backends.iptables import IptablesBackend, find_tools
from meshcni.host.netns import check_pod_netns, open_netns
from meshcni.host.redirection import program, verify_sidecar
from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

TPROXY = Interception(mode=InterceptionMode.TPROXY, redirect_dns=True, capture_all_dns=True)


@pytest.fixture
def shifted_pod() -> Iterator[Netns]:
    """A namespace owned by a user namespace in which ids 0 to 65535 are the host's 100000 to 165535."""
    script = "echo ready; read -r line; exec sleep 300"
    command = ["unshare", "--user", "--net", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for kind in ("uid", "gid"):
                with open(f"/proc/{process.pid}/{kind}_map", "w") as file:
                    file.write("0 100000 65536\n")
            pod = Netns(open_netns(f"/proc/{process.pid}/ns/net"))
            pod.ip(
                "link set lo up",
                "link add eth0 type veth peer name peer0",
                f"addr add {IPV4}/24 dev eth0",
                f"addr add {IPV6}/64 dev eth0 nodad",
            )
            yield pod
            pod.close()
        finally:
            process.kill()


def test_rules_are_applied_and_repeated(variant: str, shifted_pod: Netns) -> None:
    gc.collect()  # what earlier tests left must not go in between
    before = len(os.listdir("/proc/self/fd"))
    check_pod_netns(shifted_pod.fd)

    applied = apply(shifted_pod, TPROXY, variant)

    assert (applied.changed, applied.variant) == (True, variant)
    assert applied.processes == (0 if variant == "nftables" else 2)
    assert shifted_pod.call(lambda: verify_sidecar(TPROXY, KIND[variant], choice=node_choice(variant))) == ()
    assert not apply(shifted_pod, TPROXY, variant).changed
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_nsenter_the_way_out_is_named(shifted_pod: Netns) -> None:
    tools = find_tools("nft")
    assert tools is not None
    rules = sidecar_ruleset(TPROXY, frozenset(Family), Backend.IPTABLES)
    backend = IptablesBackend(replace(tools, nsenter=""))
    with pytest.raises(ApplyError, match="there is no nsenter"):
        shifted_pod.call(lambda: program(rules, Backend.IPTABLES, backend))
