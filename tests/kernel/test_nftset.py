"""Sets in the host's nft table: what nft prints of ours, what others may have put in, rules beside them."""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterator
from errno import EPROTONOSUPPORT

import pytest
from tests.kernel.probeworld import BOTH, ONE, OTHER_UID, SIX, TWO, UID, Host
from tests.kernel.world import Netns, nft_list

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host.backends.libnftables import Nft, NftUnavailableError
from meshcni.host.netlink import NetlinkSocket, attributes
from meshcni.host.probeset import NFT_TABLE, NftProbeSet


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host(Netns(), "nft")
    yield made
    made.netns.close()


RULE = f"add rule inet {NFT_TABLE} postrouting ip daddr @{istio.PROBE_SET_V4} counter snat to 169.254.7.127"
CHAIN = f"add chain inet {NFT_TABLE} postrouting {{ type nat hook postrouting priority 100 ; }}"


def test_what_nft_prints(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    sets.put({ONE: UID, SIX: OTHER_UID})
    assert nft_list(host.netns) == (
        "table inet istio-ambient-nat {\n"
        "\tset istio-inpod-probes-v4 {\n"
        "\t\ttype ipv4_addr\n"
        f'\t\telements = {{ 10.77.0.2 comment "{UID}" }}\n'
        "\t}\n\n"
        "\tset istio-inpod-probes-v6 {\n"
        "\t\ttype ipv6_addr\n"
        f'\t\telements = {{ fd00:77::2 comment "{OTHER_UID}" }}\n'
        "\t}\n"
        "}\n"
    )


def kernel_sets() -> dict[str, tuple[int, int, bytes]]:
    """What the kernel holds of each set in this namespace: nft's number of the key's type, its length, nft's notes."""
    with NetlinkSocket(12) as kernel:  # NETLINK_NETFILTER; NFT_MSG_GETSET of every family
        replies = kernel.dump(10 << 8 | 10, struct.pack("=BBH", 0, 0, 0))
    found = {}
    for values in (dict(attributes(reply[4:])) for reply in replies):
        kind, length = (int.from_bytes(values[number], "big") for number in (4, 5))
        found[values[2].rstrip(b"\0").decode()] = kind, length, values.get(13, b"")
    return found


def test_what_is_written_about_a_set(host: Host) -> None:
    """The byte order of keys alone, as every nft before 1.1 did: one may end in SIGSEGV over what 1.1 adds."""
    notes = struct.pack("=BBI", 0, 4, 2)
    expected = {istio.PROBE_SET_V4: (7, 4, notes), istio.PROBE_SET_V6: (8, 16, notes)}
    sets = host.sets()
    sets.put({ONE: UID})
    sets.ensure()
    host.nft(CHAIN + "\n" + RULE)
    sets.put({ONE: OTHER_UID, TWO: UID, SIX: UID})
    sets.delete([TWO])
    assert host.netns.call(kernel_sets) == expected


def test_a_set_of_the_same_type_that_nft_made_stays_as_it_is(host: Host) -> None:
    host.nft(
        f"add table inet {NFT_TABLE}\n"
        f'add set inet {NFT_TABLE} {istio.PROBE_SET_V4} {{ typeof ip daddr ; comment "theirs" ; }}\n'
        f"add element inet {NFT_TABLE} {istio.PROBE_SET_V4} {{ 10.77.0.2 }}"
    )
    before = host.netns.call(kernel_sets)[istio.PROBE_SET_V4]
    sets = host.sets()
    sets.ensure()
    assert host.netns.call(kernel_sets)[istio.PROBE_SET_V4] == before
    assert sets.entries() == {ONE: ""}


def test_sets_and_entries_of_others(host: Host) -> None:
    name = istio.PROBE_SET_V4
    host.nft(
        f"add table inet {NFT_TABLE}\n"
        f'add set inet {NFT_TABLE} {name} {{ type ipv4_addr ; comment "elements = {{ 1.2.3.4 }}" ; }}\n'
        f'add element inet {NFT_TABLE} {name} {{ 10.77.0.2 comment "it\'s, a {{b}} = c\nover two lines ключ" }}\n'
        f"add element inet {NFT_TABLE} {name} {{ 10.77.0.3 }}"
    )
    sets = host.sets()
    sets.ensure()
    assert sets.entries() == {ONE: "it's, a {b} = c\nover two lines ключ", TWO: ""}
    sets.put({TWO: UID})
    sets.delete([ONE])
    assert sets.entries() == {TWO: UID}


def test_a_comment_of_somebody_else_that_is_no_text(host: Host) -> None:
    sets = host.sets()
    sets.put({ONE: UID})
    comment = "$(printf '\\377')"
    command = f'add element inet {NFT_TABLE} {istio.PROBE_SET_V4} {{ 10.77.0.3 comment \\"{comment}\\" }}'
    host.netns.shell("sh", "-c", f'printf "%s\\n" "{command}" | nft -f -')
    assert sets.entries() == {ONE: UID, TWO: "\\xff"}


def test_the_host_s_rules_stay(host: Host) -> None:
    sets = host.sets()
    sets.ensure()
    host.nft(CHAIN + "\n" + RULE)
    sets.put({ONE: UID, TWO: UID, SIX: UID})
    sets.put({ONE: OTHER_UID})
    sets.delete([TWO])
    sets.ensure()
    listing = nft_list(host.netns)
    assert "ip daddr @istio-inpod-probes-v4 counter" in listing
    assert sets.entries() == {ONE: OTHER_UID, SIX: UID}
    with pytest.raises(ApplyError) as caught:
        sets.destroy()
    assert caught.value.message == "the sets of nft table inet istio-ambient-nat are in use by chain postrouting"
    assert nft_list(host.netns) == listing


def test_sets_go_and_what_others_have_in_the_table_stays(host: Host) -> None:
    sets = host.sets()
    sets.put({ONE: UID, SIX: UID})
    host.nft(CHAIN + f"\nadd set inet {NFT_TABLE} more {{ type ipv4_addr ; }}")
    sets.destroy()
    listing = nft_list(host.netns)
    assert "chain postrouting" in listing
    assert "set more" in listing
    assert "istio-inpod" not in listing


def test_the_original_s_flush_leaves_the_entries(host: Host) -> None:
    sets = host.sets()
    sets.put({ONE: UID})
    host.nft(f"add table inet {NFT_TABLE}; flush table inet {NFT_TABLE}")
    assert sets.entries() == {ONE: UID}


def test_a_firewall_s_flush_is_healed_by_the_next_put(host: Host) -> None:
    sets = host.sets()
    sets.put({ONE: UID})
    host.nft("flush ruleset")
    assert sets.entries() == {}
    sets.delete([ONE])
    assert nft_list(host.netns) == ""
    sets.put({SIX: UID})
    assert sets.entries() == {SIX: UID}


def test_an_nft_set_of_another_type(host: Host) -> None:
    host.nft(f"add table inet {NFT_TABLE}; add set inet {NFT_TABLE} {istio.PROBE_SET_V4} {{ type inet_service ; }}")
    before = nft_list(host.netns)
    sets = host.sets()
    for change in (sets.ensure, lambda: sets.put({ONE: UID})):
        with pytest.raises(ApplyError, match="nft table inet istio-ambient-nat: ") as caught:
            change()
        assert caught.value.hint == "somebody else may have changed it: nft list table inet istio-ambient-nat"
    assert sets.entries() == {}
    assert nft_list(host.netns) == before


def test_one_transaction_for_a_put_of_both_families(host: Host) -> None:
    """Nobody ever sees an address without its entry, nor half of a put."""

    class Counting(Nft):
        def __init__(self) -> None:
            super().__init__()
            self.changes = 0

        def change(self, commands: str) -> None:
            self.changes += 1
            super().change(commands)

    def put_twice() -> int:
        counting = Counting()
        sets = NftProbeSet(BOTH, counting)
        sets.ensure()
        sets.put({ONE: UID, SIX: UID})
        sets.put({ONE: OTHER_UID, SIX: OTHER_UID})
        return counting.changes

    assert host.netns.call(put_twice) == 2


def test_an_entry_that_comes_between_the_look_and_the_change(host: Host) -> None:
    """An old and a new agent at work at once: the later put decides, whoever looked first."""

    class Slow(Nft):
        """Another agent is faster, each time."""

        def change(self, commands: str) -> None:
            NftProbeSet(BOTH).put({ONE: "another-agent", SIX: OTHER_UID})
            super().change(commands)

    host.netns.call(lambda: NftProbeSet(BOTH, Slow()).put({ONE: UID, TWO: UID}))
    assert host.sets().entries() == {ONE: UID, TWO: UID, SIX: OTHER_UID}


def test_an_entry_that_goes_between_the_look_and_the_change(host: Host) -> None:
    class Slow(Nft):
        def change(self, commands: str) -> None:
            NftProbeSet(BOTH).delete([ONE])
            super().change(commands)

    host.sets().put({ONE: UID, TWO: UID})
    host.netns.call(lambda: NftProbeSet(BOTH, Slow()).delete([ONE, TWO]))
    assert host.sets().entries() == {}


def test_sets_that_go_between_the_look_and_the_change(host: Host) -> None:
    class Slow(Nft):
        flushed = False

        def change(self, commands: str) -> None:
            if not self.flushed:
                super().change("flush ruleset")
            self.flushed = True
            super().change(commands)

    host.sets().put({ONE: UID, TWO: UID})
    host.netns.call(lambda: NftProbeSet(BOTH, Slow()).delete([ONE]))
    assert host.sets().entries() == {}
    host.sets().ensure()
    host.netns.call(lambda: NftProbeSet(BOTH, Slow()).put({ONE: UID}))
    assert host.sets().entries() == {ONE: UID}


def test_what_is_right_is_left_alone(host: Host) -> None:
    """Neither a change, which would wake whoever monitors nft, nor a deletion, for which the kernel makes us wait."""

    class Unchanging(Nft):
        def change(self, commands: str) -> None:
            raise AssertionError(commands)

    host.sets().put({ONE: UID, SIX: UID})

    def again() -> None:
        sets = NftProbeSet(BOTH, Unchanging())
        sets.put({ONE: UID, SIX: UID})
        sets.delete([TWO])

    host.netns.call(again)


def without_netfilter() -> None:
    """Have this thread's kernel know no netfilter sockets: seccomp answers for them as a kernel without does."""
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]  # socket
    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    steps = (
        (load, 0, 0, 0),  # seccomp_data.nr
        (equal, 0, 3, number),
        (load, 0, 0, 32),  # seccomp_data.args[2], the protocol
        (equal, 0, 1, 12),  # NETLINK_NETFILTER
        (answer, 0, 0, 0x00050000 | EPROTONOSUPPORT),  # SECCOMP_RET_ERRNO
        (answer, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def test_a_kernel_without_netfilter(host: Host) -> None:
    def ensure() -> ApplyError:
        without_netfilter()
        with pytest.raises(NftUnavailableError) as caught:
            NftProbeSet(BOTH).ensure()
        return caught.value

    error = host.netns.call(ensure)
    assert error.message == "the kernel has no nf_tables: Protocol not supported"
    assert error.hint == "load nf_tables or use iptables (legacy)"
