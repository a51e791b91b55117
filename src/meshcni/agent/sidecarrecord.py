"""What the agent knows of the running sidecar pods of its node, and how it says that one was not captured."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from meshcni.host.sidecarlook import Found, Look
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.interception import Interception
from meshcni.pods.model import Pod


class SidecarState(Enum):
    """How a running sidecar pod is, as far as is known."""

    CAPTURED = "captured"
    OTHERWISE = "otherwise"  # captured, with other rules than an ADD would make now
    UNCAPTURED = "uncaptured"
    UNKNOWN = "unknown"  # not looked at yet, or its netns cannot be looked at


@dataclass(slots=True, eq=False)
class SidecarRecord:
    """One running sidecar pod. `reason`: why it is not simply captured; `mended`: what was wrong when it was healed.

    `seen_at` is when (UTC) it was last seen captured, by an agent of this life; `early`: it is older than this agent
    or its conf. `told` is what people were told last, `attempts` counts looks in a row that did not help.
    """

    pod: Pod
    early: bool
    state: SidecarState = SidecarState.UNKNOWN
    reason: str = ""
    parameters: Interception | None = None
    look: Look | None = None
    netns: NetnsId | None = None
    seen_at: str = ""
    mended: str = ""
    told: tuple[str, NetnsId] | None = None
    attempts: int = 0

    def is_drift(self, now: Look, netns: NetnsId, parameters: Interception | None) -> bool:
        """Whether rules that were just right have been changed since, and the pod's annotations have not."""
        before = self.look
        if before is None or before.found is not Found.AS_WANTED or self.netns != netns:
            return False
        return now.found is not Found.AS_WANTED and self.parameters == parameters and not _same_rules(before, now)

    def is_edited(self, now: Look, netns: NetnsId) -> bool:
        """Whether the rules are still those that captured the pod, so that what has changed is what it asks for."""
        before = self.look
        return before is not None and before.is_captured and self.netns == netns and _same_rules(before, now)

    def why(self, now: Look, netns: NetnsId) -> tuple[str, str]:
        """The likely cause of a pod that is not captured: a word for metrics, a sentence for people."""
        if self.netns is not None and self.netns != netns:
            return "new-sandbox", "the runtime made its sandbox anew without calling the plugin"
        if self.seen_at:
            return "removed", f"somebody changed its rules while it ran; at {self.seen_at} they were still in order"
        if now.found is Found.PARTLY:
            return "incomplete", "what redirects it was left incomplete before this agent first looked"
        if self.early:
            return (
                "early",
                "it is older than this agent or its conf on the node, and the runtime called no plugin for it",
            )
        return "plugin-not-called", (
            "the runtime made its sandbox without calling the plugin: another conf came first, if only for a moment, "
            "or this agent was away"
        )


def _same_rules(before: Look, now: Look) -> bool:
    return before.mark is not None and before.mark == now.mark


def timestamp(moment: datetime) -> str:
    """The moment, which is UTC, as the API writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
