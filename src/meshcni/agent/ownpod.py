"""What is wrong with this node, told at the agent's own pod: `kubectl describe pod` is where people look first.

Events need a right of their own (repair.enabled=true in the chart); without it log, metrics and `install-cni status`
still tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from meshcni.agent.installer import InstallStatus
from meshcni.pods.model import Pod

log = logging.getLogger("meshcni.agent.installer")

CONTESTED = "CNIConfigContested"
INSTALLATION = "CNIInstallationTrouble"
KERNEL = "KernelSupportMissing"
REASONS = (CONTESTED, INSTALLATION, KERNEL)  # beside prerequisites.EVENT_REASON
KNOWN_SECONDS = 30.0  # for the informer to show our own pod; an Event without its UID is not shown at it
LASTING_SECONDS = 20.0  # what an installation waits for at a node's start is no trouble yet

Warn = Callable[[Pod, str, str], Awaitable[None]]


class KnowsPods(Protocol):
    """What is needed of the informer of this node's pods."""

    synced: asyncio.Event

    def get(self, namespace: str, name: str) -> Pod | None:
        """The pod of that name."""


class OwnPod:
    """Posts warnings on the pod of that namespace and name; none where they are not known."""

    def __init__(
        self, warn: Warn, pods: KnowsPods, namespace: str, name: str, *, lasting_seconds: float = LASTING_SECONDS
    ) -> None:
        self._warn, self._pods = warn, pods
        self._namespace, self._name = namespace, name
        self._lasting_seconds = lasting_seconds
        self._telling: set[asyncio.Task[None]] = set()
        self._troubles: tuple[str, ...] = ()
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, reason: str, message: str) -> None:
        """Post an Event some time soon. To be called on the event loop; never raises."""
        if not self._namespace or not self._name:
            return
        task = asyncio.get_running_loop().create_task(self._tell(reason, message), name=f"own-pod-{reason}")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def tell_of_fight(self, path: str, hint: str) -> None:
        """Somebody keeps changing the conf at `path`; `hint` says who it may be and what to do."""
        log.warning("something else keeps changing %s: %s", path, hint)
        self.tell(CONTESTED, f"something else keeps changing {path} and is undone each time: {hint}")

    def installation_changed(self, status: InstallStatus) -> None:
        """Tell of an installation's troubles once they have lasted for a while. To be called on the event loop."""
        found = (*status.reasons, *status.notes)
        if found == self._troubles:
            return
        self._troubles = found
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        text = "; ".join(found)
        self._timer = loop.call_later(self._lasting_seconds, self.tell, INSTALLATION, text) if found else None

    async def _tell(self, reason: str, message: str) -> None:
        try:
            async with asyncio.timeout(KNOWN_SECONDS):
                await self._pods.synced.wait()
        except TimeoutError:
            pass
        own = self._pods.get(self._namespace, self._name)
        await self._warn(own or Pod(namespace=self._namespace, name=self._name), reason, message)

    async def close(self) -> None:
        """Give up what was not told yet."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
