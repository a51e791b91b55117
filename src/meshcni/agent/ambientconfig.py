"""What ambient mode is given: its configuration, and what it needs of the informers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.eligibility import Policy
from meshcni.pods.model import Namespace, Pod
from meshcni.rules.model import Family


class Pods(Protocol):
    """What is needed of the informer of pods."""

    synced: asyncio.Event

    def items(self) -> tuple[Pod, ...]:
        """All pods of this node."""


class Namespaces(Protocol):
    """What is needed of the informer of namespaces."""

    synced: asyncio.Event

    def get(self, namespace: str, name: str) -> Namespace | None:
        """One namespace; `namespace` is empty."""


@dataclass(frozen=True, slots=True)
class AmbientConfig:
    """What the settings say. `defaults` are the node's parameters, which annotations of a pod override.

    `sandboxed_runtimes` are patterns of RuntimeClass names whose pods cannot be enrolled. `without_ipv6` says what the
    kernel lacks for the IPv6 rules that were asked for; empty when there are such rules, or when none were asked for.
    """

    policy: Policy
    defaults: AmbientParameters
    families: frozenset[Family]
    verify_seconds: float
    ztunnel_wait_seconds: float
    sandboxed_runtimes: tuple[str, ...]
    without_ipv6: str = ""
