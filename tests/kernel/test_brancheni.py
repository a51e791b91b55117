"""Rules for AWS branch ENI pods, in a namespace laid out as AWS's plugin does for security groups."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from errno import EACCES, EPERM
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.kernel.world import Netns

from meshcni.errors import ApplyError
from meshcni.host import rtnetlink
from meshcni.host.brancheni import BranchRules, describe, ensure, is_enabled, observe, remove
from meshcni.host.rtnetlink import PlainRule, Rtnetlink
from meshcni.rules.model import Family

POD, SECOND, PLAIN = "10.0.5.20", "10.0.6.30", "10.0.1.40"
POD_V6 = "fd00:5::20"
VETH, SECOND_VETH = "vlan0123456789a", "vlanabcdef01234"  # 15 bytes, as AWS names them
NOTHING_OF_OURS = """\
10:	from all iif vlan.eth.1 lookup 101
10:	from all iif vlan0123456789a lookup 101
10:	from all iif vlan.eth.2 lookup 102
10:	from all iif vlanabcdef01234 lookup 102
20:	from all lookup local
512:	from all to 10.0.1.40 lookup main
1024:	from all fwmark 0x80/0x80 lookup main
1536:	from 10.0.1.40 lookup 2
32766:	from all lookup main
32767:	from all lookup default
"""


def add_veth(host: Netns, name: str, peer: str) -> None:
    host.ip(f"link add name {name} type veth peer name {peer}", f"link set {name} up", f"link set {peer} up")


def add_branch_pod(host: Netns, number: int, veth: str, address: str) -> None:
    """What AWS does for one pod on a branch ENI (strict mode): two devices, a table, two rules."""
    table, vlan = 100 + number, f"vlan.eth.{number}"
    add_veth(host, vlan, f"trunk{number}")
    add_veth(host, veth, f"pod{number}")
    host.ip(
        f"route add default via 10.0.{number % 256}.1 dev {vlan} onlink table {table}",
        f"route add {address} dev {veth} scope link table {table}",
        f"rule add iif {vlan} lookup {table} priority 10",
        f"rule add iif {veth} lookup {table} priority 10",
    )


@pytest.fixture
def host() -> Iterator[Netns]:
    made = Netns()
    made.ip("link set lo up")
    made.ip("rule add lookup local priority 20", "rule del lookup local priority 0", family=Family.V4)
    add_veth(made, "eth0", "uplink")
    add_veth(made, "eni0123456789a", "podplain")
    made.ip(
        "addr add 10.0.1.10/24 dev eth0",
        "route add default via 10.0.1.1",
        f"route add {PLAIN} dev eni0123456789a scope link",
        f"rule add to {PLAIN} lookup main priority 512",
        f"rule add from {PLAIN} lookup 2 priority 1536",
    )
    made.ip("rule add fwmark 0x80/0x80 lookup main priority 1024", family=Family.V4)
    add_branch_pod(made, 1, VETH, POD)
    add_branch_pod(made, 2, SECOND_VETH, SECOND)
    yield made
    made.close()


def rules(host: Netns, version: int = 4) -> str:
    return "".join(line.rstrip() + "\n" for line in host.shell("ip", f"-{version}", "rule").splitlines())


def make(host: Netns, address: str) -> BranchRules | None:
    return host.call(lambda: ensure(ip_address(address)))


def made(host: Netns, address: str) -> BranchRules:
    branch = make(host, address)
    assert branch is not None
    return branch


def seen(host: Netns) -> tuple[BranchRules, ...]:
    return host.call(observe)


def test_the_rules_of_a_pod(host: Netns) -> None:
    assert rules(host) == NOTHING_OF_OURS
    branch = made(host, POD)
    assert branch.address == ip_address(POD)
    assert [describe(rule) for rule in branch.rules] == [
        f"priority 512 to {POD}/32 lookup 101",
        f"priority 9 iif {VETH} lookup 255",
    ]
    listed = rules(host)
    assert listed.splitlines()[0] == f"9:	from all iif {VETH} lookup local"
    assert f"512:	from all to {POD} lookup 101\n" in listed
    assert sorted(listed.splitlines()) == sorted(
        [
            *NOTHING_OF_OURS.splitlines(),
            f"9:	from all iif {VETH} lookup local",
            f"512:	from all to {POD} lookup 101",
        ]
    )
    assert make(host, POD) == branch
    assert rules(host) == listed
    host.call(lambda: remove(branch))
    assert rules(host) == NOTHING_OF_OURS
    host.call(lambda: remove(branch))
    assert rules(host) == NOTHING_OF_OURS


def test_what_they_do(host: Netns) -> None:
    """The kernel's own answer to: where does a probe go, and where an answer?"""
    assert "dev eth0" in host.shell("ip", "route", "get", POD)
    made(host, POD)
    assert f"dev {VETH} table 101" in host.shell("ip", "route", "get", POD)
    answer = host.shell("ip", "route", "get", "10.0.1.10", "from", POD, "iif", VETH)
    assert answer.startswith(f"local 10.0.1.10 from {POD} dev lo")
    host.shell("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    elsewhere = host.shell("ip", "route", "get", "10.0.9.9", "from", POD, "iif", VETH)
    assert "via 10.0.1.1 dev vlan.eth.1" in elsewhere.replace("\n", " ")


def test_a_probe_gets_its_answer(host: Netns) -> None:
    """A connection from the host to a program in the pod, before, with and after the rules."""
    pod = Netns()
    try:
        mac = link_address(host, VETH)
        host.shell("ip", "link", "set", "pod1", "netns", f"/proc/{os.getpid()}/fd/{pod.fd}")
        pod.ip(
            "link set lo up",
            "link set pod1 up",
            f"addr add {POD}/32 dev pod1",
            "route add 169.254.1.1 dev pod1",  # the gateway that AWS gives every pod, with a fixed link address
            f"neigh add 169.254.1.1 lladdr {mac} dev pod1 nud permanent",
            "route add default via 169.254.1.1 dev pod1",
        )
        with pod.call(lambda: socket.create_server((POD, 8080))):

            def probe() -> bool:
                try:
                    socket.create_connection((POD, 8080), timeout=1).close()
                except OSError:
                    return False
                return True

            assert not host.call(probe)
            branch = made(host, POD)
            assert host.call(probe)
            host.call(lambda: remove(branch))
            assert not host.call(probe)
    finally:
        pod.close()


def link_address(host: Netns, name: str) -> str:
    found = re.search(r"link/ether (\S+)", host.shell("ip", "link", "show", "dev", name))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("address", [PLAIN, "10.0.1.10", "10.0.5.21", "192.0.2.7", "fd00:5::20", "fe80::1"])
def test_other_addresses_get_no_rules(host: Netns, address: str) -> None:
    before = rules(host), rules(host, 6)
    assert make(host, address) is None
    assert (rules(host), rules(host, 6)) == before


def test_ipv6(host: Netns) -> None:
    host.ip(
        f"route add {POD_V6} dev {VETH} table 101",
        f"rule add iif {VETH} lookup 101 priority 10",
        family=Family.V6,
    )
    before = rules(host), rules(host, 6)
    four, six = made(host, POD), made(host, POD_V6)
    assert f"512:	from all to {POD_V6} lookup 101\n" in rules(host, 6)
    assert f"9:	from all iif {VETH} lookup local\n" in rules(host, 6)
    assert seen(host) == (four, six)
    for branch in (six, four):
        host.call(lambda branch=branch: remove(branch))
    assert (rules(host), rules(host, 6)) == before


def test_a_table_above_255(host: Netns) -> None:
    add_branch_pod(host, 400, "vlanlarge", "10.0.8.8")
    branch = made(host, "10.0.8.8")
    assert branch.rules[0].table == 500
    assert "512:	from all to 10.0.8.8 lookup 500\n" in rules(host)
    assert seen(host) == (branch,)
    host.call(lambda: remove(branch))
    assert "10.0.8.8" not in rules(host)


def test_a_rule_that_comes_first_stays_first(host: Netns) -> None:
    host.ip("link add name vlanfirst type veth peer name podfirst", "link set vlanfirst up", "link set podfirst up")
    host.ip("rule add iif vlanfirst lookup 300 priority 0", "route add 10.0.9.9 dev vlanfirst table 300")
    assert made(host, "10.0.9.9").rules[1].priority == 0
    assert "0:	from all iif vlanfirst lookup local" in rules(host)
    assert seen(host)[0].rules == made(host, "10.0.9.9").rules


def test_a_new_agent_finds_them_again(host: Netns) -> None:
    assert seen(host) == ()
    first, second = made(host, POD), made(host, SECOND)
    assert set(seen(host)) == {first, second}
    for branch in seen(host):
        host.call(lambda branch=branch: remove(branch))
    assert rules(host) == NOTHING_OF_OURS


def test_a_new_agent_cleans_up_after_a_pod_that_is_gone(host: Netns) -> None:
    made(host, POD)
    living = made(host, SECOND)
    # What AWS does when the pod goes: the interfaces, and with them the routes, and its own rules.
    host.ip(f"link del {VETH}", "link del vlan.eth.1")
    host.ip(f"rule del iif {VETH} lookup 101 priority 10", "rule del iif vlan.eth.1 lookup 101 priority 10")
    found = seen(host)
    assert living in found
    gone = [branch for branch in found if branch != living]
    assert [(str(branch.address), [describe(rule) for rule in branch.rules]) for branch in gone] == [
        (POD, [f"priority 512 to {POD}/32 lookup 101"]),
        ("None", [f"priority 9 iif {VETH} lookup 255"]),
    ]
    for branch in gone:
        host.call(lambda branch=branch: remove(branch))
    assert POD not in rules(host)
    assert VETH not in rules(host)
    assert seen(host) == (living,)


def test_half_a_pair_is_completed_and_recognised(host: Netns) -> None:
    branch = made(host, POD)
    for missing, kept in ((0, 1), (1, 0)):
        host.call(lambda missing=missing: delete_rule(branch.rules[missing]))
        (half,) = seen(host)
        assert half == BranchRules(ip_address(POD), (branch.rules[kept],))
        assert make(host, POD) == branch
        assert seen(host) == (branch,)


def delete_rule(rule: PlainRule) -> None:
    with Rtnetlink() as netlink:
        netlink.change_plain_rule(rtnetlink.RTM_DELRULE, rule)


def test_the_original_s_rules_are_taken_over(host: Netns) -> None:
    host.ip(f"rule add to {POD}/32 lookup 101 priority 512", f"rule add iif {VETH} lookup local priority 9")
    before = rules(host)
    branch = made(host, POD)
    assert rules(host) == before
    assert seen(host) == (branch,)
    host.call(lambda: remove(branch))
    assert rules(host) == NOTHING_OF_OURS


@pytest.mark.parametrize(
    "foreign",
    [
        f"to {POD}/32 lookup main priority 512",
        f"to {POD}/32 lookup 101 priority 511",
        f"to {POD}/32 fwmark 1 lookup 101 priority 513",
        f"not to {POD}/32 lookup 101 priority 513",
        f"to {POD}/32 iif {VETH} lookup 101 priority 513",
        "to 10.0.5.0/24 lookup 101 priority 512",
        "iif eni0123456789a lookup local priority 9",
        "iif tun0 lookup local priority 9",
        f"iif {VETH} from 10.0.0.0/8 lookup local priority 8",
        f"iif {VETH} lookup main suppress_prefixlength 0 priority 9",
        f"iif {VETH} prohibit priority 8",
    ],
)
def test_rules_of_others_are_not_ours(host: Netns, foreign: str) -> None:
    host.ip(f"rule add {foreign}", family=Family.V4)
    assert seen(host) == ()
    before = rules(host)
    branch = made(host, POD)
    assert seen(host) == (branch,)
    host.call(lambda: remove(branch))
    assert rules(host) == before


def test_the_pod_got_another_sandbox(host: Netns) -> None:
    """The same address behind another interface and in another table: what only the old one had goes."""
    old = made(host, POD)
    host.ip(f"link del {VETH}", "link del vlan.eth.1", f"rule del iif {VETH} lookup 101", "rule del iif vlan.eth.1")
    add_branch_pod(host, 3, "vlannew", POD)
    new = made(host, POD)
    assert new != old
    host.call(lambda: remove(old, keep=[new]))
    assert seen(host) == (new,)
    assert VETH not in rules(host)


def test_shared_rules_stay_with_the_one_who_lives(host: Netns) -> None:
    host.ip(f"route add 10.0.5.21 dev {VETH} scope link table 101")
    one, other = made(host, POD), made(host, "10.0.5.21")
    assert one.rules[1] == other.rules[1]
    host.call(lambda: remove(one, keep=[other]))
    assert seen(host) == (other,)
    host.call(lambda: remove(other))
    assert rules(host) == NOTHING_OF_OURS


class Refusing(Rtnetlink):
    """The kernel with a refusal for every rule from an interface that is added."""

    def change_plain_rule(self, message: int, rule: PlainRule) -> None:
        if rule.interface and message == rtnetlink.RTM_NEWRULE:
            raise OSError(EPERM, "Operation not permitted")
        super().change_plain_rule(message, rule)


def test_half_is_nothing(host: Netns) -> None:
    with pytest.raises(ApplyError) as caught:
        host.call(lambda: ensure(ip_address(POD), connect=Refusing))
    assert caught.value.message == (
        f"cannot add the policy rule priority 9 iif {VETH} lookup 255: Operation not permitted"
    )
    assert "CAP_NET_ADMIN" in caught.value.hint
    assert rules(host) == NOTHING_OF_OURS


def test_half_is_nothing_but_what_was_there_before_stays(host: Netns) -> None:
    host.ip(f"rule add to {POD}/32 lookup 101 priority 512")
    before = rules(host)
    with pytest.raises(ApplyError):
        host.call(lambda: ensure(ip_address(POD), connect=Refusing))
    assert rules(host) == before


class Stubborn(Rtnetlink):
    """The kernel with a refusal of every deletion."""

    def change_plain_rule(self, message: int, rule: PlainRule) -> None:
        if message == rtnetlink.RTM_DELRULE:
            raise OSError(EACCES, "Permission denied")
        super().change_plain_rule(message, rule)


def test_a_failed_removal_names_every_rule(host: Netns) -> None:
    branch = made(host, POD)
    with pytest.raises(ApplyError) as caught:
        host.call(lambda: remove(branch, connect=Stubborn))
    assert [describe(rule) in caught.value.message for rule in branch.rules] == [True, True]


def test_without_a_socket() -> None:
    def none() -> Rtnetlink:
        raise OSError(24, "Too many open files")

    with pytest.raises(ApplyError, match="no route socket"):
        ensure(ip_address(POD), connect=none)


def test_a_node_without_any_of_this() -> None:
    plain = Netns()
    try:
        before = rules(plain), rules(plain, 6)
        assert make(plain, POD) is None
        assert seen(plain) == ()
        assert (rules(plain), rules(plain, 6)) == before
    finally:
        plain.close()


def test_the_switch_is_the_kernel_s_for_the_namespace_of_the_reader(host: Netns) -> None:
    assert not host.call(lambda: is_enabled("/proc"))
    host.shell("sh", "-c", "echo 0 > /proc/sys/net/ipv4/tcp_early_demux")
    assert host.call(lambda: is_enabled("/proc"))


@pytest.mark.parametrize(
    ("content", "expected"), [("0\n", True), ("0", True), ("1\n", False), ("", False), (None, False), ("\n0", False)]
)
def test_the_switch(tmp_path: Path, content: str | None, expected: bool) -> None:
    if content is not None:
        file = tmp_path / "sys/net/ipv4/tcp_early_demux"
        file.parent.mkdir(parents=True)
        file.write_text(content)
    assert is_enabled(str(tmp_path)) is expected
