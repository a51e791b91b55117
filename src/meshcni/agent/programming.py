"""Rules into pods: with which backend, on which thread, how many at once. The backend is found out once a boot."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from meshcni import istio
from meshcni.agent.podadds import Addresses
from meshcni.errors import MeshCniError
from meshcni.host.backends.detection import VariantChoice, choose_variant, legacy_rules_here
from meshcni.host.backends.iptables import find_tools
from meshcni.host.netns import call_in_netns, copy_netns, open_netns, run_in_netns
from meshcni.host.procfs import boot_id
from meshcni.host.redirection import Applied, FamilyPolicy, apply_sidecar
from meshcni.pods.interception import Interception
from meshcni.rules.model import Backend

T = TypeVar("T")
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
        self._background = asyncio.Semaphore(1)
        self._working: dict[asyncio.Task[Any], float] = {}  # when each began

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
        return await self.run(
            netns_fd,
            lambda choice: apply_sidecar(
                parameters,
                self.config.backend,
                force_iptables=self.config.forced_variant,
                choice=choice,
                family_policy=self.config.family_policy,
                expected_addresses=expected,
            ),
        )

    async def variant(self) -> VariantChoice | None:
        """The iptables variant of this boot; None with nftables. Raises MeshCniError when none works."""
        choice = await self._choose()
        return None if choice is NATIVE else choice

    async def run(self, netns_fd: int, work: Callable[[VariantChoice | None], T], *, urgent: bool = True) -> T:
        """Run `work` inside the netns, alone there; it gets the iptables variant of this boot, None with nftables.

        What is not `urgent`, such as looking after pods that run, takes turns, so that an ADD never waits behind it.
        """
        own_fd = copy_netns(netns_fd)  # now: who called may close his while we wait
        task: asyncio.Task[T] = asyncio.get_running_loop().create_task(self._alone(own_fd, work, urgent))
        self._working[task] = self._clock()
        task.add_done_callback(self._working.pop)
        return await asyncio.shield(task)  # who stops waiting must not give the netns free before the work has ended

    async def _alone(self, own_fd: int, work: Callable[[VariantChoice | None], T], urgent: bool) -> T:
        try:
            function = partial(work, await self.variant())
            lock = self._locks.setdefault(os.fstat(own_fd).st_ino, asyncio.Lock())
            async with self._turn(urgent), lock, self._slots:
                return await run_in_netns(own_fd, function)
        finally:
            os.close(own_fd)

    def _turn(self, urgent: bool) -> AbstractAsyncContextManager[object]:
        return nullcontext() if urgent else self._background

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
