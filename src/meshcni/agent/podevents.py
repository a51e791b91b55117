"""What the original's plugin asks on `pluginevent.sock`: enrol this pod; it has decided by itself that it is ambient.

Upstream: cni/pkg/nodeagent/cni-watcher.go. Excluded namespaces are not looked at here, because that plugin has done so.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from meshcni.agent.podlookup import PodLookup
from meshcni.agent.reconciler import EnrollmentError
from meshcni.host.hostpaths import open_plugin_netns
from meshcni.host.netns import check_pod_netns
from meshcni.pods.eligibility import Policy, Verdict, decide
from meshcni.pods.model import Pod
from meshcni.protocols.cmdadd import PodAdded

ANSWER_SECONDS = 4.5  # for everything: that plugin's client gives up after 5 s, and then says less than we can

Addresses = tuple[IPv4Address | IPv6Address, ...]
Enroll = Callable[[Pod, int, Addresses, str, float], Awaitable[object]]


class PodEvents:
    """Looks the pod up, checks that it is ambient, and has it enrolled."""

    def __init__(self, lookup: PodLookup, policy: Policy, enroll: Enroll) -> None:
        self._lookup = lookup
        self._policy = replace(policy, exclude_namespaces=frozenset())
        self._enroll = enroll

    async def handle(self, event: PodAdded) -> None:
        """Return when the pod is enrolled. Raises MeshCniError."""
        if not (event.pod_namespace and event.pod_name):
            raise EnrollmentError("the event names no pod", "PodName and PodNamespace are needed")
        end = time.monotonic() + ANSWER_SECONDS
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                pod = (await self._lookup.pod(event.pod_namespace, event.pod_name, event.uid)).pod
                namespace = await self._lookup.namespace(pod.namespace)
        except TimeoutError:
            raise EnrollmentError(f"the API server did not tell within {ANSWER_SECONDS:g} s what the pod is") from None
        decision = decide(pod, namespace, self._policy)
        if decision.verdict is not Verdict.AMBIENT:
            raise EnrollmentError(
                f"unexpectedly not eligible for ambient enrollment: {decision.reason.text} ({decision.evidence})",
                "the plugin's conf and the agent's AMBIENT_ENABLEMENT_SELECTOR should be the same",
            )
        netns = open_plugin_netns(event.netns)
        try:
            check_pod_netns(netns)
            usable = tuple(ip for ip in event.ips if not (ip.is_link_local or ip.is_loopback))
            await self._enroll(pod, netns, usable, event.netns, max(end - time.monotonic(), 0.0))
        finally:
            os.close(netns)
