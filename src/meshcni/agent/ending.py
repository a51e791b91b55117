"""What is taken off the node: at the end, when the agent was taken off this node, or on purpose while it runs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshcni.agent import hostmounts
from meshcni.agent.installer import Installer
from meshcni.agent.logs import labels
from meshcni.agent.prerequisites import Prerequisites
from meshcni.agent.rundir import SocketPaths
from meshcni.agent.settings import Settings
from meshcni.agent.shutdown import Identity, decide_shutdown, gather
from meshcni.agent.web import JSON, Request, Response
from meshcni.cli.control import PURGE_QUERY
from meshcni.errors import MeshCniError
from meshcni.kube.client import KubeApi

if TYPE_CHECKING:
    from meshcni.agent.ambient import Ambient

log = logging.getLogger(__name__)

SHARE_OF_GRACE_TO_DECIDE = 0.6
CLEANING_SECONDS = 3.0  # of the grace period, for the host's part after pods were un-enrolled


@dataclass(frozen=True, slots=True)
class Ending:
    """Decides what stays on the node, and takes the rest away. `stop_installing` returns when nothing is written."""

    settings: Settings
    node: str
    api: KubeApi
    prerequisites: Prerequisites
    sockets: SocketPaths
    installer: Installer
    ambient: Ambient | None
    pods_known: Callable[[], bool]
    stop_installing: Callable[[], Awaitable[object]]

    async def end(self) -> int:
        """Decide, and clean up if so decided; returns the exit status."""
        grace = self.settings.shutdown_grace_seconds
        end = asyncio.get_running_loop().time() + grace
        try:
            async with asyncio.timeout(grace):
                # When our pod was deleted by force, a successor is already at work on this node.
                await self.stop_installing()
                await self._clean(end)
        except TimeoutError:
            log.error("not done within the %s s of SHUTDOWN_GRACE_SECONDS; what is still there stays", grace)
            return 1
        except MeshCniError as error:
            log.error("cleaning up failed: %s", error)
            return 1
        return 0

    async def _clean(self, end: float) -> None:
        settings = self.settings
        if self.prerequisites.lacks(hostmounts.CONF):
            log.info("at shutdown: keep: without mounts there is nothing that could be taken away")
            return
        if self._is_succeeded():
            return
        evidence = await gather(
            self.api if settings.kubernetes_service_host else None,
            Identity(settings.pod_namespace, settings.pod_name, self.node, self.pods_known()),
            ambient=settings.ambient_enabled,
            safe_upgrade_disabled=settings.cleans_up_always,
            deadline_seconds=settings.shutdown_grace_seconds * SHARE_OF_GRACE_TO_DECIDE,
        )
        decision = decide_shutdown(evidence)
        log.info("at shutdown: %s: %s", decision.outcome.value, decision.why, extra=labels(row=decision.row))
        if decision.clean_up and not self._is_succeeded():  # it may have started while we asked
            await self._take_all(end)

    def _is_succeeded(self) -> bool:
        taken = self.sockets.taken()
        if taken:
            log.info("at shutdown: keep: another agent serves this node, what is installed is its own now")
        return taken

    async def _take_all(self, end: float) -> None:
        """Files, pods and the host's part; none of them stays because another one does."""
        try:
            await self._take_files(purge=False)
        finally:
            if self.settings.ambient_unenroll_on_uninstall:
                await self._unenroll_in_time(end - CLEANING_SECONDS)
            await self._take_host()

    async def uninstall(self, request: Request) -> Response:
        """Take everything away on purpose and stay: the pod's end is somebody else's business."""
        if request.method != "POST":
            return Response(405, b"POST uninstalls\n")
        if self.prerequisites.lacks(hostmounts.CONF, hostmounts.RUN):
            return Response(500, "\n".join((*self.prerequisites.reasons(), self.prerequisites.yaml())).encode())
        try:
            left = _said(await self.ambient.unenroll_all()) if self.ambient is not None else ()
            files = await self._take_files(purge=request.query == PURGE_QUERY)
            done = (*left, *files, *await self._take_host())
        except MeshCniError as error:
            return Response(500, f"{error}\n".encode())
        return Response(200, json.dumps({"done": list(done)}).encode() + b"\n", JSON)

    async def _take_files(self, *, purge: bool) -> tuple[str, ...]:
        """Stop installing and remove what was installed. Returns what was done as sentences."""
        await self.stop_installing()
        return _said(await self.installer.uninstall(purge=purge))

    async def _unenroll_in_time(self, end: float) -> None:
        """Take pods out of the mesh until then. Those that are not out stay captured; the rest is removed all the same.

        A node that kept our conf because of one pod would start no other one any more.
        """
        if self.ambient is None:
            return
        try:
            async with asyncio.timeout_at(end):
                _said(await self.ambient.unenroll_all())
        except TimeoutError:
            log.error("no time is left to un-enrol %s", ", ".join(record.name for record in self.ambient.records))
        except MeshCniError as error:
            log.error("%s", error)

    async def _take_host(self) -> tuple[str, ...]:
        """Remove the host's part of ambient mode, if there is one. Returns what was done as sentences."""
        if self.ambient is None:
            return ()
        await self.ambient.host.remove_all()
        return _said(("removed the host's probe rules and sets",))


def _said(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """The same sentences, once they are logged."""
    for sentence in sentences:
        log.info("%s", sentence)
    return sentences
