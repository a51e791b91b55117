"""A node: private mount, network, pid, ipc and uts namespaces under one process 1, and the means to run things in them.

Ending process 1 makes the kernel end every process of the node, and with them every mount, netns and interface. What
outlives that, the folder and the cgroups, carries the node's name, so that `lab.clean` can find it.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from lab import namespaces

T = TypeVar("T")
PREFIX = "meshcni-lab-"
HERE = Path(__file__).parent
CGROUP_ROOT = Path("/sys/fs/cgroup")
ENTERED = (  # the mount namespace comes last: the paths of the others are the host's
    ("net", namespaces.CLONE_NEWNET),
    ("uts", namespaces.CLONE_NEWUTS),
    ("ipc", namespaces.CLONE_NEWIPC),
    ("pid", namespaces.CLONE_NEWPID),
    ("mnt", namespaces.CLONE_NEWNS),
)
STOP_SECONDS = 10.0
CLEAN_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class LabError(Exception):
    """The lab cannot run here, or a part of it failed; the text says which and why."""


class LabUnavailableError(LabError):
    """This machine cannot have a lab node at all."""


class Node:
    """Context manager; inside the `with` the node runs. `folder` is on the host's disk, at the same path inside.

    `netns` is the path of the node's own netns (loopback only, no default route) as seen from outside.
    """

    def __init__(self, name: str = "") -> None:
        self._chosen_name = name  # begins with PREFIX and is nobody else's; made up when empty
        self.name = ""
        self.folder = Path()
        self.pid = 0
        self.netns = ""
        self._outer: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._doorway: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self.prepare()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def prepare(self) -> None:
        """Make the node's folder; nothing runs yet. LabUnavailableError when no node can run here."""
        reason = missing_requirements()
        if reason:
            raise LabUnavailableError(reason)
        self.name = self._chosen_name or made_up_name()  # also the node's host name
        self.folder = Path(tempfile.gettempdir()) / self.name
        self.folder.mkdir(mode=0o755)
        (self.folder / "log").mkdir()
        (self.folder / "owner").write_text(f"{os.getpid()} {start_ticks(os.getpid())}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def path(self, inside: str) -> Path:
        """Return the path from outside of what the node sees as `inside`."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def log_path(self, name: str) -> Path:
        """Return the file that takes the output of the program `name`."""
        return self.folder / "log" / f"{name}.log"

    def outer_pid(self, inside: int) -> int:
        """Return the pid from outside of the process that has the pid `inside` in the node."""
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                pids = next(line for line in status.read_text().splitlines() if line.startswith("NSpid:")).split()[1:]
                if pids[1:2] == [str(inside)] and self.is_within(int(pids[0])):
                    return int(pids[0])
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        raise LabError(f"no process {inside} in {self.name}")

    def is_within(self, pid: int) -> bool:
        """Tell whether the process with this pid, as seen from outside, is one of the node."""
        while pid > 1 and pid != self.pid:
            pid = parent(pid)
        return pid == self.pid

    def call(self, function: Callable[[], T], netns: str = "") -> T:
        """Run `function` on the thread that lives in the node: what it starts is a process of the node.

        `netns`: path from outside of the netns to be in meanwhile, the node's own by default.
        """
        if self._doorway is None:
            raise LabError("the node is not running")
        inside = netns or self.netns

        def work() -> T:
            namespaces.enter(self._as_seen_inside(inside), namespaces.CLONE_NEWNET)
            return function()

        pending: Future[T] = self._doorway.submit(work)
        return pending.result()

    def spawn(
        self,
        arguments: Sequence[str],
        *,
        netns: str = "",
        environment: Mapping[str, str] | None = None,
        log: str = "",
        **options: Any,  # noqa: ANN401  (Popen's own)
    ) -> subprocess.Popen[bytes]:
        """Start a process in the node; `log` names its log file, `options` are those of Popen (user, group, stdin)."""
        output: IO[bytes] | int = subprocess.DEVNULL
        if log:
            output = self.log_path(log).open("ab")
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **options}
        full = {**CLEAN_ENVIRONMENT, **(environment or {})}
        try:
            process = self.call(
                lambda: subprocess.Popen(arguments, env=full, cwd="/", start_new_session=True, **settings), netns
            )
        finally:
            if not isinstance(output, int):
                output.close()
        self._processes = [other for other in self._processes if other.poll() is None] + [process]
        return process

    def run(
        self,
        arguments: Sequence[str],
        *,
        netns: str = "",
        text: str = "",
        timeout_seconds: float = 60,
        **options: Any,  # noqa: ANN401
    ) -> str:
        """Run a command in the node to its end, `text` on its stdin, and return its stdout; LabError when it fails."""
        process = self.spawn(
            arguments, netns=netns, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
        try:
            output, errors = process.communicate(text.encode(), timeout=timeout_seconds)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode != 0:
            raise LabError(f"{' '.join(arguments)}: exit {process.returncode}: {errors.decode().strip()}")
        return output.decode()

    def close(self) -> None:
        """End every process of the node and remove its folder and cgroups; safe to call twice."""
        self.end_processes()
        if self.name:
            remove_leftovers(self.name, self.folder)
            self.name = ""

    def end_processes(self) -> None:
        """End every process of the node, and with them its mounts, netns and interfaces; the folder stays."""
        if self._doorway is not None:
            self._doorway.shutdown(wait=True)
            self._doorway = None
        if self._outer is not None:
            self._outer.kill()  # unshare --kill-child passes it on to process 1, whose end ends all others
            self._outer.wait(STOP_SECONDS)
            for process in self._processes:
                process.wait(STOP_SECONDS)  # process 1 waits for all others to be collected, and these are ours
            wait_ended(self.pid)
            self._outer, self._processes = None, []

    def init_arguments(self) -> list[str]:
        """Return what init.sh is told beside the name: a script that covers more of the host, and its arguments."""
        return []

    def _start(self) -> None:
        # If this process dies, even by SIGKILL, unshare gets SIGKILL, then process 1, then the kernel ends the rest.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--ipc", "--uts"]
        command += ["--fork", "--kill-child", "--mount-proc", str(HERE / "init.sh"), self.name]
        command += self.init_arguments()
        with self.log_path("init").open("wb") as errors:
            self._outer = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd="/",
                env=CLEAN_ENVIRONMENT,
                start_new_session=True,  # Ctrl-C on the terminal is for us alone; we clear away in order
            )
        assert self._outer.stdout is not None
        with self._outer.stdout as output:
            answer = output.readline().decode().strip()
        if answer != "ready":
            details = self.log_path("init").read_text().strip()
            raise LabUnavailableError(f"the node's namespaces cannot be set up here: {answer} {details}")
        self.pid = only_child(self._outer.pid)
        self.netns = f"/proc/{self.pid}/ns/net"
        self._doorway = ThreadPoolExecutor(1, "node-doorway")
        self._doorway.submit(self._move_in).result()

    def _move_in(self) -> None:
        namespaces.leave_shared_filesystem()
        for name, kind in ENTERED:  # the pid namespace is for this thread's children only
            namespaces.enter(f"/proc/{self.pid}/ns/{name}", kind)

    def _as_seen_inside(self, netns: str) -> str:
        if netns == self.netns:
            return "/proc/1/ns/net"
        return netns.removeprefix(f"/proc/{self.pid}/root")


def made_up_name() -> str:
    """Return a name for a node by which `lab.clean` knows what is left of it."""
    return f"{PREFIX}{secrets.token_hex(4)}"


def missing_requirements() -> str:
    """Return why no node can run on this machine; empty when one can."""
    if os.geteuid() != 0:
        return f"a lab node needs root, this is uid {os.geteuid()}"
    programs = ("unshare", "setpriv", "mount", "ip", "containerd", "ctr", "runc", "containerd-shim-runc-v2")
    absent = [program for program in programs if shutil.which(program, path=CLEAN_ENVIRONMENT["PATH"]) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (scripts/setup installs them)"
    filesystems = Path("/proc/filesystems").read_text()
    if "overlay" not in filesystems:
        subprocess.run(["modprobe", "-q", "overlay"], check=False)
        if "overlay" not in Path("/proc/filesystems").read_text():
            return "the kernel has no overlay file system"
    return ""


def start_ticks(pid: int) -> int:
    """Return when process `pid` started, in clock ticks since boot; 0 when there is none. With the pid it is unique."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def parent(pid: int) -> int:
    """Return the pid of the parent of process `pid`."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def last_lines(text: str, count: int) -> str:
    """Return the last `count` lines of a log."""
    return "\n".join(text.splitlines()[-count:])


def only_child(pid: int) -> int:
    """Return the pid of the one child of process `pid`."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return int(text.split()[0])


def wait_ended(pid: int) -> None:
    """Return when process `pid` has ended, which process 1 of a pid namespace does last of all in it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        wait_readable(descriptor, STOP_SECONDS)
    finally:
        os.close(descriptor)


def wait_readable(descriptor: int, seconds: float) -> bool:
    """Tell whether `descriptor` (of a process: whether that has ended) is readable within so many seconds."""
    poll = select.poll()  # select() takes no descriptor above 1023, and a run of all tests has such
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def remove_leftovers(name: str, folder: Path) -> None:
    """Remove the cgroups and the folder of the node `name`, whose processes have ended or are about to."""
    deadline = time.monotonic() + STOP_SECONDS
    while not remove_cgroups(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def remove_cgroups(name: str) -> bool:
    """Remove the cgroup `name` with all below it in every hierarchy; False while a process is still in one."""
    gone = True
    for hierarchy in (CGROUP_ROOT, *(entry for entry in CGROUP_ROOT.iterdir() if entry.is_dir())):
        top = hierarchy / name
        if not top.is_dir():
            continue
        for folder, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                gone = False
    return gone


def wait_until(what: str, check: Callable[[], object], timeout_seconds: float, pause_seconds: float = 0.02) -> None:
    """Return as soon as `check` gives something true; LabError saying `what` when it does not within the time."""
    deadline = time.monotonic() + timeout_seconds
    while not check():
        if time.monotonic() > deadline:
            raise LabError(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(pause_seconds)
