"""The packed table of relocations: read, split and written again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from native.plugin.postpone import OPENSSL_DATA, decoded, encoded

ADDRESSES = st.lists(st.integers(0, 2000).map(lambda number: 0x1000 + number * 8), unique=True).map(sorted)


def test_a_table_by_hand() -> None:
    """As lld and ld write it: an address, then a bitmap for the 63 words behind it, then one for the next 63."""
    table = [0x1000, 0b1011, 0b11]
    addresses = [0x1000, 0x1008, 0x1018, 0x1008 + 63 * 8]
    assert decoded(table) == addresses
    assert encoded(addresses) == table


@given(ADDRESSES)
def test_what_is_written_is_read(addresses: list[int]) -> None:
    table = encoded(addresses)
    assert decoded(table) == addresses
    assert len(table) <= len(addresses)


@given(ADDRESSES, st.integers(0, 2000), st.integers(0, 2000))
def test_a_split_loses_nothing(addresses: list[int], begin: int, size: int) -> None:
    ours = range(0x1000 + begin * 8, 0x1000 + (begin + size) * 8)
    now = encoded([address for address in addresses if address not in ours])
    later = encoded([address for address in addresses if address in ours])
    assert sorted(decoded(now) + decoded(later)) == addresses


def test_lines_of_a_linker_map() -> None:
    text = """
 .data.rel.ro.local
                0x00000000007a1240       0x40 /usr/lib/gcc/x/12/../../../x/libcrypto.a(libcrypto-lib-a.o)
 .data          0x00000000008a1240      0x140 /usr/lib/x86_64-linux-gnu/libssl.a(libssl-lib-b.o)
 .data.rel.ro   0x00000000008b1240      0x140 /usr/lib/python3.11/config/libpython3.11-pic.a(c.o)
 .rodata        0x00000000008c1240      0x140 /usr/lib/x86_64-linux-gnu/libssl.a(libssl-lib-b.o)
 .data.rel.ro   0x00000000008d1240      0x140 tls.o
"""
    found = [(int(start, 16), int(size, 16)) for start, size in OPENSSL_DATA.findall(text)]
    assert found == [(0x7A1240, 0x40), (0x8A1240, 0x140)]
