"""The stand-in as a whole: the link, the table, the proxies, and the control socket by which others ask it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lab.ztunnel.behaviour import Behaviour, Options
from lab.ztunnel.link import AgentLink
from lab.ztunnel.proxy import Starter
from lab.ztunnel.record import Recorder
from lab.ztunnel.workloads import NoProxy, Proxy, StartError, Workload, Workloads
from meshcni.errors import NetnsError
from meshcni.host.netns import check_netns

RETRY_SECONDS = 5.0  # between two tries to start what could not be started
DRAIN_SECONDS = 0.008  # from the ack of a Del until the listeners are gone
BROKE_PROTOCOL = 1  # exit status


async def start_nothing(uid: str, netns: int) -> Proxy:
    """Serve nothing, but refuse a descriptor that is no netns."""
    try:
        check_netns(netns, uid)
    except NetnsError as error:
        raise StartError(f"Setns: EINVAL: {error.message}") from None
    return NoProxy()


class StandIn:
    """`run` until cancelled; its exit status is `run`'s result."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.behaviour = options.behaviour
        self.record = Recorder(options.record)
        tell = self.record if options.record_connections else None
        self.starter = Starter(ipv6=options.ipv6, names=options.names, tell=tell) if options.listen else None
        start = self.starter if self.starter is not None else start_nothing
        self.workloads = Workloads(start, self.record, self._end)
        self.link = AgentLink(options.socket, self.workloads, self.record, self._behaviour)

    def _behaviour(self) -> Behaviour:
        return self.behaviour

    async def run(self) -> int:
        """Serve; returns the exit status of a process that broke off."""
        raise_descriptor_limit()
        control = await self._listen() if self.options.control else None
        retrying = asyncio.create_task(self._retry())
        try:
            await self.link.run()
            return BROKE_PROTOCOL
        finally:
            retrying.cancel()
            if control is not None:
                control.close()
                with suppress(FileNotFoundError):
                    os.unlink(self.options.control)

    async def drain(self) -> None:
        """End as after SIGTERM: no new connections at once, those that are open have some time left."""
        if self.starter is not None:
            await self.starter.drain(self.options.termination_seconds)
        self.close()

    def close(self) -> None:
        """Let go of everything."""
        self.workloads.close()
        self.record.close()

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if self.workloads.pending:
                await self.workloads.retry()

    def _end(self, workload: Workload) -> None:
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, workload.end)

    # --- control ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What it is doing."""
        workloads, link = self.workloads, self.link
        return {
            "pid": os.getpid(),
            "connected": link.is_connected,
            "connections": link.connections,
            "agent": link.agent_pid,
            "messages": link.messages,
            "snapshot": workloads.snapshot_received,
            "ready": workloads.ready,
            "named": sorted(workloads.named),
            "started": workloads.started,
            "stopped": workloads.stopped,
            "workloads": workloads.dump(),
        }

    def command(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Obey `{"do": "state" | "set" | "say" | "hang-up", …}`; every answer is the state afterwards."""
        values = dict(order)
        match values.pop("do", "state"):
            case "set":
                self.behaviour = self.behaviour.changed(values)
            case "say":
                self.link.say(bytes.fromhex(values["hex"]))
            case "hang-up":
                self.link.hang_up()
            case "state":
                pass
            case other:
                raise ValueError(f"no such command: {other}")
        return self.state()

    async def _listen(self) -> asyncio.Server:
        with suppress(FileNotFoundError):
            os.unlink(self.options.control)
        return await asyncio.start_unix_server(self._control, self.options.control)

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    reply = self.command(json.loads(line))
                except (ValueError, TypeError, KeyError, OSError) as error:
                    reply = {"error": f"{type(error).__name__}: {error}"}
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        finally:
            writer.close()


def raise_descriptor_limit() -> None:
    """Take all the descriptors that are allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
