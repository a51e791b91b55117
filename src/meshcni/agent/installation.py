"""What the agent puts on the host: the plugin's binary, the kubeconfig, the conf entry. One look and repair, blocking.

The steps are independent where they can be: a token that cannot be read must not keep a conf from being repaired. Only
a host without the binary gets no conf entry, because the runtime could start no pod any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from meshcni import istio
from meshcni.agent import neighbours, platforms
from meshcni.agent.installconfig import InstallConfig
from meshcni.cni import conf
from meshcni.cni.confplan import Assessment, ConfDir, assess, removal
from meshcni.cni.kubeconfig import RESULT as KUBECONFIG_FAILURE
from meshcni.cni.kubeconfig import kubeconfig, server_url
from meshcni.errors import InstallError, MeshCniError
from meshcni.host import files
from meshcni.host.confdir import MAX_CONF_BYTES, carry_out, entries, read_conf_dir
from meshcni.host.files import FileChangedError, FileState

# Labels of istio_cni_installs_total: cni/pkg/monitoring
SUCCESS = "SUCCESS"
BINARIES_FAILURE = "COPY_BINARIES_FAILURE"
CONF_FAILURE = "CREATE_CNI_CONFIG_FAILURE"

RUN_DIR_MODE = 0o750  # pkg/uds of the original, for a run dir that does not exist
BACKUP_DIR_NAME = "converted"  # in the run dir: single networks as they were before they became lists
RACES = 5  # times in a row that somebody else may write between our look and our rename
# A conf that stayed as we wrote it for this long is repaired at once, whatever comes; one that is undone sooner is
# repaired once more at once and then this many times a second, so that two writers do not chase each other.
LASTING_SECONDS = 0.25
REPAIRS_PER_SECOND = 0.75


@dataclass(slots=True)
class Outcome:
    """What one look at the host found and did."""

    failures: list[InstallError] = field(default_factory=list)
    waiting: str = ""  # why the conf is not in place through no failure of ours
    notes: tuple[str, ...] = ()
    conf_path: str = ""
    wrote: list[str] = field(default_factory=list)  # what was put in place, as sentences
    repairs: int = 0  # of a conf that had been in place, until somebody changed it
    held_back_seconds: float = 0.0  # a repair of the conf waits that long because there were too many

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not everything is in place; empty when it is."""
        return (*(str(failure) for failure in self.failures), *filter(None, (self.waiting,)))


class Installation:
    """The files of one `InstallConfig` on this host. Methods block and may be called from any thread."""

    def __init__(self, config: InstallConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.policy = config.policy()
        self._clock = clock
        self._one_at_a_time = threading.Lock()
        self._was_in_place = False
        self._swept = False
        self._repairs = 1.0  # the allowance for hasty ones, at most one
        self._repairs_counted_at = clock()
        self._applied_at = float("-inf")
        self._undone_at: float | None = None  # when we first saw our last write undone
        self._binaries_seen: dict[str, tuple[object, ...]] = {}

    def look_and_repair(self) -> Outcome:
        """Put in place what is missing or different; raises nothing that the host's files can cause."""
        with self._one_at_a_time:
            outcome = Outcome()
            for step in (self._place_binaries, self._place_kubeconfig, self._place_conf):
                try:
                    step(outcome)
                except InstallError as error:
                    outcome.failures.append(error)
            return outcome

    # --- binary and kubeconfig ----------------------------------------------------------------------------------------

    def _place_binaries(self, outcome: Outcome) -> None:
        source_dir = self.config.binary_source_dir
        with _failing_as(BINARIES_FAILURE, "copy binaries"):
            names = sorted(entry.name for entry in os.scandir(source_dir) if entry.is_file())
            for name in names:
                for target_dir in self.config.binary_target_dirs:
                    source, target = os.path.join(source_dir, name), os.path.join(target_dir, name)
                    if self._binaries_seen.get(target) == (seen := _identity(source, target)):
                        continue  # neither has been touched since they were compared
                    if files.copy_by_rename(source, target):
                        outcome.wrote.append(f"copied {source} to {target}")
                        continue  # compared at the next look: what stands there by now may be somebody else's again
                    self._binaries_seen[target] = seen

    def _place_kubeconfig(self, outcome: Outcome) -> None:
        config, path = self.config, self.config.kubeconfig_path
        server = server_url(config.api_protocol, config.api_host, config.api_port)
        with _failing_as(KUBECONFIG_FAILURE, "write kubeconfig"):
            token = files.read(os.path.join(config.service_account_dir, "token"))[0].decode()
            ca = None if config.skip_tls_verify else files.read(config.ca_path)[0]
            wanted = kubeconfig(server, token, ca).encode()
            os.makedirs(config.run_dir, RUN_DIR_MODE, exist_ok=True)
            files.remove_stale_temps(path)
            if not _holds(path, wanted, config.kubeconfig_mode):
                files.write_atomically(path, wanted, mode=config.kubeconfig_mode)
                outcome.wrote.append(f"wrote {path}")

    # --- conf ---------------------------------------------------------------------------------------------------------

    def _place_conf(self, outcome: Outcome) -> None:
        missing = [one for one in self.config.binary_target_dirs if not _is_executable(one, istio.PLUGIN_NAME)]
        if missing:
            outcome.waiting = f"no plugin in {', '.join(missing)}, so the conf is not touched"
            return
        with _failing_as(CONF_FAILURE, "write CNI config"):
            os.makedirs(self.config.run_dir, RUN_DIR_MODE, exist_ok=True)
            files.remove(self.config.marker_path)
            for _ in range(RACES):
                directory, _states = self._read_conf_dir()
                found = assess(directory, self.policy)
                if found.reason or not found.changes:
                    self._undone_at = None
                    break
                if elsewhere := neighbours.elsewhere(self.config, directory, found.target):
                    outcome.waiting = elsewhere
                    break
                if self._was_in_place and not self._may_repair(outcome):
                    outcome.waiting = f"{found.target} was changed again by somebody else; it is repaired shortly"
                    break
                self._apply_anew(outcome)
            else:
                outcome.waiting = f"{found.target} is changed by somebody else each time we write it"
            self._sweep(directory)
        outcome.notes = found.notes + neighbours.doubts(self.config, directory, found.target)
        if found.target:
            outcome.conf_path = os.path.join(self.config.conf_dir, found.target)
        if found.failed:
            outcome.failures.append(InstallError(CONF_FAILURE, found.reason))
        else:
            outcome.waiting = outcome.waiting or found.reason
            self._was_in_place |= not outcome.waiting
            outcome.waiting = outcome.waiting or found.doubt

    def _may_repair(self, outcome: Outcome) -> bool:
        """Whether to repair now: our last write lasted, or the allowance has one left. Else say how long to wait."""
        now = self._clock()
        earned = (now - self._repairs_counted_at) * REPAIRS_PER_SECOND
        self._repairs, self._repairs_counted_at = min(1.0, self._repairs + earned), now
        if self._undone_at is None:
            self._undone_at = now
        if self._undone_at - self._applied_at < LASTING_SECONDS:
            if self._repairs < 1:
                outcome.held_back_seconds = (1 - self._repairs) / REPAIRS_PER_SECOND
                return False
            self._repairs -= 1
        outcome.repairs += 1
        return True

    def _apply_anew(self, outcome: Outcome) -> None:
        """Decide again under the lock and carry it out; nothing happens when somebody writes meanwhile."""
        with files.locked(self.config.conf_dir):
            directory, states = self._read_conf_dir()
            found = assess(directory, self.policy)
            with contextlib.suppress(FileChangedError):
                if found.converted:
                    self._keep_backup(found.converted, directory.files[found.converted])
                self._apply(found, states, outcome.wrote)
            self._applied_at, self._undone_at = self._clock(), None

    def _apply(self, found: Assessment, states: Mapping[str, FileState], done: list[str]) -> None:
        """Carry out the changes in their order; adds to `done` what was done, also when a later one fails."""
        for change in found.changes:
            own_file = not self.policy.chained or (self.policy.uses_owned and change.name == self.policy.owned_name)
            mode = (0o640 if self.config.conf_group_read else 0o600) if own_file else None
            done.append(carry_out(self.config.conf_dir, change, states, mode=mode))

    def _sweep(self, directory: ConfDir) -> None:
        """Once in a life, remove what a killed predecessor left half-written."""
        if not self._swept and directory.files:
            with files.locked(self.config.conf_dir):
                for name in directory.files:
                    files.remove_stale_temps(os.path.join(self.config.conf_dir, name))
            self._swept = True

    def _read_conf_dir(self) -> tuple[ConfDir, dict[str, FileState]]:
        return read_conf_dir(self.config.conf_dir, self.config.conf_name)

    # --- backups of converted files -----------------------------------------------------------------------------------

    def _keep_backup(self, name: str, data: bytes) -> None:
        folder = os.path.join(self.config.run_dir, BACKUP_DIR_NAME)
        os.makedirs(folder, 0o700, exist_ok=True)
        files.write_atomically(os.path.join(folder, name), data, mode=0o600)

    def _backups(self) -> dict[str, bytes]:
        folder = os.path.join(self.config.run_dir, BACKUP_DIR_NAME)
        names = [entry.name for entry in entries(folder) if conf.suffix(entry.name) in conf.SINGLE_SUFFIXES]
        return {name: files.read(os.path.join(folder, name), MAX_CONF_BYTES)[0] for name in names}

    # --- taking away --------------------------------------------------------------------------------------------------

    def take_away(self, *, purge: bool = False) -> tuple[str, ...]:
        """Take out the conf entry, then the kubeconfig, then leave the marker or (`purge`, or as configured) no binary.

        Returns what was done, as sentences. A part that fails keeps the plugin on the node and the marker is left all
        the same: who uninstalls wants pods to start, whatever a conf still says. Raises InstallError then.
        """
        with self._one_at_a_time:
            done: list[str] = []
            failures: list[InstallError] = []
            removes = purge or self.config.uninstall_removes_binary
            steps = [self._take_out_conf_entry, self._remove_kubeconfig, *([self._remove_binary] if removes else [])]
            for step in steps:
                if failures and step == self._remove_binary:
                    break  # what a conf still names has to be there
                try:
                    step(done)
                except InstallError as error:
                    failures.append(error)
            self._was_in_place = False
            if not removes or failures:
                self._leave_marker(done, failures)
            if failures:
                raise self._unfinished(failures)
            return tuple(done)

    def _take_out_conf_entry(self, done: list[str]) -> None:
        if not os.path.isdir(self.config.conf_dir):
            return
        with _failing_as(CONF_FAILURE, "clean up CNI config"), files.locked(self.config.conf_dir):
            for _ in range(RACES):
                directory, states = self._read_conf_dir()
                found = removal(directory, self.policy, self._backups())
                with contextlib.suppress(FileChangedError):
                    self._apply(found, states, done)
                    done += found.notes
                    return
            raise FileChangedError(f"{self.config.conf_dir} is changed by somebody else each time we write it")

    def _remove_kubeconfig(self, done: list[str]) -> None:
        path = self.config.kubeconfig_path
        with _failing_as(KUBECONFIG_FAILURE, "remove kubeconfig"):
            if files.remove(path):
                done.append(f"removed {path}")
            for entry in entries(folder := os.path.join(self.config.run_dir, BACKUP_DIR_NAME)):
                files.remove(entry.path)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(folder)

    def _leave_marker(self, done: list[str], failures: list[InstallError]) -> None:
        config = self.config
        if not (done or failures or os.path.isdir(config.run_dir)):
            return  # there was nothing of ours, and there shall be nothing
        try:
            with _failing_as(BINARIES_FAILURE, "leave the mark of the uninstall"):
                os.makedirs(config.run_dir, RUN_DIR_MODE, exist_ok=True)
                files.write_atomically(config.marker_path, MARKER_TEXT, mode=0o644)
        except InstallError as error:
            failures.append(error)
        else:
            done.append(f"left the plugin to let pods pass, marked by {config.marker_path}")

    def _unfinished(self, failures: list[InstallError]) -> InstallError:
        first = failures[0]
        passes = os.path.exists(self.config.marker_path)
        state = "until then pods start" if passes else "until then pods may not start"
        hints = dict.fromkeys(filter(None, (failure.hint for failure in failures)))
        return InstallError(
            first.result,
            "; ".join(failure.message for failure in failures),
            "; ".join([*hints, f"then '{istio.AGENT_NAME} uninstall' again on this node; {state} without an agent"]),
        )

    def _remove_binary(self, done: list[str]) -> None:
        with _failing_as(BINARIES_FAILURE, "remove binaries"):
            paths = [os.path.join(base, istio.PLUGIN_NAME) for base in self.config.binary_target_dirs]
            for path in paths:
                files.remove_stale_temps(path, "*")
            with contextlib.suppress(FileNotFoundError):
                files.remove(self.config.marker_path)
            self._binaries_seen.clear()
            done += [f"removed {path}" for path in paths if files.remove(path)]


MARKER_TEXT = (
    b"The istio-cni node agent was uninstalled.\n"
    b"While this file is here and no agent answers, the plugin lets pods pass.\n"
)


@contextlib.contextmanager
def _failing_as(result: str, action: str) -> Iterator[None]:
    """Turn whatever the host's files can cause into the InstallError of a step."""
    try:
        yield
    except InstallError:
        raise
    except MeshCniError as error:
        raise InstallError(result, f"{action}: {error.message}", error.hint) from error
    except OSError as error:
        raise InstallError(result, f"{action}: {error}", _hint(error)) from error
    except UnicodeDecodeError as error:
        raise InstallError(result, f"{action}: the token is no text: {error}") from error


def _hint(error: OSError) -> str:
    if error.errno == errno.EROFS and error.filename:
        return platforms.hint_for_read_only(os.path.dirname(os.fsdecode(error.filename)))
    return files.hint(error)


def _identity(*paths: str) -> tuple[object, ...]:
    """What changes when one of the files is replaced, written or chmod-ed; None for one that is not there."""
    facts: list[object] = []
    for path in paths:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            facts.append(None)
        else:
            facts.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return tuple(facts)


def _holds(path: str, wanted: bytes, mode: int) -> bool:
    try:
        return files.read(path)[0] == wanted and os.stat(path).st_mode & 0o7777 == mode
    except FileNotFoundError:
        return False


def _is_executable(directory: str, name: str) -> bool:
    """Whether the runtime, which is root, could run it; access(2) would ask what we could without our capabilities."""
    try:
        found = os.stat(os.path.join(directory, name)).st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    return stat.S_ISREG(found) and bool(found & 0o111)
