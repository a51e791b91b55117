"""What the API server says of pods and namespaces, taken into the records of ambient mode."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from meshcni.agent import metrics as m
from meshcni.agent.ambientconfig import AmbientConfig, Namespaces, Pods
from meshcni.agent.hostside import HostSide
from meshcni.agent.logs import labels
from meshcni.agent.metrics import Metrics
from meshcni.agent.podrecord import PodRecord
from meshcni.agent.reconciler import Reconciler
from meshcni.agent.steps import PatchesRedirection, version_of
from meshcni.errors import KubeError, PodSpecError
from meshcni.kube.reducer import Change
from meshcni.pods.ambient import derive_ambient
from meshcni.pods.ambientsettings import refuse_sandboxed
from meshcni.pods.eligibility import Verdict, decide
from meshcni.pods.enrollment import Annotation, Intent, Life, adopted, annotation_of
from meshcni.pods.model import Namespace, Pod, pod_addresses
from meshcni.rules.ambient import pod_ruleset
from meshcni.rules.model import Backend
from meshcni.rules.plan import digest

log = logging.getLogger(__name__)

EVENT_TYPES = {"added": "add", "modified": "update", "deleted": "delete"}


class Observation:
    """Keeps each record as the API server's objects say it should be, and wakes its worker.

    `look_at` has a pod's netns looked for. `adopted`: what earlier agents left was looked at; `leaving`: from now on no
    pod belongs to ambient mode; `namespaces_known`: all labels were read.
    """

    def __init__(
        self,
        config: AmbientConfig,
        records: Reconciler,
        *,
        pods: Pods,
        namespaces: Namespaces,
        host: HostSide,
        api: PatchesRedirection,
        metrics: Metrics,
        backend: Backend,
        look_at: Callable[[PodRecord], None],
    ) -> None:
        self.adopted = self.leaving = self.namespaces_known = False
        self._config, self._records, self._backend = config, records, backend
        self._pods, self._namespaces = pods, namespaces
        self._host, self._api, self._metrics = host, api, metrics
        self._look_at = look_at
        self._withdrawn: dict[str, int] = {}  # by UID, in which version: until the informer shows that or a later one

    def observe(self, pod: Pod) -> None:
        """Take in what the API server says of a pod."""
        record = self._records.get(pod.uid)
        annotation = self._annotation(pod)
        addresses, malformed = pod_addresses(pod)
        verdict = decide(pod, self._namespaces.get("", pod.namespace), self._config.policy).verdict
        intent = Intent.LEAVE if self.leaving else self._intent(verdict, record, annotation)
        if record is None:
            claimed = self._host.addresses_of(pod.uid)  # an agent before us had come that far, whatever it annotated
            is_out = intent is Intent.LEAVE or pod.has_terminated or not addresses
            if annotation is Annotation.ABSENT and is_out and not claimed:
                return  # nothing of ours, or its ADD is still to come
            belongs = bool(claimed) or (intent is Intent.ENROLL and not self.adopted)  # it may have been at work
            actual = replace(adopted(annotation, belongs=belongs), addresses=claimed)
            record = PodRecord(pod, intent, "informer" if self.adopted else "start", actual=actual)
            self._records.put(record)
        record.pod, record.intent, record.in_api = pod, intent, True
        if malformed:
            log.warning("pod %s has an address that is none: %s", pod.full_name, ", ".join(malformed)[:100])
        if addresses:
            self._take_addresses(record, frozenset(addresses))
        if pod.has_terminated:
            record.life = Life.ENDED
        if version_of(pod) >= record.annotated_at:
            record.actual = replace(record.actual, annotation=annotation)
        self.read_parameters(record)
        if record.parameters_error is not None and annotation is Annotation.ABSENT and not record.actual.enrolled:
            record.actual = replace(record.actual, announced=False)  # refused: ztunnel need not hear of it
        self._records.wake(record)

    def _annotation(self, pod: Pod) -> Annotation:
        """The pod's annotation; none where the informer shows it as it was before we took it away."""
        if version_of(pod) < self._withdrawn.get(pod.uid, 0):
            return Annotation.ABSENT
        self._withdrawn.pop(pod.uid, None)
        return annotation_of(pod)

    def _intent(self, verdict: Verdict, record: PodRecord | None, annotation: Annotation) -> Intent:
        """A pod that nothing is known about stays what it is."""
        if verdict is not Verdict.ERROR:
            return Intent.ENROLL if verdict is Verdict.AMBIENT else Intent.LEAVE
        if record is not None:
            return record.intent
        return Intent.LEAVE if annotation is Annotation.ABSENT else Intent.ENROLL

    def _take_addresses(self, record: PodRecord, addresses: frozenset[IPv4Address | IPv6Address]) -> None:
        if addresses == record.outdated:
            return
        record.outdated = frozenset()
        moved = bool(record.addresses) and record.addresses.isdisjoint(addresses)
        record.addresses = addresses
        if moved and record.life is Life.RUNNING:
            self._look_at(record)  # a new sandbox, perhaps made by a conf without us

    def pod_changed(self, change: Change[Pod]) -> None:
        """Take in a change of the informer of pods."""
        self._metrics.count(m.RECONCILE_EVENTS, type=EVENT_TYPES[change.kind.value])
        if change.old is not None and (change.new is None or change.new.uid != change.old.uid):
            self.gone(change.old.uid)
        if change.new is not None:
            self.observe(change.new)

    def namespace_changed(self, change: Change[Namespace]) -> None:
        """Take in a change of the informer of namespaces: new labels may concern each of its pods."""
        self._metrics.count(m.RECONCILE_EVENTS, type=EVENT_TYPES[change.kind.value])
        if change.new is None or (change.old is not None and change.old.labels == change.new.labels):
            return
        if self.namespaces_known:  # else each pod is looked at once all are
            for pod in self._pods.items():
                if pod.namespace == change.new.name:
                    self.observe_again(pod)

    def observe_again(self, pod: Pod) -> None:
        """Look at a pod because of its namespace, which upstream counts as an event of the pod."""
        self._metrics.count(m.RECONCILE_EVENTS, type="update")
        self.observe(pod)

    def gone(self, uid: str) -> None:
        """The pod is no more."""
        self._withdrawn.pop(uid, None)
        record = self._records.get(uid)
        if record is not None:
            record.life, record.in_api = Life.ENDED, False
            self._records.wake(record)

    async def is_deleted(self, record: PodRecord) -> bool:
        """Whether the API server says that the pod is no more; a watch that stands still proves nothing."""
        try:
            pod = await self._api.get_pod(record.pod.namespace, record.pod.name)
        except KubeError as error:
            return error.status == 404
        except PodSpecError:
            return False
        return pod.uid != record.uid

    def known_uids(self) -> set[str]:
        """The pods that the informer has; one that an ADD made known may be deleted before the informer sees it."""
        return {pod.uid for pod in self._pods.items()}

    def read_parameters(self, record: PodRecord) -> None:
        """Parse the pod's overrides. An edit that makes no rules changes nothing for a pod that has some."""
        pod = record.pod
        try:
            if not record.actual.enrolled:
                refuse_sandboxed(pod, self._config.sandboxed_runtimes)
            derived = derive_ambient(pod.annotations, self._config.defaults)
        except PodSpecError as error:
            if record.parameters is None:
                known = record.parameters_error
                if known is None or known.message != error.message:
                    record.parameters_error = error
            else:
                log.warning("%s; the pod keeps its rules", error, extra=labels(pod=record.name))
            return
        record.parameters_error = None
        if derived.parameters != record.parameters:
            for warning in derived.warnings:
                log.warning("%s", warning, extra=labels(pod=record.name))
            record.edited = record.parameters is not None
            record.parameters = derived.parameters
            record.wanted_rules = digest(pod_ruleset(derived.parameters, self._config.families, self._backend))

    def left(self, record: PodRecord) -> None:
        """The record is gone for good; older objects than our last patch may still come."""
        if record.in_api and record.annotated_at:
            self._withdrawn[record.uid] = record.annotated_at
        log.info("left the mesh", extra=labels(pod=record.name, uid=record.uid))
