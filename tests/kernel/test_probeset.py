"""The host's address sets: one contract for ipset, nft and the fake; what only one of them has."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

import pytest
from tests.kernel.probeworld import BOTH, MAPPED, ONE, OTHER_UID, SIX, STATIC_UID, TWO, UID, V4, Host
from tests.kernel.world import Netns, nft_list

from meshcni import istio
from meshcni.errors import ApplyError, RulesError
from meshcni.host.probeset import NFT_TABLE, SET_NAMES, FakeProbeSet, IpsetProbeSet, NftProbeSet
from meshcni.rules.model import Family

VARIANTS = ("ipset", "nft", "fake")


@pytest.fixture
def netns() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


@pytest.fixture(params=VARIANTS)
def host(request: pytest.FixtureRequest, netns: Netns) -> Host:
    return Host(netns, request.param)


@pytest.fixture(params=VARIANTS[:2])
def real(request: pytest.FixtureRequest, netns: Netns) -> Host:
    return Host(netns, request.param)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_what_is_put_in_is_there(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    assert sets.entries() == {}
    sets.put({ONE: UID, SIX: UID})
    sets.put({TWO: STATIC_UID})
    assert sets.entries() == {ONE: UID, SIX: UID, TWO: STATIC_UID}
    assert sets.warning == ""
    assert sets.variant == host.variant


def test_a_second_ensure_changes_nothing(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    sets.put({ONE: UID, SIX: OTHER_UID})
    sets.ensure()
    sets.ensure()
    assert sets.entries() == {ONE: UID, SIX: OTHER_UID}


def test_putting_changes_the_owner(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    sets.put({ONE: UID, TWO: UID})
    sets.put({ONE: OTHER_UID, SIX: OTHER_UID})
    assert sets.entries() == {ONE: OTHER_UID, TWO: UID, SIX: OTHER_UID}


def test_putting_the_same_again_is_fine(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    for _ in range(3):
        sets.put({ONE: UID})
    assert sets.entries() == {ONE: UID}


def test_deletion(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    sets.put({ONE: UID, TWO: UID, SIX: UID})
    sets.delete([TWO, SIX, ip_address("10.9.9.9"), ip_address("fd00::9")])
    assert sets.entries() == {ONE: UID}
    sets.delete([TWO, SIX])
    sets.delete([])
    sets.put({})
    assert sets.entries() == {ONE: UID}


def test_a_completed_pod_and_a_new_one_with_its_address(host: Host) -> None:
    """The address passes to the new pod; whoever removes the old pod asks for the owner first."""
    sets = host.sets()
    sets.ensure()
    sets.put({ONE: UID})
    sets.put({ONE: OTHER_UID})
    stale = [address for address, owner in sets.entries().items() if owner == UID]
    sets.delete(stale)
    assert sets.entries() == {ONE: OTHER_UID}


def test_mapped_addresses_are_ipv4_addresses(host: Host) -> None:
    sets = host.sets(V4)
    sets.ensure()
    sets.put({MAPPED: UID})
    assert sets.entries() == {ONE: UID}
    sets.put({ONE: OTHER_UID})
    assert sets.entries() == {ONE: OTHER_UID}
    sets.delete([MAPPED])
    assert sets.entries() == {}


def test_addresses_of_a_family_that_is_off_are_skipped(host: Host) -> None:
    sets = host.sets(V4)
    sets.ensure()
    sets.put({SIX: UID, ONE: UID})
    sets.put({SIX: UID})
    sets.delete([SIX])
    assert sets.entries() == {ONE: UID}


def test_three_hundred_entries(host: Host) -> None:
    wanted = {ip_address("10.1.0.0") + n: f"{n:08x}-5d0a-4c55-9f4e-2f1f6a7b8c9d" for n in range(300)}
    wanted |= {ip_address("fd00:1::") + n: f"{n:08x}-5d0a-4c55-9f4e-2f1f6a7b8c9d" for n in range(300)}
    sets = host.sets()
    sets.ensure()
    sets.put(wanted)
    assert sets.entries() == wanted
    backwards = dict.fromkeys(reversed(wanted), UID)
    sets.put(backwards)
    assert sets.entries() == backwards
    sets.delete(list(wanted)[:599])
    assert sets.entries() == {list(wanted)[599]: UID}


def test_missing_sets(host: Host) -> None:
    sets = host.sets()
    assert sets.entries() == {}
    sets.delete([ONE, SIX])
    assert sets.entries() == {}
    sets.put({ONE: UID, SIX: UID})
    assert sets.entries() == {ONE: UID, SIX: UID}


def test_destruction(host: Host) -> None:
    sets = host.sets()
    sets.destroy()
    sets.ensure()
    sets.put({ONE: UID, SIX: UID})
    sets.destroy()
    assert sets.entries() == {}
    sets.destroy()
    sets.ensure()
    assert sets.entries() == {}


@pytest.mark.parametrize(
    "uid",
    [
        "",
        'x" }; flush ruleset; #',
        "two words",
        "line\nbreak",
        "x" * 128,
        "ключ",
        UID + "\n",
        "a\0b",
    ],
)
def test_what_is_no_uid_is_refused(host: Host, uid: str) -> None:
    sets = host.sets()
    sets.ensure()
    with pytest.raises(RulesError, match="is none") as caught:
        sets.put({TWO: UID, ONE: uid})
    assert repr(uid) in caught.value.message
    assert "127 letters" in caught.value.hint
    assert sets.entries() == {}


def test_a_scope_is_no_part_of_an_address(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    sets.put({IPv6Address('fe80::1%x" } ; flush ruleset ; #'): UID})
    assert sets.entries() == {IPv6Address("fe80::1"): UID}
    sets.delete([IPv6Address("fe80::1%eth0")])
    assert sets.entries() == {}


def test_the_longest_uid(host: Host) -> None:
    sets = host.sets()
    sets.put({ONE: "a.B-9_" + "x" * 121})
    assert sets.entries() == {ONE: "a.B-9_" + "x" * 121}


def test_threads_do_not_lose_each_other_s_entries(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    wanted = {ip_address("10.2.0.0") + n: f"uid-{n}" for n in range(40)}

    def work(part: int) -> None:
        for address in list(wanted)[part::4]:
            sets.put({address: "stale"})
            sets.delete([address])
            sets.put({address: wanted[address]})

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sets.entries() == wanted


def test_the_fake_refuses_and_is_used() -> None:
    sets = FakeProbeSet(BOTH, refuse="no")
    for change in (sets.ensure, lambda: sets.put({ONE: UID}), lambda: sets.delete([ONE]), sets.destroy):
        with pytest.raises(ApplyError, match="no"):
            change()
    sets.refuse, sets.used_by = "", "a rule"
    sets.put({ONE: UID})
    with pytest.raises(ApplyError, match="in use by a rule"):
        sets.destroy()
    assert sets.held == sets.entries() == {ONE: UID}


# --- what both real ones do -------------------------------------------------------------------------------------------


def test_another_agent_goes_on_with_what_is_there(real: Host) -> None:
    first = real.sets()
    first.ensure()
    first.put({ONE: UID, SIX: UID})
    second = real.sets()
    second.ensure()
    assert second.entries() == {ONE: UID, SIX: UID}
    only_ipv4 = real.sets(V4)
    only_ipv4.ensure()
    assert only_ipv4.entries() == {ONE: UID}
    only_ipv4.destroy()  # also the set of the family that has been switched off meanwhile
    assert real.sets().entries() == {}
    assert "istio" not in real.netns.shell("ipset", "list") + nft_list(real.netns)


def test_no_set_of_a_family_that_is_off(real: Host) -> None:
    sets = real.sets(V4)
    sets.ensure()
    sets.put({SIX: UID, ONE: UID})
    listed = real.netns.shell("ipset", "list", "-n") + nft_list(real.netns)
    assert istio.PROBE_SET_V4 in listed
    assert istio.PROBE_SET_V6 not in listed


def test_unrelated_sets_stay(real: Host) -> None:
    real.ipset("create", "theirs", "hash:ip")
    real.ipset("add", "theirs", "10.0.0.1")
    real.nft(
        "add table inet theirs; add set inet theirs s { type ipv4_addr ; }; add element inet theirs s { 10.0.0.1 }"
    )
    before = real.ipset("save"), nft_list(real.netns)
    sets = real.sets()
    sets.ensure()
    sets.put({ONE: UID})
    sets.delete([ONE])
    sets.destroy()
    assert (real.ipset("save"), nft_list(real.netns)) == before


@pytest.mark.parametrize("method", ["ensure", "put"])
def test_without_permission(real: Host, netns: Netns, method: str) -> None:
    def drop_then_change() -> str:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
        assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
        families = {"ipset": IpsetProbeSet, "nft": NftProbeSet}
        sets = families[real.variant](BOTH)
        change = sets.ensure if method == "ensure" else lambda: sets.put({ONE: UID})
        with pytest.raises(ApplyError) as caught:
            change()
        return str(caught.value)

    message = netns.call(drop_then_change)
    assert "ot permitted" in message
    assert "CAP_NET_ADMIN is needed" in message


def test_names() -> None:
    assert SET_NAMES == {Family.V4: "istio-inpod-probes-v4", Family.V6: "istio-inpod-probes-v6"}
    assert NFT_TABLE == "istio-ambient-nat"
    assert all(len(name) <= 31 for name in SET_NAMES.values())  # IPSET_MAXNAMELEN without its NUL
