"""The life of the agent: what starts when, what runs beside what, and how it ends.

Files and sockets come first and need no API server; whatever a plugin asks before the informer is synced is answered by
a direct question to the API. Upstream installs only after its caches are synced.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshcni import __version__, istio
from meshcni.agent import hostmounts, rundir, wiring
from meshcni.agent import metrics as m
from meshcni.agent.addserver import AddServer
from meshcni.agent.ending import Ending
from meshcni.agent.health import Heartbeat, endpoint
from meshcni.agent.installer import Callbacks, Installer, InstallStatus
from meshcni.agent.metrics import Metrics
from meshcni.agent.ownpod import OwnPod
from meshcni.agent.platforms import networked
from meshcni.agent.podadds import PodAdds
from meshcni.agent.podlookup import PodLookup
from meshcni.agent.preflight import Preflight
from meshcni.agent.prerequisites import Prerequisites
from meshcni.agent.programming import Programmer
from meshcni.agent.repairwiring import make_healer, make_repairer
from meshcni.agent.serving import Serving
from meshcni.agent.settings import Settings
from meshcni.agent.sidecarwiring import make_sidecars
from meshcni.agent.socketservices import EventService, LogService
from meshcni.agent.status import snapshot
from meshcni.agent.web import JSON, Request, Response
from meshcni.cli.control import STATUS_PATH, UNINSTALL_PATH
from meshcni.host.capabilities import complaint, missing_capabilities
from meshcni.kube.client import NAMESPACES, PODS, KubeApi
from meshcni.kube.events import EventRecorder
from meshcni.kube.informer import Informer
from meshcni.pods.model import Namespace, Pod, namespace_from_object, pod_from_object

if TYPE_CHECKING:
    from meshcni.agent.ambient import Ambient

log = logging.getLogger(__name__)

WORKER_THREADS = 4  # for blocking file work; programming has threads of its own
GAUGE_SECONDS = 5.0
METRICS_PATH = "/metrics"
DRAIN_SECONDS = 5.0
LOOKING_AFTER = ("repair", "sidecars")  # parts that change pods by themselves
AMBIENT_MOUNTS = (hostmounts.RUN, hostmounts.PROC, hostmounts.ZTUNNEL)  # without them no pod can be enrolled


class Agent:
    """One agent. `run()` lives until a signal, or until a part that must run ends."""

    def __init__(self, settings: Settings, plugin_log_level: str) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.node = settings.node or socket.gethostname()
        self.metrics = Metrics()
        self.api = KubeApi(wiring.api_access(settings))
        self.events = EventRecorder(self.api, node=self.node)
        self.pods: Informer[Pod] = Informer(
            self.api, PODS, pod_from_object, field_selector=f"spec.nodeName={self.node}"
        )
        self.namespaces: Informer[Namespace] | None = None
        if settings.ambient_enabled:
            self.namespaces = Informer(self.api, NAMESPACES, namespace_from_object, metadata_only=True)
        self.informers = tuple(informer for informer in (self.pods, self.namespaces) if informer is not None)
        self.own_pod = OwnPod(self.events.warn, self.pods, settings.pod_namespace, settings.pod_name)
        self.prerequisites = Prerequisites(settings, self.api, self.informers, tell=self.own_pod.tell)
        self.sockets = rundir.SocketPaths()
        self.serving = Serving(settings, self.metrics, self.sockets)
        self.installer = self._make_installer(plugin_log_level)
        self.lookup = PodLookup(self.api, self.pods, self.namespaces, settings.api_timeout_seconds)
        self.programmer = Programmer(
            wiring.backend_config(settings),
            lambda backend, choice: self.metrics.set(m.BACKEND, 1, backend=backend.value, variant=choice.variant),
        )
        self.preflight = Preflight(
            self.programmer,
            self.own_pod.tell,
            ambient_ipv6=settings.ambient_enabled and settings.ambient_ipv6,
        )
        self.ambient = self._make_ambient()
        self.healer = make_healer(settings, self.pods, self.programmer)
        self.repairer = make_repairer(settings, self.pods, self.healer, self.api, self.events, self.metrics)
        self.sidecars = make_sidecars(
            settings, self.pods, self.healer, self.events, self.metrics, self.prerequisites, self.sockets.taken
        )
        self.adds = self._make_adds()
        self.add_server = AddServer(self.adds.handle, self.serving.refusals("agent"))
        self.ending = Ending(
            settings,
            self.node,
            self.api,
            self.prerequisites,
            self.sockets,
            self.installer,
            self.ambient,
            self.pods.synced.is_set,
            lambda: self._stop("installer", *LOOKING_AFTER),
        )
        self.heartbeat = Heartbeat(settings.liveness_stale_seconds, lambda lag: self.metrics.set(m.EVENT_LOOP_LAG, lag))
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = ""  # the signal that ends us
        self._conf_fights = 0  # counted so far
        self._installed = False
        self._end = asyncio.Event()
        self._crashed = False
        self._frozen = False

    # --- parts that need several others -------------------------------------------------------------------------------

    def _make_installer(self, plugin_log_level: str) -> Installer:
        callbacks = Callbacks(
            result=lambda result: self.metrics.count(m.INSTALLS, result=result),
            changed=self._install_changed,
            fight=self.own_pod.tell_of_fight,
        )
        return Installer(
            wiring.install_config(self.settings, plugin_log_level),
            callbacks,
            superseded=self.sockets.taken,
            sandboxes=lambda: networked(self.pods.items()),
        )

    def _make_ambient(self) -> Ambient | None:
        """Ambient mode, subscribed to what it watches; None when it is off."""
        if self.namespaces is None:
            return None
        from meshcni.agent.ambientwiring import make_ambient  # with protobuf: nothing for sidecars alone

        ambient = make_ambient(
            self.settings, self.pods, self.namespaces, self.programmer, self.api, self.events.warn, self.metrics
        )
        self.pods.subscribe(ambient.pod_changed)
        self.namespaces.subscribe(ambient.namespace_changed)
        return ambient

    def _make_adds(self) -> PodAdds:
        return PodAdds(
            self.lookup,
            wiring.policy(self.settings),
            self.programmer.program,
            self.metrics,
            warn=self.events.warn,
            environment=self.settings.rule_environment,
            enroll=self.ambient.add if self.ambient else None,
            programmed=self.sidecars.programmed if self.sidecars else lambda pod: None,
        )

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Live; returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="worker"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        try:
            await self._start()
            await self._end.wait()
            return 1 if self._crashed else await self.ending.end()
        finally:
            await self._close()

    async def _start(self) -> None:
        settings = self.settings
        log.info("install-cni %s on node %s", __version__, self.node)
        for warning in wiring.warnings(settings):
            log.warning("%s", warning)
        reachable = not self.prerequisites.lacks(hostmounts.RUN)
        await self._serve_control(needed=reachable)
        if reachable:
            await self._serve_plugins()
        if self.ambient is not None and not self.prerequisites.lacks(*AMBIENT_MOUNTS):
            self._spawn("ztunnel", self.ambient.ztunnel.run(self.serving.ztunnel_listener()))
            self._spawn("ambient", self.ambient.run())
        await self._serve_tcp()
        self._spawn("prerequisites", self.prerequisites.run())
        self._spawn("installer", self._install())
        self._spawn("pods", self.pods.run())
        if self.namespaces is not None:
            self._spawn("namespaces", self.namespaces.run())
        if self.repairer is not None:
            self._spawn("repair", self.repairer.run())
        if self.sidecars is not None and not self.sidecars.trouble:
            self._spawn("sidecars", self.sidecars.run())
        self._spawn("heartbeat", self.heartbeat.run())
        self._spawn("gauges", self._gauges())
        self._spawn("run-dir", self._look_after(Path(settings.cni_agent_run_dir, istio.PLUGIN_LOG_NAME)))
        if reachable:
            self._prepare = asyncio.get_running_loop().create_task(self.preflight.run())

    async def _install(self) -> None:
        """Install once we are sure to stay and to be of use: a conf without an agent behind it stops pods."""
        await self.prerequisites.released.wait()
        await self.installer.run()

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a part that must not end before the agent ends it."""
        task = self._tasks[name] = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._part_ended)

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        """Without a part the agent is of no use: end, leave the node as it is, and let the kubelet start us anew."""
        if not task.cancelled():
            log.critical("%s ended by itself; leaving everything in place", task.get_name(), exc_info=task.exception())
            self._crashed = True
            self._end.set()

    async def _serve_control(self, *, needed: bool) -> None:
        await self.serving.control({STATUS_PATH: self._status, UNINSTALL_PATH: self.ending.uninstall}, needed=needed)

    async def _serve_plugins(self) -> None:
        """What plugins ask, ours and the original's."""
        self._spawn("add-server", self.add_server.run(self.serving.plugin_listener()))
        enroll = None
        if self.ambient is not None:
            from meshcni.agent.podevents import PodEvents

            enroll = PodEvents(self.lookup, wiring.policy(self.settings), self.ambient.add).handle
        await self.serving.originals_plugin(LogService(self.metrics), EventService(self.metrics, enroll))

    async def _serve_tcp(self) -> None:
        health = {
            istio.READY_PATH: endpoint((self.not_ready,), self.prerequisites.yaml),
            istio.LIVE_PATH: endpoint((self.not_live,)),
        }
        await self.serving.tcp(health, {METRICS_PATH: self._exposition})

    # --- ending -------------------------------------------------------------------------------------------------------

    def _signalled(self, number: signal.Signals) -> None:
        name = signal.Signals(number).name
        if self._stopping:
            log.warning("second signal %s: leaving at once", name)
            logging.shutdown()
            os._exit(128 + number)
        log.info("Exit signal received: %s", name)
        self._stopping = name
        self._end.set()

    async def _stop(self, *names: str) -> bool:
        """End parts before the agent ends; tells whether there was one."""
        parts = [task for name in names if (task := self._tasks.pop(name, None)) is not None]
        for task in parts:
            task.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        return bool(parts)

    async def _close(self) -> None:
        accepting = self._tasks.get("add-server")
        if accepting is not None:
            accepting.cancel()
        late, _ = await asyncio.gather(self.add_server.drain(DRAIN_SECONDS), self.serving.drain(DRAIN_SECONDS))
        if late:
            log.error("%d ADDs were cut short", late)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self.ambient is not None:
            await self.ambient.close()
        await self.serving.close()
        await self.own_pod.close()
        await self.events.close()
        await self.api.close()

    # --- what others ask ----------------------------------------------------------------------------------------------

    def not_ready(self) -> tuple[str, ...]:
        """Why not ready.

        The first reading of the cluster counts where the original waits for it too: in ambient mode and with repair.
        Without either, a pod that is not read yet is asked for directly, so the agent is of full use before.
        """
        counts = self.settings.ambient_enabled or self.settings.repair_enabled
        waiting = [
            f"{informer.name} of the cluster are not read yet: {informer.state.last_error or 'asking'}"
            for informer in self.informers
            if counts and not informer.synced.is_set()
        ]
        stopping = (f"the agent is shutting down ({self._stopping})",) if self._stopping else ()
        ambient = self.ambient.not_ready() if self.ambient is not None and not waiting else ()
        return (
            *stopping,
            *self.prerequisites.reasons(),
            *self.sockets.reasons(),
            *self.installer.reasons,
            *waiting,
            *ambient,
        )

    def not_live(self) -> tuple[str, ...]:
        """Why the process should be restarted."""
        return (*self.heartbeat.reasons(), *self.programmer.stuck())

    async def _exposition(self, _request: Request) -> Response:
        self._measure()
        return Response(200, self.metrics.text(), m.CONTENT_TYPE)

    async def _status(self, _request: Request) -> Response:
        document = snapshot(
            uptime_seconds=time.monotonic() - self.started,
            not_ready=self.not_ready(),
            not_live=self.not_live(),
            install=self.installer.status,
            programmer=self.programmer,
            informers=self.informers,
            node=self.node,
            adds=self.adds.recent,
            errors=self.metrics.series(m.ERRORS),
            missing_capabilities=complaint(missing_capabilities()),
            missing=self.prerequisites.as_object(),
            kernel=self.preflight.notes,
            ambient=self.ambient.status() if self.ambient is not None else None,
            sidecars=self.sidecars.status() if self.sidecars is not None else None,
            repair=self.repairer.status() if self.repairer is not None else None,
        )
        return Response(200, json.dumps(document, default=str).encode() + b"\n", JSON)

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _install_changed(self, status: InstallStatus) -> None:
        self.metrics.set(m.INSTALL_READY, status.ready)
        self.own_pod.installation_changed(status)
        if status.ready and not self._installed:
            for part in (self.ambient, self.sidecars):
                if part is not None:
                    part.conf_in_place()
        self._installed = status.ready
        self.metrics.set(m.INSTALL_TROUBLES, len(status.reasons), kind="blocking")
        self.metrics.set(m.INSTALL_TROUBLES, len(status.notes), kind="note")
        self.metrics.count(m.CONF_DRIFT, status.conf_fights - self._conf_fights)
        self._conf_fights = status.conf_fights

    def _measure(self) -> None:
        for part in (self.ambient, self.sidecars):
            if part is not None:
                part.measure()
        for informer in self.informers:
            self.metrics.set(m.WATCH_SYNCED, informer.synced.is_set(), resource=informer.name)
            self.metrics.set(m.WATCH_OBJECTS, len(informer.items()), resource=informer.name)
            self.metrics.set(m.WATCH_FAILURES, informer.state.restarts, resource=informer.name)
            self.metrics.set(m.WATCH_REJECTED, informer.state.rejected, resource=informer.name)

    async def _look_after(self, plugin_log: Path) -> None:
        """Raises SocketLostError, which ends the agent: its successor makes the sockets anew."""
        while True:
            await asyncio.sleep(rundir.LOOK_SECONDS)
            self.sockets.check()
            if self.sockets.taken():
                await self._hand_over()
            try:
                rundir.rotate(plugin_log)
            except OSError as error:
                log.warning("the plugins' log cannot be put aside: %s", error)

    async def _hand_over(self) -> None:
        """Leave pods, host and ztunnel, which then connects to it, to the agent that started after us.

        What that one enrols is not known here, so we would call it wrong and take it away.
        """
        await self._stop(*LOOKING_AFTER)
        if self.ambient is not None and await self._stop("ztunnel", "ambient"):
            log.info("another agent serves this node now: ambient mode is left to it")
            await self.ambient.close()

    async def _gauges(self) -> None:
        """What must be looked at now and then; once ready, everything made so far is left out of collections."""
        while True:
            await asyncio.sleep(GAUGE_SECONDS)
            if not self._frozen and not self.not_ready():
                gc.collect()
                gc.freeze()
                self._frozen = True
