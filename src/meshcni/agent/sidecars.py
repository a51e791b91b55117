"""Running sidecar pods are looked at: at the start, once the conf is in place, when they get an address, and in rounds.

The runtime calls the plugin once a sandbox. Whatever goes wrong around that call (a conf that came too late, another
one that came first, rules that somebody flushed) stays for as long as the pod lives, unless somebody looks. What is
done about one pod is agent.sidecarexaminer's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from meshcni.agent import metrics as m
from meshcni.agent import sidecarreport
from meshcni.agent.healing import NotHealed
from meshcni.agent.metrics import Metrics
from meshcni.agent.podrecord import Netns
from meshcni.agent.rounds import Rounds
from meshcni.agent.sidecarexaminer import MAY_COME, Heals, Mode, PostsEvents, SidecarExaminer
from meshcni.agent.sidecarrecord import SidecarRecord, SidecarState, timestamp
from meshcni.host.mending import Mending
from meshcni.host.sidecarlook import Look, look_at_capture
from meshcni.kube.reducer import Change
from meshcni.pods.eligibility import Verdict
from meshcni.pods.model import Pod

log = logging.getLogger(__name__)

RUNNING_PHASES = frozenset({"Running", "Pending"})


class Pods(Protocol):
    """What is needed of the informer of pods."""

    synced: asyncio.Event

    def items(self) -> tuple[Pod, ...]:
        """All pods of this node."""

    def get(self, namespace: str, name: str) -> Pod | None:
        """One of them."""


class Sidecars:
    """The running sidecar pods of this node, looked at until `run` is cancelled.

    `may_begin` is set when the agent may change this node; `superseded` tells that another agent serves it now.
    """

    def __init__(
        self,
        mode: Mode,
        seconds: float,
        *,
        pods: Pods,
        healer: Heals,
        events: PostsEvents,
        metrics: Metrics,
        may_begin: asyncio.Event,
        superseded: Callable[[], bool] = lambda: False,
        look: Callable[[Mending, Look | None], Look] = look_at_capture,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.mode = mode
        self.trouble = ""  # why nothing is looked at
        self._pods, self._healer, self._metrics = pods, healer, metrics
        self._may_begin, self._superseded, self._now = may_begin, superseded, now
        self._rounds = Rounds("looking at sidecar pods", seconds, self.round, self._look_at_suspects)
        self._examiner = SidecarExaminer(
            mode,
            healer=healer,
            events=events,
            metrics=metrics,
            suspect=self._rounds.suspect,
            look=look,
            now=now,
        )
        self._records: dict[str, SidecarRecord] = {}
        self._fresh: set[str] = set()  # programmed by an ADD, whose address the informer has not told yet
        self._conf_in_place = False
        self._older: set[str] = set()  # UIDs
        self._said: frozenset[str] = frozenset()

    # --- what others tell ---------------------------------------------------------------------------------------------

    def conf_in_place(self) -> None:
        """The runtime calls the plugin from now on: look at all pods, some may have started just before."""
        if not self._conf_in_place:
            self._note_older()
        self._conf_in_place = True
        self._rounds.all_now()

    def _note_older(self) -> None:
        """Those pods that are there by now are older than the conf, or than this agent."""
        self._older |= {pod.uid for pod in self._pods.items()}

    def programmed(self, pod: Pod) -> None:
        """An ADD has just put the pod's rules in place: it need not be looked at before the next round."""
        record = SidecarRecord(pod, early=False, state=SidecarState.CAPTURED, seen_at=timestamp(self._now()))
        self._records[pod.uid] = record
        self._fresh.add(pod.uid)

    def pod_changed(self, change: Change[Pod]) -> None:
        """Take in a change of the informer: a pod that now has an address, or another one, is looked at soon."""
        old, new = change.old, change.new
        if old is not None and (new is None or new.uid != old.uid):
            self._records.pop(old.uid, None)
            self._fresh.discard(old.uid)
        if new is None or not self._pods.synced.is_set():
            return
        record = self._records.get(new.uid)
        known = record.pod if record is not None else None
        if known is not None and (known.ips, known.phase) == (new.ips, new.phase):
            return
        if not self._is_expected(new):
            return
        if record is not None and new.uid in self._fresh:
            self._fresh.discard(new.uid)
            record.pod = new
            return
        self._rounds.suspect(new.uid)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look until cancelled."""
        await self._may_begin.wait()
        await self._pods.synced.wait()
        self._note_older()
        self._rounds.all_now()
        await self._rounds.run()

    async def round(self, spread_seconds: float) -> None:
        """Look at every running sidecar pod once, spread over `spread_seconds`."""
        if self._superseded():
            return
        begin = time.monotonic()
        there = self._pods.items()
        self._older &= {pod.uid for pod in there}
        pods = [pod for pod in there if self._is_expected(pod)]
        for uid in self._records.keys() - {pod.uid for pod in pods}:
            del self._records[uid]
        await self._look_at(pods, spread_seconds)
        self._metrics.observe(m.SIDECAR_VERIFICATION, time.monotonic() - begin)

    async def _look_at_suspects(self, uids: frozenset[str]) -> None:
        pods = [pod for pod in self._pods.items() if pod.uid in uids and self._is_expected(pod)]
        if pods and not self._superseded():
            await self._look_at(pods, 0.0)

    def _is_expected(self, pod: Pod) -> bool:
        """Whether the pod runs, has a network of its own, and should be captured."""
        if pod.phase not in RUNNING_PHASES or not pod.ips or pod.terminating or pod.host_network:
            return False
        record = self._records.get(pod.uid)
        if record is not None and record.pod is pod:
            return True
        assessment = self._healer.assess(pod)
        return assessment.decision.verdict is Verdict.SIDECAR or assessment.error is not None

    # --- looking ------------------------------------------------------------------------------------------------------

    async def _look_at(self, pods: Sequence[Pod], spread_seconds: float) -> None:
        """One walk over the host's processes for all pods, then into each netns, one after the other."""
        rest = self._rounds.pace(len(pods), spread_seconds)
        found = await self._healer.locate(pods)
        refused: dict[str, list[str]] = {}
        try:
            for pod in pods:
                where = found.pop(pod.uid)
                now = self._pods.get(pod.namespace, pod.name)
                if now is None or now.uid != pod.uid or not self._is_expected(now):
                    _close(where)  # it has gone or ended since
                    continue
                refusal = await self._examiner.examine(self._record(now), where)
                if refusal is not None:
                    refused.setdefault(refusal.code, []).append(f"{pod.full_name}: {refusal}")
                await rest()
        finally:
            for left in found.values():
                _close(left)
        self._say_refusals(refused)

    def _record(self, pod: Pod) -> SidecarRecord:
        record = self._records.get(pod.uid)
        if record is None:
            record = self._records[pod.uid] = SidecarRecord(pod, early=pod.uid in self._older)
        record.pod = pod
        return record

    def _say_refusals(self, refused: dict[str, list[str]]) -> None:
        """One line for all pods that cannot be looked at for the same new reason."""
        for code, texts in refused.items():
            if code not in self._said and code not in MAY_COME:
                log.warning("%d sidecar pods cannot be looked at, such as %s", len(texts), texts[0][:400])
        self._said = frozenset(refused) | (self._said & MAY_COME)

    # --- telling ------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Set the gauges."""
        states = Counter(record.state for record in self._records.values())
        for state in SidecarState:
            self._metrics.set(m.SIDECAR_PODS, states[state], state=state.value)
        self._metrics.set(m.SIDECAR_EXPECTED, len(self._records))

    def status(self) -> dict[str, Any]:
        """What `install-cni status` shows."""
        return sidecarreport.status(self.mode.value, self.trouble, self._records.values())


def _close(where: Netns | NotHealed) -> None:
    if isinstance(where, Netns):
        where.close()
