"""The rows of the benchmark and the one table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `measured` is compared with `target`: at most it, or at least it with `at_least`.

    `yardstick` says what a ratio is relative to; `detail` shows the absolute figures behind it.
    """

    what: str
    measured: float
    target: float
    unit: str
    detail: str = ""
    yardstick: str = ""
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the target is reached."""
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def ratio(what: str, value: float, yardstick_value: float, target: float, yardstick: str, unit: str = "ms") -> Row:
    """Return a row that compares two times."""
    detail = f"{value:.2f} / {yardstick_value:.2f} {unit}"
    return Row(what, value / yardstick_value, target, "×", detail, yardstick)


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the table and how many targets are missed."""
    table = Table(box=box.ROUNDED)
    for heading in ("what", "yardstick", "measured / yardstick"):
        table.add_column(heading)
    for heading in ("result", "target"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        verdict = "[green]ok[/]" if row.is_met else "[bold red]MISSED[/]"
        result, target = f"{row.measured:.2f} {row.unit}", f"{sign} {row.target:g} {row.unit}"
        table.add_row(row.what, row.yardstick, row.detail, result, target, verdict)
    console.print(table)
    missed = sum(not row.is_met for row in rows)
    console.print(f"{len(rows) - missed} of {len(rows)} targets reached")
