"""The sockets and ports on which the agent is asked things, and who may ask."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from meshcni import istio
from meshcni.agent import metrics as m
from meshcni.agent.metrics import Metrics
from meshcni.agent.rundir import SocketPaths
from meshcni.agent.settings import Settings
from meshcni.agent.socketservices import MAX_EVENTS, EventService, LogService
from meshcni.agent.web import MAX_CONNECTIONS, Handler, WebServer, listen_tcp
from meshcni.errors import SettingError
from meshcni.host.sockets import OPEN_SOCKET_MODE, SOCKET_MODE, listen_seqpacket, listen_stream
from meshcni.protocols.cmdadd import MAX_BODY_BYTES as MAX_EVENT_BYTES

log = logging.getLogger(__name__)

MAX_LOG_BODY_BYTES = 1024 * 1024
ROOT_ONLY = frozenset({0})

Routes = Mapping[str, Handler]


class Serving:
    """Listens on everything, until `close`. `sockets` hears of each path, so that a lost one is noticed."""

    def __init__(self, settings: Settings, metrics: Metrics, sockets: SocketPaths) -> None:
        self._settings = settings
        self._metrics = metrics
        self._sockets = sockets
        self._run_dir = Path(settings.cni_agent_run_dir)
        self._servers: list[WebServer] = []

    def refusals(self, name: str) -> Callable[[str], None]:
        """What counts refused requests of one socket by their cause."""
        return lambda cause: self._metrics.count(m.REFUSED, socket=name, cause=cause)

    async def control(self, routes: Routes, *, needed: bool) -> None:
        """Let `install-cni status` ask; whether it runs as root or as we do, it is a process of our container."""
        try:
            listener = self._listen(listen_stream, self._run_dir / istio.CONTROL_SOCKET_NAME)
        except SettingError as error:
            if needed:
                raise
            log.warning("install-cni status cannot ask: %s", error.message)  # a read-only root file system, most likely
            return
        users = frozenset({0, os.geteuid()})
        await self._serve(WebServer(routes, users=users, on_refused=self.refusals("control")), listener)

    def plugin_listener(self) -> socket.socket:
        """The socket on which our plugin asks. Raises SettingError."""
        return self._listen(listen_seqpacket, self._run_dir / istio.AGENT_SOCKET_NAME)

    def ztunnel_listener(self) -> socket.socket:
        """The socket that ztunnel connects to. Raises SettingError."""
        return self._listen(_listen_to_ztunnel, Path(self._settings.ztunnel_uds_address), callable_by_us=False)

    async def originals_plugin(self, logs: LogService, events: EventService) -> None:
        """What the original's plugin asks."""
        for name, label, routes, limit, connections in (
            (istio.LOG_SOCKET_NAME, "log", {istio.LOG_PATH: logs.handle}, MAX_LOG_BODY_BYTES, MAX_CONNECTIONS),
            (istio.EVENT_SOCKET_NAME, "event", {istio.EVENT_PATH: events.handle}, MAX_EVENT_BYTES, MAX_EVENTS),
        ):
            server = WebServer(
                routes,
                max_body_bytes=limit,
                max_connections=connections,
                users=ROOT_ONLY,
                on_refused=self.refusals(label),
            )
            await self._serve(server, self._listen(listen_stream, self._run_dir / name))

    async def tcp(self, health: Routes, metrics: Routes) -> None:
        """Health must be served, or nobody would notice; without metrics the agent still does its work."""
        settings = self._settings
        try:
            listener = listen_tcp(settings.health_address, settings.health_port)
        except OSError as error:
            raise SettingError(
                f"cannot serve health on {settings.health_address} port {settings.health_port}: {error}",
                "free the port, or set HEALTH_PORT or HEALTH_ADDRESS and the probes of the pod with it",
            ) from None
        await self._serve(WebServer(health, on_refused=self.refusals("health")), listener)
        if settings.monitoring_port <= 0:
            return
        try:
            listener = listen_tcp(settings.monitoring_address, settings.monitoring_port)
        except OSError as error:
            log.error("no metrics: cannot listen on port %d: %s", settings.monitoring_port, error)
            return
        await self._serve(WebServer(metrics, on_refused=self.refusals("metrics")), listener)

    async def drain(self, seconds: float) -> None:
        """Take no more requests; those under way have so long."""
        await asyncio.gather(*(server.drain(seconds) for server in self._servers))

    async def close(self) -> None:
        """Close everything."""
        for server in self._servers:
            await server.close()

    async def _serve(self, server: WebServer, listener: socket.socket) -> None:
        await server.start(listener)
        self._servers.append(server)

    def _listen(
        self, listen: Callable[[Path], socket.socket], path: Path, *, callable_by_us: bool = True
    ) -> socket.socket:
        try:
            listener = listen(path)
            self._sockets.add(path, callable_by_us=callable_by_us)
            return listener
        except OSError as error:
            raise SettingError(
                f"cannot listen on {path}: {error}",
                "its directory (--cni-agent-run-dir, --ztunnel-uds-address) must be writable, and SELinux allow it",
            ) from None


def _listen_to_ztunnel(path: Path) -> socket.socket:
    """Istio's chart runs ztunnel as root without DAC_OVERRIDE: it may only call what is root's or everybody's."""
    return listen_seqpacket(path, OPEN_SOCKET_MODE if os.geteuid() else SOCKET_MODE)
