"""Looking after what is in place: the host's rules and set, and each enrolled pod's netns, rules and listeners.

What is found wrong is mended by the pod's own worker, which then tells what was wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace

from meshcni.agent import metrics as m
from meshcni.agent.hostside import HostSide
from meshcni.agent.metrics import Metrics
from meshcni.agent.netnssearch import NetnsSearch
from meshcni.agent.podrecord import PodRecord
from meshcni.agent.reconciler import Reconciler
from meshcni.agent.rounds import Rounds
from meshcni.agent.steps import SandboxGoneError, Steps
from meshcni.errors import MeshCniError
from meshcni.pods.enrollment import Life

log = logging.getLogger(__name__)

UNKNOWN_SECONDS = 60.0  # after which a pod that the informer never showed is asked for: was it deleted?


class Verification:
    """Rounds for ever; `hurry` begins one now, `look_at` looks at one pod soon."""

    def __init__(
        self,
        records: Reconciler,
        steps: Steps,
        search: NetnsSearch,
        host: HostSide,
        metrics: Metrics,
        seconds: float,
        *,
        known_uids: Callable[[], Collection[str]],
        is_deleted: Callable[[PodRecord], Awaitable[bool]],
    ) -> None:
        self._records = records
        self._steps = steps
        self._search = search
        self._host = host
        self._metrics = metrics
        self._known_uids = known_uids
        self._is_deleted = is_deleted
        self._rounds = Rounds("a round of verification", seconds, self.round, self._look_at)

    def hurry(self) -> None:
        """Look at everything now."""
        self._rounds.all_now()

    def look_at(self, record: PodRecord) -> None:
        """Look for the pod's netns soon."""
        self._rounds.suspect(record.uid)

    async def run(self) -> None:
        """Until cancelled."""
        await self._rounds.run()

    async def _look_at(self, uids: frozenset[str]) -> None:
        await self._check_netns([record for record in self._records if record.uid in uids])

    async def round(self, spread_seconds: float) -> None:
        """Look at everything once, the pods spread over `spread_seconds`."""
        begin = time.monotonic()
        await self._check_host()
        known = self._known_uids()
        for record in self._records:
            is_unknown = record.uid not in known and time.monotonic() - record.started_at > UNKNOWN_SECONDS
            if is_unknown and await self._is_deleted(record):
                record.life, record.in_api = Life.ENDED, False
        running = [record for record in self._records if record.life is Life.RUNNING]
        await self._check_netns([record for record in running if record.addresses])
        rest = self._rounds.pace(len(running), spread_seconds)
        for record in running:
            await self._check_rules(record)
            if self._host.lacks(record.actual.addresses):
                record.actual = replace(record.actual, addresses=frozenset(), claimed=True)
            await rest()
        self._records.wake_all()  # ztunnel's side and the addresses are compared there
        self._metrics.observe(m.AMBIENT_VERIFICATION, time.monotonic() - begin)

    async def _check_host(self) -> None:
        try:
            drift = await self._host.verify()
        except (MeshCniError, OSError) as error:
            log.error("the host's probe rules cannot be looked at: %s", error)
            return
        if drift:
            self._metrics.count(m.AMBIENT_DRIFT, what="host-rules")
            log.warning("mended on the host: %s", "; ".join(drift)[:400])

    async def _check_netns(self, records: list[PodRecord]) -> None:
        """A pod whose processes are in another netns than the one we know got a sandbox that nobody told us of."""
        before = {record.uid: record.generation for record in records}
        for uid, netns in (await self._search.find_all(records)).items():
            record = self._records.get(uid)
            unchanged = record is not None and record.generation == before[uid] and record.life is Life.RUNNING
            if record is None or not unchanged or (record.netns is not None and record.netns.id == netns.id):
                netns.close()
                continue
            known = record.netns
            if known is None:
                self._steps.settle_in(record, netns)
            else:
                said = f"its sandbox was made anew without us (netns inode {known.id.inode}, now {netns.id.inode})"
                record.leave_sandbox(by_add=False)
                self._steps.settle_in(record, netns)
                record.edited = True  # that its rules are missing there is no news of its own
                await self._steps.say_healed(record, "netns", (said,))
            self._records.wake(record)

    async def _check_rules(self, record: PodRecord) -> None:
        if not record.actual.enrolled or not record.actual.rules or record.netns is None:
            return  # its worker is at it
        generation, looked_for = record.generation, record.actual.rules
        try:
            drift = await self._steps.verify_rules(record)
        except SandboxGoneError as error:
            if record.generation == generation:
                log.info("%s", error)
                record.leave_sandbox(by_add=False)  # a ztunnel that starts must not be handed it
                self._records.wake(record)
            return
        except MeshCniError as error:
            log.debug("the rules of %s cannot be looked at: %s", record.name, error)
            return
        if drift and record.generation == generation and record.actual.rules == looked_for:
            record.actual = replace(record.actual, rules="")
            self._records.wake(record)
