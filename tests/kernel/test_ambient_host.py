"""Whatever happens to the host's rules for probes is named and healed; sets and other people's rules stay."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import permutations

import pytest
from tests.kernel.listings import listing, settled
from tests.kernel.test_ambient_contract import make_foreign, make_sets
from tests.kernel.test_ambient_convergence import BOTH, PLAIN, backend
from tests.kernel.world import KIND, VARIANTS, Netns, node_choice

from meshcni.errors import ApplyError
from meshcni.host.hostrules import apply_host, remove_host, verify_host
from meshcni.host.redirection import Applied
from meshcni.rules.model import Purpose

HOST_TABLE = "inet istio-ambient-nat"
HOST_DAMAGE = {
    "the jump gone": ("-D POSTROUTING -j ISTIO_POSTRT", "", "lacks the rule: -j ISTIO_POSTRT"),
    "another rule first": (
        "-I POSTROUTING 1 -p tcp -j MASQUERADE",
        "",
        "does not begin with the rule: -j ISTIO_POSTRT",
    ),
    "the jump twice": ("-A POSTROUTING -j ISTIO_POSTRT", "", "should not be there: -j ISTIO_POSTRT"),
    "the chain flushed": ("-F ISTIO_POSTRT", f"flush chain {HOST_TABLE} postrouting", "lacks the rule"),
    "everything gone": (
        "-D POSTROUTING -j ISTIO_POSTRT\n-F ISTIO_POSTRT\n-X ISTIO_POSTRT",
        f"flush chain {HOST_TABLE} postrouting\ndelete chain {HOST_TABLE} postrouting",
        "is missing",
    ),
    "a rule more": (
        "-I ISTIO_POSTRT 1 -j RETURN",
        f"insert rule {HOST_TABLE} postrouting counter accept",
        "holds a rule that should not be there",
    ),
    "a chain more": (
        "",
        f"add chain {HOST_TABLE} prerouting {{ type nat hook prerouting priority 0 ; }}",
        "should not be there",
    ),
    "another hook": (
        "",
        f"flush chain {HOST_TABLE} postrouting\ndelete chain {HOST_TABLE} postrouting\n"
        f"add chain {HOST_TABLE} postrouting {{ type nat hook postrouting priority 200 ; }}",
        "wrong hook",
    ),
}


def apply_rules(host: Netns, variant: str, *, uid: int | None = 0, force: str = "") -> Applied:
    choice = node_choice(variant)
    return host.call(
        lambda: apply_host(
            PLAIN.probe_v4, PLAIN.probe_v6, BOTH, KIND[variant], kubelet_uid=uid, choice=choice, force_iptables=force
        )
    )


def verify_rules(host: Netns, variant: str, *, uid: int | None = 0) -> tuple[str, ...]:
    choice = node_choice(variant)
    return host.call(
        lambda: verify_host(PLAIN.probe_v4, PLAIN.probe_v6, BOTH, KIND[variant], kubelet_uid=uid, choice=choice)
    )


def ipsets(host: Netns) -> str:
    return host.shell("ipset", "list")


@pytest.fixture
def host() -> Iterator[Netns]:
    """A host with address sets of both kinds."""
    with closing(Netns()) as netns:
        netns.ip("link set lo up")
        make_sets(netns, "nftables")
        make_sets(netns, "nft")
        yield netns


@pytest.mark.parametrize("damage", HOST_DAMAGE)
def test_damage_on_the_host_is_named_and_healed(damage: str, variant: str, host: Netns) -> None:
    for_iptables, for_nft, words = HOST_DAMAGE[damage]
    make_foreign(host, variant)
    apply_rules(host, variant)
    good, sets = settled(listing(host, variant)), ipsets(host)
    if variant == "nftables" and for_nft:
        host.shell("nft", "-f", "-", text=f"{for_nft}\n")
    elif variant != "nftables" and for_iptables:
        host.shell(f"ip6tables-{variant}-restore", "--noflush", text=f"*nat\n{for_iptables}\nCOMMIT\n")
    else:
        return  # there is no such thing with this backend

    assert any(words in found for found in verify_rules(host, variant))
    assert apply_rules(host, variant).changed

    assert verify_rules(host, variant) == ()
    assert ipsets(host) == sets
    after = settled(listing(host, variant))
    if damage == "another rule first":
        after.remove("-A POSTROUTING -p tcp -j MASQUERADE")
    assert after == good
    assert not apply_rules(host, variant).changed


@pytest.mark.parametrize(("former", "latter"), list(permutations(VARIANTS, 2)))
def test_a_change_of_backend_on_the_host_leaves_one_set_of_rules(former: str, latter: str, host: Netns) -> None:
    make_foreign(host, "nft")
    before = settled(listing(host, "nft"))
    apply_rules(host, former)
    assert apply_rules(host, latter, force=latter if latter != "nftables" else "").variant == latter
    assert verify_rules(host, latter) == ()
    host.call(lambda: backend(latter, Purpose.AMBIENT_HOST).remove())
    # Nothing is left of the former, and the sets of both are as they were.
    assert settled(listing(host, "nft")) == before
    assert "a-uid" in ipsets(host)
    assert host.shell("nft", "list", "table", "inet", "istio-ambient-nat").count("a-uid") == 2


def test_without_its_sets_the_host_gets_no_rules_and_keeps_what_it_had(variant: str) -> None:
    with closing(Netns()) as host:
        make_foreign(host, variant)
        before = settled(listing(host, variant))
        with pytest.raises(ApplyError) as caught:
            apply_rules(host, variant)
        if variant != "nftables":
            assert caught.value.hint == "the address set of the probes has to be made before the rules"
        assert settled(listing(host, variant)) == before


def test_a_new_kubelets_user_is_a_change_for_nft_only(variant: str, host: Netns) -> None:
    apply_rules(host, variant)
    assert (verify_rules(host, variant, uid=1000) != ()) is (variant == "nftables")
    assert apply_rules(host, variant, uid=1000).changed is (variant == "nftables")
    assert verify_rules(host, variant, uid=1000) == ()


def test_the_hosts_lock_is_the_hosts(host: Netns) -> None:
    """A pod's lock is the pod's own; on the host other tools have to wait for us and we for them."""
    assert apply_rules(host, "legacy").processes == 2
    code = "import fcntl; f = open('/run/xtables.lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    code += "; input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    done = threading.Event()

    def remove() -> None:
        host.call(remove_host)
        done.set()

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        assert not done.wait(0.3)
    finally:
        holder.communicate("\n")
        thread.join()
    assert done.is_set()


READ_ONLY_RUN = """
import sys
from tests.kernel.test_ambient_host import apply_rules, verify_rules
from tests.kernel.world import Netns
host = Netns(int(sys.argv[1]))
print(apply_rules(host, "legacy").changed, verify_rules(host, "legacy") == ())
"""


def test_a_lock_that_cannot_be_had_keeps_nobody_from_the_hosts_rules(host: Netns) -> None:
    """In a container with a read-only root file system, where the host's file is not mounted."""
    os.set_inheritable(host.fd, True)
    script = 'mount -t tmpfs -o ro tmpfs /run && exec "$@"'
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", sys.executable, "-c", READ_ONLY_RUN, str(host.fd)]
    environment = {"PYTHONPATH": "src:.", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, close_fds=False, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("True True\n", "")
