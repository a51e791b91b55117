"""Sets of the kernel's ipset: what ipset prints of ours, what others may have made, old kernels, sets in use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from errno import ENOENT
from ipaddress import ip_address

import pytest
from tests.kernel.probeworld import BOTH, ONE, OTHER_UID, SIX, TWO, UID, V4, Host, Inside
from tests.kernel.world import Netns

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host import ipset
from meshcni.host.ipset import Ipset
from meshcni.host.probeset import NO_COMMENTS, IpsetProbeSet


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host(Netns(), "ipset")
    yield made
    made.netns.close()


def header_lines(listing: str) -> list[str]:
    return re.findall(r"^(?:Name|Type|Header): .*$", re.sub(r" (bucketsize|initval) \S+", "", listing), re.MULTILINE)


def test_what_ipset_prints(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    sets.put({ONE: UID, SIX: OTHER_UID})
    listing = host.ipset("list")
    assert header_lines(listing) == [
        "Name: istio-inpod-probes-v4",
        "Type: hash:ip",
        "Header: family inet hashsize 1024 maxelem 65536 comment",
        "Name: istio-inpod-probes-v6",
        "Type: hash:ip",
        "Header: family inet6 hashsize 1024 maxelem 65536 comment",
    ]
    assert f'10.77.0.2 comment "{UID}"\n' in listing
    assert f'fd00:77::2 comment "{OTHER_UID}"\n' in listing


def test_sets_that_ipset_made_are_ours_too(host: Host) -> None:
    """ipset makes them with the newest revision, so the kernel has to take the two for the same."""
    host.ipset("create", istio.PROBE_SET_V4, "hash:ip", "comment")
    host.ipset("create", istio.PROBE_SET_V6, "hash:ip", "family", "inet6", "comment", "counters", "maxelem", "512")
    host.ipset("add", istio.PROBE_SET_V4, "10.77.0.2", "comment", "somebody's, with \\ and ; { }")
    host.ipset("add", istio.PROBE_SET_V4, "10.77.0.3")
    sets = host.sets()
    sets.ensure()
    assert sets.warning == ""
    assert sets.entries() == {ONE: "somebody's, with \\ and ; { }", TWO: ""}
    sets.put({TWO: UID, SIX: UID})
    assert sets.entries() == {ONE: "somebody's, with \\ and ; { }", TWO: UID, SIX: UID}


def test_a_set_without_comments_is_used_as_it_is(host: Host) -> None:
    host.ipset("create", istio.PROBE_SET_V4, "hash:ip")
    host.ipset("add", istio.PROBE_SET_V4, "10.77.0.2")
    sets = host.sets()
    sets.put({TWO: UID, SIX: UID})  # even before it was looked at
    assert sets.entries() == {ONE: "", TWO: "", SIX: UID}
    assert sets.warning == NO_COMMENTS
    sets.delete([ONE])
    host.ipset("destroy", istio.PROBE_SET_V4)
    sets.ensure()
    assert sets.warning == ""
    sets.put({ONE: UID})
    assert sets.entries() == {ONE: UID, SIX: UID}


class OldKernel(Ipset):
    """The kernel's answers where sets cannot have comments: it knows no revision that could."""

    def create(self, name: str, family: int, *, comments: bool = True) -> None:
        if comments:
            raise OSError(ipset.ERROR_FIND_TYPE, "as if")
        super().create(name, family, comments=False)


def test_a_kernel_without_comments(host: Host) -> None:
    inner = IpsetProbeSet(BOTH, connect=OldKernel)
    sets = Inside(host.netns, inner)
    sets.ensure()
    assert inner.warning == NO_COMMENTS
    sets.put({ONE: UID, SIX: UID})
    sets.put({ONE: OTHER_UID})
    assert sets.entries() == {ONE: "", SIX: ""}
    sets.delete([ONE])
    assert sets.entries() == {SIX: ""}
    assert "comment" not in host.ipset("list")


@pytest.mark.parametrize(
    ("made", "described"),
    [
        (("hash:net",), "a hash:net family inet, not"),
        (("hash:ip", "family", "inet6"), "a hash:ip family inet6, not"),
        (("hash:ip", "netmask", "24"), "a hash:ip family inet netmask 24, not"),
        (("hash:ip", "timeout", "60", "comment"), "a hash:ip family inet timeout 60, not"),
        (("list:set",), "a list:set family 0, not"),
    ],
)
def test_a_set_that_will_not_do(host: Host, made: tuple[str, ...], described: str) -> None:
    host.ipset("create", istio.PROBE_SET_V4, *made)
    before = host.ipset("save")
    with pytest.raises(ApplyError) as caught:
        host.sets(V4).ensure()
    assert described in caught.value.message
    assert caught.value.message.endswith("not a hash:ip family inet")
    assert "ipset destroy istio-inpod-probes-v4" in caught.value.hint
    assert host.ipset("save") == before


def test_a_full_set(host: Host) -> None:
    host.ipset("create", istio.PROBE_SET_V4, "hash:ip", "comment", "maxelem", "1", "hashsize", "64")
    sets = host.sets(V4)
    with pytest.raises(
        ApplyError, match=r"cannot add 10\.3\.0\.\d+ to the ipset istio-inpod-probes-v4: the set is full"
    ):
        sets.put({ip_address("10.3.0.0") + n: UID for n in range(200)})
    sets.put({next(iter(sets.entries())): OTHER_UID})
    assert OTHER_UID in sets.entries().values()


def test_an_ipset_that_rules_use_stays(host: Host) -> None:
    sets = host.sets()
    sets.put({ONE: UID, SIX: UID})
    rule = ("POSTROUTING", "-p", "tcp", "-m", "set", "--match-set", istio.PROBE_SET_V4, "dst", "-j", "RETURN")
    host.netns.shell("iptables-legacy", "-t", "nat", "-A", *rule)
    host.netns.shell("iptables-nft", "-t", "nat", "-A", *rule)
    host.ipset("create", "holder", "list:set")
    host.ipset("add", "holder", istio.PROBE_SET_V4)
    with pytest.raises(ApplyError) as caught:
        sets.destroy()
    expected = "the ipset istio-inpod-probes-v4 is in use by the list of sets holder and 2 packet rules"
    assert caught.value.message == expected
    assert "iptables-legacy-save" in caught.value.hint
    assert sets.entries() == {ONE: UID}  # the other set is gone
    sets.ensure()
    host.netns.shell("iptables-legacy", "-t", "nat", "-F")
    host.netns.shell("iptables-nft", "-t", "nat", "-F")
    host.ipset("destroy", "holder")
    sets.destroy()
    assert "istio" not in host.ipset("list")


def test_a_rule_goes_on_matching_through_every_change(host: Host) -> None:
    """The rule holds on to the set, not to its name: an ensure must not exchange it."""
    sets = host.sets(V4)
    sets.ensure()
    host.netns.shell(
        "iptables-legacy", "-A", "OUTPUT", "-m", "set", "--match-set", istio.PROBE_SET_V4, "dst", "-j", "DROP"
    )
    sets.put({ONE: UID})
    sets.ensure()
    listing = host.ipset("list", istio.PROBE_SET_V4)
    assert "References: 1" in listing
    assert UID in listing


def test_a_mapped_entry_of_somebody_else_is_left_out(host: Host) -> None:
    """Reported, it would be deleted as nobody's, and with it the IPv4 entry of a living pod."""
    sets = host.sets()
    sets.put({ONE: UID, SIX: UID})
    host.ipset("add", istio.PROBE_SET_V6, "::ffff:10.77.0.2", "comment", "strange")
    assert sets.entries() == {ONE: UID, SIX: UID}


def test_what_the_kernel_does_not_answer_is_an_apply_error(host: Host) -> None:
    def no_socket() -> Ipset:
        raise OSError(93, "Protocol not supported")

    sets = IpsetProbeSet(BOTH, connect=no_socket)
    calls: list[Callable[[], object]] = [
        sets.ensure,
        sets.entries,
        lambda: sets.put({ONE: UID}),
        lambda: sets.delete([ONE]),
        sets.destroy,
    ]
    for call in calls:
        with pytest.raises(ApplyError, match="cannot talk to ipset: Protocol not supported") as caught:
            call()
        assert "ip_set" in caught.value.hint


def test_a_set_that_vanishes_again_and_again(host: Host) -> None:
    class Vanishing(Ipset):
        def add(self, name: str, address: object, comment: str | None) -> None:
            raise OSError(ENOENT, "No such file or directory")

    sets = Inside(host.netns, IpsetProbeSet(V4, connect=Vanishing))
    with pytest.raises(ApplyError, match=r"cannot add 10\.77\.0\.2 to the ipset istio-inpod-probes-v4: No such file"):
        sets.put({ONE: UID})
