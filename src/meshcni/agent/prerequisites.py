"""What only the agent's manifest can give: mounts of the host and rights at the API server. What is missing, and since.

Mounts are looked at once, for none appears in a container that runs. Rights are asked for at the start, again for as
long as one is missing, and whenever the API server begins to refuse us. A review that runs out of time is taken up
where it was: all agents of a cluster that start at once would otherwise ask everything anew, and make each other late.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshcni.agent import hostmounts, logs, manifest, rights
from meshcni.agent.needs import Weight
from meshcni.agent.rights import Asks, Review, Right
from meshcni.agent.settings import Settings
from meshcni.kube.credentials import TOKEN_NAME, subject
from meshcni.kube.informer import Informer
from meshcni.pods.repair import Mode, choose_mode

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # how often the informers' failures are looked at
ROUNDS_TO_A_NOTE = 60  # of those, until what merely degrades is asked for again
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 2.0, 30.0
LEAST_OF_A_PAUSE = 0.5  # a random part between this and all of it, so that agents that start together drift apart
# An API server that has just started refuses everybody for a second: once at work, believe a refusal the second time.
CONFIRMATIONS = 2
EVENT_REASON = "AgentPrerequisitesMissing"
SERVICE_ACCOUNT_PREFIX = "system:serviceaccount:"


class Prerequisites:
    """`run()` looks until cancelled. `released` is set once, when the agent may begin to change this node."""

    def __init__(
        self,
        settings: Settings,
        api: Asks,
        informers: Sequence[Informer[Any]],
        *,
        mounts: Sequence[hostmounts.Mount] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str, str], None] = lambda reason, message: None,
    ) -> None:
        self.settings = settings
        self.mounts = tuple(hostmounts.missing(settings) if mounts is None else mounts)
        self.rights = rights.wanted(ambient=settings.ambient_enabled, repair=_repair_mode(settings))
        self.review = rights.UNKNOWN
        self.released = asyncio.Event()
        self._api = api
        self._informers = informers
        self._sleep = sleep
        self._tell_pod = tell  # an Event at our own pod
        self._answers = rights.Answers(clock)
        self._refusals = 0  # reviews in a row in which something indispensable was refused
        self._told: tuple[str, ...] = ()
        self._told_of_help: tuple[str, ...] = ()

    # --- asking -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Review rights, and again when there is reason to."""
        await self._look()
        pause = FIRST_RETRY_SECONDS
        while True:
            if self._lacks_right() or not self.review.known:
                await self._sleep(pause * random.uniform(LEAST_OF_A_PAUSE, 1.0))
                pause = min(pause * 2, MAX_RETRY_SECONDS)
            else:
                pause = FIRST_RETRY_SECONDS
                await self._wait_for_doubt()
                self._answers.forget()
            await self._look()

    async def _wait_for_doubt(self) -> None:
        """Wait until the API server refuses an informer, or until it is time to ask for what only degrades."""
        rounds = ROUNDS_TO_A_NOTE if self._told_of_rights() else -1
        while rounds:
            await self._sleep(LOOK_SECONDS)
            if self._refused_lists():
                return
            self._refusals = 0
            rounds -= 1

    async def _look(self) -> None:
        """Look, and let the agent begin when nothing is missing, or when nobody answers.

        An API server that is away is away for everybody, and comes back; a role that is missing does not.
        """
        found = await self._ask() if self.settings.kubernetes_service_host else rights.UNKNOWN  # not within a pod
        if not found.known:
            if self._lacks_right():
                return  # what was refused stays refused while nobody answers
            if self.released.is_set():
                found = rights.UNKNOWN  # once at work, half a review is none
        self._refusals = self._refusals + 1 if _stops(found.refused) else 0
        if self.released.is_set() and 0 < self._refusals < CONFIRMATIONS:
            return
        self.review = found
        self._tell()
        if not self._lacks_mount() and not self._lacks_right():
            self.released.set()

    async def _ask(self) -> Review:
        folder = self.settings.service_account_dir
        if not Path(folder).is_dir():
            return Review(self.rights, f"no token of a service account is mounted at {folder}")
        try:
            return await rights.review(
                self._api, self.rights, self.settings.pod_namespace, self._refused_lists(), self._answers
            )
        except Exception:  # ours or a library's mistake must not end the agent
            log.exception("the review of our rights failed")
            return rights.UNKNOWN

    def _refused_lists(self) -> frozenset[str]:
        return frozenset(one.name for one in self._informers if one.state.last_status in (401, 403))

    # --- what is missing ----------------------------------------------------------------------------------------------

    def lacks(self, *volumes: str) -> bool:
        """Whether one of these mounts is missing."""
        return any(mount.volume in volumes for mount in self.mounts)

    def reasons(self) -> tuple[str, ...]:
        """Why the agent cannot do its work; empty when it can, as far as its manifest is concerned."""
        return tuple(self._sentences(Weight.STOPS))

    def notes(self) -> tuple[str, ...]:
        """What of its work it cannot do."""
        return tuple(self._sentences(Weight.DEGRADES))

    def yaml(self) -> str:
        """What to put into the manifest, as YAML; empty when nothing is missing that counts."""
        if not self._told_of():
            return ""
        found = []
        namespace, account = self._account()
        takes_account = bool(self.review.problem or self._told_of_rights()) and account != self._own_account()
        variables = [name for name in manifest.VARIABLES if self.mounts and not getattr(self.settings, name.lower())]
        if self.mounts or takes_account:
            patch = manifest.daemonset_patch(
                self.mounts, namespace=namespace, account=account if takes_account else "", variables=variables
            )
            found.append(patch)
        if self._told_of_rights():
            found.append(manifest.role(self.rights, self.review.refused, namespace=namespace, account=account))
        return "---\n".join(found)

    def as_object(self) -> Mapping[str, Any] | None:
        """For the status document; None when nothing is missing."""
        if not self._told_of() and not self.review.refused:
            return None
        return {
            "stops": list(self.reasons()),
            "degrades": list(self.notes()),
            "rights": [] if self.review.problem else [right.as_object() for right in self.review.refused],
            "yaml": self.yaml(),
        }

    def _sentences(self, weight: Weight) -> Iterable[str]:
        degraded = "" if weight is Weight.STOPS else "degraded by "
        mounts = [f"{one.volume}, {one.why}: {one.needed_for}" for one in self.mounts if one.weight is weight]
        if mounts:
            yield f"{degraded}missing mounts: {'; '.join(mounts)}"
        if self.review.problem:
            if weight is Weight.STOPS:
                yield f"missing access to the API server: {self.review.problem}"
            return
        refused = [right for right in self.review.refused if right.weight is weight]
        if refused:
            yield f"{degraded}missing rights{self._whose()}: {'; '.join(_by_purpose(refused))}"

    def _told_of(self) -> bool:
        return bool(self.reasons() or self.notes())

    def _told_of_rights(self) -> bool:
        return any(right.weight is not Weight.HELPS for right in self.review.refused)

    def _lacks_mount(self) -> bool:
        return any(mount.weight is Weight.STOPS for mount in self.mounts)

    def _lacks_right(self) -> bool:
        return _stops(self.review.refused)

    # --- who we are ---------------------------------------------------------------------------------------------------

    def _subject(self) -> str:
        """`system:serviceaccount:NAMESPACE:NAME` of our token, empty when it does not say."""
        try:
            token = Path(self.settings.service_account_dir, TOKEN_NAME).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return ""
        found = subject(token.strip())
        return found if found.startswith(SERVICE_ACCOUNT_PREFIX) and found.count(":") == 3 else ""

    def _own_account(self) -> str:
        return self._subject().rpartition(":")[2]

    def _account(self) -> tuple[str, str]:
        """Namespace and name of the account that should have the rights."""
        own = self._subject().removeprefix(SERVICE_ACCOUNT_PREFIX).partition(":")
        namespace = own[0] or self.settings.pod_namespace or self.settings.system_namespace
        # Rights of the default account would be rights of every pod that names none.
        return namespace, own[2] if own[2] and own[2] != manifest.DEFAULT_ACCOUNT else manifest.ACCOUNT

    def _whose(self) -> str:
        own = self._subject()
        return f" of {own}" if own else ""

    # --- telling ------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """One log line when what is missing changes, with the YAML below it."""
        stops, degrades = self.reasons(), self.notes()
        if (said := (*stops, *degrades)) == self._told:
            self._tell_of_help()
            return
        attachment = logs.attached(self.yaml())
        if stops:
            harm = "can no longer do its work" if self.released.is_set() else "changes nothing on this node"
            log.error("this agent %s: %s", harm, "; ".join(said), extra=attachment)
        elif degrades:
            log.warning("this agent does not do all of its work: %s", "; ".join(said), extra=attachment)
        else:
            log.info("this agent has the mounts and rights that it needs now")
        self._tell_of_help()
        if said:
            self._tell_pod(EVENT_REASON, "; ".join(said))
        self._told = said

    def _tell_of_help(self) -> None:
        """Rights that nobody misses until the agent ends are told once, and are no trouble."""
        found = [right for right in self.review.refused if right.weight is Weight.HELPS and not self.review.problem]
        said = tuple(f"{right} (without: {right.without})" for right in found)
        if said and said != self._told_of_help:
            log.info("not granted, and not needed for the daily work: %s", "; ".join(said))
        self._told_of_help = said


def _repair_mode(settings: Settings) -> Mode | None:
    if not settings.repair_enabled:
        return None
    return choose_mode(
        repair=settings.repair_repair_pods, delete=settings.repair_delete_pods, label=settings.repair_label_pods
    ).mode


def _stops(refused: Iterable[Right]) -> bool:
    return any(right.weight is Weight.STOPS for right in refused)


def _by_purpose(refused: Iterable[Right]) -> list[str]:
    """`get, list, watch pods: why`, one for each kind of object, with what is not done and which values grant it."""
    groups: dict[tuple[str, str, str], list[Right]] = {}
    for right in refused:
        groups.setdefault((right.target, right.needed_for, right.chart), []).append(right)
    return [
        f"{', '.join(right.verb for right in of)} {target}: {why} (without: {_loss(of)}; granted by the chart: {chart})"
        for (target, why, chart), of in groups.items()
    ]


def _loss(of: Sequence[Right]) -> str:
    """What is not done; of several verbs what they have in common."""
    return of[0].without if len(of) == 1 else of[0].without.partition(":")[0]
