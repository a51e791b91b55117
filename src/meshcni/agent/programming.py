"""Rules into pods: with which backend, on which thread, how many at once. The backend is found out once a boot."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from meshcni import istio
from meshcni.agent.podadds import Addresses
from meshcni.errors import MeshCniError
from meshcni.host.backends.detection import VariantChoice, choose_variant, legacy_rules_here
from meshcni.host.backends.iptables import find_tools
from meshcni.host.netns import call_in_netns, open_netns, run_in_netns
from meshcni.host.procfs import boot_id
from meshcni.host.redirection import Applied, FamilyPolicy, apply_sidecar
from meshcni.pods.interception import Interception
from meshcni.rules.model import Backend

log = logging.getLogger(__name__)

CHOICE_FILE_NAME = "backend.json"  # in the run directory: which iptables variant this boot uses, and why
STUCK_SECONDS = 180.0  # an ADD has 60 s, the commands of both families and of their undoing 30 s each
NATIVE = VariantChoice("nftables", "NATIVE_NFTABLES is set")


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """What the settings say about programming; `host_netns` is where the host's own rules can be looked at."""

    backend: Backend
    forced_variant: str
    family_policy: FamilyPolicy
    run_dir: str
    host_netns: str


class Programmer:
    """Programs pods, as many at once as there are CPUs: more would only take turns.

    A netns is programmed by one ADD at a time. A runtime that gives up on a plugin sends the ADD again while the first
    one is still at work, and of two at once each would add its entries, or one would undo what the other has reported.
    """

    def __init__(
        self,
        config: BackendConfig,
        on_choice: Callable[[Backend, VariantChoice], None] = lambda backend, choice: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._clock = clock
        self.choice: VariantChoice | None = NATIVE if config.backend is Backend.NFTABLES else None
        self._on_choice = on_choice
        self._choosing = asyncio.Lock()
        self._slots = asyncio.Semaphore(max(2, os.cpu_count() or 1))
        self._locks: weakref.WeakValueDictionary[int, asyncio.Lock] = weakref.WeakValueDictionary()  # by netns inode
        self._working: dict[asyncio.Task[Applied], float] = {}  # when each began

    def stuck(self) -> tuple[str, ...]:
        """Why no pod may get its rules any more: work that has long been under way, behind which others wait."""
        late = sum(self._clock() - begun > STUCK_SECONDS for begun in self._working.values())
        return (f"{late} pods have been waiting for their rules for more than {STUCK_SECONDS:.0f} s",) if late else ()

    async def prepare(self) -> None:
        """Choose the iptables variant before the first ADD needs it; a failure is logged and met again there."""
        try:
            await self._choose()
        except (MeshCniError, OSError) as error:
            log.error("no way to program rules on this node yet: %s", error)

    async def program(self, netns_fd: int, parameters: Interception, expected: Addresses) -> Applied:
        """Put the rules of `parameters` into the netns, which must have one of the `expected` addresses."""
        choice = await self._choose()
        apply = partial(
            apply_sidecar,
            parameters,
            self.config.backend,
            force_iptables=self.config.forced_variant,
            choice=None if choice is NATIVE else choice,
            family_policy=self.config.family_policy,
            expected_addresses=expected,
        )
        work = asyncio.get_running_loop().create_task(self._alone(os.dup(netns_fd), apply))
        self._working[work] = self._clock()
        work.add_done_callback(self._working.pop)
        return await asyncio.shield(work)  # who stops waiting must not give the netns free before the work has ended

    async def _alone(self, own_fd: int, apply: Callable[[], Applied]) -> Applied:
        try:
            lock = self._locks.setdefault(os.fstat(own_fd).st_ino, asyncio.Lock())
            async with lock, self._slots:
                return await run_in_netns(own_fd, apply)
        finally:
            os.close(own_fd)

    async def _choose(self) -> VariantChoice:
        async with self._choosing:
            if self.choice is None:
                self.choice = await asyncio.to_thread(settle_choice, self.config)
                log.info("programming with iptables, variant %s: %s", self.choice.variant, self.choice.reason)
                self._on_choice(self.config.backend, self.choice)
            return self.choice


def settle_choice(config: BackendConfig, find: Callable[[str], object | None] = find_tools) -> VariantChoice:
    """The variant of this boot: forced, or remembered in the run directory, or found out now. Blocking.

    A remembered one whose commands this image no longer has (`find` gives None) is found out anew.
    """
    path = Path(config.run_dir, CHOICE_FILE_NAME)
    if not config.forced_variant:
        remembered = _remembered(path)
        if remembered is not None and find(remembered.variant) is not None:
            return remembered
    choice = choose_variant(config.forced_variant, _host_uses_legacy(config.host_netns))
    if not config.forced_variant:
        try:
            path.write_text(json.dumps(choice.to_object()) + "\n")  # a torn file reads as none and is written again
        except OSError as error:
            log.warning("the choice of iptables variant is not remembered: %s", error)
    return choice


def _remembered(path: Path) -> VariantChoice | None:
    try:
        return VariantChoice.from_object(json.loads(path.read_bytes()), boot_id())
    except (OSError, ValueError):
        return None


def _host_uses_legacy(host_netns: str) -> bool | None:
    """Whether the host's own rules are in legacy tables; None when its netns is out of reach."""
    try:
        if host_netns == istio.OWN_NETNS:
            return legacy_rules_here()
        fd = open_netns(host_netns)
    except MeshCniError:
        return None
    try:
        return call_in_netns(fd, legacy_rules_here)
    except MeshCniError:
        return None
    finally:
        os.close(fd)
