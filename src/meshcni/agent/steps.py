"""The steps of a pod's enrolment, performed: in its netns, on the host, at ztunnel, at the API server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from meshcni.agent import metrics as m
from meshcni.agent.hostside import HostSide
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.agent.netnssearch import NetnsNotFoundError, NetnsSearch
from meshcni.agent.podrecord import Netns, PodRecord
from meshcni.agent.podrules import PodRules
from meshcni.agent.programming import Programmer
from meshcni.agent.ztunnel import Workload, ZtunnelServer
from meshcni.errors import ApplyError, KubeError, MeshCniError, NetnsError
from meshcni.host import ambient as host_ambient
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.netns import NetnsFacts, facts
from meshcni.host.redirection import Address
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.enrollment import Annotation, Intent, Step, seen
from meshcni.pods.model import Pod
from meshcni.rules.model import Family

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_LOGGED_CHARACTERS = 200  # of a message, so that a line stays below 400 bytes
FAILED = "AmbientEnrollmentFailed"  # reasons of Events
HEALED = "AmbientRedirectionHealed"

DRAIN_SECONDS = 0.2  # that connections under way get to end by themselves before ztunnel closes them
LINGER_SECONDS = (
    0.1  # ztunnel closes them about 8 ms after it acknowledged the Del, and their last packets need the rules
)

# Why a pod that leaves has no netns to clean: nothing of it runs, or nothing that rules could reach.
NOTHING_TO_CLEAN = frozenset({"not-found", "host-netns", "sandboxed"})

Warn = Callable[[Pod, str, str], Awaitable[None]]


class SandboxGoneError(NetnsError):
    """The runtime has torn the sandbox down: ztunnel cannot listen there, and nothing can be enrolled in it."""


class PatchesRedirection(Protocol):
    """What is needed of the API client."""

    async def get_pod(self, namespace: str, name: str) -> Pod:
        """One pod."""

    async def patch_redirection(self, namespace: str, name: str, uid: str, value: str | None) -> Pod:
        """Set or (None) remove the annotation; returns the new object."""


@dataclass(frozen=True, slots=True)
class StepParts:
    """What the steps work with."""

    programmer: Programmer
    search: NetnsSearch
    ztunnel: ZtunnelServer
    host: HostSide
    api: PatchesRedirection
    warn: Warn
    metrics: Metrics
    families: frozenset[Family]
    ztunnel_wait_seconds: float
    rules: PodRules = host_ambient
    facts: Callable[[], NetnsFacts] = facts
    without_ipv6: str = ""  # as of AmbientConfig


class Steps:
    """See reconciler.Effects. `others` gives the records, to keep two pods from one netns."""

    def __init__(self, parts: StepParts, others: Callable[[], list[PodRecord]]) -> None:
        self._parts = parts
        self._others = others
        self._work: Mapping[Step, Callable[[PodRecord], Awaitable[None]]] = {
            Step.FIND_NETNS: self._find_netns,
            Step.LOOK: self._look,
            Step.ROUTES: self._put_routes,
            Step.ADD: self._add,
            Step.RULES: self._put_rules,
            Step.ADDRESSES: self._put_addresses,
            Step.ENABLE: lambda record: self._annotate(record, Annotation.ENABLED),
            Step.PEND: lambda record: self._annotate(record, Annotation.PENDING),
            Step.RELEASE: self._release,
            Step.REMOVE_RULES: self._remove_rules,
            Step.WITHDRAW: lambda record: self._annotate(record, Annotation.ABSENT),
            Step.DEL: self._delete,
            Step.REMOVE_ADDRESSES: lambda record: self._parts.host.remove(record.uid),
        }

    async def perform(self, step: Step, record: PodRecord) -> None:
        """Do one step. Raises MeshCniError."""
        try:
            await self._work[step](record)
        except OSError as error:  # such as a limit that is reached
            raise ApplyError(f"step {step.value} failed: {error}") from error

    async def failed(self, step: Step, record: PodRecord, error: MeshCniError) -> None:
        """Count it, say it in the log and on the pod; an ADD that waits does all of that itself."""
        if record.waiter is None:
            self._parts.metrics.count(m.ERRORS, error=type(error).__name__)
            log.warning(
                "%s",
                str(error)[:MAX_LOGGED_CHARACTERS],
                extra=labels(pod=record.name, step=step.value, attempt=record.attempts + 1),
            )
            await self._parts.warn(record.pod, FAILED, f"step {step.value}: {error}")

    def count(self, step: Step, result: str, seconds: float) -> None:
        """Count a step."""
        self._parts.metrics.count(m.AMBIENT_STEPS, step=step.value, result=result)
        self._parts.metrics.observe(m.AMBIENT_STEP_DURATION, seconds, step=step.value)

    # --- the netns ----------------------------------------------------------------------------------------------------

    async def _find_netns(self, record: PodRecord) -> None:
        generation = record.generation
        try:
            netns = await self._parts.search.find(record)
        except NetnsNotFoundError as error:
            if record.intent is not Intent.LEAVE or error.code not in NOTHING_TO_CLEAN:
                raise
            record.actual = replace(record.actual, touched=False)
            return
        if record.generation == generation:
            self.settle_in(record, netns)
        else:
            netns.close()  # an ADD has told of a newer one meanwhile

    def settle_in(self, record: PodRecord, netns: Netns) -> None:
        """Make `netns` the pod's. Of two pods with one netns the later one has it; ztunnel must never see both."""
        for other in self._others():
            if other is not record and other.netns is not None and other.netns.id == netns.id:
                log.error("pods %s and %s have one netns; it is the latter's", other.name, record.name)
                other.leave_sandbox(by_add=False)
                record.displaced.add(other.uid)
        record.drop_netns()
        record.netns = netns

    async def _look(self, record: PodRecord) -> None:
        """Find out whether an agent that died before it annotated the pod had captured it."""
        generation, desired = record.generation, record.desired
        drift = await self.verify_rules(record)
        if not drift and record.generation == generation:
            record.actual = seen(desired, record.actual)

    async def _put_routes(self, record: PodRecord) -> None:
        uncaptured = self._uncaptured(record)

        def work(_choice: VariantChoice | None) -> None:
            self._refuse(uncaptured())
            self._parts.rules.prepare_routes(self._parts.families)

        await self._in_netns(record, work)

    async def _put_rules(self, record: PodRecord) -> None:
        if record.parameters is None:
            raise NetnsError(f"pod {record.name} has no parameters to make rules of")
        healing = record.actual.enrolled
        drift = await self._in_netns(record, self._programming(record, record.parameters, healing))
        edited, record.edited = record.edited, False
        if healing and drift and not edited:
            await self.say_healed(record, "rules", drift)

    def _programming(
        self, record: PodRecord, parameters: AmbientParameters, healing: bool
    ) -> Callable[[VariantChoice | None], tuple[str, ...]]:
        """What runs in the netns: a pod that is enrolled is looked at first, so that it can be told what was wrong."""
        config, families, rules = self._parts.programmer.config, self._parts.families, self._parts.rules
        expected, uncaptured = tuple(record.addresses), self._uncaptured(record)

        def work(choice: VariantChoice | None) -> tuple[str, ...]:
            self._refuse(uncaptured())
            drift: tuple[str, ...] = ()
            if healing:
                drift = rules.verify_pod(
                    parameters, families, config.backend, force_iptables=config.forced_variant, choice=choice
                )
                if not drift:
                    return ()
            rules.apply_pod(
                parameters,
                families,
                config.backend,
                force_iptables=config.forced_variant,
                choice=choice,
                expected_addresses=expected,
                keep_on_failure=healing,
            )
            return drift

        return work

    async def verify_rules(self, record: PodRecord) -> tuple[str, ...]:
        """How the pod's netns differs from what it should hold, in words. Raises MeshCniError."""
        parts, parameters, config = self._parts, record.parameters, self._parts.programmer.config
        if parameters is None:
            return ()
        has_addresses, uncaptured = bool(record.addresses), self._uncaptured(record)

        def work(choice: VariantChoice | None) -> tuple[str, ...]:
            if has_addresses and not parts.facts().addresses:
                raise SandboxGoneError(f"the network namespace of pod {record.name} has no address any more")
            drift = parts.rules.verify_pod(
                parameters, parts.families, config.backend, force_iptables=config.forced_variant, choice=choice
            )
            return (*(f"nothing captures what it sends and gets at {address}" for address in uncaptured()), *drift)

        return await self._in_netns(record, work)

    def _uncaptured(self, record: PodRecord) -> Callable[[], tuple[Address, ...]]:
        """What tells, in the pod's netns, the addresses of a family that the kernel takes no rules for.

        Looked for only where there is such a family: everywhere else it costs nothing.
        """
        known = record.addresses
        if not self._parts.without_ipv6:
            return tuple
        return lambda: tuple(sorted(one for one in {*known, *self._parts.facts().addresses} if one.version == 6))

    def _refuse(self, uncaptured: tuple[Address, ...]) -> None:
        if uncaptured:
            raise ApplyError(
                f"the pod has the IPv6 address {uncaptured[0]}, whose traffic would pass by the mesh: "
                f"{self._parts.without_ipv6}",
                "load them on the node and start the agent again, give the pod no IPv6 address, or set "
                "AMBIENT_IPV6=false, which leaves IPv6 outside of the mesh",
            )

    async def _release(self, record: PodRecord) -> None:
        await self._in_netns(record, lambda _choice: self._parts.rules.release_pod())

    async def _remove_rules(self, record: PodRecord) -> None:
        if record.actual.released:
            await asyncio.sleep(LINGER_SECONDS)
        await self._in_netns(record, lambda _choice: self._parts.rules.remove_pod())

    async def _in_netns(self, record: PodRecord, work: Callable[[VariantChoice | None], T]) -> T:
        if record.netns is None:
            raise NetnsError(f"the network namespace of pod {record.name} is not known")
        return await self._parts.programmer.run(record.netns.descriptor, work, urgent=record.waiter is not None)

    async def say_healed(self, record: PodRecord, what: str, drift: tuple[str, ...]) -> None:
        """Tell that a running pod was not as it should be, and what was mended."""
        record.healed = drift
        self._parts.metrics.count(m.AMBIENT_DRIFT, what=what)
        words = "; ".join(drift)
        log.warning("mended: %s", words[:MAX_LOGGED_CHARACTERS], extra=labels(pod=record.name, what=what))
        await self._parts.warn(record.pod, HEALED, f"its redirection was not as it should be and was mended: {words}")

    # --- elsewhere ----------------------------------------------------------------------------------------------------

    async def _add(self, record: PodRecord) -> None:
        ztunnel = self._parts.ztunnel
        if record.waiter is not None:
            await self._wait_for_ztunnel(record.waiter)
        told = workload(record)
        for uid in tuple(record.displaced):
            if ztunnel.acked(uid) in (None, told.inode):  # else ztunnel has moved it elsewhere already
                await ztunnel.delete(uid)
            record.displaced.discard(uid)
        await ztunnel.add(told)

    async def _wait_for_ztunnel(self, waiter: asyncio.Future[None]) -> None:
        """Wait as long as the setting says, but not when nobody waits for the pod any more."""
        connected = asyncio.ensure_future(self._parts.ztunnel.wait_connected(self._parts.ztunnel_wait_seconds))
        try:
            await asyncio.wait((connected, waiter), return_when=asyncio.FIRST_COMPLETED)
        finally:
            connected.cancel()

    async def _delete(self, record: PodRecord) -> None:
        if record.actual.released:
            await asyncio.sleep(DRAIN_SECONDS)
        await self._parts.ztunnel.delete(record.uid)

    async def _put_addresses(self, record: PodRecord) -> None:
        await self._parts.host.put(record.uid, record.addresses)

    async def _annotate(self, record: PodRecord, annotation: Annotation) -> None:
        pod = record.pod
        try:
            patched = await self._parts.api.patch_redirection(
                pod.namespace, pod.name, pod.uid, annotation.value or None
            )
        except KubeError as error:
            if not is_gone(error):
                raise
            record.in_api = False  # until the informer shows it again
            return
        record.annotated_at = version_of(patched)


def is_gone(error: KubeError) -> bool:
    """Whether an answer says that the pod is no more, or that another one has its name now."""
    return error.status == 404 or (error.status == 409 and "uid" in str(error).lower())


def workload(record: PodRecord) -> Workload:
    """The pod as ztunnel is told of it."""
    pod, netns = record.pod, record.netns
    return Workload(
        uid=record.uid,
        name=pod.name,
        namespace=pod.namespace,
        service_account=pod.service_account,
        netns=netns.descriptor if netns else None,
        inode=netns.id.inode if netns else 0,
    )


def version_of(pod: Pod) -> int:
    """The object's version as a number, 0 where it is none (resource versions are comparable since Kubernetes 1.35)."""
    return int(pod.resource_version) if pod.resource_version.isdecimal() else 0
