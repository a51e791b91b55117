"""When pods are looked at: all of them in rounds, at once when that is asked for, and single ones soon.

What asks for a look never moves the next round: however many pods come and go, all are looked at once an interval.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

SPREAD = 0.5  # the part of an interval over which a round is spread, so that it is never felt
JITTER = 0.2  # of the interval, so that the agents of a cluster do not all work at once
MIN_PAUSE_SECONDS = 0.1  # between the time that a round should take and the next one
GATHER_SECONDS = 0.5  # pods come in crowds; one walk over the host's processes does for all of a moment


class Rounds:
    """Calls `whole` every `seconds` and `some` for suspects, until `run` is cancelled.

    `whole(spread_seconds)` looks at every pod, and awaits what `pace` gives after each; 0 s when it was asked for.
    `some(uids)` looks at these pods only. They never run beside each other, but `some` may run while `whole` rests.
    What either raises is logged, with `what` as the thing that failed.
    """

    def __init__(
        self,
        what: str,
        seconds: float,
        whole: Callable[[float], Awaitable[None]],
        some: Callable[[frozenset[str]], Awaitable[None]],
    ) -> None:
        self._what, self._seconds = what, seconds
        self._whole, self._some = whole, some
        self._asked = False  # for a whole round
        self._suspects: set[str] = set()  # UIDs
        self._gathered_at = 0.0  # when to look at them, in the loop's time
        self._wake = asyncio.Event()

    def all_now(self) -> None:
        """Begin a whole round, unspread; one that is under way does not rest any more."""
        self._asked = True
        self._wake.set()

    def suspect(self, uid: str) -> None:
        """Look at this pod soon. To be called on the event loop."""
        if not self._suspects:
            self._gathered_at = _now() + GATHER_SECONDS
            self._wake.set()
        self._suspects.add(uid)

    async def run(self) -> None:
        """Until cancelled. The first round comes after a pause; ask for `all_now` before to have one at once."""
        due = _now() + self._pause_seconds()
        while True:
            await self._rest_until(due)
            asked, self._asked = self._asked, False
            spread_seconds = 0.0 if asked else self._seconds * SPREAD
            due = _now() + spread_seconds + self._pause_seconds()
            if asked:
                self._suspects.clear()  # all are looked at now
            await self._try(self._whole(spread_seconds))

    def pace(self, count: int, spread_seconds: float) -> Callable[[], Awaitable[None]]:
        """What to await after each of `count` pods, so that all of them take `spread_seconds` from now on."""
        begin, done = _now(), itertools.count(1)

        async def rest() -> None:
            if spread_seconds:
                await self._rest_until(begin + spread_seconds * next(done) / count)

        return rest

    async def _rest_until(self, moment: float) -> None:
        """Do nothing but look at suspects until then, or until a whole round is asked for.

        When that moment has passed there is one look at most, else a steady stream of suspects would delay the rest.
        """
        while not self._asked:
            now = _now()
            if self._suspects and self._gathered_at <= now:
                await self._look_at_suspects()
            elif now < moment:
                await self._woken(min(moment, self._gathered_at) if self._suspects else moment)
            if moment <= now:
                return

    async def _look_at_suspects(self) -> None:
        suspects, self._suspects = frozenset(self._suspects), set()
        await self._try(self._some(suspects))
        self._gathered_at = _now() + GATHER_SECONDS  # of those that came meanwhile: rounds have their turn before

    async def _woken(self, moment: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout_at(moment):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _try(self, turn: Awaitable[None]) -> None:
        try:
            await turn
        except Exception:  # the next turn may do better
            log.exception("%s failed", self._what)

    def _pause_seconds(self) -> float:
        return max(self._seconds * (random.uniform(1 - JITTER, 1) - SPREAD), MIN_PAUSE_SECONDS)


def _now() -> float:
    return asyncio.get_running_loop().time()
