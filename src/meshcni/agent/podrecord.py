"""One ambient pod as the agent knows it: what it should be, what is known to be there, who waits for it."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

from meshcni.errors import MeshCniError
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.enrollment import NOTHING, Actual, Addresses, Desired, Intent, Life, NetnsId, Step, in_new_sandbox
from meshcni.pods.model import Pod


class Netns:
    """A descriptor of a pod's network namespace, ours until `close`; it keeps the namespace alive."""

    __slots__ = ("descriptor", "id", "name")

    def __init__(self, descriptor: int, name: str = "") -> None:
        status = os.fstat(descriptor)
        self.descriptor = descriptor
        self.id = NetnsId(status.st_dev, status.st_ino)
        self.name = name  # as the runtime called it, for messages

    def close(self) -> None:
        """Give the descriptor back; safe to call twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass(slots=True, eq=False)
class PodRecord:
    """The one record of a pod UID. Only the event loop's thread touches it.

    `parameters` is None when an annotation makes none (`parameters_error`). `addresses` are those of the API object,
    before it has any those of the ADD; `outdated` those that the API object had when the ADD brought others, which it
    shows until the kubelet has told it. `failed` holds the failed steps of this pass; `generation` counts sandboxes,
    so that what was done in an old one is not taken for done in the new.
    """

    pod: Pod
    intent: Intent
    source: str  # what made it known first: add, informer, start
    life: Life = Life.RUNNING
    in_api: bool = True
    actual: Actual = NOTHING
    parameters: AmbientParameters | None = None
    parameters_error: MeshCniError | None = None
    wanted_rules: str = ""  # names the rule set that `parameters` lead to
    edited: bool = False  # an annotation of the running pod: that its rules are others is no drift
    addresses: Addresses = frozenset()
    outdated: Addresses = frozenset()
    netns: Netns | None = None
    generation: int = 0
    displaced: set[str] = field(default_factory=set)  # UIDs that ztunnel must let go of before it gets this netns
    undoing: bool = False
    failed: set[Step] = field(default_factory=set)
    error: MeshCniError | None = None
    reasons: dict[Step, str] = field(default_factory=dict)  # why steps failed, as people were told
    step: Step | None = None  # under way
    attempts: int = 0  # failed passes in a row
    waiter: asyncio.Future[None] | None = None  # of the ADD
    started_at: float = field(default_factory=time.monotonic)
    desired_since: float | None = None  # when everything became as it should be; None while it is not
    milliseconds: dict[str, float] = field(default_factory=dict)  # of the steps of this enrolment
    healed: tuple[str, ...] = ()  # the last drift that was mended, in words
    annotated_at: int = 0  # resourceVersion of our last patch: older objects of the watch know less

    @property
    def uid(self) -> str:
        """The pod's UID in the API."""
        return self.pod.uid

    @property
    def name(self) -> str:
        """`namespace/name`."""
        return self.pod.full_name

    @property
    def desired(self) -> Desired:
        """What the pod should be."""
        netns = self.netns.id if self.netns else None
        return Desired(self.intent, self.life, netns, self.wanted_rules, self.addresses, self.in_api)

    def leave_sandbox(self, *, by_add: bool) -> None:
        """Forget the netns and what was known to be in it; `by_add`: nothing runs in the next one yet."""
        self.drop_netns()
        self.generation += 1
        self.failed.clear()
        self.actual = in_new_sandbox(self.actual, by_add=by_add)

    def drop_netns(self) -> None:
        """Forget the namespace."""
        if self.netns is not None:
            self.netns.close()
            self.netns = None
