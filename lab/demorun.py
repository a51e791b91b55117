"""Running a demo from a command line: its console, what interrupts it, and its exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from rich.console import Console

from lab.cri import CriError
from lab.node import LabError

EXIT_INTERRUPTED = 130
PIPE_WIDTH = 120  # characters of a line when the output is no terminal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(play: Callable[[Console], Iterable[str]]) -> int:
    """Run `play`, which clears away after itself and returns what was not as it should be.

    Returns the exit status: 0 when all was, 1 when not or when the demo cannot run here, 130 when it was interrupted.
    """
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPE_WIDTH)
    for number in SIGNALS:
        signal.signal(number, _stop)
    try:
        failures = tuple(play(console))
    except KeyboardInterrupt:
        console.print("Interrupted; everything is cleared away.")
        return EXIT_INTERRUPTED
    except (LabError, CriError, OSError) as error:
        console.print("The demo failed: ", style="red", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    for failure in failures:
        console.print("[red]not as it should be:[/] ", end="")
        console.print(failure, markup=False)
    return 1 if failures else 0


def _stop(number: int, _frame: object) -> NoReturn:
    """End as Ctrl-C does, and let nothing interrupt the clearing away."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)
