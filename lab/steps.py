"""A list of steps that is alive on a terminal and plain lines when the output goes elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

REFRESHES_PER_SECOND = 12
MARKS = {"done": "[green]✓[/]", "failed": "[red]✗[/]"}


@dataclass(slots=True)
class Step:
    """One line: what is being done, what came of it (`note`), how long it took."""

    title: str
    note: str = ""
    state: str = "running"
    seconds: float = 0.0


class Steps:
    """Context manager; `with steps.step("..."):` shows a step while it runs and how it ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: list[Step] = []
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=REFRESHES_PER_SECOND)
        self._is_live = console.is_terminal

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show `title` as running, then as done or failed; set `note` of the step to say what came of it."""
        step = Step(title)
        self._steps.append(step)
        begin = time.monotonic()
        try:
            yield step
            step.state = "done"
        except BaseException:
            step.state = "failed"
            raise
        finally:
            step.seconds = time.monotonic() - begin
            if not self._is_live:
                table = self._frame()
                self._add_row(table, step)
                self._console.print(table)

    def _table(self) -> Table:
        table = self._frame()
        for step in self._steps:
            self._add_row(table, step)
        return table

    def _frame(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(width=40)
        table.add_column(width=7, justify="right", style="dim")
        table.add_column(style="dim", ratio=1)
        return table

    def _add_row(self, table: Table, step: Step) -> None:
        mark = self._spinner if step.state == "running" else MARKS[step.state]
        duration = f"{step.seconds:.2f} s" if step.state != "running" else ""
        table.add_row(mark, step.title, duration, step.note)
