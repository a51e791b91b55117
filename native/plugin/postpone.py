"""Takes OpenSSL's relocations out of the start of the linked plugin; tls.c makes up for them when it needs OpenSSL.

    postpone.py EXECUTABLE MAP

A position-independent executable adds its address to every pointer in its data when it starts. OpenSSL has more of them
than all the rest: 90 pages written to, a seventh of the plugin's start, for something that only runs while the node
agent is down. So the linker's packed table of relative relocations (RELR) is split in two: what the start still does,
and what belongs to data of libssl and libcrypto, which goes into the section that tls.c reserves. MAP is the linker's,
and says which data that is.
"""

import re
import struct
import sys
from pathlib import Path

SECTION = b".postponed_relr"  # of tls.c: room for a word with the number of words that follow, and these
OPENSSL_DATA = re.compile(r"^ \.data\S*\s+0x([0-9a-f]+)\s+0x([0-9a-f]+) \S*/lib(?:ssl|crypto)\.a\(\S+\)$", re.MULTILINE)
WORD = 8
BITS = 63  # in a word that is a bitmap, as its lowest bit says
PT_LOAD, PT_DYNAMIC = 1, 2
DT_RELRSZ, DT_RELR = 35, 36


def decoded(words: list[int]) -> list[int]:
    """The addresses in a RELR table: a word is an address, or says which of the 63 words behind the last are meant."""
    addresses = []
    at = 0
    for word in words:
        if word & 1:
            addresses += [at + bit * WORD for bit in range(BITS) if word >> (bit + 1) & 1]
            at += BITS * WORD
        else:
            addresses.append(word)
            at = word + WORD
    return addresses


def encoded(addresses: list[int]) -> list[int]:
    """The RELR table of ascending addresses."""
    words = []
    index = 0
    while index < len(addresses):
        words.append(addresses[index])
        at = addresses[index] + WORD
        index += 1
        while bits := bits_from(at, addresses[index : index + BITS]):
            words.append(sum(1 << (bit + 1) for bit in bits) | 1)
            index += len(bits)
            at += BITS * WORD
    return words


def bits_from(at: int, addresses: list[int]) -> list[int]:
    """Which bits the next addresses have in the bitmap for the words from `at` on, up to the first that has none."""
    bits = []
    for address in addresses:
        bit, odd = divmod(address - at, WORD)
        if odd or bit >= BITS:
            break
        bits.append(bit)
    return bits


class Elf:
    """A linked 64-bit little-endian executable whose load address is 0."""

    def __init__(self, data: bytes) -> None:
        """Takes the whole file."""
        self.data = bytearray(data)
        phoff, shoff = struct.unpack_from("<QQ", data, 32)
        phsize, phnum, shsize, shnum, shstrndx = struct.unpack_from("<5H", data, 54)
        self.segments = [struct.unpack_from("<IIQQQQQQ", data, phoff + i * phsize) for i in range(phnum)]
        self.sections = [struct.unpack_from("<IIQQQQ", data, shoff + i * shsize) for i in range(shnum)]
        self.names = self.sections[shstrndx][4]

    def place(self, address: int) -> int:
        """Where in the file an address is."""
        for kind, _, offset, start, _, size, *_ in self.segments:
            if kind == PT_LOAD and start <= address < start + size:
                return int(offset + address - start)
        raise SystemExit(f"postpone: nothing is loaded at {address:#x}")

    def dynamic(self, tag: int) -> int:
        """Where in the file the value of an entry of the dynamic section is."""
        (start, size) = next((segment[2], segment[5]) for segment in self.segments if segment[0] == PT_DYNAMIC)
        for at in range(start, start + size, 2 * WORD):
            if self.words(at, 1) == [tag]:
                return int(at + WORD)
        raise SystemExit(f"postpone: the dynamic section has no entry {tag}: does the linker pack relocations?")

    def section(self, name: bytes) -> tuple[int, int]:
        """Where in the file a section is, and its size."""
        for name_at, _, _, _, offset, size in self.sections:
            if self.data[self.names + name_at :].startswith(name + b"\0"):
                return offset, size
        raise SystemExit(f"postpone: there is no section {name.decode()}")

    def words(self, at: int, count: int) -> list[int]:
        """Words of the file."""
        return list(struct.unpack_from(f"<{count}Q", self.data, at))

    def write(self, at: int, words: list[int]) -> None:
        """Words into the file."""
        struct.pack_into(f"<{len(words)}Q", self.data, at, *words)


def postpone(data: bytes, linker_map: str) -> bytes:
    """The executable with its table split."""
    elf = Elf(data)
    ours = set()
    for start, size in OPENSSL_DATA.findall(linker_map):
        ours.update(range(int(start, 16) & -WORD, int(start, 16) + int(size, 16), WORD))
    table = elf.place(*elf.words(elf.dynamic(DT_RELR), 1))
    count = elf.words(elf.dynamic(DT_RELRSZ), 1)[0] // WORD
    addresses = decoded(elf.words(table, count))
    now = encoded([address for address in addresses if address not in ours])
    later = encoded([address for address in addresses if address in ours])
    room_at, room = elf.section(SECTION)
    if not later or len(now) > count or (len(later) + 1) * WORD > room:
        raise SystemExit(
            f"postpone: {count} words of relocations make {len(now)} and {len(later)}, with room for {room}"
        )
    elf.write(table, now + [0] * (count - len(now)))
    elf.write(elf.dynamic(DT_RELRSZ), [len(now) * WORD])
    elf.write(room_at, [len(later), *later])
    return bytes(elf.data)


if __name__ == "__main__":
    executable, map_file = map(Path, sys.argv[1:])
    executable.write_bytes(postpone(executable.read_bytes(), map_file.read_text()))
