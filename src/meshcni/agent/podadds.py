"""What happens in an ADD: check the netns, find the pod, decide, program, answer. Any doubt fails the ADD."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, ip_interface

from meshcni.agent import metrics as m
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.agent.podlookup import PodLookup
from meshcni.errors import (
    CNI_INVALID_NETNS,
    CNI_TRY_AGAIN_LATER,
    MeshCniError,
    NetnsError,
    PodSpecError,
    RulesError,
)
from meshcni.host.netns import check_pod_netns
from meshcni.host.redirection import Applied
from meshcni.pods.assess import Assessment, assess
from meshcni.pods.eligibility import (
    AMBIENT_ENABLED,
    BAD_PARAMETERS,
    NAMESPACE_EXCLUDED,
    SIDECAR_INJECTED,
    Policy,
    Reason,
    Verdict,
)
from meshcni.pods.interception import Interception
from meshcni.pods.model import Pod
from meshcni.protocols.podadd import AddReply, AddRequest, accepted, refused

log = logging.getLogger(__name__)

ADD_SECONDS = 60.0  # everything; the kubelet gives a sandbox 2 to 4 minutes and then starts anew
ENROLL_SECONDS = 23.0  # look-up and ztunnel's return included; our plugin waits 25 s for the answer
REMEMBERED_ADDS = 50  # for `install-cni status`
MAX_LOGGED_CHARACTERS = 200  # of a message, so that a line stays below 400 bytes
MAX_REPLY_CHARACTERS = 2000  # an annotation can be 256 KiB long, and messages quote values
EVENT_REASON = "MeshRedirectionFailed"

Addresses = tuple[IPv4Address | IPv6Address, ...]
Program = Callable[[int, Interception, Addresses], Awaitable[Applied]]
Enroll = Callable[[Pod, int, Addresses, str, float], Awaitable[object]]  # netns, its addresses and name, seconds
Warn = Callable[[Pod, str, str], Awaitable[None]]  # returns at once; the Event is posted in the background


@dataclass(slots=True)
class AddRecord:
    """One ADD as status and log show it; `milliseconds` by phase."""

    pod: str
    container_id: str
    at: str
    verdict: str = "error"
    reason: str = "internal"
    message: str = ""
    backend: str = ""
    variant: str = ""
    source: str = ""
    code: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase, also one that fails."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.milliseconds[name] = round((time.monotonic() - begin) * 1000, 2)


POD_UNKNOWN = Reason("pod-unknown", "The API server did not say what the pod is.", Verdict.ERROR)
WRONG_NETNS = Reason("wrong-netns", "The netns is none, the host's, or has none of the pod's addresses.", Verdict.ERROR)
NOT_PROGRAMMED = Reason("not-programmed", "The rules could not be put into the netns.", Verdict.ERROR)
INTERNAL = Reason("internal", "The agent met a case it does not know; its log has the traceback.", Verdict.ERROR)
AGENT_REASONS = (POD_UNKNOWN, WRONG_NETNS, NOT_PROGRAMMED, INTERNAL)  # beside those of pods.eligibility
REASON_OF_CODE: Mapping[int, Reason] = {
    NetnsError.cni_code: WRONG_NETNS,
    CNI_INVALID_NETNS: WRONG_NETNS,
    CNI_TRY_AGAIN_LATER: NOT_PROGRAMMED,
    RulesError.cni_code: BAD_PARAMETERS,
}


class AddRefusedError(MeshCniError):
    """The pod must not start now; the runtime tries again."""

    cni_code = CNI_TRY_AGAIN_LATER


class PodAdds:
    """Handles ADDs, any number at once; `program` puts rules into a netns, `warn` posts an Event on a pod.

    `programmed` hears of each sidecar pod that got its rules.
    """

    def __init__(
        self,
        lookup: PodLookup,
        policy: Policy,
        program: Program,
        metrics: Metrics,
        *,
        warn: Warn,
        environment: Mapping[str, str],
        enroll: Enroll | None = None,
        programmed: Callable[[Pod], None] = lambda pod: None,
    ) -> None:
        self._lookup = lookup
        self._enroll = enroll
        self._programmed = programmed
        self._policy = policy
        self._program = program
        self._metrics = metrics
        self._warn = warn
        self._environment = environment
        self._active = 0
        self.recent: deque[AddRecord] = deque(maxlen=REMEMBERED_ADDS)

    async def handle(self, request: AddRequest, netns_fd: int) -> AddReply:
        """Serve one ADD; the caller owns `netns_fd`. Raises nothing but cancellation."""
        now = datetime.now(UTC).isoformat("T", "seconds")
        record = AddRecord(f"{request.pod_namespace}/{request.pod_name}", request.container_id, now)
        self._active += 1
        self._metrics.set(m.ADDS_IN_PROGRESS, self._active)
        try:
            with record.phase("total"):
                async with asyncio.timeout(ADD_SECONDS):
                    reply = await self._add(request, netns_fd, record)
        except MeshCniError as error:
            reply = self._failed(record, error)
        except TimeoutError:
            late = AddRefusedError(f"the ADD was not done within {ADD_SECONDS:.0f} s", "is the node overloaded?")
            reply = self._failed(record, late)
        except Exception as error:
            log.exception("ADD of %s failed unexpectedly", record.pod)
            reply = self._failed(record, MeshCniError(f"{type(error).__name__}: {error}", "see the agent's log"))
        finally:
            self._active -= 1
            self._metrics.set(m.ADDS_IN_PROGRESS, self._active)
        asyncio.get_running_loop().call_soon(self._finish, record)  # the pod need not wait for our book-keeping
        return reply

    async def _add(self, request: AddRequest, netns_fd: int, record: AddRecord) -> AddReply:
        """The steps. Raises MeshCniError for whatever must fail the ADD."""
        check_pod_netns(netns_fd)
        if request.pod_namespace in self._policy.exclude_namespaces:  # the plugin's conf may be older than our settings
            return _skipped(record, NAMESPACE_EXCLUDED)
        with record.phase("lookup"):
            pod, assessment = await self._assess(request, record)
        for warning in assessment.warnings:
            log.warning("%s", warning, extra=labels(pod=record.pod))
        record.reason = assessment.decision.reason.code
        if assessment.decision.verdict is Verdict.SKIP:
            return _skipped(record, assessment.decision.reason)
        try:
            if assessment.decision.verdict is Verdict.AMBIENT:
                return await self._add_ambient(request, netns_fd, pod, record)
            interception = required_interception(assessment)
            with record.phase("program"):
                applied = await self._program(netns_fd, interception, addresses(request.ips))
        except MeshCniError as error:
            await self._warn(pod, EVENT_REASON, str(error))
            raise
        self._programmed(pod)
        record.verdict, record.backend, record.variant = "sidecar", applied.backend.value, applied.variant
        record.message = assessment.decision.reason.text
        return accepted("sidecar", record.reason, record.message)

    async def _add_ambient(self, request: AddRequest, netns_fd: int, pod: Pod, record: AddRecord) -> AddReply:
        """Answer when the rules are in and ztunnel has acknowledged the pod."""
        if self._enroll is None:
            raise AddRefusedError(f"pod {pod.full_name} is an ambient pod, and ambient mode is off on this node")
        with record.phase("enroll"):
            seconds = ENROLL_SECONDS - record.milliseconds["lookup"] / 1000
            await self._enroll(pod, netns_fd, addresses(request.ips), request.netns, seconds)
        record.verdict, record.message = "ambient", AMBIENT_ENABLED.text
        return accepted("ambient", record.reason, record.message)

    async def _assess(self, request: AddRequest, record: AddRecord) -> tuple[Pod, Assessment]:
        """The pod and what is to be done with it; its namespace is asked for only where ambient mode needs it."""
        try:
            found = await self._lookup.pod(request.pod_namespace, request.pod_name, request.pod_uid)
        except MeshCniError as error:
            self._metrics.count(m.POD_LOOKUPS, source="failed")
            record.reason = POD_UNKNOWN.code
            if isinstance(error, PodSpecError):  # the API knows it, but its fields cannot be read
                unread = Pod(namespace=request.pod_namespace, name=request.pod_name, uid=request.pod_uid)
                await self._warn(unread, EVENT_REASON, str(error))
            raise
        record.source = found.source
        self._metrics.count(m.POD_LOOKUPS, source=found.source)
        namespace = await self._lookup.namespace(found.pod.namespace) if self._policy.ambient_enabled else None
        return found.pod, assess(found.pod, namespace, self._policy, self._environment)

    def _failed(self, record: AddRecord, error: MeshCniError) -> AddReply:
        record.verdict, record.message, record.code = "error", str(error)[:MAX_REPLY_CHARACTERS], error.cni_code
        if record.reason in (
            INTERNAL.code,
            SIDECAR_INJECTED.code,
            AMBIENT_ENABLED.code,
        ):  # no step has named a better one
            record.reason = REASON_OF_CODE.get(error.cni_code, INTERNAL).code
        self._metrics.count(m.ERRORS, error=type(error).__name__)
        message = "; ".join([error.message, *getattr(error, "__notes__", ())])
        return refused(error.cni_code, message[:MAX_REPLY_CHARACTERS], error.hint[:MAX_REPLY_CHARACTERS])

    def _finish(self, record: AddRecord) -> None:
        """Count, remember, and say in one line what was done."""
        self.recent.append(record)
        self._metrics.count(m.ADDS, verdict=record.verdict, reason=record.reason)
        for phase, milliseconds in record.milliseconds.items():
            self._metrics.observe(m.ADD_DURATION, milliseconds / 1000, phase=phase, verdict=record.verdict)
        values: dict[str, object] = {"pod": record.pod, "verdict": record.verdict, "reason": record.reason}
        if record.backend:
            values["backend"] = f"{record.backend}/{record.variant}"
        values |= {f"{phase}_ms": milliseconds for phase, milliseconds in record.milliseconds.items()}
        level = logging.ERROR if record.verdict == "error" else logging.INFO
        log.log(level, "ADD %s", record.message[:MAX_LOGGED_CHARACTERS], extra=labels(**values))


def required_interception(assessment: Assessment) -> Interception:
    """The parameters to program. Raises PodSpecError for wrong ones, AddRefusedError where there can be none."""
    decision = assessment.decision
    if assessment.error is not None:
        raise assessment.error
    if assessment.derived is None:
        raise AddRefusedError(f"{decision.reason.text} ({decision.evidence})")
    return assessment.derived.interception


def _skipped(record: AddRecord, reason: Reason) -> AddReply:
    record.verdict, record.reason, record.message = "skip", reason.code, reason.text
    return accepted("skip", reason.code, reason.text)


def addresses(ips: tuple[str, ...]) -> Addresses:
    """The addresses of a request (`10.0.0.2/24`) that identify a pod; raises NetnsError for text that is none."""
    try:
        found = [ip_interface(text).ip for text in ips]
    except ValueError as error:
        raise NetnsError(f"the plugin sent an address that is none: {error}") from None
    return tuple(address for address in found if not (address.is_link_local or address.is_loopback))
