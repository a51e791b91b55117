"""Keeps plugin, kubeconfig and conf entry on the host while the agent lives: installs, watches, repairs, takes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from meshcni import istio
from meshcni.agent import platforms
from meshcni.agent.installation import SUCCESS, Installation, Outcome
from meshcni.agent.installconfig import InstallConfig
from meshcni.cni import conf
from meshcni.errors import MeshCniError
from meshcni.host import files
from meshcni.host.files import TEMP_MARK
from meshcni.host.inotify import DirectoryWatch

log = logging.getLogger("cni-agent")

JITTER = 0.1  # of the resync interval, so that the agents of a cluster do not all work at once
POLL_SECONDS = 5.0  # between looks when a directory cannot be watched
QUIET_SECONDS = 0.005  # after a change: its writer may do one more
BUSY_QUIET_SECONDS = 0.05  # when changes come thick
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0
# So many repairs within so long are a fight, also when each of them lasted for a while: some rewrite once a second.
FIGHT_REPAIRS, FIGHT_SECONDS = 5, 60.0
FIGHT_WARNING_SECONDS = 30.0  # between two warnings that somebody keeps changing the conf

# Who is known to rewrite confs, by what their file's name contains, and what to tell them.
FIGHT_HINTS = (
    ("cilium", "Cilium removes other plugins' confs unless its Helm value cni.exclusive=false"),
    ("azure", "AKS reconciles its conf and does not support chaining into it"),
    (
        "calico",
        "calico-node writes it anew when it starts; ISTIO_OWNED_CNI_CONFIG=true keeps a copy of our own",
    ),
    ("multus", "Multus writes its conf anew; name the file it delegates to with CNI_CONF_NAME"),
    (
        "flannel",
        "kube-flannel copies its conf there when it starts; ISTIO_OWNED_CNI_CONFIG=true keeps a copy of our own",
    ),
    ("ptp", "kindnet writes its conf anew; ISTIO_OWNED_CNI_CONFIG=true keeps a copy of our own"),
    ("", "find out who writes it; ISTIO_OWNED_CNI_CONFIG=true keeps our entry in a file of our own"),
)


def fight_hint(path: str) -> str:
    """Who may be changing the conf at `path`, by its name, its plugins and what lies beside it, and what to tell them.

    Cilium, when it is exclusive, renames the confs of others to `*.cilium_bak`.
    """
    texts = [os.path.basename(path).lower()]
    with contextlib.suppress(OSError):
        texts += ["cilium" for name in os.listdir(os.path.dirname(path)) if name.endswith(".cilium_bak")]
    with contextlib.suppress(OSError, MeshCniError):
        document = conf.as_list(os.path.basename(path), files.read(path)[0])
        texts += [str(plugin.get("type")).lower() for plugin in conf.foreign_part(document)["plugins"]]
    return next(text for part, text in FIGHT_HINTS if any(part in found for found in texts))


@dataclass(frozen=True, slots=True)
class InstallStatus:
    """What `install-cni status`, `/readyz` and the gauges show.

    `reasons` say why it is not ready (empty exactly when `ready`); `notes` are troubles that do not stop readiness.
    """

    ready: bool = False
    reasons: tuple[str, ...] = ("installation has not finished",)
    notes: tuple[str, ...] = ()
    conf_path: str = ""  # the file that carries our entry, as the agent sees it; empty when none does
    installs: int = 0  # times something was written
    conf_fights: int = 0  # times our entry was put back because somebody else had removed or changed it
    contested: str = ""  # the last time somebody did so again and again: when, which file, who it may be


@dataclass(slots=True)
class Callbacks:
    """What the agent does when something happens; called on the event loop."""

    result: Callable[[str], None] = field(default=lambda result: None)  # label of istio_cni_installs_total
    changed: Callable[[InstallStatus], None] = field(default=lambda status: None)
    fight: Callable[[str, str], None] = field(default=lambda path, hint: None)  # path of the conf, what to do


class Installer:
    """`run()` installs and watches until cancelled; `uninstall()` takes everything away again.

    While `superseded()` nothing is written: two agents on one node (a rollout with maxSurge) would undo each other's
    work without end. `sandboxes` tells how many pods of this node have got a network. Raises SettingError at once when
    a conf name can never work.
    """

    def __init__(
        self,
        config: InstallConfig,
        callbacks: Callbacks | None = None,
        *,
        superseded: Callable[[], bool] = lambda: False,
        sandboxes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.config = config
        self.callbacks = callbacks or Callbacks()
        self.status = InstallStatus()
        self.installed = asyncio.Event()  # set once everything was in place for the first time
        self._superseded = superseded
        self._sandboxes = sandboxes
        self._installation = Installation(config)
        self._wake = asyncio.Event()
        self._watch = DirectoryWatch(self._changed)
        self._matters: dict[str, Callable[[str], bool]] = {  # by directory, for names of files in it; absent: all do
            config.conf_dir: lambda name: conf.suffix(name) in conf.SUFFIXES or name == config.conf_name,
            config.run_dir: lambda name: name in (istio.KUBECONFIG_NAME, istio.UNINSTALLED_MARKER_NAME),
        }
        self._unwatched: dict[str, str] = {}  # directory -> why it cannot be watched
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._last_look = self._last_fight_warning = float("-inf")
        self._repaired: deque[float] = deque(maxlen=FIGHT_REPAIRS)  # when

    @property
    def ready(self) -> bool:
        """Whether everything was in place at the last look."""
        return self.status.ready

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not ready."""
        return self.status.reasons

    async def run(self) -> None:
        """Install, then keep installed; ends only by cancellation."""
        try:
            while True:
                failed = self._watch_directories()  # before the look, so that no change falls in between
                self._wake.clear()
                outcome = await self._look()
                self._last_look = time.monotonic()
                self._note_unwatched(self._watch_directories() if failed else failed)
                self._publish(outcome)
                await self._wait_for_work(outcome)
        finally:
            self._watch.close()

    async def _look(self) -> Outcome:
        if self._superseded():
            return Outcome(waiting="a newer agent installs on this node now")
        return await _to_its_end(self._installation.look_and_repair)

    async def uninstall(self, *, purge: bool = False) -> tuple[str, ...]:
        """Take conf entry, kubeconfig and (`purge`, or as configured) the binary away; `run` must have ended.

        Returns what was done, as sentences. Raises InstallError.
        """
        done = await asyncio.to_thread(self._installation.take_away, purge=purge)
        self._set_status(replace(self.status, ready=False, reasons=("uninstalled",), conf_path=""))
        return done

    # --- waiting for work ---------------------------------------------------------------------------------------------

    async def _wait_for_work(self, outcome: Outcome) -> None:
        if outcome.held_back_seconds:
            await asyncio.sleep(outcome.held_back_seconds)  # whatever happens meanwhile: two writers must not race
            return
        try:
            async with asyncio.timeout(self._seconds_until_next_look(outcome)):
                await self._wake.wait()
        except TimeoutError:
            return
        busy = time.monotonic() - self._last_look < BUSY_QUIET_SECONDS
        await asyncio.sleep(BUSY_QUIET_SECONDS if busy else QUIET_SECONDS)

    def _seconds_until_next_look(self, outcome: Outcome) -> float:
        seconds = self.config.resync_seconds * random.uniform(1 - JITTER, 1 + JITTER)
        if self._unwatched:
            seconds = min(seconds, POLL_SECONDS)
        if outcome.failures:
            seconds = min(seconds, self._retry_seconds)
            self._retry_seconds = min(self._retry_seconds * 2, MAX_RETRY_SECONDS)
        else:
            self._retry_seconds = FIRST_RETRY_SECONDS
        return seconds

    def _watch_directories(self) -> dict[str, str]:
        """Watch what is not watched yet; returns which directories cannot be, and why."""
        config = self.config
        directories = [config.conf_dir, *config.binary_target_dirs, config.run_dir, config.service_account_dir]
        if config.kube_ca_file:
            directories.append(os.path.dirname(config.kube_ca_file) or ".")
        return {path: str(error) for path, error in self._watch.ensure(list(dict.fromkeys(directories))).items()}

    def _note_unwatched(self, failed: dict[str, str]) -> None:
        """What cannot be watched is looked at every few seconds instead."""
        for path in sorted(failed.keys() - self._unwatched.keys()):
            log.warning("cannot watch %s (%s): looking every %g s instead", path, failed[path], POLL_SECONDS)
        for path in sorted(self._unwatched.keys() - failed.keys()):
            log.info("watching %s", path)
        self._unwatched = failed

    def _changed(self, directory: str, name: str) -> None:
        """Wake up for files that matter to us; a plugin's log in the run dir, for one, does not."""
        matters = self._matters.get(directory)
        if TEMP_MARK not in name and (not name or matters is None or matters(name)):
            self._wake.set()

    # --- telling ------------------------------------------------------------------------------------------------------

    def _publish(self, outcome: Outcome) -> None:
        for sentence in outcome.wrote:
            log.info("%s", sentence)
        for failure in outcome.failures:
            self.callbacks.result(failure.result)
        ready = not outcome.reasons
        if ready and (outcome.wrote or not self.status.ready):
            self.callbacks.result(SUCCESS)
        before = self.status
        outcome.notes += self._notes_on_directory(outcome)
        for text in (*outcome.reasons, *outcome.notes):
            if text not in (*before.reasons, *before.notes):
                log.warning("%s", text)
        if ready and not before.ready:
            log.info("installed: %s calls %s", outcome.conf_path, istio.PLUGIN_NAME)
        self._set_status(
            InstallStatus(
                ready=ready,
                reasons=outcome.reasons,
                notes=outcome.notes,
                conf_path=outcome.conf_path,
                installs=before.installs + bool(outcome.wrote),
                conf_fights=before.conf_fights + outcome.repairs,
                contested=before.contested,
            )
        )
        self._repaired.extend([self._last_look] * outcome.repairs)
        if outcome.held_back_seconds or (outcome.repairs and self._repairs_are_many()):
            self._warn_of_fight(outcome.conf_path)
        if ready:
            self.installed.set()

    def _repairs_are_many(self) -> bool:
        return len(self._repaired) == FIGHT_REPAIRS and self._last_look - self._repaired[0] <= FIGHT_SECONDS

    def _warn_of_fight(self, path: str) -> None:
        if self._last_look - self._last_fight_warning < FIGHT_WARNING_SECONDS:
            return
        self._last_fight_warning = self._last_look
        hint = fight_hint(path)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._set_status(replace(self.status, contested=f"{path}, last at {at}: {hint}"))
        self.callbacks.fight(path, hint)

    def _notes_on_directory(self, outcome: Outcome) -> tuple[str, ...]:
        """Pods have got a network from a conf that is not here."""
        config = self.config
        if outcome.conf_path or outcome.failures or not outcome.waiting or not config.chained:
            return ()
        count = 0 if config.conf_name else self._sandboxes()
        if not count:
            return ()
        return (
            f"{count} pods of this node have a network, and there is no usable conf in {config.conf_dir}: the runtime "
            f"seems to read another directory; {platforms.hint_for_confs(config.host_root)}",
        )

    def _set_status(self, status: InstallStatus) -> None:
        if status != self.status:
            self.status = status
            self.callbacks.changed(status)


async def _to_its_end(work: Callable[[], Outcome]) -> Outcome:
    """Run `work` on a thread. A cancellation waits for it: what writes now must not write after an uninstall."""
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait((thread,))
        raise
