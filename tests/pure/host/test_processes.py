"""The text of /proc/PID/stat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.host.processes import Stat, parse_stat

REST = "1 1 1 0 -1 4194560 2 0 0 0 11 22 0 0 20 0 1 0 70298968 2678784 178 18446744073709551615 1 1 0\n"


@pytest.mark.parametrize("comm", ["pause", "", "a b", ") S 1 2 3", "((", "tmux: server", "runc:[2:INIT]", "a\nb", "é"])
def test_the_last_parenthesis_ends_the_name(comm: str) -> None:
    assert parse_stat(f"77 ({comm}) S {REST}".encode()) == Stat(comm, "S", 70298968)


@given(st.text(max_size=15), st.sampled_from("RSDZTtXI"), st.integers(0, 2**64 - 1))
def test_any_name(comm: str, state: str, start: int) -> None:
    text = f"77 ({comm}) {state} " + REST.replace("70298968", str(start))
    assert parse_stat(text.encode("utf-8", "surrogatepass")) == Stat(comm, state, start)


def test_a_name_cut_within_a_letter() -> None:
    assert parse_stat(b"77 (caf\xc3) S " + REST.encode()).comm == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("data", [b"", b"77 (pause", b"77 (pause) S 1 2 3\n", b"77 (x) S " + b"x " * 30])
def test_what_is_no_stat_file(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no process status|invalid literal"):
        parse_stat(data)
