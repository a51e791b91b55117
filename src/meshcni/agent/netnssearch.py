"""Finding the namespaces of running pods: whoever asks within a moment shares one walk over the host's processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from meshcni.agent.podrecord import Netns, PodRecord
from meshcni.errors import NetnsError
from meshcni.host.podnetns import Found, Refused, Wanted
from meshcni.pods.podidentity import uids_of

GATHER_SECONDS = 0.02  # a label on a namespace makes all its pods ask at once

Find = Callable[[Mapping[str, Wanted]], dict[str, Found | Refused]]


class NetnsNotFoundError(NetnsError):
    """No network namespace was found for a pod that runs; `code` says why, see host.podnetns.Refused."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


HINTS = {
    "not-found": "is the host's /proc mounted at /host/proc, and do the pod's containers run?",
    "wrong-address": "the API server's podIPs and the sandbox do not agree yet; the kubelet will tell",
    "sandboxed": "sandboxed runtimes have their network inside; label the pod istio.io/dataplane-mode=none",
}


class NetnsSearch:
    """Walks with `find`, which blocks, on a worker thread."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._asking: dict[str, tuple[Wanted, asyncio.Future[Found]]] = {}
        self._walk: asyncio.Task[None] | None = None

    async def find(self, record: PodRecord) -> Netns:
        """The pod's namespace, the caller's. Raises NetnsNotFoundError."""
        loop = asyncio.get_running_loop()
        waiting = self._asking.get(record.uid)
        if waiting is None:
            waiting = self._asking[record.uid] = (wanted(record), loop.create_future())
        if self._walk is None or self._walk.done():
            self._walk = loop.create_task(self._walk_soon(), name="netns-walk")
        found = await asyncio.shield(waiting[1])
        return Netns(found.descriptor)

    async def find_all(self, records: list[PodRecord]) -> dict[str, Netns]:
        """The namespaces of all that have one, by UID."""
        results = await asyncio.to_thread(self._find, {record.uid: wanted(record) for record in records})
        return {uid: Netns(found.descriptor) for uid, found in results.items() if isinstance(found, Found)}

    async def _walk_soon(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        while self._asking:
            asking, self._asking = self._asking, {}
            try:
                results = await asyncio.to_thread(self._find, {uid: one for uid, (one, _) in asking.items()})
            except Exception as error:
                for _, future in asking.values():
                    if not future.done():
                        future.set_exception(NetnsError(f"the host's processes cannot be walked: {error}"))
                        future.exception()  # fetched, even when nobody waits any more
                continue
            for uid, (_, future) in asking.items():
                _tell(future, results.get(uid, Refused("not-found", "no process of it was found")))


def _tell(future: asyncio.Future[Found], result: Found | Refused) -> None:
    if isinstance(result, Found):
        future.set_result(result)
        return
    error = NetnsNotFoundError(
        result.code, f"no network namespace: {result.text}", HINTS.get(result.code, "it is tried again")
    )
    future.set_exception(error)
    future.exception()


def wanted(record: PodRecord) -> Wanted:
    """What tells the pod's processes and its namespace."""
    return Wanted(uids_of(record.pod), tuple(record.addresses), record.pod.container_ids)
