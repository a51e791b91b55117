"""Who may talk ZDS, and how fast: a ztunnel whose connection is closed is back within 0.2 ms, without any back-off.

What comes too fast is taken, and left unread until its turn: closing it would only bring the next one sooner.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from meshcni.agent.zdsconnection import Connection

BEGINS = 5  # connections of one process that begin within WINDOW_SECONDS: the original's rate, its burst of 1 aside
WINDOW_SECONDS = 1.0
MAX_SILENT = 32  # connections that have not said hello, delayed ones included; a node has one or two ztunnels


class Turns:
    """Lets the connections of one process begin, at most BEGINS in any WINDOW_SECONDS."""

    def __init__(self, clock: Callable[[], float], window_seconds: float) -> None:
        self._clock = clock
        self._window_seconds = window_seconds
        self._begun: deque[float] = deque(maxlen=BEGINS)
        self._waiting: deque[Connection] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing of the present would be forgotten with it."""
        return not self._waiting and (not self._begun or self._clock() - self._begun[-1] > self._window_seconds)

    def arrive(self, connection: Connection) -> None:
        """Let a connection begin, now or when its turn comes."""
        self._waiting.append(connection)
        self._serve()

    def cancel(self) -> None:
        """Let none begin any more."""
        self._waiting.clear()
        self._serve()

    def _serve(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            if not self._waiting[0].is_open:
                self._waiting.popleft()
                continue
            now = self._clock()
            wait = self._begun[0] + self._window_seconds - now if len(self._begun) == BEGINS else 0.0
            if wait > 0:
                self._timer = asyncio.get_running_loop().call_later(wait, self._serve)
                return
            self._begun.append(now)
            self._waiting.popleft().begin()


class Admission:
    """The turns of every process that has connected lately, by pid (0 for all of which the kernel names none)."""

    def __init__(self, clock: Callable[[], float], window_seconds: float = WINDOW_SECONDS) -> None:
        self._clock = clock
        self._window_seconds = window_seconds
        self._turns: dict[int, Turns] = {}

    def arrive(self, connection: Connection) -> None:
        """Let a connection begin when its process may."""
        for pid in [pid for pid, turns in self._turns.items() if turns.is_idle]:
            del self._turns[pid]
        turns = self._turns.setdefault(connection.peer.pid, Turns(self._clock, self._window_seconds))
        turns.arrive(connection)

    def cancel(self) -> None:
        """Let none begin any more."""
        for turns in self._turns.values():
            turns.cancel()
