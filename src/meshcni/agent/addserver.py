"""`agent.sock`: takes ADDs from plugins, one connection, one request with one descriptor, one reply each."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from meshcni.errors import CNI_TRY_AGAIN_LATER, ProtocolError
from meshcni.host.sockets import accept, close_descriptors, peer_credentials, receive_message
from meshcni.protocols.podadd import MAX_REQUEST_BYTES, AddReply, AddRequest, decode_request, encode_reply, refused

log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0  # from connect to the whole request, and for the reply to be taken
ACCEPT_PAUSE_SECONDS = 0.1  # after an accept that failed, for want of descriptors for example

Handle = Callable[[AddRequest, int], Awaitable[AddReply]]


class AddServer:
    """Serves `handle` on a SEQPACKET listener; only peers that are root are listened to.

    `on_refused` hears the cause of each refusal: `peer`, `slow`, `oversized`, `malformed`, `version`, `descriptors`.
    """

    def __init__(self, handle: Handle, on_refused: Callable[[str], None]) -> None:
        self._handle = handle
        self._on_refused = on_refused
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket) -> None:
        """Accept until cancelled; the listener is closed then, connections already taken go on."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection = await accept(listener)
                except OSError as error:
                    log.error("cannot accept on agent.sock: %s", error)
                    await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                    continue
                task = loop.create_task(self._serve(connection))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)
        finally:
            listener.close()

    async def drain(self, seconds: float) -> int:
        """Let the ADDs under way finish, at most `seconds`; returns how many had to be cancelled."""
        if not self._connections:
            return 0
        _, late = await asyncio.wait(tuple(self._connections), timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    async def _serve(self, connection: socket.socket) -> None:
        """One connection from its first byte to its end."""
        with connection:
            try:
                peer = peer_credentials(connection)
                if peer.uid != 0:
                    self._on_refused("peer")
                    log.warning(
                        "refused a connection of pid %d, uid %d on agent.sock: only root may", peer.pid, peer.uid
                    )
                    return
                reply = await self._answer(connection)
                if reply is not None:
                    async with asyncio.timeout(REQUEST_SECONDS):
                        await asyncio.get_running_loop().sock_sendall(connection, encode_reply(reply))
            except (OSError, TimeoutError) as error:
                log.warning("the plugin went away before the reply: %s", error)
            except Exception:
                log.exception("a connection on agent.sock failed")

    async def _answer(self, connection: socket.socket) -> AddReply | None:
        """The reply to the connection's request; None when there was none."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                message = await receive_message(connection, MAX_REQUEST_BYTES)
        except TimeoutError:
            self._on_refused("slow")
            return None
        except ProtocolError as error:
            return self._refuse(error)
        if message is None:
            return None
        try:
            if len(message.descriptors) != 1:
                count = len(message.descriptors)
                return self._refuse(ProtocolError("descriptors", f"request carries {count} descriptors instead of one"))
            try:
                request = decode_request(message.data)
            except ProtocolError as error:
                return self._refuse(error)
            return await self._handle(request, message.descriptors[0])
        finally:
            close_descriptors(message.descriptors)

    def _refuse(self, error: ProtocolError) -> AddReply:
        """The plugin says this to the runtime, which tries again: a rollout may be half way."""
        self._on_refused(error.cause)
        log.warning("refused a request on agent.sock: %s", error)
        return refused(CNI_TRY_AGAIN_LATER, error.message, error.hint)
