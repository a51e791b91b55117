"""Ambient mode in the agent: who tells what to the records of pods, what happens at the start and at the end.

At the start nothing is taken for granted and nothing is taken away: what earlier agents left is adopted, ztunnel gets
its snapshot as soon as every enrolled pod is known, and the looking after goes on in the background while ADDs are
served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from meshcni.agent import ambientreport
from meshcni.agent.ambientconfig import AmbientConfig, Namespaces, Pods
from meshcni.agent.hostside import HostSide
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.agent.netnssearch import NetnsSearch
from meshcni.agent.observation import Observation
from meshcni.agent.podrecord import Netns, PodRecord
from meshcni.agent.podrules import PodRules
from meshcni.agent.programming import Programmer
from meshcni.agent.reconciler import EnrollmentError, Reconciler
from meshcni.agent.steps import PatchesRedirection, StepParts, Steps, Warn, workload
from meshcni.agent.verification import Verification
from meshcni.agent.ztunnel import Workload, ZtunnelServer
from meshcni.errors import MeshCniError
from meshcni.host import ambient as host_ambient
from meshcni.host.netns import NetnsFacts, copy_netns, facts
from meshcni.kube.reducer import Change
from meshcni.pods.enrollment import Intent, Life, Step, adopted, annotation_of
from meshcni.pods.model import Namespace, Pod, pod_addresses

log = logging.getLogger(__name__)

LEAVE_SECONDS = 45.0  # for all pods of the node to be un-enrolled
CLAIM_SECONDS = 10.0  # until entries of pods that are no more are looked for again
STAYS_HINT = "they stay captured until they end; delete them, or uninstall again when the cause is gone"
Addresses = Collection[IPv4Address | IPv6Address]


class Ambient:
    """Ambient mode of one node. `run` lives as long as the agent."""

    def __init__(
        self,
        config: AmbientConfig,
        *,
        pods: Pods,
        namespaces: Namespaces,
        programmer: Programmer,
        search: NetnsSearch,
        host: HostSide,
        api: PatchesRedirection,
        warn: Warn,
        metrics: Metrics,
        rules: PodRules = host_ambient,
        facts: Callable[[], NetnsFacts] = facts,
    ) -> None:
        self.config = config
        self.host = host
        self.ztunnel = ZtunnelServer(
            self._snapshot, on_change=self._ztunnel_changed, meter=ambientreport.zds_meter(metrics)
        )
        parts = StepParts(
            programmer,
            search,
            self.ztunnel,
            host,
            api,
            warn,
            metrics,
            config.families,
            config.ztunnel_wait_seconds,
            rules,
            facts,
            config.without_ipv6,
        )
        self.steps = Steps(parts, lambda: list(self.records))
        self.records = Reconciler(self.ztunnel, self.steps, on_desired=_became_desired, on_left=self._left)
        self.observation = Observation(
            config,
            self.records,
            pods=pods,
            namespaces=namespaces,
            host=host,
            api=api,
            metrics=metrics,
            backend=programmer.config.backend,
            look_at=lambda record: self.verification.look_at(record),
        )
        self.verification = Verification(
            self.records,
            self.steps,
            search,
            host,
            metrics,
            config.verify_seconds,
            known_uids=self.observation.known_uids,
            is_deleted=self.observation.is_deleted,
        )
        self._pods, self._namespaces = pods, namespaces
        self._search, self._metrics = search, metrics
        self._closed = False  # all work has ended

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Adopt what is there once the cluster was read, then look after it until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.host.start())
            await self._pods.synced.wait()
            await self._namespaces.synced.wait()
            await self.adopt()
            group.create_task(self._adopt_addresses())
            await self.verification.run()

    async def adopt(self) -> None:
        """Take in every pod that was read, with what earlier agents left of it; from then on they are worked on."""
        self.observation.namespaces_known = True
        for pod in self._pods.items():
            self.observation.observe_again(pod)
        await self._adopt()

    def begin_to_leave(self) -> None:
        """From now on no pod belongs to ambient mode; those that are adopted later leave too."""
        self.observation.leaving = True

    async def close(self) -> None:
        """End all work; pods, host and ztunnel keep what they have."""
        self._closed = True
        await self.records.close()
        self.host.close()

    def not_ready(self) -> tuple[str, ...]:
        """Why not ready. Whether ztunnel is there does not count: it may wait for us."""
        reasons = () if self.observation.adopted else ("the ambient pods of this node are not looked at yet",)
        return (*reasons, *((self.host.trouble,) if self.host.trouble else ()))

    def conf_in_place(self) -> None:
        """The runtime uses the plugin from now on: look at all pods once more, some may have started just before."""
        if self.observation.adopted:
            for pod in self._pods.items():
                self.observation.observe(pod)
            self.verification.hurry()

    async def unenroll_all(self, seconds: float = LEAVE_SECONDS) -> tuple[str, ...]:
        """Take every pod of this node out of the mesh. Returns what was done as sentences; raises MeshCniError."""
        if not self.observation.adopted:
            raise EnrollmentError("the ambient pods of this node are not looked at yet", "try again in a moment")
        self.begin_to_leave()
        names = [record.name for record in self.records]
        for record in self.records:
            record.intent = Intent.LEAVE
            self.records.wake(record)
        end = time.monotonic() + seconds
        while len(self.records):
            if time.monotonic() > end:
                left = "; ".join(f"{record.name} ({record.error or 'no step failed'})" for record in self.records)
                raise EnrollmentError(f"not un-enrolled within {seconds:g} s: {left}", STAYS_HINT)
            await asyncio.sleep(0.05)
        return tuple(f"un-enrolled pod {name}" for name in names)

    async def _adopt(self) -> None:
        """One walk for the namespaces of all pods, then ztunnel may have its snapshot and the workers may begin."""
        records = [record for record in self.records if record.netns is None and record.addresses]
        try:
            found = await self._search.find_all(records)
        except Exception as error:  # pods keep what they have, and are looked for again one by one
            log.error("the host's processes cannot be walked: %s", error)
            found = {}
        for record in records:
            netns = found.get(record.uid)
            if netns is not None and record.netns is None:
                self.steps.settle_in(record, netns)
            elif netns is not None:
                netns.close()  # an ADD came in between
        if self.host.ready.is_set():
            await self._claim_addresses()
        self.observation.adopted = True
        self.ztunnel.snapshot_ready.set()
        self.records.resume()
        enrolled = sum(record.actual.enrolled for record in self.records)
        log.info("adopted %d enrolled pods, %d with their netns", enrolled, len(found))

    async def _adopt_addresses(self) -> None:
        if not self.host.owners:
            await self.host.ready.wait()
        while True:
            if await self._claim_addresses():
                break
            await asyncio.sleep(CLAIM_SECONDS)
        self.records.wake_all()

    async def _claim_addresses(self) -> bool:
        """Adopt the set's entries; tells whether that worked."""
        known = [record for record in self.records if record.life is not Life.ENDED]
        staying = [record for record in known if record.intent is Intent.ENROLL]
        enrolled = [record for record in staying if record.actual.enrolled]
        claims = {address: record.uid for record in enrolled for address in record.addresses}
        try:
            complete = all(record.addresses for record in staying)
            await self.host.adopt(claims, {record.uid for record in known}, complete=complete)
        except (MeshCniError, OSError) as error:
            log.error("the set of probed addresses: %s", error)  # the workers put each pod's in meanwhile
            return False
        for record in enrolled:
            record.actual = replace(record.actual, addresses=self.host.addresses_of(record.uid))
        return True

    # --- what others tell ---------------------------------------------------------------------------------------------

    def pod_changed(self, change: Change[Pod]) -> None:
        """Take in a change of the informer of pods."""
        self.observation.pod_changed(change)

    def namespace_changed(self, change: Change[Namespace]) -> None:
        """Take in a change of the informer of namespaces."""
        self.observation.namespace_changed(change)

    async def add(self, pod: Pod, netns_fd: int, addresses: Addresses, netns_name: str, seconds: float) -> PodRecord:
        """Enrol a pod whose sandbox is being made; returns when rules are in and ztunnel has acknowledged.

        Raises MeshCniError when that does not come about within `seconds`; what is in the sandbox by then is taken out
        right after.
        """
        if self.observation.leaving:
            raise EnrollmentError("ambient mode is being removed from this node", "the conf entry goes next; try again")
        if self._closed:
            raise EnrollmentError("this agent is ending", "the runtime tries again, with the next agent")
        record = self.records.get(pod.uid)
        if record is None:
            record = PodRecord(pod, Intent.ENROLL, "add", actual=adopted(annotation_of(pod)))
            self.records.put(record)
        record.pod, record.intent, record.in_api, record.source = pod, Intent.ENROLL, True, "add"
        self.observation.read_parameters(record)
        if record.parameters_error is not None:
            raise record.parameters_error
        self._enter_sandbox(record, Netns(copy_netns(netns_fd), netns_name), frozenset(map(_unmapped, addresses)))
        waiter = record.waiter = asyncio.get_running_loop().create_future()
        self.records.wake(record)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(waiter)
        except asyncio.CancelledError:
            self._give_up(record, waiter)
            raise
        except TimeoutError:
            if _succeeded(waiter):
                return record
            self._give_up(record, waiter)
            step = record.step or next(iter(record.failed), None)
            raise EnrollmentError(
                f"pod {pod.full_name} was not enrolled within {seconds:g} s{f' (step {step.value})' if step else ''}",
                "is ztunnel of this node answering? install-cni status tells",
            ) from None
        return record

    def _enter_sandbox(self, record: PodRecord, netns: Netns, addresses: frozenset[IPv4Address | IPv6Address]) -> None:
        if record.waiter is not None and not record.waiter.done():
            record.waiter.set_exception(EnrollmentError("another ADD of the same pod came after this one"))
        if record.netns is not None and record.netns.id == netns.id:
            netns.close()  # the runtime repeats itself: what is in place counts, once it was looked at
            record.actual = replace(record.actual, rules="")
            record.addresses = addresses or record.addresses
        else:
            record.leave_sandbox(by_add=True)
            self.steps.settle_in(record, netns)
            record.addresses = addresses
        in_api = frozenset(pod_addresses(record.pod)[0])
        record.outdated = in_api if in_api != record.addresses else frozenset()
        if not record.actual.enrolled:
            record.life = Life.STARTING
        record.undoing, record.error, record.attempts = False, None, 0
        record.failed.clear()
        record.reasons.clear()
        record.milliseconds.clear()
        record.started_at, record.desired_since = time.monotonic(), None

    def _give_up(self, record: PodRecord, waiter: asyncio.Future[None]) -> None:
        """The ADD fails for want of time: what has been done is undone."""
        waiter.cancel()
        if record.waiter is waiter:
            record.waiter = None
            if record.life is Life.STARTING:
                record.undoing = True
                record.error = record.error or EnrollmentError("enrolment took too long")
            self.records.wake(record)

    # --- ztunnel ------------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Iterator[Workload]:
        """Every pod that ztunnel should have; one without a known netns keeps what ztunnel has for it."""
        for record in self.records:
            if self.records.is_named(record):
                yield workload(record)

    def _ztunnel_changed(self) -> None:
        self.records.wake_all()

    # --- book-keeping -------------------------------------------------------------------------------------------------

    def _left(self, record: PodRecord) -> None:
        self.observation.left(record)

    def measure(self) -> None:
        """Set the gauges."""
        ambientreport.measure(self._metrics, self.records, self.host)

    def status(self) -> dict[str, Any]:
        """What `install-cni status` shows."""
        return ambientreport.status(self.records, self.host, self.ztunnel)


def _became_desired(record: PodRecord) -> None:
    if not record.actual.enrolled or record.source == "add" or not record.milliseconds:
        return  # an ADD has a line of its own; what was found in order needs none
    phases = {f"{name}_ms": value for name, value in record.milliseconds.items()}
    record.milliseconds.clear()
    if Step.ADD.value + "_ms" in phases or Step.ENABLE.value + "_ms" in phases:
        log.info("enrolled", extra=labels(pod=record.name, source=record.source, **phases))


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _succeeded(waiter: asyncio.Future[None]) -> bool:
    """Whether the answer came in the moment in which the time ran out."""
    return waiter.done() and not waiter.cancelled() and waiter.exception() is None
