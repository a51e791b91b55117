"""The capacity page: its arithmetic is right, and its fixed figures are those of the code."""

from __future__ import annotations

import re

import pytest
from bench.capacity.report import LARGE, WATCH_SECONDS
from tests.docs.pages import OPERATIONS, Page

from meshcni.kube.informer import Timing

PAGE = Page(OPERATIONS / "capacity.md")
NUMBER = r"(-?[\d,]+(?:\.\d+)?)"
PRODUCT = re.compile(rf"{NUMBER}([^×=|\n]*) × {NUMBER}([^×=/|\n]*)(?: / {NUMBER} s)? = {NUMBER} ?([^,;|\n]*)")
SCALES = {("ms", "s"): 1000, ("KiB", "MiB"): 1024, ("KiB", "GiB"): 1024**2, ("bytes/s", "KiB/s"): 1024}


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("line", PRODUCT.findall(PAGE.text), ids=lambda line: f"{line[0]}×{line[2]}")
def test_the_arithmetic_is_right(line: tuple[str, ...]) -> None:
    left, _, right, unit, divisor, result, result_unit = line
    first, second = unit.strip().split(" ")[0], result_unit.strip().split(" ")[0]
    scale = SCALES.get((first, second), 1)
    exact = number(left) * number(right) / (number(divisor) if divisor else 1) / scale
    last_digit = 10.0 ** -len(right.partition(".")[2])
    tolerance = max(number(left) * last_digit / 2 / scale, 0.5 if "." not in result else 0.05) + 1e-9
    assert number(result) == pytest.approx(exact, abs=tolerance)


def test_there_is_arithmetic_for_both_modes() -> None:
    assert len(PRODUCT.findall(PAGE.text)) >= 12
    assert f"{LARGE}" in PAGE.text.replace(",", "")


def test_the_watches_last_as_long_as_the_page_says() -> None:
    timing = Timing()
    assert (timing.watch_min_seconds + timing.watch_max_seconds) / 2 == WATCH_SECONDS
    assert f"{timing.watch_min_seconds // 60} to {timing.watch_max_seconds // 60} minutes" in PAGE.text
