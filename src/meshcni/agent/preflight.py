"""What the node's kernel lacks for our rules, looked at once at the start and told before the first pod meets it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from meshcni.agent.ownpod import KERNEL
from meshcni.agent.programming import Programmer
from meshcni.errors import MeshCniError
from meshcni.host import kernelsupport
from meshcni.host.kernelsupport import Lack
from meshcni.rules.model import Backend

log = logging.getLogger(__name__)

NO_IPV6 = "the kernel has no IPv6, or has it switched off (ipv6.disable=1): IPv4 alone is redirected"


class Preflight:
    """`run()` once; `notes` are sentences for the status. `ambient_ipv6`: whether IPv6 was asked for (AMBIENT_IPV6)."""

    def __init__(
        self,
        programmer: Programmer,
        tell: Callable[[str, str], None],
        *,
        ambient_ipv6: bool,
        look: Callable[[Backend, str, bool], tuple[Lack, ...]] = lambda backend, variant, ipv6: kernelsupport.lacks(
            backend, variant, ipv6=ipv6
        ),
        has_ipv6: Callable[[], bool] = kernelsupport.has_ipv6,
    ) -> None:
        self.notes: tuple[str, ...] = ()
        self._programmer, self._tell, self._look = programmer, tell, look
        self._ambient_ipv6, self._has_ipv6 = ambient_ipv6, has_ipv6

    async def run(self) -> None:
        """Choose the backend's variant, try what it needs, and tell. Raises nothing: the agent works without."""
        await self._programmer.prepare()
        try:
            await self._try()
        except (MeshCniError, OSError) as error:
            log.warning("what the kernel supports could not be found out: %s", error)

    async def _try(self) -> None:
        backend, choice = self._programmer.config.backend, self._programmer.choice
        if choice is None:
            return  # the programmer has said why, and asks again with the first pod
        ipv6 = self._has_ipv6()
        found = await asyncio.to_thread(self._look, backend, choice.variant, ipv6)
        notes = [str(lack) for lack in found]
        if not ipv6 and self._ambient_ipv6:
            notes.append(NO_IPV6)
        self.notes = tuple(notes)
        for note in notes:
            log.warning("%s", note)
        if found:
            self._tell(KERNEL, "; ".join(notes))
